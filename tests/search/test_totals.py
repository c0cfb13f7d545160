"""One setting for all loads: the best by trying every one, and what it gains over another."""

import numpy as np
import pytest
from fake_engine import TokenLoads, law

from planner.search.grid import Question, evaluate
from planner.search.totals import best_static, counts_of, gains, total


@pytest.mark.parametrize("objective", ["tpot", "throughput", "e2e"])
@pytest.mark.parametrize("loads", [(1, 4), (1, 256), (100, 256)])
def test_the_best_constant_is_the_best_of_all_tried(objective, loads):
    made = TokenLoads(law, {"eagle3": 5}, sd=0.01, ttft_s=None)
    grid = evaluate(made, Question(*loads, [1000], objective))
    counts = counts_of(grid, np.zeros((1, loads[1] - loads[0] + 1), dtype=int))
    tried = {int(s): total(grid, np.full((1, len(grid.concurrency)), s), counts)[0] for s in grid.free}
    found = best_static(grid)
    assert tried[found] >= max(tried.values()) - 0.01, "loads are weighed by their best there, which shifts near ties"
    path = np.full((1, len(grid.concurrency)), found)
    (gain,) = gains(grid, [path], np.zeros_like(path), counts)
    assert gain.low <= gain.value <= gain.high and gain.value == pytest.approx(np.expm1(tried[found] - tried[0]))


def test_a_setting_gains_nothing_over_itself():
    made = TokenLoads(law, {"eagle3": 5}, sd=0.05, ttft_s=None)
    grid = evaluate(made, Question(1, 16, [1000], "tpot"))
    path = np.full((1, 16), 3)
    (gain,) = gains(grid, [path], path, counts_of(grid, path))
    assert (gain.value, gain.low, gain.high) == (0.0, 0.0, 0.0)
