"""planner sweep --trials: a part of the grid, chosen by a study, run for real on a tiny model; alone, resumed, and by several processes."""

import gc
import json
import multiprocessing
import pydoc_data.topics
import sys
from collections import Counter

import msgspec
import pytest

torch = pytest.importorskip("torch")

from tiny import write_model

import planner
from planner.cli import main
from planner.commands import sweep as sweep_module
from planner.commands.configs import grid
from planner.commands.sweep import coordinates
from planner.errors import BadInput, OutOfMemory
from planner.files import journal_path
from planner.plans import Sweep
from planner.profiler import device, trial
from planner.specs import PLAIN, DraftConfig, DrafterSpec, FullKV, Sampler, SparseKV, Workload

WORKLOAD = Workload(context_len=24, output_len=8, sampler=Sampler())
SELF_SPARSE = DrafterSpec(kind="self_sparse")
BUDGETS = [SparseKV(budget=budget, sink=2, recent=4) for budget in (8, 12)]
GRID = grid([SELF_SPARSE, DrafterSpec(kind="ngram")], BUDGETS, [1, 2])
NUM_TEXTS = 2
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_model(folder / "model")
    text = pydoc_data.topics.topics[sorted(pydoc_data.topics.topics)[3]]
    (folder / "text.txt").write_text(text[:4000], encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(device, "BUSY_SECONDS", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not survive a fork
    gc.freeze()  # every trial collects garbage: not what was imported here
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def swept(folder, out, **changes) -> Sweep:
    options = {"workload": WORKLOAD, "configs": GRID, "num_texts": NUM_TEXTS, "num_trials": 4, "seed": 1}
    options |= {"dtype": "float32", "device": "cpu", "execution": "eager", "out": out} | changes
    return planner.sweep(str(folder / "model"), [str(folder / "text.txt")], **options)


def keys(found: Sweep) -> Counter:
    return Counter((cell.config, trial.text) for cell in found.cells for trial in cell.trials)


@pytest.fixture
def storage(tmp_path) -> str:
    return f"{tmp_path}/study.journal"


def test_a_part_of_the_grid_is_run_and_the_rest_is_named(folder, tmp_path):
    found = swept(folder, tmp_path / "sweep.json")
    assert len(GRID) == 6 and len(found.cells) == 4 and found.cells[0].config == PLAIN
    assert set(keys(found).values()) == {1} and len(keys(found)) == 4 * NUM_TEXTS
    assert found.study.num_candidates == 7 and not found.study.failed
    assert set(found.study.left_out) | {cell.config for cell in found.cells} == {PLAIN, *GRID} and len(found.study.left_out) == 3
    assert found.best in [cell.config for cell in found.cells]


def test_as_many_trials_as_the_grid_has_run_what_the_grid_runs(folder, tmp_path):
    """Token for token: texts, seeds and lengths are those of the whole grid, though every configuration runs by itself."""
    workload = msgspec.structs.replace(WORKLOAD, sampler=Sampler(temperature=1.0), batch=2)
    whole, study = (
        {
            (t.config, t.text): (t.output_len, t.drafted, t.accepted, t.cache_bytes)
            for cell in swept(folder, tmp_path / f"{n}.json", num_trials=n, workload=workload, num_texts=3).cells
            for t in cell.trials
        }
        for n in (None, 99)
    )
    assert whole == study and len(whole) == 7 * 4  # 3 texts are 2 groups of 2


def test_each_prompt_is_prefilled_once(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "prefill", lambda *args, real=trial.prefill: calls.append(1) or real(*args))
    swept(folder, tmp_path / "sweep.json")
    assert len(calls) == NUM_TEXTS


class Interrupted(Exception):
    pass


class Stopping:
    """Ends a run after so many trials."""

    def __init__(self, after: int):
        self.left = after

    def stage(self, name, total):
        pass

    def advance(self, n=1):
        self.left -= n
        if self.left <= 0:
            raise Interrupted


def test_without_a_storage_the_journal_goes_on_in_the_middle_of_a_configuration(folder, tmp_path):
    out = tmp_path / "sweep.json"
    with pytest.raises(Interrupted):
        swept(folder, out, progress=Stopping(after=NUM_TEXTS * 2 + 1))
    before = journal_path(out).read_bytes()
    with pytest.raises(BadInput, match="go on with --resume"):
        swept(folder, out)
    found = swept(folder, out, resume=True)
    after = journal_path(out).read_bytes()
    assert after.startswith(before) and len(after.splitlines()) == 1 + 4 * NUM_TEXTS  # nothing measured twice
    assert set(keys(found).values()) == {1} and len(keys(found)) == 4 * NUM_TEXTS
    more = swept(folder, out, resume=True, num_trials=5)
    assert len(more.cells) == 5 and {cell.config for cell in found.cells} < {cell.config for cell in more.cells}


def test_a_study_in_a_storage_goes_on_by_itself(folder, tmp_path, storage):
    out = tmp_path / "sweep.json"
    with pytest.raises(Interrupted):
        swept(folder, out, storage=storage, progress=Stopping(after=NUM_TEXTS * 2 + 1))
    assert not journal_path(out).exists()
    found = swept(folder, out, storage=storage)
    assert len(found.cells) == 4 and set(keys(found).values()) == {1}
    again = swept(folder, tmp_path / "other.json", storage=storage, progress=Stopping(after=1))  # nothing is left to run
    assert again.cells == found.cells and again.study == found.study and again.minutes == found.minutes


def worker(folder, out, storage, log):
    real = sweep_module._Runs.__call__

    def run(self, configs, *args):
        with open(log, "a") as file:
            file.write(f"{coordinates(configs[0])}\n")
        return real(self, configs, *args)

    sweep_module._Runs.__call__ = run
    out.write_bytes(msgspec.json.encode(swept(folder, out, storage=storage)))


def test_two_processes_share_a_study_and_each_reports_all_of_it(folder, tmp_path, storage):
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    workers = [FORK.Process(target=worker, args=(folder, out, storage, tmp_path / "log")) for out in outs]
    for process in workers:
        process.start()
    for process in workers:
        process.join(100)
        assert process.exitcode == 0
    first, second = (msgspec.json.decode(out.read_bytes(), type=Sweep) for out in outs)
    assert first.cells == second.cells and first.study == second.study and first.best == second.best and len(first.cells) == 4
    ran = (tmp_path / "log").read_text().splitlines()
    assert len(ran) == len(set(ran)) == 4
    assert all("2 processes measured these" in found.warnings[-1] for found in (first, second))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, "seed, texts, prompts differ"),
        ({"workload": msgspec.structs.replace(WORKLOAD, output_len=9)}, "workload differs"),
        ({"configs": GRID[1:]}, "candidates differs"),
        ({"weights": "int8"}, "fingerprint, weights differ"),
    ],
)
def test_a_study_of_another_run_is_refused_by_name(folder, tmp_path, change, words):
    storage = str(tmp_path / "study.journal")
    swept(folder, tmp_path / "a.json", storage=storage, num_trials=2, num_texts=2)
    before = (tmp_path / "study.journal").read_bytes()
    with pytest.raises(BadInput, match=rf"study.journal belongs to another run \({words}\)"):
        swept(folder, tmp_path / "a.json", **{"storage": storage, "num_trials": 2, "num_texts": 2} | change)
    assert (tmp_path / "study.journal").read_bytes() == before


