"""Ratios of what was measured twice: known ones are recovered, and intervals cover the truth as often as they say."""

import numpy as np
import pytest

from planner.plans import Interval
from planner.search.ratios import around, log_half, mean_of, paired, ratio_of


def test_a_ratio_is_as_uncertain_as_both_sides_together():
    ratio = ratio_of(around(3.0, 0.3), around(2.0, 0.4))
    assert ratio.value == pytest.approx(1.5) and log_half(ratio) == pytest.approx(0.5)
    exact = ratio_of(around(3.0, 0.0), around(2.0, 0.0))
    assert exact.low == exact.value == exact.high == 1.5


def test_an_interval_that_reaches_down_to_0_has_the_width_above_its_value():
    assert log_half(Interval(value=1.0, low=0.0, high=2.0)) == pytest.approx(np.log(2))


def test_pairs_take_out_what_they_share():
    rng = np.random.default_rng(0)
    loads = np.exp(rng.normal(0, 2, 12))
    ratio, known = paired(1.2 * loads, loads)
    assert known and ratio.low == pytest.approx(1.2) == pytest.approx(ratio.high)
    ratio, known = paired([1.2], [1.0])
    assert not known and ratio.value == pytest.approx(1.2)


def test_intervals_cover_the_truth_in_nine_of_ten_cases():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        before, after = (mean_of(scale * np.exp(0.05 * rng.standard_normal(12))) for scale in (1.0, 0.7))
        ratio = ratio_of(after, before)
        inside += ratio.low <= 0.7 <= ratio.high
    assert 0.82 < inside / 400 < 0.97  # medians scatter a quarter more than the means that the width is of


def test_a_machine_that_drifted_is_less_certain():
    values = [1.0, 1.01, 0.99]
    assert log_half(mean_of(values, drift=0.05)) > log_half(mean_of(values)) + 0.04
