"""Power from cells: the law that made them comes back, what nothing was counted for stays unknown, and intervals hold the truth."""

import msgspec
import numpy as np
import pytest
from made import NGRAM, SELF_SPARSE, budgets, linear_round_s, made_profile

from planner.cost.energy import COUNTER_ERROR, fit_power
from planner.search.objective import fit_models, predict
from planner.specs import NO_DRAFTER, PLAIN, DraftConfig, DrafterSpec, FullKV, Sampler, SparseKV, Workload

DRAFTERS = [*budgets(64, 256), (NGRAM, FullKV())]


def law(drafter, draft_len, context_len, batch):
    return {"none": 200.0, "self_sparse": 180.0, "ngram": 210.0}[drafter.kind] + 5.0 * draft_len + 10.0 * context_len / 1000 + 3.0 * (batch - 1)


def sparse(draft_len, budget=64):
    return DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=budget), draft_len=draft_len)


def workload(context_len=1024, batch=1):
    return Workload(context_len=context_len, output_len=33, sampler=Sampler(), batch=batch)


@pytest.mark.parametrize("context_len", [1024, 3000, 4096])
@pytest.mark.parametrize("config", [PLAIN, sparse(1), sparse(3, 128), sparse(4), DraftConfig(drafter=NGRAM, draft_len=2)], ids=str)
def test_a_power_law_comes_back_from_its_cells(config, context_len):
    found = fit_power(made_profile(drafters=DRAFTERS, watts=law)).watts(config, context_len)
    assert found.watts == pytest.approx(law(config.drafter, config.draft_len, context_len, 1))
    assert found.error == pytest.approx(COUNTER_ERROR, rel=1e-6)  # cells predict each other


def test_batches_have_fits_of_their_own_and_are_interpolated_between():
    profile = made_profile(batches={1: linear_round_s, 5: linear_round_s}, watts=law)
    power = fit_power(profile)
    assert [power.watts(sparse(2), 2000, batch).watts for batch in (1, 2, 5)] == pytest.approx([210, 213, 222])
    assert power.watts(sparse(2), 2000, 6) is None


def test_one_cell_of_a_drafter_holds_for_all_of_its_lengths():
    """Nothing says how its power grows; anything but the one value would be made up."""
    profile = made_profile(drafters=[(NGRAM, FullKV())], contexts=(1024,), draft_lens=(4,), watts=law)
    power = fit_power(profile)
    assert [power.watts(DraftConfig(drafter=NGRAM, draft_len=k), 1024).watts for k in (1, 4)] == pytest.approx([240.24, 240.24])
    assert power.watts(PLAIN, 1024).watts == pytest.approx(210.24)
    assert power.watts(PLAIN, 1024).error > COUNTER_ERROR  # no cell checks another


def test_what_was_not_counted_stays_unknown():
    profile = made_profile(watts=law)
    assert fit_power(made_profile()).watts(PLAIN, 1024) is None
    assert (
        fit_power(profile).watts(DraftConfig(drafter=DrafterSpec(kind="self_sparse", weights="int8"), kv=SparseKV(budget=64), draft_len=1), 1024)
        is None
    )
    alone = msgspec.structs.replace(profile, energy=[sample for sample in profile.energy if sample.drafter == NO_DRAFTER])
    models = fit_models(alone)
    assert predict(models, PLAIN, workload()).estimate.joules_per_token is not None
    assert predict(models, sparse(2), workload()).estimate.joules_per_token is None


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("config", [PLAIN, sparse(2)], ids=str)
def test_energy_per_token_is_power_times_the_device_time_of_a_token(config, batch):
    models = fit_models(made_profile(batches={1: linear_round_s, 4: linear_round_s}, watts=law))
    found = predict(models, config, workload(batch=batch)).estimate
    expected = law(config.drafter, config.draft_len, 1024, batch) * found.tpot_s.value / batch
    assert found.joules_per_token.value == pytest.approx(expected)
    assert found.joules_per_token.low < expected < found.joules_per_token.high
    width = np.log(found.joules_per_token.high / found.joules_per_token.low)
    assert width >= np.log(found.tpot_s.high / found.tpot_s.low)  # what is not known of the time is not known of the energy


def test_scattered_cells_widen_the_interval_and_it_holds_the_truth():
    held, widths = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scattered = made_profile(drafters=DRAFTERS, watts=lambda *cell, rng=rng: law(*cell) * (1 + 0.1 * rng.standard_normal()))
        found = fit_power(scattered).watts(sparse(3), 1024)
        truth = law(SELF_SPARSE, 3, 1024, 1)
        held += abs(found.watts / truth - 1) < 1.645 * found.error
        widths.append(found.error)
    assert held >= 34  # of 40, at 90 %
    assert 0.05 < np.median(widths) < 0.25
