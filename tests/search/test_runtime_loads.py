"""A profile of the own runtime as loads: it agrees with single plans at the profiled batches, and between them."""

import numpy as np
import pytest
from made import FIFTH, NGRAM, budgets, made_profile

from planner.errors import BadInput
from planner.schedules import Setting
from planner.search.grid import Question
from planner.search.objective import fit_models, objective_s, predict
from planner.search.optimize import candidates
from planner.search.runtime_loads import RuntimeLoads
from planner.search.schedule import make_schedule
from planner.specs import PLAIN, FullKV, Sampler, SparseKV, Workload

ABOUT = {"profile_sha256": "0" * 64, "model": "tiny", "system": "made", "source": "own runtime"}


def law(batch):
    """Wide passes cost more the more streams there are, and drafting from a large budget costs more than from a small one."""

    def round_s(kv, draft_len, context_len):
        draft_s = draft_len * (2e-3 + 4e-6 * batch * kv.read(context_len)) if isinstance(kv, SparseKV) else 1e-4 * (draft_len > 0)
        return draft_s, max(10e-3, 1e-3 * batch * (draft_len + 1)) + 1e-6 * context_len, 1e-4

    return round_s


@pytest.fixture(scope="module")
def profile():
    return made_profile(
        batches={batch: law(batch) for batch in (1, 4, 16)}, drafters=[*budgets(64, 256), (NGRAM, FullKV())],
        accept=lambda kv, context_len, number: (2 if isinstance(kv, FullKV) else 3 if kv.budget == 64 else 4) * FIFTH,
    )  # fmt: skip


def loads_of(profile, concurrency=(1, 16), **more):
    return RuntimeLoads(profile, Sampler(), 33, concurrency, **more)


def test_at_a_profiled_batch_it_says_what_a_single_plan_says(profile):
    loads, models = loads_of(profile), fit_models(profile)
    for batch in (1, 4, 16):
        workload = Workload(context_len=1024, output_len=33, sampler=Sampler(), batch=batch)
        for config in [PLAIN, *candidates(models)]:
            name = config.drafter.kind
            kv = config.kv if isinstance(config.kv, SparseKV) else None
            place = loads.settings.index(Setting(drafter=name, draft_len=config.draft_len, kv=kv))
            found = loads.predict(np.array([place]), np.array([batch]), np.array([1024]))
            prediction = predict(models, config, workload)
            assert found.tpot_s[0] == pytest.approx(prediction.estimate.tpot_s.value)
            assert 1 / found.output_tokens_per_s[0] == pytest.approx(objective_s(prediction, "price"))


def test_between_batches_it_is_close_to_a_single_plan(profile):
    loads, models = loads_of(profile), fit_models(profile)
    every = np.arange(len(loads.settings))
    for batch in (2, 7, 12):
        found = loads.predict(every, np.full(len(every), batch), np.full(len(every), 1024))
        for place, setting in enumerate(loads.settings):
            config = next((c for c in [PLAIN, *candidates(models)] if _is(c, setting)), None)
            if config is not None:
                exact = predict(models, config, Workload(context_len=1024, output_len=33, sampler=Sampler(), batch=batch))
                assert found.tpot_s[place] == pytest.approx(exact.estimate.tpot_s.value, rel=0.03)


def _is(config, setting):
    kv = config.kv if isinstance(config.kv, SparseKV) else None
    return (config.drafter.kind, config.draft_len, kv) == (setting.drafter, setting.draft_len, setting.kv)


def test_the_schedule_chooses_what_single_plans_choose_or_loses_almost_nothing(profile):
    found, models = make_schedule(loads_of(profile), Question(1, 16, [1024], "throughput"), **ABOUT), fit_models(profile)
    configs = [PLAIN, *candidates(models)]
    for row in found.schedule:
        for batch in range(row.concurrency_from, row.concurrency_to + 1):
            workload = Workload(context_len=1024, output_len=33, sampler=Sampler(), batch=batch)
            seconds = [objective_s(predict(models, config, workload), "price") for config in configs]
            own = next(i for i, config in enumerate(configs) if _is(config, row.setting))
            assert seconds[own] <= 1.02 * min(seconds)
    assert any(isinstance(row.kv, SparseKV) for row in found.schedule) and len(found.schedule) > 1
    assert found.schedule[0].concurrency_from == 1 and found.schedule[-1].concurrency_to == 16


def test_beyond_the_profiled_batches_there_is_no_answer(profile):
    with pytest.raises(BadInput, match="batch 1, 4, 16, got 17"):
        loads_of(profile, (1, 17))
    assert make_schedule(loads_of(profile, (5, 9)), Question(5, 9, [1024], "e2e"), **ABOUT).schedule[0].concurrency_from == 5


def test_a_memory_cap_holds_at_every_load(profile):
    free = loads_of(profile)
    off = predict(fit_models(profile), PLAIN, Workload(context_len=1024, output_len=33, sampler=Sampler(), batch=16)).estimate.memory_bytes.value
    tight = loads_of(profile, memory_cap_bytes=int(off) + 20_000)
    every = np.arange(len(free.settings))
    runs = ~np.isnan(tight.predict(every, np.full(len(every), 16), np.full(len(every), 1024)).tpot_s)
    assert runs[0] and not runs.all()
    found = make_schedule(tight, Question(1, 16, [1024], "throughput"), **ABOUT)
    last = found.schedule[-1].setting
    assert runs[free.settings.index(last)]
    with pytest.raises(BadInput, match="plain decoding alone"):
        make_schedule(loads_of(profile, memory_cap_bytes=int(off) - 1), Question(1, 16, [1024], "throughput"), **ABOUT)


def test_an_idle_drafter_costs_what_off_does(profile):
    loads = loads_of(profile)
    idle = [i for i, setting in enumerate(loads.settings) if setting.idle]
    assert idle and any("idle drafter was not timed" in note for note in loads.notes)
    found = loads.predict(np.array([0, *idle]), np.full(1 + len(idle), 4), np.full(1 + len(idle), 1024))
    assert len(set(found.tpot_s)) == 1
