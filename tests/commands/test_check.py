"""What a check makes of trials: the objective it compares by, and money and energy beside what was predicted."""

import pytest
from made import budgets, made_profile

from planner.commands.check import _arms, _report
from planner.plans import Trial
from planner.search.optimize import make_plan
from planner.specs import PLAIN, Sampler, Workload

WORKLOAD = Workload(context_len=1024, output_len=33, sampler=Sampler())


def checked(objective: str, price: float | None, joules: float | None = None):
    """A check whose texts all took what was predicted, the choice a tenth longer."""
    profile = made_profile(drafters=budgets(64, 256))
    plan = make_plan(profile, "0" * 64, WORKLOAD, objective=objective, memory_cap_bytes=None, price_per_hour=price)
    predicted = {estimate.config: estimate for estimate in (plan.estimate, plan.baseline, *plan.runners_up)}
    trials = []
    for config in _arms(plan):
        decode_s = 32 * predicted[config].tpot_s.value * (1.1 if config == plan.chosen else 1.0)
        trials += [
            Trial(
                config=config, text=f"{number}.txt@0+1024", output_len=33, prefill_s=0.1, start_s=predicted[config].ttft_s.value - 0.1, decode_s=decode_s,
                drafted=[0], accepted=[0], round_s=[decode_s], cache_bytes=1, peak_bytes=1, decode_joules=joules,
            )
            for number in range(3)
        ]  # fmt: skip
    return plan, _report(plan, "0" * 64, _arms(plan), trials, profile.environment, [], 1.0, None, None)


def test_a_plan_by_price_is_checked_by_price():
    plan, found = checked("price", 2.5)
    assert found.objective == "price" and found.best != plan.chosen and found.regret.value > 0
    assert found.regret.value == pytest.approx(checked("e2e", 2.5)[1].regret.value)  # one stream
    for cell in found.cells:
        measured, predicted = cell.measured_price_per_million_tokens, cell.predicted.price_per_million_tokens
        assert measured.value == pytest.approx(predicted.value) if cell.config != plan.chosen else measured.value > predicted.value * 1.01
        assert measured.value == pytest.approx(2.5 / 3600 * cell.measured_e2e_s.value / 33 * 1e6)


def test_what_has_no_price_and_was_not_counted_stays_empty():
    _, found = checked("e2e", None)
    assert all(cell.measured_price_per_million_tokens is None and cell.measured_joules_per_token is None for cell in found.cells)


def test_measured_energy_is_that_of_the_tokens_after_the_first():
    _, found = checked("tpot", None, joules=64.0)
    plain = next(cell for cell in found.cells if cell.config == PLAIN)
    assert plain.measured_joules_per_token.value == pytest.approx(2.0)
