import numpy as np
import pytest

from planner.cost.serving import Cells
from planner.cost.step_law import IDLE_TAX, StepLaw, graph_size


def cells(drafter, draft_len, concurrency, context=1000, output=200) -> Cells:
    return Cells(*np.broadcast_arrays(*map(np.atleast_1d, (drafter, draft_len, concurrency, context, output))))


GRID = cells(*np.array([(d, k, c) for d, ks in ((0, (0,)), (1, (1, 2, 4, 8))) for k in ks for c in (1, 3, 8, 20, 50, 120, 250)]).T)
ONES = np.ones(len(GRID.drafter))


def fitted(round_s, grid=GRID, tokens=ONES) -> StepLaw:
    return StepLaw(grid, grid.concurrency.astype(float), tokens[: len(grid.drafter)], round_s, 2)


def smooth(grid=GRID):
    """Weights, tokens, cache, drafts: terms of the law."""
    running, k = grid.concurrency, grid.draft_len
    return 8e-3 + 20e-6 * running * (k + 1) + 1e-8 * running * (grid.context_len + grid.output_len / 2) + 1e-3 * k


def test_a_law_of_its_own_terms_is_recovered():
    law = fitted(smooth())
    between = cells(*np.array([(1, 3, 10), (1, 6, 100), (0, 0, 180)]).T)
    assert law.seconds(between, between.concurrency.astype(float), np.ones(3)) == pytest.approx(smooth(between), rel=5e-3)
    assert np.abs(law.residual).max() < 5e-3


def test_steps_are_taken_where_they_are_there_and_not_where_they_are_not():
    tiled = smooth() + 4e-3 * np.maximum(np.ceil(GRID.concurrency * (GRID.draft_len + 1) / 128) - 1, 0)
    below, above = (fitted(tiled).seconds(cells(1, 1, c), np.array([float(c)]), np.ones(1))[0] for c in (64, 66))
    assert above - below > 2e-3
    below, above = (fitted(smooth()).seconds(cells(1, 1, c), np.array([float(c)]), np.ones(1))[0] for c in (64, 66))
    assert above - below < 2e-4


def test_seconds_never_fall_with_the_load():
    rng = np.random.default_rng(0)
    law = fitted(smooth() * np.exp(0.05 * rng.standard_normal(len(ONES))))
    running = np.arange(1.0, 400.0)
    seconds = law.seconds(cells(1, 3, running.astype(int)), running, np.ones(len(running)))
    assert (np.diff(seconds) >= -1e-12).all()


def test_an_idle_drafters_tax_is_learnt_from_its_cells_with_a_prior():
    grid = Cells(*(np.append(column, value) for column, value in zip(GRID, (1, 0, 20, 1000, 200), strict=True)))
    taxed = np.append(smooth(), 1.2 * smooth(cells(0, 0, 20)))
    one = cells(1, 0, 20)
    off = fitted(taxed, grid, np.ones(len(taxed))).seconds(cells(0, 0, 20), np.array([20.0]), np.ones(1))
    learnt = fitted(taxed, grid, np.ones(len(taxed)))
    assert 1.15 < learnt.seconds(one, np.array([20.0]), np.ones(1))[0] / off[0] < 1.2
    unknown = fitted(smooth())
    assert unknown.seconds(one, np.array([20.0]), np.ones(1))[0] / off[0] == pytest.approx(1 + IDLE_TAX, rel=0.01)
    assert unknown.idle_doubt(one)[0] > learnt.idle_doubt(one)[0] > 0 == unknown.idle_doubt(cells(0, 0, 20))[0]


@pytest.mark.parametrize(
    ("running", "rows", "held"),
    [
        (1, 1, 1),
        (3, 1, 4),
        (5, 1, 8),
        (9, 1, 16),
        (17, 1, 24),
        (1, 4, 1),
        (1, 6, 1),
        (3, 4, 4),
        (16, 4, 16),
        (17, 4, 18),
        (600, 1, 600),
        (200, 4, 200),
    ],
)
def test_a_pass_is_padded_to_the_captured_size_in_whole_requests(running, rows, held):
    assert graph_size(np.array([float(running)]), np.array([rows]))[0] == held


def test_a_term_that_no_cell_shows_is_zero_and_never_a_guess():
    law = fitted(smooth(cells(1, [1, 2, 4, 8], 1)), cells(1, [1, 2, 4, 8], 1))
    far = law.seconds(cells(1, 4, 256), np.array([256.0]), np.ones(1))[0]
    assert np.isfinite(far) and far > 0