def test_a_configuration_that_memory_does_not_suffice_for_is_passed_over(folder, tmp_path, monkeypatch):
    def make_drafter(config, *args, real=trial.make_drafter, **options):
        if config.drafter.kind == "ngram":
            raise MemoryError
        return real(config, *args, **options)

    monkeypatch.setattr(trial, "make_drafter", make_drafter)
    found = swept(folder, tmp_path / "sweep.json", num_trials=99, num_texts=2)
    assert [one.config.drafter.kind for one in found.study.failed] == ["ngram"] * 2 and len(found.cells) == 5 and not found.study.left_out
    assert all("memory does not suffice" in one.reason for one in found.study.failed)


def test_where_memory_does_not_suffice_for_plain_decoding_nothing_can_be_compared(folder, tmp_path, monkeypatch):
    def make_drafter(*args, **options):
        raise MemoryError

    monkeypatch.setattr(trial, "make_drafter", make_drafter)
    with pytest.raises(OutOfMemory, match="memory does not suffice"):
        swept(folder, tmp_path / "sweep.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_trials": 1}, "--trials 1; raise it"),
        ({"num_trials": None, "storage": "x.journal"}, "got no --trials"),
        ({"storage": "x.journal", "resume": True}, "drop --resume"),
        ({"storage": "evict"}, "a draft model's keys is --kv-storage"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(folder, tmp_path, options, words):
    with pytest.raises(BadInput, match=words):
        swept(folder, tmp_path / "sweep.json", **options)


def test_coordinates_tell_configurations_apart():
    draft_model = DrafterSpec(kind="draft_model", path="a/b")
    configs = [PLAIN, *GRID, DraftConfig(drafter=draft_model, kv=FullKV(), draft_len=2), DraftConfig(drafter=draft_model, kv=BUDGETS[0], draft_len=2)]
    assert len({json.dumps(coordinates(config)) for config in configs}) == len(configs)
    assert coordinates(configs[1]) == {"drafter": "self_sparse", "selection": "window", "kv_budget": 8, "draft_len": 1}


def test_the_command_line_runs_a_study_and_says_what_it_left_out(folder, tmp_path, monkeypatch, capsys):
    words = "--isl 24 --osl 8 --kv-budgets 8,12,16 --sink 2 --recent 4 --drafter-weights full --draft-lens 1,2 --texts 2 --dtype float32"
    fixed = ["--model", str(folder / "model"), "--dataset", str(folder / "text.txt"), *words.split(), "--device", "cpu", "--execution", "eager", "-q"]
    out, storage = tmp_path / "sweep.json", str(tmp_path / "study.journal")

    monkeypatch.setattr(sys, "argv", ["planner", "sweep", *fixed, "-o", str(out), "--trials", "4", "--storage", storage])
    with pytest.raises(SystemExit) as end:
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert not end.value.code
    assert "4 of 9 configurations, chosen by expected improvement" in shown and "Left out" in shown
    found = msgspec.json.decode(out.read_bytes(), type=Sweep)
    assert len(found.cells) == 4 and len(found.study.left_out) == 5 and not journal_path(out).exists()
