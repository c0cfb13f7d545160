"""What a drafter's levels become: a chain of drawn tokens, or a tree of the likely ones; and trees along a written text.

A tree is not drawn: it has the likeliest candidates of each level, and the target chooses among them, so that it is
lossless at every temperature. Probabilities are those at the sampling temperature, at 1 where the target is greedy; what
top_p and top_k cut is left in, since neither changes the order. Behind a chain drafter's level, whatever the tree, only
the top candidate was looked behind.

The host shapes the tree: a round reads once more from the device than that of a chain.

B  streams     D  levels     R  candidates of a level     S  rounds replayed     T  tokens of a continuation     V  vocabulary size
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from planner.draft_trees import Branching, best_first, choose_size
from planner.runtime.drafters.protocol import Draft, TreeReplay
from planner.runtime.sampling import probabilities, sample, uniforms
from planner.specs import AdaptiveTree, Sampler, Tree

BLOCK = 64  # tokens that are passed over together where none of them can be a candidate


class ChainLevels:
    """One token of each level, drawn from the drafter's distribution."""

    def __init__(self, sampler: Sampler, uniform: Tensor):
        """uniform  [B, at least as many as levels]"""
        self._sampler, self._uniform, self._tokens, self._probs = sampler, uniform, [], []

    def add(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B], what the next level stands behind."""
        self._probs.append(probabilities(logits, self._sampler))
        self._tokens.append(sample(self._probs[-1], self._uniform[:, len(self._tokens)]))
        return self._tokens[-1]

    def draft(self, levels: list[int]) -> Draft:
        """levels  that a stream may use"""
        return Draft(torch.stack(self._tokens, 1), torch.stack(self._probs, 1), levels)


class TreeLevels:
    """The candidates of each level behind the top one of the level before."""

    def __init__(self, sampler: Sampler, tree: Tree):
        self._sampler, self._tree, self._tokens, self._probs = sampler, tree, [], []

    def add(self, logits: Tensor) -> Tensor:
        tokens, probs = candidates(logits, self._sampler, self._tree.max_size)
        self._tokens.append(tokens)
        self._probs.append(probs)
        return tokens[:, 0]

    def draft(self, levels: list[int]) -> Draft:
        return draft_tree(torch.stack(self._tokens, 1), torch.stack(self._probs, 1), levels, self._tree, "chain")


def levels_for(tree: Tree | None, sampler: Sampler, generators: list[torch.Generator], draft_len: int) -> ChainLevels | TreeLevels:
    """The levels of one round of at most draft_len."""
    if tree is None:  # as many uniforms whatever is drafted: neighbours must not change what a stream draws
        return ChainLevels(sampler, uniforms(generators, draft_len))
    return TreeLevels(sampler, tree)


def candidates(
    logits: Tensor,  # [.., V]
    sampler: Sampler,
    count: int,
) -> tuple[Tensor, Tensor]:  # [.., R] each, R = min(count, V)
    """The likeliest tokens and their probabilities, falling."""
    scaled = logits.float() / (1.0 if sampler.greedy else sampler.temperature)
    values, indices = _top(scaled, min(count, scaled.shape[-1]))
    return indices, (values - scaled.logsumexp(-1, keepdim=True)).exp()


def _top(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x.topk(count) over the last dimension; on a CPU in a third of its time, as it looks at few blocks only."""
    V = x.shape[-1]
    if V % BLOCK or V // BLOCK <= count:
        return tuple(x.topk(count, dim=-1))
    blocks = x.unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(-1).topk(count, dim=-1).indices  # what is among the largest lies in a block whose largest is
    values, at = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).flatten(-2).topk(count, dim=-1)
    return values, chosen.gather(-1, at // BLOCK) * BLOCK + at % BLOCK


def draft_tree(
    tokens: Tensor,  # [B, D, R]
    probs: Tensor,  # [B, D, R], falling in R
    levels: list[int],  # that a stream may use, 0..D
    tree: Tree,
    branching: Branching,
) -> Draft:
    """The best nodes of each stream, as many as its configuration says or as are worth it."""
    device, shapes = tokens.device, []
    for level_probs, usable in zip(probs.cpu().numpy(), levels, strict=True):
        shape = best_first(level_probs[:usable], tree.max_size, branching=branching)
        shapes.append(shape.first(choose_size(shape.probs, tree.costs)) if isinstance(tree, AdaptiveTree) else shape)
    sizes = [len(shape.probs) for shape in shapes]
    table = np.zeros((3, len(shapes), max(sizes)), dtype=np.int64)  # parents, levels, ranks
    table[0] = -1
    for b, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        table[:, b, :size] = shape.parents, shape.depths - 1, shape.ranks
    parents, level, rank = torch.from_numpy(table).to(device)
    return Draft(tokens[torch.arange(len(sizes), device=device)[:, None], level, rank], None, sizes, parents)


def rolled_out(
    step: Callable[[int, Tensor | None], Tensor],  # number of a level, the tokens [S] it reads behind level 0 -> its logits [S, V]
    num_levels: int,
    sampler: Sampler,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:  # [S, D, R] each
    """Candidates of many rounds side by side, level by level, each behind its own top candidate."""
    found = []
    for number in range(num_levels):
        found.append(candidates(step(number, found[-1][0][:, 0] if found else None), sampler, count))
    tokens, probs = (torch.stack(part, 1).cpu().numpy() for part in zip(*found, strict=True))
    return tokens, probs


def memberships(
    rolled: list[tuple[np.ndarray, np.ndarray]],  # candidates of rounds, tokens and probabilities [S, D, R], in the order of the text
    text: list[int],
    draft_lens: Sequence[int],  # levels, up to D
    max_size: int,
    branching: Branching,
) -> list[TreeReplay]:
    """Trees on fewer levels are made of the first ones."""
    tokens, probs = map(np.concatenate, zip(*rolled, strict=True))
    return [membership(tokens[:, :levels], probs[:, :levels], text, max_size, branching) for levels in draft_lens]


def membership(
    tokens: np.ndarray,  # [S, D, R] candidates of rounds behind the tokens 0, 1, .. T-2 of the text
    probs: np.ndarray,  # [S, D, R], falling in R
    text: list[int],  # [T], T = S + 1
    max_size: int,
    branching: Branching,
) -> TreeReplay:
    """How large a round's tree must be to hold what the text says, level by level; exact, as the target chooses at every node.

    A round near the end has no more levels than leave room for the target's own token, as the decode loop has it. So the text
    is taken as one that ended by its length.
    """
    S, D, _ = tokens.shape
    sizes, path_probs = np.zeros((S, D), dtype=np.int64), np.zeros((S, max_size), dtype=np.float32)
    for s in range(S):
        tree = best_first(probs[s, : min(D, S - 1 - s)], max_size, branching=branching)
        path_probs[s, : len(tree.probs)] = tree.probs
        node = -1
        for level in range(min(D, S - 1 - s)):
            says = tokens[s, tree.depths - 1, tree.ranks] == text[s + 1 + level]
            found = np.flatnonzero((tree.parents == node) & says)
            if not len(found):
                break
            node = int(found[0])
            sizes[s, level] = node + 1
    return TreeReplay(sizes, path_probs)
