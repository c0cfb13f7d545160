"""The target as its own drafter, looking at a part of its own cache (TriForce arXiv:2404.11912, MagicDec 2408.11049).

Committed tokens keep the target's exact keys and values; only the drafts of the current round have keys that were
computed under sparse attention. So acceptance depends on where a round began, and the replay runs every round of a
text (start s, offset j) instead of one pass over it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from planner.runtime import kv_select
from planner.runtime.drafters.protocol import Draft, Replay, TargetText, TreeReplay, no_draft
from planner.runtime.drafters.trees import levels_for, memberships, rolled_out
from planner.runtime.kv_cache import KVCache, SparseKVCache, additive_mask
from planner.runtime.model import Transformer
from planner.runtime.sampling import probability_of
from planner.runtime.verify import accept_prob_of
from planner.specs import Sampler, SparseKV, Tree

STARTS_PER_PASS = 64  # rounds replayed in one forward pass: bounds its mask and its logits


def queries_of(model: Transformer, history: list[int], cache: KVCache, stream: int, end: int) -> kv_select.Queries:
    """The queries of the last of the first `end` tokens of a stream, computed when a selection asks for them."""
    return lambda count: model.queries(torch.tensor(history[end - count : end], device=model.device), end, cache.stream(stream))


class SelfSparseDrafter:
    taps = ()

    def __init__(self, model: Transformer, policy: SparseKV, *, draft_len: int, batch: int, weights_bytes: int = 0, tree: Tree | None = None):
        """`model` is the target or a cheaper copy of it, which has weights_bytes of its own."""
        self.model, self.policy, self.draft_len, self._weights_bytes, self._tree = model, policy, draft_len, weights_bytes, tree
        self.cache = SparseKVCache(model.spec, policy, draft_len=draft_len, batch=batch, dtype=model.dtype, device=model.device)
        self._context_lens: list[int] = []

    @property
    def nbytes(self) -> int:
        return self._weights_bytes + self.cache.nbytes

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        self._context_lens = list(target_cache.lengths)
        for b, history in enumerate(histories):
            self.cache.select(
                target_cache.stream(b), b, self._context_lens[b], queries_of(self.model, history, target_cache, b, self._context_lens[b])
            )

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        B, K = len(histories), max(draft_lens)
        device = self.model.device
        levels = levels_for(self._tree, sampler, generators, self.draft_len)
        tokens = torch.tensor([history[-1] for history in histories], device=device)
        position = torch.tensor([len(history) - 1 for history in histories], device=device)
        committed = self.cache.lengths
        for i in range(K):
            hidden = self.model(tokens[:, None], position[:, None] + i, self.cache).hidden
            self.cache.commit([1] * B)
            tokens = levels.add(self.model.logits(hidden[:, 0]))
        self.cache.lengths = committed  # the drafts' own keys and values end with the round
        return levels.draft(draft_lens) if K else no_draft(B, self.model.spec.vocab_size, device)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        for b, (context_len, count) in enumerate(zip(self._context_lens, counts, strict=True)):
            length = target_cache.lengths[b]
            chosen_at = self.policy.chosen_at(context_len, length)
            if chosen_at > length - count:
                self.cache.select(target_cache.stream(b), b, chosen_at, queries_of(self.model, histories[b], target_cache, b, chosen_at))
            else:
                self.cache.slide(target_cache.stream(b), b, count)

    @torch.inference_mode()
    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Teacher-forced: draft j of the round behind token s reads token s+j and is judged on token s+j+1."""
        T, L, K = len(text.tokens), len(text.prompt), draft_len
        device = self.model.device
        tokens = torch.tensor(text.tokens, device=device)
        accept_prob = np.zeros((T - 1, K), dtype=np.float32)
        for committed, cache, sees_committed in self._rounds(text, K):
            starts = committed - L
            S = len(starts)
            reads = (starts[:, None] + torch.arange(K, device=device)).flatten()  # [S * K] index of the token a row reads
            judged_on = reads + 1
            inside = judged_on < T
            reads, judged_on = reads.clamp(max=T - 1), judged_on.clamp(max=T - 1)

            row = torch.arange(S * K, device=device)
            sees_drafts = (row[:, None] // K == row // K) & (row <= row[:, None])
            mask = additive_mask(torch.cat([sees_committed.repeat_interleave(K, 0), sees_drafts], 1), cache.keys.dtype)[None, None]
            hidden = self.model(tokens[reads][None], (L + reads)[None], cache, mask).hidden[0]
            q = probability_of(self.model.logits(hidden), tokens[judged_on], text.sampler)
            w = accept_prob_of(text.token_probs[judged_on - 1], q) * inside
            accept_prob[starts.tolist()] = w.view(-1, K).cpu().numpy()
        return Replay(accept_prob, np.full(T - 1, K))

    @torch.inference_mode()
    def replay_trees(self, text: TargetText, draft_lens: Sequence[int], max_size: int) -> list[TreeReplay]:
        """All rounds of a pass draft their next level at once, each behind tokens of its own."""
        tokens, K = torch.tensor(text.tokens, device=self.model.device), max(draft_lens)

        def rolled(positions: Tensor, cache: KVCache, sees_committed: Tensor) -> tuple[np.ndarray, np.ndarray]:
            sees_own = torch.eye(len(positions), dtype=torch.bool, device=positions.device)

            def step(level: int, read: Tensor | None) -> Tensor:
                read = tokens[positions - len(text.prompt)] if read is None else read
                mask = additive_mask(torch.cat([sees_committed, *[sees_own] * (level + 1)], 1), cache.keys.dtype)[None, None]
                hidden = self.model(read[None], (positions + level)[None], cache, mask).hidden[0]
                cache.commit([len(positions)])
                return self.model.logits(hidden)

            return rolled_out(step, K, text.sampler, max_size)

        return memberships([rolled(*rounds) for rounds in self._rounds(text, K)], text.tokens, draft_lens, max_size, "chain")

    def _rounds(self, text: TargetText, K: int) -> Iterator[tuple[Tensor, KVCache, Tensor]]:
        """Of the rounds of a text, some at a time: positions [S] of the tokens that they start behind, a cache, and what of it each sees."""
        L, end = len(text.prompt), len(text.prompt) + len(text.tokens) - 1
        for lengths in self.policy.choices(L, end):
            queries = queries_of(self.model, text.prompt + text.tokens, text.cache, 0, lengths[0])
            fixed = kv_select.select(self.policy, text.cache.keys[:, 0, :, : lengths[0]], queries)  # [layers, H, F]
            for committed in torch.arange(lengths[0], lengths[-1] + 1, device=self.model.device).split(STARTS_PER_PASS):
                yield committed, *self._visible(text.cache, fixed, committed, K)

    def _visible(
        self,
        target_cache: KVCache,
        fixed: Tensor,  # [layers, H, F]
        positions: Tensor,  # [S], ascending: of the token that each round starts behind
        K: int,
    ) -> tuple[KVCache, Tensor]:  # and [S, what is committed] bool
        """The target's keys that any of the rounds may see, with room for K tokens of each."""
        F, S = fixed.shape[-1], len(positions)
        window = self.policy.budget - F
        first, last = int(positions[0]), int(positions[-1])
        span = torch.arange(max(F, first - window), last, device=positions.device)
        num_committed = F + len(span)
        cache = KVCache(self.model.spec, batch=1, capacity=num_committed + S * K, dtype=self.model.dtype, device=self.model.device)
        index = fixed[..., None].expand(-1, -1, -1, cache.keys.shape[-1])
        for own, theirs in ((cache.keys, target_cache.keys), (cache.values, target_cache.values)):
            own[:, 0, :, :F] = theirs[:, 0].gather(2, index)
            own[:, 0, :, F:num_committed] = theirs[:, 0, :, span]
        cache.commit([num_committed])

        in_window = (span >= positions[:, None] - window) & (span < positions[:, None])  # [S, span]
        return cache, torch.cat([torch.ones(S, F, dtype=torch.bool, device=span.device), in_window], 1)
