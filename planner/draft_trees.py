"""Shape and size of a draft tree: the best nodes first, as many as their verification is worth. Runs in the decode loop.

A node is a token behind its parent; its path probability is the product of the drafter's probabilities from the root on.
Verification lets the target choose at each node and follows it while its choice is in the tree, so a tree of n nodes
yields 1 + Phi(n) tokens, Phi the sum of their path probabilities. Since nodes come best first, a smaller tree is the
beginning of a larger one, and one cumulative sum is Phi for every n.

Sources: DDTree (arXiv:2604.12989) for the nodes, CaDDTree (arXiv:2606.01813) for the size, where
    theta(n) = (1 + Phi(n)) / (C_draft + C_verify(n; context))     tokens per second
is maximised. The paper stops at the first n that theta does not rise behind, which is right if the cost is convex;
measured costs have steps, so here all n are looked at, none included.

D  drafted levels     R  candidates per level     N  nodes of a tree, the root excluded
"""

from heapq import heappop, heappush
from typing import Literal, NamedTuple

import numpy as np

from planner.specs import Calibration, TreeCosts

Branching = Literal["all", "chain"]


class DraftTree(NamedTuple):
    """Nodes, the best first and each behind its parent."""

    parents: np.ndarray  # [N] int, -1: a child of the root
    depths: np.ndarray  # [N] int, 1..D
    ranks: np.ndarray  # [N] int, which candidate of its level
    probs: np.ndarray  # [N] of the path, falling

    def first(self, size: int) -> "DraftTree":
        """The best tree of at most so many nodes."""
        return DraftTree(*(column[:size] for column in self))


def best_first(
    level_probs: np.ndarray,  # [D, R], falling in each row: of the candidates of a level, at their place
    size: int,
    *,
    branching: Branching,
) -> DraftTree:
    """The `size` nodes of highest path probability; fewer where there are no more that could be reached.

    all    every node has the candidates of the next level as children (DDTree: a level's probabilities hold behind any path)
    chain  only the first candidate of a level has children (the drafter has looked behind no other)
    """
    return (_grown if branching == "all" else _along_chain)(np.asarray(level_probs, float), size)


def _grown(level_probs: np.ndarray, size: int) -> DraftTree:
    """Behind a node come its next sibling and its first child; whatever else there is, is less likely than one of them."""
    levels = level_probs[:, :size].tolist()
    parents, depths, ranks, probs = [], [], [], []
    heap = [(-levels[0][0], 0, -1, 0, 0, 1.0)] if levels and levels[0] else []
    pushed = 1  # breaks ties: earlier ones first
    while heap and len(probs) < size:
        negative, _, parent, level, rank, above = heappop(heap)
        if negative == 0.0:
            break
        node = len(probs)
        parents.append(parent)
        depths.append(level + 1)
        ranks.append(rank)
        probs.append(-negative)
        if rank + 1 < len(levels[level]):
            heappush(heap, (-above * levels[level][rank + 1], pushed, parent, level, rank + 1, above))
        if level + 1 < len(levels):
            heappush(heap, (negative * levels[level + 1][0], pushed + 1, node, level + 1, 0, -negative))
        pushed += 2
    return DraftTree(np.array(parents, int), np.array(depths, int), np.array(ranks, int), np.array(probs, float))


def _along_chain(level_probs: np.ndarray, size: int) -> DraftTree:
    D, R = level_probs.shape
    above = np.concatenate([[1.0], np.cumprod(level_probs[:-1, 0])]) if D else np.zeros(0)
    flat = (above[:, None] * level_probs).ravel()
    order = np.argsort(-flat, kind="stable")[: min(size, np.count_nonzero(flat))]  # stable: of equals, the shallower first
    levels, ranks = np.divmod(order, R)
    place = np.full(D * R + 1, -1)  # of the nodes by level and rank; the last stands for the root
    place[order] = np.arange(len(order))
    return DraftTree(place[np.where(levels > 0, (levels - 1) * R, D * R)], levels + 1, ranks, flat[order])


def calibrated(probs: np.ndarray, calibration: Calibration | None) -> np.ndarray:
    """How often texts went down paths to which the drafter gave these probabilities; of the same shape, and in the same order."""
    return probs if calibration is None else np.interp(probs, calibration.reported, calibration.observed)


def choose_size(
    probs: np.ndarray,  # [N] of the nodes, falling, as the drafter reports them
    costs: TreeCosts,
) -> int:
    """How many of the nodes to verify, 0..N: the most tokens for the time, by round or in the long run; of equals the fewest."""
    return int(choose_sizes(probs, costs))


def choose_sizes(
    probs: np.ndarray,  # [.., N], of several rounds, zeros behind the last node of each
    costs: TreeCosts,
) -> np.ndarray:  # [..]
    """The same for many rounds at once."""
    return worth(expected_tokens(probs, costs.calibration), costs).argmax(-1)


def greedy_stop(
    probs: np.ndarray,  # [N]
    costs: TreeCosts,
) -> int:
    """The same by the paper's rule: stop where one node more is not worth its time. Equal to choose_size if the cost is convex."""
    falls = np.flatnonzero(np.diff(worth(expected_tokens(probs, costs.calibration), costs)) <= 0)
    return int(falls[0]) if len(falls) else len(probs)


def expected_tokens(
    probs: np.ndarray,  # [.., N]
    calibration: Calibration | None,
) -> np.ndarray:  # [.., N + 1]
    """1 + Phi(n) of trees of 0, 1, .. N nodes."""
    tokens = np.ones((*probs.shape[:-1], probs.shape[-1] + 1))
    tokens[..., 1:] += np.cumsum(calibrated(probs, calibration), axis=-1)
    return tokens


def worth(
    tokens: np.ndarray,  # [.., N + 1] by nodes
    costs: TreeCosts,
) -> np.ndarray:
    """What the rule maximises: tokens per second of the round, or tokens less those that the run writes in its time."""
    if tokens.shape[-1] > len(costs.verify_s):
        raise ValueError(f"the costs cover trees of up to {len(costs.verify_s) - 1} nodes, got {tokens.shape[-1] - 1}")
    seconds = costs.draft_s + np.array(costs.verify_s[: tokens.shape[-1]])
    return tokens / seconds if costs.rate is None else tokens - costs.rate * seconds
