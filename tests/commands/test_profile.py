"""The whole way on a real model, tiny: profile, save, load, plan, check, and a sweep that is interrupted and resumed."""

import math
import pydoc_data.topics
from collections import Counter
from functools import cache

import msgspec
import pytest

import planner
from planner.commands.profile import measure
from planner.commands.profile_settings import Settings, latency_cells
from planner.commands.session import open_session
from planner.cost.memory import drafter_weights_bytes, full_cache_bytes
from planner.errors import BadInput, PlannerError
from planner.files import journal_path
from planner.measurements import load_profile, save_profile
from planner.plans import load_plan, save_plan
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV, Workload

pytestmark = pytest.mark.model

MODEL = "smollm2"
POLICIES = [SparseKV(budget=40, sink=4, recent=8), SparseKV(budget=64, sink=4, recent=8, selection="chunk")]
SELF_SPARSE = DrafterSpec(kind="self_sparse", weights="int8")
SETTINGS = Settings(
    contexts=[96], samplers=[Sampler(temperature=0.0), Sampler(temperature=1.0)], policies=POLICIES, max_draft_len=2, num_texts=4, output_len=24,
    batches=[3, 1], drafters=[SELF_SPARSE, DrafterSpec(kind="ngram")],
)  # fmt: skip


class Interrupted(Exception):
    pass


