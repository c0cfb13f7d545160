import numpy as np
import pytest
from served import MODEL, SYSTEM

from planner.cost.capacity import request_capacity
from planner.cost.running_batch import RunningBatch, distinct
from planner.cost.serving import Cells
from planner.serving import ModelSize, ServedCell, ServingProfile

DRAFT = ModelSize(name="small", num_layers=16, num_kv_heads=8, head_dim=128, weights_bytes=5 * 10**9)
TPOT = 0.01


def cells(drafter, concurrency, context=2000, output=500) -> Cells:
    return Cells(*np.broadcast_arrays(*map(np.atleast_1d, (drafter, 3 * np.minimum(drafter, 1), concurrency, context, output))))


def batch(grid: Cells, running=None, ttft_s=None, drafters=None, system=SYSTEM) -> RunningBatch:
    n = len(grid.drafter)
    profile = ServingProfile(
        source="made", date="2026", planner_version="0", model=MODEL, drafters=drafters or {"draft_model": DRAFT}, system=system,
        cells=[ServedCell(concurrency=1, context_len=1, output_len=1, tpot_s=TPOT)],
    )  # fmt: skip
    throughput = np.full(n, np.nan) if running is None else np.asarray(running) / TPOT
    first = np.full(n, np.nan) if ttft_s is None else np.asarray(ttft_s, dtype=float)
    return RunningBatch(profile, ["none", "draft_model"], grid, np.full(n, TPOT), throughput, first, 1)


def runs(model: RunningBatch, grid: Cells) -> np.ndarray:
    return model.running(grid, np.full(len(grid.drafter), TPOT), model.capacity(grid))


LOADS = np.array([1, 8, 64, 256])


def test_without_throughput_memory_decides():
    grid = cells(np.repeat([0, 1], 4), np.tile(LOADS, 2), context=20_000)
    counted = [
        request_capacity(MODEL, own, SYSTEM, tensor_parallel=1, context_len=20_000, output_len=500, draft_len=k) for own, k in ((None, 0), (DRAFT, 3))
    ]
    assert counted[1] < counted[0] < 64
    found = runs(batch(grid), grid)
    assert found[[3, 7]] == pytest.approx(counted, rel=0.01)
    assert found[[0, 4]] == pytest.approx([1, 1], rel=0.01)


def test_a_lag_that_grows_with_the_prompt_is_memory_and_one_that_does_not_is_a_limit():
    both = cells(0, np.tile(LOADS, 2), context=np.repeat([1000, 20_000], 4))
    limited = runs(batch(both, np.minimum(both.concurrency, 30)), cells(0, [256, 256], context=[1000, 20_000]))
    assert limited == pytest.approx([30, 30], rel=0.05)
    memory = np.where(both.context_len == 1000, 256, 30)
    found = runs(batch(both, np.minimum(both.concurrency, memory)), cells(0, [256, 256], context=[1000, 20_000]))
    assert found == pytest.approx([256, 30], rel=0.08)


def test_the_reserve_that_one_drafter_shows_is_the_others_too():
    grid = cells(np.repeat([0, 1], 4), np.tile(LOADS, 2), context=20_000)
    plain = batch(grid)
    counted = plain.capacity(cells([0, 1], 256, context=20_000))
    only_off = np.minimum(grid.concurrency[:4], 0.8 * counted[0])
    model = batch(Cells(*(column[:4] for column in grid)), only_off)
    ratio = model.capacity(cells([0, 1], 256, context=20_000)) / counted
    assert ratio[0] == pytest.approx(0.8, abs=0.03) and 0.78 < ratio[1] < 0.9


def test_time_spent_on_prompts_leaves_fewer_decoding():
    grid = cells(0, LOADS)
    share = 0.8  # of its time a request decodes, at every load
    found = runs(batch(grid, share * LOADS), cells(0, [4, 100]))
    assert found == pytest.approx([3.2, 80], rel=0.03)


def test_the_first_token_waits_for_memory_by_littles_law():
    grid = cells(0, LOADS)
    running = np.minimum(LOADS, 40)
    first = 0.1 + np.maximum(LOADS - 40, 0) * 500 * TPOT / 40
    model = batch(grid, running, first)
    asked = cells(0, [4, 200])
    load = model.predict(asked, np.full(2, TPOT), model.capacity(asked))
    assert load.ttft_s == pytest.approx([0.1, 0.1 + 160 * 500 * TPOT / 40], rel=0.1)
    assert np.isnan(batch(grid, running).predict(asked, np.full(2, TPOT), np.full(2, 40.0)).ttft_s).all()


def test_loads_without_end_do_not_overflow():
    model = batch(cells(0, LOADS), np.minimum(LOADS, 40))
    assert runs(model, cells(0, 2**40)) == pytest.approx([40], rel=0.1)


def test_distinct_rows_and_where_each_is():
    a, b = np.array([3, 1, 3, 1, 2]), np.array([5, 5, 5, 7, 5])
    (x, y), where = distinct(a, b)
    assert len(x) == 4 and (x[where] == a).all() and (y[where] == b).all()
