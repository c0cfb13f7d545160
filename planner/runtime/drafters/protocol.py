"""What every drafter offers: propose during decoding, and be replayed along a text that was already written.

B  streams     K  tokens drafted     N  nodes of a tree     V  vocabulary size     T  tokens of a continuation
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from planner.runtime.kv_cache import KVCache
from planner.runtime.model import Transformer
from planner.specs import Sampler


class Draft(NamedTuple):
    """The proposal of one round, for all streams: chains drawn from a distribution, or trees, which nothing was drawn for."""

    tokens: Tensor  # [B, K], drawn from probs, or nodes [B, N]; columns behind a stream's length hold anything
    probs: Tensor | None  # [B, K, V] float32; None of a tree
    lens: list[int]  # tokens or nodes per stream, 0..K
    parents: Tensor | None = None  # [B, N] of a tree: node that each stands behind, an earlier one; -1: the last token of the history


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


class TreeReplay(NamedTuple):
    """What the trees of a drafter would have held at every place of a text, a round starting behind each token.

    A round behind token s that verifies n nodes accepts as many tokens as sizes[s] has entries from 1 to n.
    """

    sizes: np.ndarray  # [T-1, K] int: nodes of the smallest best-first tree that holds the text's next 1, 2, .. tokens; 0: none up to max_size
    probs: np.ndarray  # [T-1, max_size] float32: path probabilities of the nodes, the best first; 0 where there are no more


class Drafter(Protocol):
    taps: tuple[int, ...]  # layers of the target whose output for committed tokens it reads from the target's cache

    @property
    def nbytes(self) -> int:
        """Bytes resident beyond the target's: caches and weights of its own."""

    def start(self, target_cache: KVCache, histories: list[list[int]]) -> None:
        """Look at the prompts, which the target has just committed."""

    def propose(self, histories: list[list[int]], draft_lens: list[int], sampler: Sampler, generators: list[torch.Generator]) -> Draft:
        """Draft up to draft_lens[b] tokens, or levels of a tree, behind each history, the last token of which the target has not seen."""

    def commit(self, target_cache: KVCache, histories: list[list[int]], counts: list[int]) -> None:
        """The target has committed counts[b] more tokens, and the histories have grown by as many."""

    def replay(self, text: TargetText, draft_len: int) -> Replay:
        """Acceptance along a text, as decoding it with this drafter would meet it, for every start of a round."""

    def replay_trees(self, text: TargetText, draft_lens: Sequence[int], max_size: int) -> list[TreeReplay]:
        """The same of trees of up to max_size nodes on so many levels; not of drafters without probabilities."""
