"""The draft-verify-accept loop, the only one. Without a drafter it is plain decoding.

Greedy output equals plain greedy output, sampled output follows the target's distribution, whatever the drafter,
its cache, draft_len and tree are. One read back to the host per round, beside those of a drafter that shapes a tree.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from planner.runtime.drafters.protocol import Draft, Drafter
from planner.runtime.kv_cache import Ancestors, KVCache
from planner.runtime.model import Transformer
from planner.runtime.sampling import probabilities, sample, uniforms
from planner.runtime.verify import verify_chain, verify_tree
from planner.specs import Sampler


class Round(NamedTuple):
    """What one round did, per stream. A stream that has ended drafts, accepts and emits nothing."""

    tokens: list[list[int]]  # emitted: the accepted drafts and one token of the target's own, cut at a stop token
    drafted: list[int]  # tokens of a chain, or nodes of a tree, that were verified
    accepted: list[int]


class _Streams:
    """What each stream has written, and whether it has ended."""

    def __init__(self, prompts: list[list[int]], max_new_tokens: int, stop_tokens: Sequence[int]):
        self.histories = [list(prompt) for prompt in prompts]
        self.emitted, self.ended = [0] * len(prompts), [False] * len(prompts)
        self._max_new_tokens, self._stop_tokens = max_new_tokens, stop_tokens

    def emit(self, proposed: list[list[int]]) -> list[list[int]]:
        """Add tokens to the streams that still run; what each really took."""
        taken = []
        for b, tokens in enumerate(proposed):
            stop = next((i + 1 for i, token in enumerate(tokens) if token in self._stop_tokens), len(tokens))
            tokens = [] if self.ended[b] else tokens[:stop]
            self.histories[b] += tokens
            self.emitted[b] += len(tokens)
            self.ended[b] = self.ended[b] or self.emitted[b] >= self._max_new_tokens or (bool(tokens) and tokens[-1] in self._stop_tokens)
            taken.append(tokens)
        return taken


def cache_capacity(context_len: int, output_len: int, verified: int) -> int:
    """Slots per stream that a full cache needs: prompt, output, and drafts (DraftConfig.verified) that a round writes behind it."""
    return context_len + output_len + verified


@torch.inference_mode()
def decode(
    model: Transformer,
    cache: KVCache,  # prompts committed; holds cache_capacity(...) tokens per stream
    prompts: list[list[int]],
    first_logits: Tensor,  # [B, V], from prefill
    drafter: Drafter,
    *,
    draft_len: int,  # tokens of a chain, or levels of a tree
    sampler: Sampler,
    generators: list[torch.Generator],  # one per stream, on the model's device
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    mark: Callable[[str], None] = lambda phase: None,  # told when "select", "start", "draft", "verify" and "commit" are reached
) -> Iterator[Round]:
    """Yield the first token, which prefill paid for, as a round of its own, then round after round.

    A round never drafts beyond max_new_tokens. Abandoning the iterator leaves the cache with what was committed.
    """
    B = len(prompts)
    mark("start")
    streams = _Streams(prompts, max_new_tokens, stop_tokens)
    histories, ended = streams.histories, streams.ended
    drafter.start(cache, histories)
    first = sample(probabilities(first_logits, sampler), uniforms(generators, 1)[:, 0])
    opening = Round(streams.emit([[token] for token in model.kernels.agreed(first).tolist()]), [0] * B, [0] * B)
    mark("select")
    yield opening

    while not all(ended):
        mark("start")
        room = [0 if ended[b] else min(draft_len, max_new_tokens - streams.emitted[b] - 1) for b in range(B)]
        draft = drafter.propose(histories, room, sampler, generators)
        mark("draft")

        draft_lens = torch.tensor(draft.lens, device=model.device)  # all uploads before the pass: each may wait for the device
        uniform = uniforms(generators, draft_len + 1)  # as many whatever is drafted: neighbours must not change what a stream draws
        last = torch.tensor([[history[-1]] for history in histories], device=model.device)
        lengths = torch.tensor([[length] for length in cache.lengths], device=model.device)
        tree = None if draft.parents is None else Ancestors.of(draft.parents, draft_len)
        depths = torch.arange(draft.tokens.shape[1] + 1, device=model.device) if tree is None else tree.depths
        hidden = model(torch.cat([last, draft.tokens], 1), lengths + depths, cache, tree, taps=drafter.taps).hidden
        rule = _verified_chain if tree is None else _verified_tree
        host = model.kernels.agreed(rule(draft, draft_lens, model.logits(hidden), sampler, uniform)).tolist()
        mark("verify")

        running = [not end for end in ended]
        accepted = [row[0] if runs else 0 for row, runs in zip(host, running, strict=True)]
        tokens = streams.emit([row[1 : row[0] + 2] for row in host])
        if tree is not None:
            cache.compact([row[draft_len + 2 :][:n] for row, n in zip(host, accepted, strict=True)])
        # The last token of a history is never in the cache: it is the next round's first input.
        counts = [n + 1 if runs else 0 for n, runs in zip(accepted, running, strict=True)]
        cache.commit(counts)
        drafter.commit(cache, histories, counts)
        mark("commit")
        yield Round(tokens, [n if runs else 0 for n, runs in zip(draft.lens, running, strict=True)], accepted)


def _verified_chain(draft: Draft, draft_lens: Tensor, target_logits: Tensor, sampler: Sampler, uniform: Tensor) -> Tensor:
    """By stream, the number of accepted tokens, these, and the target's own behind them."""
    K = draft.tokens.shape[1]
    verdict = verify_chain(
        draft.tokens, draft.probs, draft_lens, probabilities(target_logits, sampler), torch.cat([uniform[:, :K], uniform[:, -1:]], 1)
    )
    n, own = verdict.num_accepted[:, None], verdict.next_tokens[:, None]
    return torch.cat([n, torch.cat([draft.tokens, own], 1).scatter(1, n, own)], 1)


def _verified_tree(draft: Draft, sizes: Tensor, target_logits: Tensor, sampler: Sampler, uniform: Tensor) -> Tensor:
    """The same, the tokens filled up to draft_len + 1, and behind them the nodes that were accepted."""
    verdict = verify_tree(draft.tokens, draft.parents, sizes, target_logits, sampler, uniform)
    return torch.cat([verdict.num_accepted[:, None], verdict.tokens, verdict.path], 1)
