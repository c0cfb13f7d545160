"""Prompt lookup: what followed the last few tokens when they last occurred (Saxena 2023, "prompt lookup decoding").

The longest suffix of MAX_NGRAM down to MIN_NGRAM tokens that occurred before wins, its latest occurrence counts;
without one, nothing is drafted. Engines differ in the lengths: vLLM starts at 5, transformers at 2.
"""

import numpy as np
import torch

from planner.runtime.drafters.protocol import Draft, Replay, TargetText
from planner.runtime.kv_cache import KVCache
from planner.specs import Sampler

MAX_NGRAM, MIN_NGRAM = 4, 2


class NgramDrafter:
    nbytes = 0  # the index is a few kilobytes of host memory
    taps = ()

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self._indexes: list[NgramIndex] = []

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        self._indexes = [NgramIndex(history) for history in histories]

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        found = []
        for index, history, draft_len in zip(self._indexes, histories, draft_lens, strict=True):
            index.extend(history)
            found.append(index.continuation(draft_len))
        lens = [len(tokens) for tokens in found]
        K = max(lens)
        padded = torch.tensor([tokens + [0] * (K - len(tokens)) for tokens in found], dtype=torch.long, device=self.device).view(len(found), K)
        probs = torch.zeros(len(found), K, self.vocab_size, device=self.device).scatter_(-1, padded[..., None], 1.0)
        return Draft(padded, probs, lens)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        pass  # the next proposal reads the history

    def replay(self, text: TargetText, draft_len: int) -> Replay:
        starts = len(text.tokens) - 1
        accept_prob = np.zeros((starts, draft_len), dtype=np.float32)
        drafted = np.zeros(starts, dtype=np.int64)
        history = list(text.prompt)
        index = NgramIndex(history)
        for s in range(starts):
            history.append(text.tokens[s])
            index.extend(history)
            guess = index.continuation(draft_len)
            drafted[s] = len(guess)
            for i, (ours, theirs) in enumerate(zip(guess, text.tokens[s + 1 :])):
                accept_prob[s, i] = ours == theirs
        return Replay(accept_prob, drafted)


class NgramIndex:
    """Where each n-gram of a growing history was last followed by something."""

    def __init__(self, history: list[int]):
        self._follows: dict[tuple[int, ...], int] = {}
        self._tokens: list[int] = []
        self.extend(history)

    def extend(self, history: list[int]) -> None:
        """Learn the tokens that `history` has beyond what is known; what is known is its beginning."""
        for end in range(len(self._tokens), len(history)):
            for n in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._follows[tuple(history[end - n : end])] = end
        self._tokens = self._tokens + history[len(self._tokens) :]

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest known suffix."""
        for n in range(min(MAX_NGRAM, len(self._tokens)), MIN_NGRAM - 1, -1):
            at = self._follows.get(tuple(self._tokens[-n:]))
            if at is not None:
                return self._tokens[at : at + count]
        return []
