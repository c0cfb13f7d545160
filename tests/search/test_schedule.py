"""Schedules by load: every load covered once, almost nothing lost, off where a drafter starves the batch, and load that decides."""

import itertools
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_load import LawLoads, roofline

from planner.errors import BadInput
from planner.schedules import Limits
from planner.search.grid import TIED, TOLERANCE, Question
from planner.search.rows import fewest_rows, runs
from planner.search.schedule import context_ranges, make_schedule

ABOUT = {"profile_sha256": "0" * 64, "model": "made", "system": "made", "source": "made"}
OBJECTIVES = ("throughput", "tpot", "e2e", "price")


def scheduled(loads, first=1, last=64, contexts=(1000,), objective="throughput", **more):
    return make_schedule(loads, Question(first, last, list(contexts), objective, **more), **ABOUT)


def row_at(rows, concurrency, context_len):
    found = [r for r in rows if r.concurrency_from <= concurrency <= r.concurrency_to and r.context_from <= context_len <= r.context_to]
    assert len(found) == 1, (concurrency, context_len)
    return found[0]


def score(loads, setting, concurrency, context_len, objective):
    """What is maximised, asked one load at a time."""
    f = loads.predict(np.array([loads.settings.index(setting)]), np.array([concurrency]), np.array([context_len]))
    return -np.log(f.tpot_s[0]) if objective == "tpot" else np.log(f.output_tokens_per_s[0])


