"""A guard on planning under load: a few engines of benchmarks/load.py, limits looser than the benchmark's because they are few."""

import numpy as np
import pytest
from load import judge, plan_seconds, replay_magicdec, replay_single_stream, summary

SEEDS = range(200, 206)  # not those of the benchmark


@pytest.fixture(scope="module")
def judged():
    return [judge(seed) for seed in SEEDS]


def test_unseen_cells_are_predicted(judged):
    assert summary(judged)["synthetic/tpot_error_median"] < 0.05


def test_intervals_cover_and_are_narrow(judged):
    figures = summary(judged)
    assert 0.75 < figures["synthetic/coverage"] < 0.99
    assert figures["synthetic/half_width_median"] < 0.08


def test_the_choice_at_each_load_loses_little_and_less_than_the_baselines_do(judged):
    figures = summary(judged)
    assert figures["synthetic/regret_mean"] < 0.03
    for baseline in ("nearest", "batch_1", "no_capacity"):
        assert figures["synthetic/regret_mean"] < figures[f"synthetic/regret_mean_{baseline}"]


def test_cells_drawn_at_random_do_not_break_the_fit():
    one = judge(SEEDS[0], drawn=True)
    assert np.isfinite(one.tpot_error) and one.tpot_error < 0.15


def test_the_published_single_stream_is_replayed():
    _, figures = replay_single_stream()
    assert figures["published/single_stream_best_k"] in (4, 5)  # 10.46 and 10.44 ms
    assert figures["published/single_stream_error_max"] < 0.04
    assert figures["published/single_stream_speedup_covered"] == 1


def test_each_left_out_batch_of_magicdec_keeps_the_sign_of_its_speedup():
    rows, figures = replay_magicdec()
    assert all(float(row["predicted speedup"].split()[0]) > 1 for row in rows)
    assert figures["published/magicdec_speedup_error_max"] < 0.25


def test_a_hundred_thousand_candidates_take_about_a_second():
    assert plan_seconds(20_000) < 3  # scaled from a fifth of them, on a machine that is shared
