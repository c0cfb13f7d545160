"""The best tree of fixed shape, when all that is known is how often the first, second, .. candidate of a node is accepted.

Source: Sequoia (arXiv:2402.12374), its dynamic programme over nodes and depth. Engines that take the shape of a tree as a
setting need it; where every round has probabilities of its own, draft_trees.py does better.

R  candidates     N  nodes, the root excluded     D  drafted levels
"""

import numpy as np

from planner.draft_trees import DraftTree


def best_in_rank_order(
    acceptance: np.ndarray,  # [R] P(the text goes on with candidate r of a node), at most 1 in sum
    size: int,  # N
    num_levels: int,  # D
) -> DraftTree:
    """The tree of most expected tokens in which a node has a candidate only if it has all before it, as drafters sample them.

    Taken freely, without that condition, it is best_first with the acceptance sorted: a candidate that is accepted more
    often than one before it then goes first.
    """
    # A subtree of at most n nodes, its own root included, yields tokens[n]; so do its children from r on, below a node.
    tokens, taken = np.minimum(np.arange(size + 1), 1.0), []
    n = np.arange(size + 1)
    left = n[:, None] - n  # nodes that remain for the later children when one takes n
    for _ in range(num_levels):
        below, splits = np.zeros(size + 1), []
        for chance in acceptance[::-1]:
            value = np.where(left >= 0, chance * tokens + below[left], -np.inf)
            value[:, 0] = 0.0  # none: then none of the later ones either
            splits.append(value.argmax(1))
            below = value.max(1)
        taken.append(splits[::-1])
        tokens = np.concatenate([[0.0], 1.0 + below[:-1]])

    parents, depths, ranks, probs = [], [], [], []
    waiting = [(-1, 0, size, 1.0)]  # node, depth, nodes for its children, its path probability
    for parent, depth, room, above in waiting:
        if depth == num_levels:
            continue
        for rank, split in enumerate(taken[num_levels - 1 - depth]):
            if (own := int(split[room])) == 0:
                break
            waiting.append((len(probs), depth + 1, own - 1, above * acceptance[rank]))
            parents.append(parent)
            depths.append(depth + 1)
            ranks.append(rank)
            probs.append(above * acceptance[rank])
            room -= own
    return _sorted(DraftTree(np.array(parents, int), np.array(depths, int), np.array(ranks, int), np.array(probs, float)))


def _sorted(tree: DraftTree) -> DraftTree:
    """The same tree with its best nodes first; they were made level by level, so that parents stay before their children."""
    order = np.argsort(-tree.probs, kind="stable")
    place = np.empty(len(order) + 1, int)
    place[order], place[-1] = np.arange(len(order)), -1
    return DraftTree(place[tree.parents[order]], *(column[order] for column in tree[1:]))
