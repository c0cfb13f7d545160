"""How long a round with a draft tree takes, from rounds that were timed in place, all at one batch.

    round(n, K, L) = draft(K) + rest(n, L)         n nodes verified, K levels drafted, L committed tokens

`draft` is the chain's fit: the levels are the same passes. `rest` is what a tree adds to drafting (candidates, its shape),
the mask, the target's pass, copies to the host and the compaction of the path. Passes have steps in n where a device
rounds up, and no law is put upon them: what was timed stands, linear between the sizes that were timed and between
contexts. No node at all is what a pass over one token takes behind such a draft.

P  cells     N  nodes of the largest tree     J  cells of chains that can be left out of the fit of `draft`
"""

from typing import NamedTuple

import numpy as np

from planner.cost.round_fit import Point, RoundFits
from planner.errors import BadInput
from planner.specs import DraftConfig, DrafterSpec, FixedTree, describe


class TreeCell(NamedTuple):
    levels: int
    point: Point  # its `drafted` counts nodes


class TreeFit:
    """The cells of one drafter."""

    def __init__(self, cells: list[TreeCell], fits: RoundFits):
        self._points, self._fits = [cell.point for cell in cells], fits
        self.sizes = sorted({point.drafted for point in self._points})
        self.error = float(np.sqrt(np.mean([point.standard_error**2 for point in self._points])))  # relative, of a cell's mean
        self._draft_s = np.stack([fits.draft_s(point.drafter, levels, point.read) for levels, point in cells], axis=1)  # [1 + J, P]
        self._build_s = np.array([point.draft_s for point in self._points]) - self._draft_s[0]
        self._pass_s = np.array([point.verify_s + point.commit_s for point in self._points])

    def round_s(self, config: DraftConfig, context_len: int, position: float) -> np.ndarray:
        """[1 + J, max_size + 1] seconds of a round that verifies 0..max_size nodes."""
        max_size, build, rest = self._spread(config, position)
        draft_s = self._fits.draft_s(config.drafter, config.draft_len, config.kv.read(context_len))  # [1 + J]
        built = build @ (self._build_s + self._draft_s[0] - self._draft_s).T  # [N + 1, 1 + J]: a cell's whole round stays what it was
        if not isinstance(config.tree, FixedTree):
            built[:] = built[max_size]  # the largest is built, and the best part of it verified
        passed = rest @ self._pass_s + self._none(rest) * self._fits.narrow_s(config.drafter, position)
        return draft_s[:, None] + built.T + passed

    def costs(self, config: DraftConfig, context_len: int, position: float) -> tuple[float, np.ndarray]:
        """Seconds to draft an adaptive tree, and [max_size + 1] to verify 0.. nodes of it; a larger pass is never told to be cheaper."""
        max_size, build, rest = self._spread(config, position)
        draft_s = self._fits.draft_s(config.drafter, config.draft_len, config.kv.read(context_len))[0] + build[max_size] @ self._build_s
        passed = rest @ self._pass_s + self._none(rest) * self._fits.narrow_s(config.drafter, position)
        return max(0.0, float(draft_s)), np.maximum.accumulate(np.maximum(passed, 1e-9))

    def _spread(self, config: DraftConfig, position: float) -> tuple[int, np.ndarray, np.ndarray]:
        """How much each cell says about a tree of 0..max_size nodes, [N + 1, P]: of its building, and of its pass."""
        assert config.tree is not None
        if config.tree.max_size > self.sizes[-1]:
            raise BadInput(f"rounds were timed with trees of up to {self.sizes[-1]} nodes, got {describe(config)}; profile with --tree-sizes")
        at_size = np.array([self._between(size, position) for size in self.sizes])
        n = np.arange(config.tree.max_size + 1)
        build = np.stack([np.interp(n, self.sizes, hat) for hat in np.eye(len(self.sizes))], axis=1) @ at_size
        hats = np.eye(len(self.sizes) + 1)
        rest = np.stack([np.interp(n, [0, *self.sizes], hat) for hat in hats[1:]], axis=1) @ at_size
        return config.tree.max_size, build, rest

    def _none(self, rest: np.ndarray) -> np.ndarray:
        """[N + 1] what is left to a pass over one token alone."""
        return 1.0 - rest.sum(1)

    def _between(self, size: int, position: float) -> np.ndarray:
        """[P] weights of the cells of one size: linear between the two nearest contexts, and beyond them on the same line."""
        contexts = sorted({p.context_len for p in self._points if p.drafted == size})
        groups = [[i for i, p in enumerate(self._points) if p.drafted == size and p.context_len == context] for context in contexts]
        centres = [float(np.mean([self._points[i].position for i in group])) for group in groups]
        weights = np.zeros(len(self._points))
        if len(groups) == 1:
            shares = {0: 1.0}
        else:
            above = min(max(1, int(np.searchsorted(centres, position))), len(groups) - 1)
            share = (position - centres[above - 1]) / (centres[above] - centres[above - 1])
            shares = {above - 1: 1 - share, above: share}
        for number, share in shares.items():
            weights[groups[number]] = share / len(groups[number])
        return weights


def fit_trees(cells: list[TreeCell], fits: RoundFits) -> dict[DrafterSpec, TreeFit]:
    """A fit for each drafter whose trees were timed."""
    drafters = dict.fromkeys(cell.point.drafter for cell in cells)
    return {drafter: TreeFit([cell for cell in cells if cell.point.drafter == drafter], fits) for drafter in drafters}
