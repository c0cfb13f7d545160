"""EAGLE-3 (arXiv:2503.01840): a head of one layer that reads hidden states of the target, as a drafter of chains.

Committed tokens have entries made of the target's hidden states; a round begins by making those of the tokens that the
last one committed, the last of which gives the first draft, and goes on with entries made of the head's own output,
which end with the round. So acceptance depends on where a round began, and the replay runs every round of a text.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from planner.runtime.drafters.protocol import Draft, Replay, TargetText, TreeReplay, no_draft
from planner.runtime.drafters.trees import levels_for, memberships, rolled_out
from planner.runtime.eagle_head import EagleHead
from planner.runtime.kv_cache import KVCache, additive_mask
from planner.runtime.model import PREFILL_CHUNK
from planner.runtime.sampling import probability_of
from planner.runtime.verify import accept_prob_of
from planner.specs import Sampler, Tree

STARTS_PER_PASS = 64  # rounds replayed in one forward pass: bounds its mask and its logits


class EagleDrafter:
    def __init__(self, head: EagleHead, *, draft_len: int, weights_bytes: int, tree: Tree | None = None):
        """weights_bytes: what the head does not share with the target."""
        self.head, self.taps, self.draft_len, self._weights_bytes, self._tree = head, head.taps, draft_len, weights_bytes, tree
        self.cache: KVCache | None = None  # as large as the target's, which start() gets to know
        self._target_cache: KVCache | None = None

    @property
    def nbytes(self) -> int:
        return self._weights_bytes + (0 if self.cache is None else self.cache.nbytes)

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        if not set(self.taps) <= set(target_cache.taps):
            raise ValueError(
                f"the target's cache must keep the output of layers {self.taps}, got {target_cache.taps}; make it after loading the head"
            )
        self._target_cache = target_cache
        self.cache = self.head.new_cache(target_cache.capacity, batch=len(histories))
        for b, history in enumerate(histories):
            stream = self.cache.stream(b)
            self._read(stream, target_cache.stream(b), torch.tensor(history[1:], dtype=torch.long, device=self.head.device))
            self.cache.lengths[b] = stream.lengths[0]

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        B, K = len(histories), max(draft_lens)
        device = self.head.device
        levels = levels_for(self._tree, sampler, generators, self.draft_len)
        new = [history[length + 1 :] for history, length in zip(histories, self.cache.lengths, strict=True)]  # none where a stream has ended
        n = max(map(len, new))
        tokens = torch.tensor([own + [0] * (n - len(own)) for own in new], device=device)
        last = torch.tensor([max(0, len(own) - 1) for own in new], device=device)
        hidden = self._entries(self.cache, self._target_cache, tokens)[torch.arange(B, device=device), last][:, None]  # [B, 1, C]
        self.cache.commit([len(own) for own in new])
        committed = self.cache.lengths
        position = torch.tensor(committed, device=device)[:, None]
        for i in range(K):
            drafted = levels.add(self.head.logits(hidden[:, 0]))
            if i + 1 < K:
                hidden = self.head(drafted[:, None], hidden, position + i, self.cache)
                self.cache.commit([1] * B)
        self.cache.lengths = committed  # the drafts' own keys and values end with the round
        return levels.draft(draft_lens) if K else no_draft(B, self.head.logits(hidden[:, :0]).shape[-1], device)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        pass  # the next proposal reads the histories, and the hidden states that the target has left in its cache

    @torch.inference_mode()
    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Teacher-forced: draft j of the round behind token s reads token s+j and is judged on token s+j+1.

        Draft 0 comes from entries of committed tokens, which are the same for all rounds; the others see these and, of
        their own kind, those of their round. All rounds of a pass make their next draft at once.
        """
        T, K = len(text.tokens), draft_len
        tokens = torch.tensor(text.tokens, device=self.head.device)
        accept_prob = np.zeros((T - 1, K), dtype=np.float32)
        for starts, step in self._rounds(text, K):
            for j in range(K):
                reads = starts + j
                hidden = step(j, tokens[reads.clamp(max=T - 1)])
                inside = reads + 1 < T
                judged_on = (reads + 1).clamp(max=T - 1)
                q = probability_of(self.head.logits(hidden), tokens[judged_on], text.sampler)
                w = accept_prob_of(text.token_probs[judged_on - 1], q) * inside
                accept_prob[starts.tolist(), j] = w.cpu().numpy()
        return Replay(accept_prob, np.full(T - 1, K))

    @torch.inference_mode()
    def replay_trees(self, text: TargetText, draft_lens: Sequence[int], max_size: int) -> list[TreeReplay]:
        """The same rounds, each behind tokens of its own."""
        K = max(draft_lens)

        def rolled(step: Callable[[int, Tensor | None], Tensor]) -> tuple[np.ndarray, np.ndarray]:
            return rolled_out(lambda j, read: self.head.logits(step(j, read)), K, text.sampler, max_size)

        return memberships([rolled(step) for _, step in self._rounds(text, K)], text.tokens, draft_lens, max_size, "chain")

    def _rounds(self, text: TargetText, K: int) -> Iterator[tuple[Tensor, Callable[[int, Tensor | None], Tensor]]]:
        """Of the rounds of a text, some at a time: the tokens [S] of the continuation that they start behind, and what makes their drafts.

        That is told, for j = 0, 1, .. K-1, which tokens [S] draft j of each reads, which draft 0 does not look at, and gives hidden
        states [S, C].
        """
        T, L, device = len(text.tokens), len(text.prompt), self.head.device
        num_entries = L + T - 2
        cache = self.head.new_cache(num_entries + (K - 1) * min(STARTS_PER_PASS, T - 1))
        first = self._read(cache, text.cache, torch.tensor(text.prompt[1:] + text.tokens[:-1], device=device))[L - 1 :]  # [T-1, C]
        for starts, hidden in zip(torch.arange(T - 1, device=device).split(STARTS_PER_PASS), first.split(STARTS_PER_PASS), strict=True):
            yield starts, self._drafting(cache, starts, L, hidden)
            cache.truncate(num_entries)

    def _drafting(self, cache: KVCache, starts: Tensor, prompt_len: int, hidden: Tensor) -> Callable[[int, Tensor | None], Tensor]:
        sees_committed = torch.arange(cache.lengths[0], device=starts.device) < (prompt_len + starts)[:, None]
        sees_own = torch.eye(len(starts), dtype=torch.bool, device=starts.device)

        def step(j: int, read: Tensor | None) -> Tensor:
            nonlocal hidden
            if j:
                mask = additive_mask(torch.cat([sees_committed, *[sees_own] * j], 1), self.head.dtype)[None, None]
                hidden = self.head(read[None], hidden[None], (prompt_len + starts + j - 1)[None], cache, mask)[0]
                cache.commit([len(starts)])
            return hidden

        return step

    def _read(self, cache: KVCache, target_cache: KVCache, tokens: Tensor) -> Tensor:
        """Commit the entries of one stream's tokens [n], which follow those that the cache has; their outputs [n, C]."""
        outputs = []
        for part in tokens.split(PREFILL_CHUNK):
            if len(part):  # an empty tensor splits into itself
                outputs.append(self._entries(cache, target_cache, part[None])[0])
                cache.commit([len(part)])
        return torch.cat(outputs) if outputs else tokens.new_zeros(0, self.head.spec.hidden_size, dtype=self.head.dtype)

    def _entries(
        self,
        cache: KVCache,
        target_cache: KVCache,
        tokens: Tensor,  # [B, n] behind the entries that each stream has committed
    ) -> Tensor:  # [B, n, C]
        """Entries made of the target's hidden states: what the head says of each, not committed."""
        positions = torch.tensor(cache.lengths, device=tokens.device)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(tokens, self.head.fuse(target_cache.features_at(positions, self.taps)), positions, cache)