class Listener:
    """Counts what a progress bar would show, and can raise after so many steps of a stage."""

    def __init__(self, stop_in: str | None = None, after: int = 0):
        self.stages, self.done = {}, Counter()
        self._stop_in, self._after = stop_in, after

    def stage(self, name: str, total: int) -> None:
        self.now, self.stages[name] = name, total

    def advance(self, n: int = 1) -> None:
        self.done[self.now] += n
        if self.now == self._stop_in and self.done[self.now] >= self._after:
            raise Interrupted


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two files of prose that every Python carries."""
    pytest.importorskip("torch")
    from planner.runtime.weights import default_model_path

    try:
        default_model_path()
    except (PlannerError, ImportError, OSError) as error:
        pytest.skip(f"the default model is absent: {error}")
    folder = tmp_path_factory.mktemp("texts")
    topics = sorted(pydoc_data.topics.topics)
    for name, part in (("first.txt", topics[:6]), ("second.txt", topics[6:12])):
        (folder / name).write_text("\n\n".join(pydoc_data.topics.topics[topic] for topic in part)[:12_000], encoding="utf-8")
    return [str(folder)]


@pytest.fixture
def loaded_once(monkeypatch):
    """check and sweep share a model: loading it takes longer than they do."""
    for verb in ("check", "sweep"):
        monkeypatch.setattr(f"planner.commands.{verb}.open_session", shared_session)


@cache
def shared_session(model: str, **options):
    return open_session(model, **options)


@pytest.fixture(scope="module")
def measured(dataset, tmp_path_factory):
    """A profile that was measured, and the file it was saved in."""
    listener = Listener()
    profile = planner.profile(MODEL, dataset, settings=SETTINGS, dtype="float32", device="cpu", progress=listener)
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    save_profile(profile, path)
    return profile, path, listener


@pytest.fixture(scope="module")
def planned(measured, tmp_path_factory):
    _, path, _ = measured
    plan = planner.plan(path, temperature=1.0, output_len=8, objective="tpot")
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(plan, out)
    return plan, out


def test_a_profile_is_complete_and_survives_the_disk(measured):
    profile, path, listener = measured
    assert load_profile(path) == profile
    assert len(profile.texts) == 4 * 2 and len(profile.acceptance) == len(profile.texts) * (len(POLICIES) + 1)
    assert {sample.kv for sample in profile.acceptance if sample.drafter == SELF_SPARSE} == set(POLICIES)
    assert not profile.failures
    assert all(listener.done[name] == total for name, total in listener.stages.items())
    assert {"rounds, pass 4 of 4", "prompts at 96 tokens", "texts at 96 tokens, greedy"} <= set(listener.stages)
    drift = [sample for sample in profile.rounds if sample.role == "drift"]
    assert len(drift) == 1 and drift[0].draft_len == 0 and drift[0].batch == 1


def test_a_profile_times_rounds_at_every_batch(measured):
    from planner.profiler.latency import PASSES, ROUNDS_PER_PASS, rounds_room

    profile, _, listener = measured
    assert listener.stages["rounds, pass 1 of 4"] == 2  # a step for each batch
    cells = {(s.batch, s.drafter, s.kv, s.draft_len) for s in profile.rounds}
    assert cells == {(batch, cell.drafter, cell.kv, cell.draft_len) for batch in (1, 3) for cell in latency_cells(SETTINGS, batch)}
    assert all(len(s.draft_s) == PASSES * ROUNDS_PER_PASS for s in profile.rounds if s.role == "cell")
    one, three = profile.memory
    assert (one.batch, three.batch) == (1, 3)
    weights_bytes = profile.weights_bytes + drafter_weights_bytes(profile.target, "float32", SELF_SPARSE, "full")
    ground = (one.known_bytes - weights_bytes) // profile.target.kv_bytes_per_token("float32")
    assert ground == 96 + rounds_room(2)
    assert three.known_bytes - one.known_bytes == full_cache_bytes(profile.target, "float32", capacity=ground, batch=3)
    assert all(sample.base_bytes + sample.peak_bytes >= sample.known_bytes for sample in profile.memory)


def test_a_batch_needs_fewer_cells():
    assert [cell.draft_len for cell in latency_cells(SETTINGS._replace(max_draft_len=1))] == [0, 1, 1, 1]
    settings = SETTINGS._replace(max_draft_len=8)
    assert [cell.draft_len for cell in latency_cells(settings)] == [0, 8, 1, 2, 4, 8, 1, 4, 8]
    assert [cell.draft_len for cell in latency_cells(settings, 4)] == [0, 8, 1, 4, 8, 1, 4, 8]


def test_every_selection_is_timed_once_and_none_with_a_refresh():
    window, snapkv, retrieval = (SparseKV(budget=64, selection=name) for name in ("window", "snapkv", "retrieval"))
    policies = [
        window,
        snapkv,
        SparseKV(budget=128, selection="snapkv"),
        SparseKV(budget=64, selection="retrieval", refresh=16),
        SparseKV(budget=256),
    ]
    settings = SETTINGS._replace(policies=policies, batches=[1, 4], contexts=[512])
    assert [cell.kv for cell in latency_cells(settings)[-2:]] == [snapkv, retrieval]
    assert {cell.kv for cell in latency_cells(settings, 4)} == {PLAIN.kv, window, SparseKV(budget=256)}


@pytest.mark.parametrize(
    ("batches", "match"), [([], "at least 1"), ([0, 4], "at least 1"), ([1, 10**7], "largest batch that fits is .*lower --batches")]
)
def test_batches_that_cannot_be_timed_are_refused_before_anything_runs(dataset, batches, match):
    session = shared_session(MODEL, dtype="float32", device="cpu")
    with pytest.raises(BadInput, match=match):
        measure(MODEL, session, dataset, settings=SETTINGS._replace(batches=batches), progress=Listener("none"), began=0.0)


def test_every_text_of_a_profile_is_a_stretch_of_its_own(measured):
    profile, _, _ = measured
    for sampler in profile.samplers:
        own = [text for text in profile.texts if text.sampler == sampler]
        assert len({(text.source, text.offset) for text in own}) == len(own) == 4


def test_a_plan_comes_out_of_a_real_profile(planned):
    plan, out = planned
    assert load_plan(out) == plan
    assert plan.num_candidates == 1 + 2 * (len(POLICIES) + 1)
    assert plan.estimate.tpot_s.value <= plan.baseline.tpot_s.value
    assert all(math.isfinite(x) and x > 0 for x in (plan.estimate.tpot_s.low, plan.estimate.tpot_s.high))


def test_a_sampler_that_was_not_profiled_is_refused(measured):
    with pytest.raises(BadInput, match="profiled for greedy; temperature 1"):
        planner.plan(measured[1], temperature=0.5)


def test_a_check_runs_the_choice_beside_off_on_unseen_texts(planned, dataset, loaded_once):
    plan, out = planned
    listener = Listener()
    found = planner.check(out, dataset, num_texts=2, device="cpu", progress=listener)
    assert listener.done["check"] == listener.stages["check"] == 2 * len(found.cells)
    assert {cell.config for cell in found.cells} == {PLAIN, plan.chosen, *(estimate.config for estimate in plan.runners_up)}
    for cell in found.cells:
        assert len(cell.trials) == 2
        for trial in cell.trials:
            source, _, stretch = trial.text.rpartition("@")
            begin, length = map(int, stretch.split("+"))
            for seen in plan.seen_texts:
                other, _, rest = seen.rpartition("@")
                start, extent = map(int, rest.split("+"))
                assert source != other or begin + length <= start or start + extent <= begin
            assert sum(trial.accepted) + len(trial.accepted) >= trial.output_len - 1  # a stop token cuts a round
    assert found.regret.low <= found.regret.value <= found.regret.high


def test_a_plan_for_a_batch_is_checked_with_as_many_streams(measured, dataset, tmp_path, loaded_once):
    """Two texts are asked for, three run: a batch of two would be another one."""
    plan = planner.plan(measured[1], temperature=1.0, output_len=8, batch=3, objective="tpot")
    assert plan.workload.batch == 3
    save_plan(plan, tmp_path / "plan.json")
    listener = Listener()
    found = planner.check(tmp_path / "plan.json", dataset, num_texts=2, device="cpu", progress=listener)
    assert any("3 texts ran in 1 group of 3, which share" in warning for warning in found.warnings)
    assert found.num_texts == 3 and listener.done["check"] == listener.stages["check"] == 3 * len(found.cells)
    for cell in found.cells:
        assert [trial.batch for trial in cell.trials] == [3] * 3
        longest = max((trial.round_s for trial in cell.trials), key=len)
        assert all(trial.round_s == longest[: len(trial.round_s)] for trial in cell.trials)
        assert cell.predicted.config == cell.config and cell.measured_round_s > 0
        assert cell.measured_tokens_per_round == 1 if cell.config == PLAIN else cell.measured_tokens_per_round >= 1
    with pytest.raises(BadInput, match="at batch 1, 3, got 4; profile with `planner profile --batches 1,3,4`"):
        planner.plan(measured[1], temperature=1.0, output_len=8, batch=4)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_interrupted_sweep_goes_on_where_it_stopped(dataset, tmp_path, loaded_once, batch):
    """In a batch of 2 it stops in the middle of a group, which runs again; the half that is known is not written twice."""
    configs = [DraftConfig(drafter=SELF_SPARSE, kv=POLICIES[0], draft_len=k) for k in (1, 2)]
    settings = {
        "workload": Workload(context_len=96, output_len=8, sampler=Sampler(temperature=1.0), batch=batch), "configs": configs, "num_texts": 2,
        "dtype": "float32",
        "device": "cpu", "out": tmp_path / "sweep.json",
    }  # fmt: skip
    with pytest.raises(Interrupted):
        planner.sweep(MODEL, dataset, progress=Listener("sweep", after=3), **settings)
    journal = journal_path(tmp_path / "sweep.json")
    before = journal.read_bytes().splitlines()[1:]
    assert 3 <= len(before) < 6

    with pytest.raises(BadInput, match="another run"):
        planner.sweep(MODEL, dataset, resume=True, **(settings | {"seed": 7}))
    found = planner.sweep(MODEL, dataset, resume=True, **settings)
    after = journal.read_bytes().splitlines()[1:]
    assert after[: len(before)] == before and len(after) == 6  # nothing measured twice
    assert [cell.config for cell in found.cells] == [PLAIN, *configs]
    keys = [(trial.text, trial.config) for cell in found.cells for trial in cell.trials]
    assert len(keys) == len(set(keys)) == 6
    finished = [msgspec.json.decode(line)["trial"]["decode_s"] for line in before]
    assert set(finished) <= {trial.decode_s for cell in found.cells for trial in cell.trials}


def test_an_interrupted_profile_goes_on_where_it_stopped(dataset, tmp_path, monkeypatch):
    from planner.profiler.latency import PASSES, ROUNDS_PER_PASS

    monkeypatch.setattr("planner.commands.profile.open_session", shared_session)
    out = tmp_path / "profile.json"
    settings = SETTINGS._replace(policies=POLICIES[:1], max_draft_len=1, output_len=16, batches=[2])
    options = {"settings": settings, "dtype": "float32", "device": "cpu", "out": out}
    with pytest.raises(Interrupted):
        planner.profile(MODEL, dataset, progress=Listener("texts at 96 tokens, temperature 1", after=2), **options)
    before = journal_path(out).read_bytes().splitlines()
    assert len(before) == 1 + 1 + 4 + 1 + 1  # header, a pass over the rounds, the greedy texts, another pass, a text

    with pytest.raises(BadInput, match="another run"):
        planner.profile(MODEL, dataset, resume=True, **(options | {"settings": settings._replace(seed=7)}))
    found = planner.profile(MODEL, dataset, resume=True, **options)
    after = journal_path(out).read_bytes().splitlines()
    assert after[: len(before)] == before and len(after) == 1 + 4 + 2 * 4  # nothing measured twice
    earlier = [entry["text"] for entry in map(msgspec.json.decode, before) if entry.get("type") == "text"]
    assert msgspec.to_builtins(found.texts[: len(earlier)]) == earlier
    assert len(found.texts) == 4 * 2
    assert all(len(sample.draft_s) == PASSES * ROUNDS_PER_PASS for sample in found.rounds if sample.role == "cell")
    assert {sample.batch for sample in found.rounds} == {2} and max(sample.draft_len for sample in found.rounds) == 1
    with pytest.raises(BadInput, match="another run"):
        planner.profile(MODEL, dataset, resume=True, **(options | {"settings": settings._replace(batches=[1])}))
