"""Rounds along a written text with draft trees. Exact: the target chooses at each node, and the text is what it chose.

A round behind token s writes the tokens whose smallest tree is no larger than the one it verifies, and one more; the next
round starts behind those. A text that is cut short ends its last round early, and so does decoding.

S  starts, one behind each token but the last     K  levels     N  nodes of the largest tree
"""

from typing import NamedTuple

import numpy as np

from planner.draft_trees import choose_sizes
from planner.measurements import TreeSample
from planner.specs import FixedTree, Tree


class TreeText(NamedTuple):
    """The part of a replayed text that a request would write."""

    sizes: np.ndarray  # [S, K] nodes of the smallest tree that goes along the text down to each level, 0: none
    probs: np.ndarray  # [S, N] path probabilities of the nodes, 0: no such node

    @property
    def member(self) -> np.ndarray:
        """[S, N] whether the text goes through each node."""
        found = np.zeros((len(self.sizes), self.probs.shape[1] + 1), bool)
        np.put_along_axis(found, self.sizes, True, axis=1)
        return found[:, 1:]


class TreeWalk(NamedTuple):
    by_nodes: np.ndarray  # [N + 1] rounds that verified 0, 1, .. N nodes
    starts: np.ndarray  # [S] bool, whether a round started behind each token


def tree_text(sample: TreeSample, output_len: int) -> TreeText:
    starts = min(sample.sizes.shape[0], output_len - 1)
    return TreeText(sample.sizes.unpack()[:starts].astype(int), sample.node_probs()[:starts])


def nodes_of(tree: Tree, text: TreeText) -> np.ndarray:
    """[S] nodes that a round behind each token verifies."""
    probs = text.probs[:, : tree.max_size]
    there = (probs > 0).sum(1)
    return there if isinstance(tree, FixedTree) else np.minimum(choose_sizes(probs, tree.costs), there)


def walk_trees(
    text: TreeText,
    nodes: np.ndarray,  # [S]
) -> TreeWalk:
    """The rounds from the first token to the end of the text."""
    S, N = text.probs.shape
    written = 1 + ((text.sizes > 0) & (text.sizes <= nodes[:, None])).sum(1)
    by_nodes, starts = np.zeros(N + 1), np.zeros(S, bool)
    s = 0
    while s < S:
        starts[s] = True
        by_nodes[nodes[s]] += 1
        s += written[s]
    return TreeWalk(by_nodes, starts)
