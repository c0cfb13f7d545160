"""No drafter: the decode loop becomes plain decoding."""

import torch

from planner.runtime.drafters.protocol import Draft
from planner.runtime.kv_cache import KVCache
from planner.specs import Sampler


class NoDrafter:
    nbytes = 0
    taps = ()

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        pass

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        B = len(histories)
        tokens = torch.zeros(B, 0, dtype=torch.long, device=self.device)
        return Draft(tokens, torch.zeros(B, 0, self.vocab_size, device=self.device), [0] * B)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        pass
