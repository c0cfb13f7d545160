"""What settings gain over all loads together, and the one setting that gains most where an engine knows no schedule.

S settings    X contexts    C concurrencies
"""

from collections.abc import Sequence

import numpy as np

from planner.errors import BadInput
from planner.plans import Interval
from planner.search.grid import Grid, choose, ratio_sds, some_places, violation
from planner.search.loads import Forecast, log_interval

LARGEST = np.log(1e3)  # what a margin is cut at: where nothing else keeps the limits it would be infinite


def relative(value: float, sd: float) -> Interval:
    """A relative difference from a difference of logarithms."""
    ratio = log_interval(value, sd)
    return Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)


def counts_of(grid: Grid, best: np.ndarray) -> np.ndarray:
    """[X, C] what a load's value counts: its share of the histogram; without one, so that each load's best setting [X, C] counts the same."""
    if grid.asked.weights is not None:
        return grid.asked.weights
    value = grid.value(best)
    return np.divide(1.0, value, out=np.zeros_like(value), where=value > 0) / value.size


def total(grid: Grid, path: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Logarithm of what all loads together gain by the settings [X, C], -inf where no limit is ever kept; and what then decides, minus the mean
    violation."""
    value = float((grid.value(path) * counts).sum())
    x, c = np.indices(path.shape)
    excess = violation(Forecast(*(v[path, x, c] for v in grid.forecast)), grid.asked.limits)
    gained = np.log(value) if value > 0 else -np.inf
    return float(-gained if grid.asked.objective in ("tpot", "e2e") else gained), -float(excess.mean())


def gains(grid: Grid, paths: Sequence[np.ndarray], over: np.ndarray, counts: np.ndarray) -> list[Interval]:
    """Of each path [X, C] over another, all loads together, relatively; 0 where the other gains nothing at all.

    What is not known is taken as shared by the loads, so nothing averages out.
    """
    c = some_places(len(grid.concurrency))
    x = np.arange(len(grid.asked.contexts))[:, None]
    base, found = total(grid, over, counts)[0], []
    for path, sd in zip(paths, ratio_sds(grid, [(p[:, c], over[:, c], x, c) for p in paths], grid.asked.objective), strict=True):
        along = np.array([np.interp(np.arange(len(grid.concurrency)), c, own) for own in sd.reshape(-1, len(c))])  # [X, C]
        share = grid.value(path) * counts
        unsure = float((along * share).sum() / share.sum()) if share.sum() > 0 else 0.0
        ahead = total(grid, path, counts)[0] - base if np.isfinite(base) else 0.0
        found.append(relative(float(np.clip(ahead, -LARGEST, LARGEST)), unsure))
    return found


def best_static(grid: Grid) -> int:
    """The one setting of those that are loaded and drafting, or off, that gains most over all loads; BadInput where none can run at all of them."""
    able = [s for s in grid.free if np.isfinite(grid.forecast.tpot_s[s]).all()]
    if not able:
        raise BadInput("no setting can run at every load asked about; lower --max-concurrency")
    counts = counts_of(grid, choose(grid, [grid.free], grid.asked.objective)[0].best)
    return int(max(able, key=lambda s: total(grid, np.full(grid.forecast.tpot_s.shape[1:], s), counts)))
