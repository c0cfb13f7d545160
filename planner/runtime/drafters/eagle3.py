"""EAGLE-3 (arXiv:2503.01840): a head of one layer that reads hidden states of the target, as a drafter of chains.

Committed tokens have entries made of the target's hidden states; a round begins by making those of the tokens that the
last one committed, the last of which gives the first draft, and goes on with entries made of the head's own output,
which end with the round. So acceptance depends on where a round began, and the replay runs every round of a text.
"""

import numpy as np
import torch
from torch import Tensor

from planner.runtime.drafters.protocol import Draft, Replay, TargetText
from planner.runtime.eagle_head import EagleHead
from planner.runtime.kv_cache import KVCache, additive_mask
from planner.runtime.model import PREFILL_CHUNK
from planner.runtime.sampling import probabilities, probability_of, sample, uniforms
from planner.runtime.verify import accept_prob_of
from planner.specs import Sampler

STARTS_PER_PASS = 64  # rounds replayed in one forward pass: bounds its mask and its logits


class EagleDrafter:
    def __init__(self, head: EagleHead, *, draft_len: int, weights_bytes: int):
        """weights_bytes: what the head does not share with the target."""
        self.head, self.taps, self.draft_len, self._weights_bytes = head, head.taps, draft_len, weights_bytes
        self.cache: KVCache | None = None  # as large as the target's, which start() gets to know
        self._target_cache: KVCache | None = None

    @property
    def nbytes(self) -> int:
        return self._weights_bytes + (0 if self.cache is None else self.cache.nbytes)

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        target_cache.check_keeps(self.taps)
        self._target_cache = target_cache
        self.cache = self.head.new_cache(target_cache.capacity, batch=len(histories))
        for b, history in enumerate(histories):
            stream = self.cache.stream(b)
            self._read(stream, target_cache.stream(b), torch.tensor(history[1:], dtype=torch.long, device=self.head.device))
            self.cache.lengths[b] = stream.lengths[0]

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        B, K = len(histories), max(draft_lens)
        device = self.head.device
        uniform = uniforms(generators, self.draft_len)  # as many whatever is drafted: neighbours must not change what a stream draws
        new = [history[length + 1 :] for history, length in zip(histories, self.cache.lengths, strict=True)]  # none where a stream has ended
        n = max(map(len, new))
        tokens = torch.tensor([own + [0] * (n - len(own)) for own in new], device=device)
        last = torch.tensor([max(0, len(own) - 1) for own in new], device=device)
        hidden = self._entries(self.cache, self._target_cache, tokens)[torch.arange(B, device=device), last][:, None]  # [B, 1, C]
        self.cache.commit([len(own) for own in new])
        committed = self.cache.lengths
        position = torch.tensor(committed, device=device)[:, None]
        drafted, probs = [], []
        for i in range(K):
            if i:
                hidden = self.head(drafted[-1][:, None], hidden, position + i - 1, self.cache)
                self.cache.commit([1] * B)
            probs.append(probabilities(self.head.logits(hidden[:, 0]), sampler))
            drafted.append(sample(probs[-1], uniform[:, i]))
        self.cache.lengths = committed  # the drafts' own keys and values end with the round
        if K == 0:
            return Draft(tokens.new_zeros(B, 0), probabilities(self.head.logits(hidden[:, :0]), sampler), draft_lens)
        return Draft(torch.stack(drafted, 1), torch.stack(probs, 1), draft_lens)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        pass  # the next proposal reads the histories, and the hidden states that the target has left in its cache

    @torch.inference_mode()
    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Teacher-forced: draft j of the round behind token s reads token s+j and is judged on token s+j+1.

        Draft 0 comes from entries of committed tokens, which are the same for all rounds; the others see these and, of
        their own kind, those of their round. All rounds of a pass make their next draft at once.
        """
        T, L, K = len(text.tokens), len(text.prompt), draft_len
        device = self.head.device
        tokens = torch.tensor(text.prompt + text.tokens, device=device)
        num_entries = L + T - 2
        cache = self.head.new_cache(num_entries + (K - 1) * min(STARTS_PER_PASS, T - 1))
        first = self._read(cache, text.cache, tokens[1 : num_entries + 1])[L - 1 :]  # [T-1, C]
        accept_prob = np.zeros((T - 1, K), dtype=np.float32)
        for begin in range(0, T - 1, STARTS_PER_PASS):
            hidden = first[begin : begin + STARTS_PER_PASS]
            S = len(hidden)
            starts = torch.arange(begin, begin + S, device=device)
            sees_committed = torch.arange(num_entries, device=device) < (L + starts)[:, None]
            sees_own = torch.eye(S, dtype=torch.bool, device=device)
            for j in range(K):
                reads = starts + j
                if j:
                    mask = additive_mask(torch.cat([sees_committed, *[sees_own] * j], 1), self.head.dtype)[None, None]
                    forced = tokens[(L + reads).clamp(max=L + T - 1)]
                    hidden = self.head(forced[None], hidden[None], (L + reads - 1)[None], cache, mask)[0]
                    cache.commit([S])
                inside = reads + 1 < T
                judged_on = (reads + 1).clamp(max=T - 1)
                q = probability_of(self.head.logits(hidden), tokens[L + judged_on], text.sampler)
                w = accept_prob_of(text.token_probs[judged_on - 1], q) * inside
                accept_prob[begin : begin + S, j] = w.cpu().numpy()
            cache.truncate(num_entries)
        return Replay(accept_prob, np.full(T - 1, K))

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
