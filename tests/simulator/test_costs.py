"""Step tables: what a simulated step takes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import BadInput
from planner.simulator.costs import Prefill, tabulate
from planner.simulator.engine import StepLoad

PASS_S, TOKEN_S, PAIR_S = 8e-3, 2e-5, 1e-10


def law(draft_len, running, held):
    return PASS_S + 1e-5 * running * (draft_len + 1) + 2e-8 * running * held + 1e-3 * draft_len


def table(max_batch=32, longest=4096):
    return tabulate(law, (0, 3), max_batch=max_batch, longest=longest, pass_s=PASS_S, prefill=Prefill(TOKEN_S, PAIR_S))


TABLE = table()


@given(st.integers(1, 32), st.integers(64, 4096), st.sampled_from((0, 3)))
def test_a_round_without_prompts_takes_what_the_source_says(n, length, draft_len):
    took = TABLE.step_s(StepLoad(0, 0, 0, n, n * length, draft_len))
    assert took == pytest.approx(law(draft_len, n, length), rel=1e-9)


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 32), st.integers(1, 9000)), min_size=1, max_size=20), st.sampled_from((0, 3)))
def test_steps_taken_at_once_take_what_they_take_one_by_one(steps, draft_len):
    tokens, n, length = (np.array(column) for column in zip(*steps, strict=True))
    pairs = tokens * (tokens + 1) / 2
    whole = TABLE.step_s(StepLoad(tokens, np.ones_like(n), pairs, n, n * length, draft_len))
    single = [TABLE.step_s(StepLoad(int(t), 1, float(p), int(m), int(m * c), draft_len)) for t, p, m, c in zip(tokens, pairs, n, length, strict=True)]
    assert whole.tolist() == single and min(single) >= PASS_S


def test_prompts_are_free_until_they_take_as_long_as_a_pass_and_add_up_beyond():
    alone = TABLE.step_s(StepLoad(0, 0, 0, 8, 8000, 0))
    hidden = int(PASS_S / TOKEN_S)
    assert TABLE.step_s(StepLoad(hidden - 1, 1, 0, 8, 8000, 0)) == alone
    assert TABLE.step_s(StepLoad(hidden + 1000, 1, 0, 8, 8000, 0)) == pytest.approx(alone + 1000 * TOKEN_S)
    assert TABLE.step_s(StepLoad(hidden + 1000, 1, 0, 0, 0, 0)) == pytest.approx(PASS_S + 1000 * TOKEN_S)
    assert TABLE.step_s(StepLoad(hidden, 1, 1e8, 0, 0, 0)) == pytest.approx(PASS_S + 1e8 * PAIR_S)


def test_longer_texts_than_the_grid_follow_its_last_stretch():
    assert TABLE.step_s(StepLoad(0, 0, 0, 4, 4 * 50_000, 3)) == pytest.approx(law(3, 4, 50_000))


def test_a_round_time_that_is_not_known_is_refused():
    with pytest.raises(BadInput, match="no round time is known for every batch up to 8 .* lower --max-num-seqs"):
        tabulate(lambda k, n, c: np.where(n > 4, np.nan, 1.0), (0,), max_batch=8, longest=512, pass_s=1e-3, prefill=Prefill(0.0, 0.0))