@given(
    loss=st.integers(1, 4).flatmap(
        lambda S: st.lists(st.lists(st.sampled_from([0, 0.001, 0.003, 0.02]), min_size=S, max_size=S), min_size=1, max_size=6)
    )
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_fewest_rows_are_what_brute_force_finds(loss):
    loss = np.array(loss).T  # [S, C]
    loss -= loss.min(0)
    allowed = loss <= TOLERANCE
    S, C = loss.shape

    def cost(path):
        return sum(a != b for a, b in itertools.pairwise(path)), round(sum(loss[s, c] for c, s in enumerate(path)), 9)

    best = min(cost(path) for path in itertools.product(range(S), repeat=C) if all(allowed[s, c] for c, s in enumerate(path)))
    other = loss[:, ::-1]  # beside another schedule, which it knows nothing of
    path, _ = fewest_rows(np.stack([loss, other]), np.stack([allowed, other <= TOLERANCE]))
    assert all(allowed[path, np.arange(C)])
    assert cost(path) == best


def test_runs_are_the_stretches_of_a_path():
    assert runs(np.array([3, 3, 1, 1, 1, 3])) == [(0, 1), (2, 4), (5, 5)]
    assert runs(np.array([[1, 1], [1, 2]])) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sd", [0.0, 0.02])
def test_every_load_is_covered_once_and_loses_almost_nothing(objective, sd):
    loads = LawLoads(partial(roofline, gain={"none": 0, "eagle3": 0.75, "ngram": 0.5}), {"eagle3": 5, "ngram": 8}, sd=sd)
    found = scheduled(loads, last=200, contexts=(500, 4000, 32000), objective=objective)
    losses = []
    for concurrency in range(1, 201):
        for context_len in (1, 499, 500, 1415, 4000, 20000, 32000):
            row_at(found.schedule, concurrency, context_len)
        for context_len in (500, 4000, 32000):
            values = [score(loads, setting, concurrency, context_len, objective) for setting in loads.settings if not setting.idle]
            losses.append(max(values) - score(loads, row_at(found.schedule, concurrency, context_len).setting, concurrency, context_len, objective))
    assert max(losses) <= -np.log1p(-TIED) + 1e-9 and np.mean(losses) <= 1.01 * TOLERANCE
    if sd == 0:
        assert max(losses) <= -np.log1p(-TOLERANCE) + 1e-9
    assert len(found.schedule) <= 3 * 14
    assert found.num_candidates == len(loads.settings) * 200 * 3


def test_rows_are_as_few_as_the_tolerance_lets_them_be():
    """Two settings that differ by less than the tolerance, in turn the better one: one row."""

    def law(drafter, draft_len, concurrency, context_len):
        return 1e-2 * (1 + 0.004 * (concurrency % 2 == draft_len)) * (1 + (drafter == "none")), concurrency.astype(float)

    found = scheduled(LawLoads(law, {"mtp": 2}, sd=0.0))
    assert len(found.schedule) == 1 and found.flips == []
    row = found.schedule[0]
    assert (row.drafter, row.draft_len) == ("mtp", 2) and 0 < row.margin < TOLERANCE


def test_a_drafter_that_starves_the_batch_is_left_out_at_high_load():
    """The drafter is faster for those it serves, at every load; but its memory halves how many run."""
    law = partial(roofline, capacity={"none": 256 * 1128, "eagle3": 96 * 1128}, gain=0.8, draft_cost=0.01, idle_tax=0.0)

    def gentle(drafter, draft_len, concurrency, context_len):  # matrix units never fill: only memory can speak against drafting
        tpot_s, running = law(drafter, draft_len, concurrency, context_len)
        return np.full_like(tpot_s, 1e-2 / (1 + 0.45 * (draft_len > 0))), running

    loads = LawLoads(gentle, {"eagle3": 3})
    found = scheduled(loads, last=256)
    assert row_at(found.schedule, 64, 1000).drafter == "eagle3" and row_at(found.schedule, 256, 1000).drafter == "none"
    # 96 x 1.45 = 139.2 run as fast as 139 without
    assert abs(row_at(found.schedule, 256, 1000).concurrency_from - 140) <= 2
    assert row_at(scheduled(loads, last=256, objective="tpot").schedule, 256, 1000).drafter == "eagle3"
    assert [flip.concurrency for flip in found.flips] == [row_at(found.schedule, 256, 1000).concurrency_from]
    assert found.flips[0].lowest < found.flips[0].concurrency < found.flips[0].highest
    apart = found.disagreements[-1]
    assert (apart.by_tpot.drafter, apart.by_throughput.drafter, apart.concurrency_to) == ("eagle3", "none", 256)
    assert apart.throughput_lost > 0.1 and apart.tpot_lost == pytest.approx(0.45)


def test_off_and_an_idle_drafter_are_different_answers():
    loads = LawLoads(partial(roofline, idle_tax=0.05), {"eagle3": 4}, sd=0.001)
    found = scheduled(loads, last=256)
    assert (found.deployment, found.weighted) == (None, False)
    assert row_at(found.schedule, 256, 1000).setting == loads.settings[0]
    assert not any(row.setting.idle for row in found.schedule)
    loaded = next(d for d in found.deployments if d.drafter == "eagle3")
    last = row_at(loaded.schedule, 256, 1000)
    assert (last.drafter, last.draft_len) == ("eagle3", 0) and loaded.loss > 0
    off = next(d for d in found.deployments if d.drafter == "none")
    assert {row.drafter for row in off.schedule} == {"none"} and off.gain_over_off.value == 0
    assert off.loss > 0 and any("running server cannot change" in note for note in found.notes)


@pytest.mark.parametrize(("busy", "drafter"), [(1, "eagle3"), (256, "none")])
def test_the_load_decides_whether_the_drafter_is_loaded(busy, drafter):
    loads = LawLoads(partial(roofline, idle_tax=0.1), {"eagle3": 4}, sd=0.002)
    weights = np.full((1, 256), 0.001 / 256)
    weights[0, busy - 1] += 0.999
    found = scheduled(loads, last=256, weights=weights)
    assert found.weighted and found.deployment == drafter and {row.drafter for row in found.schedule} == {drafter}
    assert found.schedule == found.deployments[0].schedule
    gain = next(d.gain_over_off for d in found.deployments if d.drafter == "eagle3")
    assert gain.low > 0 if drafter == "eagle3" else gain.high < 0
    assert sum(row.weight for row in found.schedule) == pytest.approx(1)


def test_the_gain_of_a_deployment_is_that_of_the_sum_over_loads():
    loads = LawLoads(partial(roofline, idle_tax=0.1), {"eagle3": 4}, sd=0.002)
    weights = np.array([[0.5, 0.0, 0.0, 0.5]])
    for objective, value in (("throughput", 1), ("tpot", -1)):
        found = scheduled(loads, last=4, weights=weights, objective=objective)
        own = next(d for d in found.deployments if d.drafter == "eagle3")
        sums = [
            sum(0.5 * np.exp(value * score(loads, setting(c), c, 1000, objective)) for c in (1, 4))
            for setting in (lambda c, own=own: row_at(own.schedule, c, 1000).setting, lambda c: loads.settings[0])
        ]
        assert own.gain_over_off.value == pytest.approx((sums[0] / sums[1]) ** value - 1)


def test_a_margin_is_the_advantage_over_the_best_other_setting_of_its_row():
    loads = LawLoads(roofline, {"eagle3": 4}, sd=0.01)
    for row in scheduled(loads, last=128).schedule:
        span = range(row.concurrency_from, row.concurrency_to + 1)
        others = {
            other: -np.log(
                np.mean([np.exp(score(loads, other, c, 1000, "throughput") - score(loads, row.setting, c, 1000, "throughput")) for c in span])
            )
            for other in loads.settings
            if other != row.setting and not other.idle
        }
        runner_up = min(others, key=others.get)
        assert row.runner_up == runner_up and row.margin == pytest.approx(np.expm1(others[runner_up]))
        assert row.margin_low < row.margin < row.margin_high
        half = 1.6448536 * 0.01 * np.sqrt(2)
        assert {tie.setting for tie in row.ties} == {other for other, gap in others.items() if gap <= half}
        for tie in row.ties:
            assert tie.cost_of_being_wrong == pytest.approx(np.expm1(half - others[tie.setting]))


def test_where_a_flip_may_lie_grows_with_what_is_not_known():
    widths = []
    for sd in (0.0, 0.005, 0.03):
        flips = scheduled(LawLoads(roofline, {"mtp": 1}, sd=sd), last=256).flips
        assert len(flips) == 1 and flips[0].lowest <= flips[0].concurrency <= flips[0].highest
        assert (flips[0].before.draft_len, flips[0].after.drafter) == (1, "none")
        widths.append(flips[0].highest - flips[0].lowest)
    assert widths[0] == 0 and widths[0] < widths[1] < widths[2]


def test_goodput_counts_what_keeps_the_limits_and_says_where_nothing_does():
    loads = LawLoads(roofline, {"eagle3": 4}, sd=0.005, ttft_s=lambda concurrency, running: 0.01 * concurrency)
    limits = Limits(tpot_s=0.0095)
    found = scheduled(loads, last=256, objective="goodput", limits=limits)
    for c in range(1, 257):
        row = row_at(found.schedule, c, 1000)
        tpot_s = {setting: np.exp(-score(loads, setting, c, 1000, "tpot")) for setting in loads.settings if not setting.idle}
        keeping = [setting for setting, value in tpot_s.items() if value <= limits.tpot_s]
        if keeping:
            best = max(score(loads, setting, c, 1000, "throughput") for setting in keeping)
            assert row.setting in keeping and best - score(loads, row.setting, c, 1000, "throughput") <= TIED + 1e-3
        else:
            assert tpot_s[row.setting] / min(tpot_s.values()) - 1 <= TIED + 1e-3 and row.violation > 0
    assert found.schedule[0].violation == 0 and found.schedule[-1].violation > 0
    assert any("nothing keeps the limits" in note for note in found.notes)
    late = scheduled(loads, last=256, objective="goodput", limits=Limits(ttft_s=0.5))
    assert row_at(late.schedule, 50, 1000).violation == 0
    assert late.schedule[-1].violation == pytest.approx(256 / 50 - 1)


def test_a_limit_of_an_unknown_time_is_refused():
    with pytest.raises(BadInput, match="drop ttft"):
        scheduled(LawLoads(roofline, {"mtp": 1}), objective="goodput", limits=Limits(ttft_s=1.0))


def test_contexts_are_cut_in_the_middle_on_a_log_scale():
    assert context_ranges([1000]) == [(1, 1000)]
    assert context_ranges([1000, 4000, 9000]) == [(1, 2000), (2001, 6000), (6001, 9000)]
    assert context_ranges([1, 2]) == [(1, 1), (2, 2)]


def test_one_setting_is_a_schedule_without_a_runner_up():
    row = scheduled(LawLoads(roofline, {}), last=3).schedule[0]
    assert (row.drafter, row.runner_up, row.margin, row.ties) == ("none", None, 0.0, [])


def test_estimates_stand_at_the_ends_of_rows_beside_off():
    loads = LawLoads(roofline, {"eagle3": 4})
    found = scheduled(loads, last=100, price_per_s=1 / 3600)
    ends = [c for row in found.schedule for c in dict.fromkeys((row.concurrency_from, row.concurrency_to))]
    assert [pair.estimate.concurrency for pair in found.estimates] == ends
    for pair in found.estimates:
        assert pair.estimate.setting == row_at(found.schedule, pair.estimate.concurrency, 1000).setting
        assert pair.speedup.value == pytest.approx(pair.estimate.output_tokens_per_s.value / pair.baseline.output_tokens_per_s.value)
        assert pair.estimate.e2e_s == pytest.approx(pair.estimate.concurrency * 128 / pair.estimate.output_tokens_per_s.value)
        assert pair.estimate.price_per_million_tokens.value == pytest.approx(1e6 / 3600 / pair.estimate.output_tokens_per_s.value)


def test_beyond_what_was_measured_is_said():
    found = scheduled(LawLoads(roofline, {"eagle3": 4}, measured=(1, 64)), last=100)
    assert [row.extrapolated for row in found.schedule] == [row.concurrency_to > 64 for row in found.schedule]
    assert any("beyond what was measured" in note for note in found.notes)


def test_a_hundred_thousand_candidates_take_less_than_seconds():
    loads = LawLoads(partial(roofline, gain={"none": 0, **{f"d{i}": 0.5 + 0.05 * i for i in range(8)}}), {f"d{i}": 15 for i in range(8)})
    start = time.perf_counter()
    found = scheduled(loads, last=256, contexts=(500, 4000, 32000))
    assert found.num_candidates >= 99_000
    assert time.perf_counter() - start < 5  # about half a second on an idle core


def test_too_many_candidates_are_refused():
    with pytest.raises(BadInput, match="narrow --max-concurrency"):
        scheduled(LawLoads(roofline, {"mtp": 9}), last=10**6)
