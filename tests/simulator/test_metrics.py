"""Statistics of a run, their intervals, and what a comparison on the same arrivals gains."""

from dataclasses import replace

import numpy as np
import pytest

from planner.errors import BadInput
from planner.schedules import Limits
from planner.simulator.engine import Outcome, Policy, Server, StepLoad, simulate
from planner.simulator.metrics import difference, goodput, interval, keeps, ratio, statistic, summarise
from planner.simulator.scheduler import KVRoom
from planner.simulator.texts import Acceptance
from planner.simulator.workload import Request, generate


class Linear:
    def step_s(self, load: StepLoad) -> np.ndarray:
        return 0.01 + 1e-5 * load.prefill_tokens + 1e-4 * load.decode_requests + 0.0005 * load.draft_len


SERVER = Server(cost=Linear(), room=KVRoom(blocks=2000), acceptance=Acceptance(tokens_per_round=((1.7, 2.2, 2.5),)))
DRAFTING = replace(SERVER, policy=Policy.fixed(3))


def serve(rate: float, server: Server = SERVER, count: int = 600, seed: int = 0) -> Outcome:
    return simulate(generate(rate=rate, lengths=[(200, 60), (900, 20), (50, 100)], count=count, seed=seed), server, seed=seed)


def test_percentiles_and_means_are_those_of_the_requests():
    run = serve(4)
    found = summarise(run)
    assert found.ttft_s["mean"].value == pytest.approx(run.ttft_s.mean())
    assert found.e2e_s["p99"].value == pytest.approx(np.percentile(run.e2e_s, 99))
    assert found.tpot_s["p50"].low <= found.tpot_s["p50"].value <= found.tpot_s["p50"].high
    assert found.requests_per_s == pytest.approx(600 / (run.finish_s.max() - run.arrival_s.min()))
    assert found.output_tokens_per_s == pytest.approx(run.output_len.sum() / found.makespan_s)


def test_use_over_time_agrees_with_the_requests():
    run = serve(4)
    found = summarise(run)
    assert found.mean_running + found.mean_waiting == pytest.approx(run.e2e_s.sum() / run.makespan_s)
    assert 0 < found.busy_share <= 1 and 0 < found.mean_kv_share < found.max_kv_share <= 1


def test_replicas_share_the_work():
    one, two = summarise(serve(3)), summarise(serve(3, replace(SERVER, replicas=2)))
    assert two.busy_share < one.busy_share and two.ttft_s["mean"].value < one.ttft_s["mean"].value


def test_goodput_counts_requests_within_all_limits():
    run = serve(5)
    limits = Limits(ttft_s=float(np.median(run.ttft_s)), tpot_s=float(np.percentile(run.tpot_s, 80)))
    kept = (run.ttft_s <= limits.ttft_s) & (run.tpot_s <= limits.tpot_s)
    assert (keeps(run, limits) == kept).all() and 0 < kept.mean() < 0.5
    found = summarise(run, limits)
    assert found.within.value == pytest.approx(kept.mean())
    assert found.goodput_requests_per_s.value == pytest.approx(kept.sum() / run.makespan_s)
    assert found.goodput_tokens_per_s.value == pytest.approx(run.output_len[kept].sum() / run.makespan_s)
    assert summarise(run).within.value == 1


def test_a_single_token_keeps_every_limit_of_time_per_token_and_a_refused_request_none():
    requests = [Request(arrival_s=0, input_len=n, output_len=m) for n, m in ((10, 1), (10, 5), (10**6, 5))]
    run = simulate(requests, SERVER)
    assert keeps(run, Limits(tpot_s=1e-6)).tolist() == [True, False, False]
    assert summarise(run).rejected == 1 and summarise(run).within.value == pytest.approx(2 / 3)


def test_what_nobody_says_is_none():
    run = simulate([Request(arrival_s=0, input_len=10**6, output_len=5)], SERVER)
    found = summarise(run)
    assert found.ttft_s["mean"] is None and found.rejected == 1 and found.makespan_s == 0
    assert summarise(simulate([Request(arrival_s=3, input_len=10, output_len=1)], SERVER)).tpot_s["p50"] is None


def test_intervals_hold_the_long_runs_mean_about_as_often_as_they_say():
    rate, mean = 5, statistic("ttft_s", "mean")
    truth = np.mean([serve(rate, count=4000, seed=1000 + seed).ttft_s.mean() for seed in range(2)])
    found = [interval(serve(rate, count=400, seed=seed), mean, draws=100) for seed in range(16)]
    held = np.mean([one.low <= truth <= one.high for one in found])
    assert held >= 0.6  # 90 % in the long run; short runs know too little of their longest queues
    assert np.mean([(one.high - one.low) / one.value for one in found]) < 0.5


def test_the_same_arrivals_tell_two_policies_apart_better_than_two_runs():
    off, drafting = serve(4), serve(4, DRAFTING)
    mean = statistic("tpot_s", "mean")
    paired = ratio(drafting, off, mean)
    assert paired.value == pytest.approx(drafting.tpot_s.mean() / off.tpot_s.mean())
    width = np.hypot(*((one.high - one.low) / one.value for one in (interval(off, mean), interval(drafting, mean))))
    assert (paired.high - paired.low) / paired.value < width
    assert difference(drafting, off, mean).value == pytest.approx(drafting.tpot_s.mean() - off.tpot_s.mean())
    same = ratio(off, off, goodput(Limits(ttft_s=1.0)))
    assert (same.low, same.value, same.high) == (1, 1, 1)


def test_runs_on_other_arrivals_are_not_compared():
    with pytest.raises(BadInput, match="same arrivals"):
        ratio(serve(4), serve(4, seed=1), statistic("ttft_s", "mean"))
    with pytest.raises(BadInput, match="a statistic is"):
        statistic("ttft_s", "p101")
