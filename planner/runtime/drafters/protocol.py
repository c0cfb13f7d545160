"""What every drafter offers: propose during decoding, and be replayed along a text that was already written.

B  streams     K  tokens drafted     V  vocabulary size     T  tokens of a continuation
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from planner.runtime.kv_cache import KVCache
from planner.runtime.model import Transformer
from planner.specs import Sampler


class Draft(NamedTuple):
    """The proposal of one round, for all streams."""

    tokens: Tensor  # [B, K], drawn from probs; columns behind a stream's length hold anything
    probs: Tensor  # [B, K, V] float32
    lens: list[int]  # tokens really drafted per stream, 0..K


def no_draft(batch: int, vocab_size: int, device: torch.device) -> Draft:
    """The proposal of a round in which no stream drafts."""
    return Draft(torch.zeros(batch, 0, dtype=torch.long, device=device), torch.zeros(batch, 0, vocab_size, device=device), [0] * batch)


class TargetText(NamedTuple):
    """A continuation that the target wrote under a sampler, with the cache it wrote it with.

    Token t lies at position prompt_len + t. Token 0 came from prefill.
    """

    prompt: list[int]
    tokens: list[int]  # [T]
    token_probs: Tensor  # [T-1] float32: the target's probability of token t+1 after the sampler, 1 when greedy
    cache: KVCache  # one stream, prompt and tokens 0..T-2 committed
    sampler: Sampler
    prompt_caches: dict[Transformer, KVCache]  # of draft models that were replayed along it: several policies share one prefill


class Replay(NamedTuple):
    """What a drafter would have done at every place of a text, a round starting behind each token."""

    accept_prob: np.ndarray  # [T-1, K] float32: [s, i] is P(draft i of a round behind token s is accepted | those before were)
    drafted: np.ndarray  # [T-1] int: tokens that round drafts, at most K


class Drafter(Protocol):
    taps: tuple[int, ...]  # layers of the target whose output for committed tokens it reads from the target's cache

    @property
    def nbytes(self) -> int:
        """Bytes resident beyond the target's: caches and weights of its own."""

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        """Look at the prompts, which the target has just committed."""

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        """Draft up to draft_lens[b] tokens behind each history, the last token of which the target has not seen."""

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        """The target has committed counts[b] more tokens, and the histories have grown by as many."""

    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Acceptance along a text, as decoding it with this drafter would meet it, for every start of a round."""
