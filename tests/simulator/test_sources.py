"""What a simulation learns from a profile, a schedule and a plan."""

from itertools import pairwise

import numpy as np
import pytest
from made import DRAFT_MODEL, made_profile
from made_plans import served_profile
from msgspec.structs import replace

import planner
from planner.cost.serving import fit_serving
from planner.errors import BadInput
from planner.measurements import save_profile
from planner.schedules import Schedule
from planner.serving import OFF, ModelSize, SystemSpec, save_serving_profile
from planner.simulator.sources import PlanSource, ProfileSource, ScheduleSource, Sizes, feasible, pass_s
from planner.simulator.texts import Acceptance
from planner.specs import FullKV

FIRST_S, TOKEN_S, PAIR_S = 0.03, 2e-5, 4e-10


def read_s(context_len):
    return FIRST_S + TOKEN_S * context_len + PAIR_S * context_len * (context_len + 1) / 2


def measured(contexts):
    """With times to the first token of a law, where requests come one by one."""
    profile = served_profile(contexts)
    cells = [replace(cell, ttft_s=read_s(cell.context_len) if cell.concurrency == 1 else 5.0) for cell in profile.cells]
    return replace(profile, cells=cells)


def opened(profile):
    return ProfileSource(profile, fit_serving(profile), profile.cells)


@pytest.fixture(scope="module")
def source():
    return opened(measured((500, 2000, 8000)))


def test_rounds_of_a_profile_are_those_it_measured(source):
    errors = []
    for cell in measured((500, 2000, 8000)).cells:
        running = np.array([min(cell.concurrency, round(cell.output_tokens_per_s * cell.tpot_s))])
        found = source.rounds(cell.drafter, cell.draft_len, running, np.array([cell.context_len + cell.output_len / 2]))
        errors.append(float(found[0] / cell.itl_s - 1))
    assert np.median(np.abs(errors)) < 0.02 and np.abs(errors).max() < 0.12  # the fit's, and what it takes for prompts of others


def test_what_a_prompt_takes_is_found_again_from_single_requests(source):
    token_s, pair_s = source.prefill(OFF)
    assert (token_s, pair_s) == pytest.approx((TOKEN_S, PAIR_S), rel=1e-3)
    assert any("30 ms of it that do not depend on the prompt are left out" in note for note in source.notes)
    two = opened(measured((500, 8000))).prefill(OFF)
    assert two.token_s > 0 and two.pair_s >= 0
    assert opened(measured((2000,))).prefill(OFF) == pytest.approx((read_s(2000) / 2000, 0.0))


def test_without_single_requests_a_roofline_says_what_prompts_take_or_nothing_does():
    profile = served_profile()
    profile = replace(profile, cells=[replace(cell, ttft_s=None) for cell in profile.cells])
    assert opened(profile).prefill(OFF) is None
    system = SystemSpec(name="h100", memory_bytes=80 * 2**30, fraction=0.9, bandwidth_bytes_per_s=3.35e12, flops_per_s=989e12)
    draft = ModelSize(name="draft", num_layers=16, num_kv_heads=8, head_dim=64, weights_bytes=profile.model.weights_bytes // 8)
    known = opened(replace(profile, system=system, drafters={"eagle3": draft}))
    assert known.prefill(OFF).token_s == pytest.approx(profile.model.weights_bytes / (989e12 * 0.75))
    assert known.prefill("eagle3").token_s == pytest.approx(1.125 * known.prefill(OFF).token_s, rel=1e-6)


def test_the_pool_is_smaller_beside_a_drafter_and_larger_on_a_larger_device():
    profile, draft = served_profile(), ModelSize(name="draft", num_layers=16, num_kv_heads=8, head_dim=64, weights_bytes=2 * 2**30)
    source = opened(replace(profile, drafters={"eagle3": draft}))
    assert 0 < source.kv_tokens("eagle3", 256, 8192) < source.kv_tokens(OFF, 256, 8192)
    sizes = Sizes(profile.model, {}, profile.system, 1)
    assert sizes.kv_tokens(OFF, 256, 8192) < Sizes(profile.model, {}, replace(profile.system, memory_bytes=2**37), 1).kv_tokens(OFF, 256, 8192)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_tokens_per_round_of_any_source_are_what_texts_can_be_drawn_with(spread):
    rng = np.random.default_rng(0)
    for asked in ([1.9, 2.9, 3.9], [1.5, 1.4, 1.3], [1.1, 1.9, 2.8], [2.0, 3.0, 4.0], *(1 + np.cumsum(rng.random((3, 4)), axis=1)).tolist()):
        found = feasible(list(asked), spread)
        assert all(b - a >= 0 for a, b in pairwise([1.0, *found]))
        Acceptance(tokens_per_round=(found,), spread=spread)


def test_tokens_per_round_that_texts_have_stay_as_they_are(source):
    assert feasible([1.75, 2.3125, 2.73], 0.5) == (1.75, 2.3125, 2.73)
    assert source.tokens_per_round("eagle3", [1, 2, 3], 2000) == pytest.approx([1.75, 2.3125, 2.734], rel=0.02)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Schedule:
    path = tmp_path_factory.mktemp("sources") / "served.json"
    save_serving_profile(measured((500, 8000)), path)
    return planner.schedule(path, output_len=128)


def test_rounds_of_a_schedule_are_those_of_its_curves(planned):
    source = ScheduleSource(planned, None)
    for curve in planned.curves:
        i = len(curve.concurrency) // 2
        held = np.array([curve.context_len + planned.output_len / 2])
        found = source.rounds(curve.setting.drafter, curve.setting.draft_len, np.array([curve.running_batch[i]]), held)
        assert found == pytest.approx(curve.round_s[i], rel=1e-3)
        at = source.running(curve.setting.drafter, curve.setting.draft_len, curve.concurrency[i], curve.context_len)
        assert at == pytest.approx(curve.running_batch[i])
    beyond = source.rounds(OFF, 0, np.array([100, 400]), np.array([600.0, 600.0]))
    assert beyond[1] > beyond[0]
    with pytest.raises(BadInput, match="the schedule says nothing of eagle3 K=40"):
        source.rounds("eagle3", 40, np.array([1]), np.array([600.0]))


def test_a_schedule_without_curves_is_refused(planned):
    with pytest.raises(BadInput, match="holds no curves"):
        ScheduleSource(replace(planned, curves=[]), None)


def test_a_plan_of_the_own_runtime_has_one_round_time(tmp_path):
    path = tmp_path / "own.json"
    save_profile(made_profile(drafters=[(DRAFT_MODEL, FullKV())]), path)
    plan = planner.plan(path, context_len=1024)
    source = PlanSource(plan)
    name, k = source.drafters[1], source.max_draft_len[source.drafters[1]]
    best = next(e for e in [plan.estimate, *plan.runners_up] if e.config == plan.best_speculative)
    assert source.rounds(name, k, np.array([1]), np.array([2000.0])) == pytest.approx(best.round_s.value)
    assert pass_s(source) == pytest.approx(plan.baseline.round_s.value)
    assert source.tokens_per_round(name, list(range(1, k + 1)), 1024)[-1] == pytest.approx(best.tokens_per_round.value)
    assert source.prefill(OFF).token_s * 1024 == pytest.approx(plan.baseline.ttft_s.value)
    assert source.kv_tokens(name, 1, 8192) >= 1024 + plan.workload.output_len + k
