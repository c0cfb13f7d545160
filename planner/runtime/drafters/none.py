"""No drafter: the decode loop becomes plain decoding."""

import torch

from planner.runtime.drafters.protocol import Draft, no_draft
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
        return no_draft(len(histories), self.vocab_size, self.device)

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        pass
