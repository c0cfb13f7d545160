"""Long runs survive: killed, stopped, out of memory or out of disk, they lose at most what was being measured, and --resume goes on."""

import errno
import json
import os
import pydoc_data.topics
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest

torch = pytest.importorskip("torch")

from tiny import write_model

import planner
from planner.commands.flags import Asked
from planner.commands.profile_settings import Settings
from planner.errors import BadInput, Unfinished
from planner.files import journal_path
from planner.measurements import load_profile, save_profile
from planner.plans import Sweep
from planner.specs import DrafterSpec, Sampler, SparseKV, Workload

KILLS = 20
NUM_TEXTS = 18  # more than a group
PROFILE = shlex.split(
    "profile --contexts 24,40 --temperatures 0,1 --kv-budgets 12,16 --sink 2 --recent 4 --selections window --drafter-weights full "
    f"--max-draft-len 2 --texts {NUM_TEXTS} --output-len 16 --dtype float32 --device cpu --execution eager --quiet"
)
SHORT = shlex.split(
    "profile --contexts 24 --temperatures 1 --kv-budgets 12 --sink 2 --recent 4 --selections window --drafter-weights full --max-draft-len 1 "
    "--texts 6 --output-len 16 --dtype float32 --device cpu --execution eager --quiet"
)
SWEEP = shlex.split(
    "sweep --isl 24 --osl 12 --kv-budgets 12 --sink 2 --recent 4 --draft-lens 1,2 --texts 4 --dtype float32 --device cpu --execution eager --quiet"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survive")
    write_model(folder / "model")
    topics = sorted(pydoc_data.topics.topics)
    for name, topic in (("first.txt", topics[3]), ("second.txt", topics[4])):
        (folder / name).write_text(pydoc_data.topics.topics[topic][:4000], encoding="utf-8")
    return folder


class Forks:
    """Runs of the command line, one at a time."""

    def __init__(self, folder: Path):
        self._stderr = folder / "stderr"
        self._fixed = ["--model", str(folder / "model"), "--dataset", str(folder / "first.txt"), "--dataset", str(folder / "second.txt")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(Path(__file__).parents[1] / "forked.py")]
        self._server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def begin(self, argv: list[str], out: Path, **limits) -> int:
        """The id of a process that has just begun."""
        order = {"argv": [*argv, *self._fixed, "--out", str(out)], "stderr": str(self._stderr)} | limits
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def end(self) -> tuple[int, str]:
        """How it ended (a signal is negative), and what it wrote on stderr."""
        return int(self._server.stdout.readline()), self._stderr.read_text()

    def held(self, argv: list[str], out: Path, after: int) -> int:
        """The id of a process that waits behind its so many-th addition to the journal."""
        before = max(1, len(whole_lines(journal_path(out))))
        pid = self.begin(argv, out, hold_after=after)
        while len(whole_lines(journal_path(out))) < before + after:
            time.sleep(0.001)
        return pid

    def whole(self, argv: list[str], out: Path, **limits) -> tuple[int, str]:
        self.begin(argv, out, **limits)
        return self.end()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(30)


@pytest.fixture(scope="module")
def forks(folder):
    forks = Forks(folder)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def uninterrupted(forks, folder):
    """A profile that nobody disturbed."""
    assert forks.whole(PROFILE, folder / "whole.json")[0] == 0
    assert not journal_path(folder / "whole.json").exists()
    return load_profile(folder / "whole.json")


@pytest.fixture(scope="module")
def undisturbed(forks, folder):
    """The same for the short one."""
    assert forks.whole(SHORT, folder / "short.json")[0] == 0
    return load_profile(folder / "short.json")


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def kill_at_random(forks: Forks, argv: list[str], out: Path, random: random.Random, number: int = signal.SIGKILL, most: int = 9) -> bool:
    """Begin or go on, and kill after some more lines of the journal and a moment; False if it was through before."""
    journal = journal_path(out)
    goal, pause_s = len(whole_lines(journal)) + random.randrange(most), random.uniform(0, 0.05)
    pid = forks.begin([*argv, *["--resume"] * journal.exists()], out)
    while len(whole_lines(journal)) < goal and psutil.pid_exists(pid):
        time.sleep(0.001)
    time.sleep(pause_s)
    with suppress(ProcessLookupError):
        os.kill(pid, number)
    code, error = forks.end()
    assert code in (0, -number), error
    return code == -number


def chain_of_kills(forks, argv, folder, kills, seed, most):
    """Kill and go on until so many kills are done, with one output after the other; then each is brought to its end."""
    rng, outs, killed = random.Random(seed), [folder / "0.json"], 0
    while killed < kills:
        before = whole_lines(journal_path(outs[-1]))
        if kill_at_random(forks, argv, outs[-1], rng, most=most):
            killed += 1
            after = whole_lines(journal_path(outs[-1]))
            assert after[: len(before)] == before or (not after and outs[-1].exists())  # nothing that was finished is lost
        if outs[-1].exists() and not journal_path(outs[-1]).exists():
            outs.append(folder / f"{len(outs)}.json")
    for out in outs:
        if not out.exists() or journal_path(out).exists():
            assert forks.whole([*argv, *["--resume"] * journal_path(out).exists()], out)[0] == 0
        assert not journal_path(out).exists()
    return outs


def round_cells(profile) -> Counter:
    """Rounds timed by cell."""
    return Counter({(s.drafter, s.kv, s.draft_len, s.context_len, s.batch, s.role): len(s.draft_s) for s in profile.rounds})


def check_same(found, whole) -> None:
    """What was written and replayed to the byte, what was timed by cell."""
    assert found.texts == whole.texts and found.acceptance == whole.acceptance
    assert round_cells(found) == round_cells(whole)
    assert [(s.context_len, len(s.seconds)) for s in found.prefill] == [(s.context_len, len(s.seconds)) for s in whole.prefill]
    assert [(s.context_len, s.batch, s.known_bytes) for s in found.memory] == [(s.context_len, s.batch, s.known_bytes) for s in whole.memory]
    assert found.failures == whole.failures == []


def test_a_profile_killed_at_20_random_moments_ends_as_if_nothing_had_happened(forks, uninterrupted, tmp_path):
    assert len(uninterrupted.texts) == NUM_TEXTS * 2 * 2 and len(uninterrupted.acceptance) == len(uninterrupted.texts) * 3
    outs = chain_of_kills(forks, PROFILE, tmp_path, KILLS, seed=1, most=12)
    for out in outs:
        check_same(load_profile(out), uninterrupted)


def test_a_sweep_killed_at_random_moments_runs_every_trial_once(forks, tmp_path):
    outs = chain_of_kills(forks, SWEEP, tmp_path, 6, seed=2, most=8)
    assert forks.whole(SWEEP, tmp_path / "whole.json")[0] == 0
    trials = []
    for out in [tmp_path / "whole.json", *outs]:
        found = msgspec.json.decode(out.read_bytes(), type=Sweep)
        trials.append([(t.config, t.text, t.output_len, t.drafted, t.accepted) for cell in found.cells for t in cell.trials])
    assert len(trials[0]) == 4 * (1 + 2 + 2)
    assert all(sorted(map(repr, other)) == sorted(map(repr, trials[0])) for other in trials)


# ---- asked to stop


@pytest.mark.parametrize(
    ("number", "argv", "code", "word"),
    [(signal.SIGINT, SHORT, 130, "Ctrl-C"), (signal.SIGTERM, SHORT, 143, "SIGTERM"), (signal.SIGINT, SWEEP, 130, "Ctrl-C")],
)
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(forks, tmp_path, number, argv, code, word):
    out = tmp_path / "out.json"
    pid = forks.held(argv, out, after=3)
    os.kill(pid, number)
    assert forks.end() == (code, f"error: stopped by {word}; what was finished is in {journal_path(out)}, --resume goes on from there\n")
    assert forks.whole([*argv, "--resume"], out)[0] == 0


# ---- a second run with the same output


def test_a_second_run_with_the_same_output_is_refused_while_the_first_one_runs(forks, folder, tmp_path):
    out = tmp_path / "out.json"
    pid = forks.held(SHORT, out, after=2)
    try:
        with pytest.raises(BadInput, match="another process is writing the journal"):
            profiled(folder, out)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert forks.end()[0] == -signal.SIGKILL
    assert forks.whole([*SHORT, "--resume"], out)[0] == 0


def test_killed_between_saving_and_tidying_up_both_ways_on_lose_nothing(forks, undisturbed, tmp_path):
    out = tmp_path / "out.json"
    os.kill(forks.held(SHORT, out, after=3), signal.SIGKILL)
    forks.end()
    save_profile(undisturbed, out)
    code, error = forks.whole(SHORT, out)  # the same again would begin from nothing
    assert code == 2 and "finished pieces of an interrupted run; go on with --resume, or delete it" in error and error.count("\n") == 1
    assert load_profile(out) == undisturbed and journal_path(out).exists()
    assert forks.whole([*SHORT, "--resume"], out)[0] == 0
    check_same(load_profile(out), undisturbed)


# ---- a full disk


def test_a_profile_whose_disk_fills_up_ends_in_one_line_and_goes_on_when_there_is_room(forks, undisturbed, tmp_path):
    out = tmp_path / "out.json"
    code, error = forks.whole(SHORT, out, max_file_bytes=6000)
    journal = journal_path(out)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: cannot write the journal {journal}: File too large; make room on its disk; ")
    assert f"what was finished is in {journal}, --resume goes on from there" in error
    before = journal.read_bytes()
    assert 2000 < len(before) <= 6000 and before.endswith(b"\n")
    code, error = forks.whole([*SHORT, "--resume"], out, max_file_bytes=len(before) + 1000)
    assert code == 2 and journal.read_bytes().startswith(before)
    assert forks.whole([*SHORT, "--resume"], out)[0] == 0
    check_same(load_profile(out), undisturbed)


def test_a_profile_that_cannot_be_saved_stays_in_its_journal(folder, monkeypatch, tmp_path):
    """Where the profile itself finds no room: the run is through, and so is its journal."""
    from planner.cli.stopping import journaled

    settings, out = SETTINGS._replace(num_texts=4), tmp_path / "out.json"
    found = profiled(folder, out, settings=settings)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(Unfinished, match=f"cannot write {out}: No space left on device") as raised, journaled(out):
        patch.setattr("planner.files.os.fsync", full)
        save_profile(found, out)
    assert raised.value.__notes__ == [f"what was finished is in {journal_path(out)}, --resume goes on from there"]
    assert not out.exists()
    with journaled(out):
        save_profile(profiled(folder, out, settings=settings, resume=True), out)
    assert load_profile(out).acceptance == found.acceptance and os.listdir(tmp_path) == ["out.json"]


# ---- out of memory

SETTINGS = Settings(
    contexts=[24], samplers=[Sampler(temperature=1.0)], policies=[SparseKV(budget=12, sink=2, recent=4), SparseKV(budget=16, sink=2, recent=4)],
    drafters=[DrafterSpec(kind="self_sparse"), DrafterSpec(kind="ngram")], max_draft_len=2, num_texts=10, output_len=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("planner.profiler.device.BUSY_SECONDS", 0.0)


def profiled(folder: Path, out: Path | None = None, **changes):
    options = {"settings": SETTINGS, "dtype": "float32", "device": "cpu", "execution": "eager", "out": out}
    options |= changes
    model, dataset = options.pop("model", folder / "model"), options.pop("dataset", [str(folder / "first.txt")])
    return planner.profile(str(model), dataset, **options)


def out_of_memory():
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


def test_a_group_that_does_not_fit_is_halved_and_its_memory_given_back_first(folder, monkeypatch, tmp_path):
    from planner.profiler import acceptance
    from planner.runtime.model import Transformer

    real_write, real_cache, groups, failed = acceptance.write_texts, Transformer.new_cache, [], []

    def write(model, cache, prompts, *args, **options):
        groups.append(len(prompts))
        if len(prompts) > 4:
            failed.append(weakref.ref(cache))
            out_of_memory()
        return real_write(model, cache, prompts, *args, **options)

    def new_cache(self, capacity, batch=1):
        assert all(cache() is None for cache in failed)
        return real_cache(self, capacity, batch)

    whole = profiled(folder)
    monkeypatch.setattr(acceptance, "write_texts", write)
    monkeypatch.setattr(Transformer, "new_cache", new_cache)
    found = profiled(folder, tmp_path / "out.json")
    assert groups == [10, 5, 2, 2, 2, 2, 2] and len(failed) == 2
    told = [warning for warning in found.warnings if "memory did not suffice" in warning]
    assert [warning.split(":")[0] for warning in told] == [f"the memory did not suffice for {n} texts side by side" for n in (10, 5)]
    assert [(t.source, t.offset) for t in found.texts] == [(t.source, t.offset) for t in whole.texts]
    assert [(s.text, s.drafter, s.kv) for s in found.acceptance] == [(s.text, s.drafter, s.kv) for s in whole.acceptance]
    again = profiled(folder, tmp_path / "out.json", resume=True)  # the warnings are in the journal
    assert [warning for warning in again.warnings if "memory did not suffice" in warning] == told and again.acceptance == found.acceptance


def test_one_text_that_does_not_fit_ends_the_profile_in_one_line(folder, monkeypatch, tmp_path):
    from planner.profiler import acceptance

    monkeypatch.setattr(acceptance, "write_texts", lambda *args, **options: out_of_memory())
    with pytest.raises(Unfinished, match="memory does not suffice for one text at context 24; .*lower --contexts"):
        profiled(folder, tmp_path / "out.json")
    assert len(whole_lines(journal_path(tmp_path / "out.json"))) == 2  # the first pass over the rounds


def test_another_error_is_not_taken_for_a_lack_of_memory(folder, monkeypatch):
    from planner.profiler import acceptance

    def fail(*args, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(acceptance, "write_texts", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        profiled(folder)


def test_a_replay_that_runs_out_of_memory_is_reported_and_missing_on_that_text_alone(folder, monkeypatch, tmp_path):
    from planner.runtime.drafters.self_sparse import SelfSparseDrafter

    real, calls = SelfSparseDrafter.replay, Counter()

    def replay(self, text, draft_len):
        calls[self.policy.budget] += 1
        if self.policy.budget == 16 and calls[16] in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, text, draft_len)

    whole = profiled(folder)
    monkeypatch.setattr(SelfSparseDrafter, "replay", replay)
    found = profiled(folder, tmp_path / "out.json")
    lost = {(1, 16), (4, 16)}
    assert found.texts == whole.texts
    assert found.acceptance == [s for s in whole.acceptance if (s.text, getattr(s.kv, "budget", None)) not in lost]
    assert [failure.cell for failure in found.failures] == [
        f"replay of self_sparse window 16 K=2 along text {n} at context 24, temperature 1" for n in (2, 5)
    ]
    save_profile(found, tmp_path / "profile.json")
    estimate, _ = planner.estimate(tmp_path / "profile.json", Asked(drafter="self_sparse", kv_budget=16, draft_len=2), objective="tpot")
    assert any("replayed on 8 of 10 texts" in note for note in estimate.notes) and estimate.num_texts == 8
    plan = planner.plan(tmp_path / "profile.json", objective="tpot")
    assert plan.num_candidates == 1 + 2 * 3 and not plan.rejected


def test_a_sweep_that_runs_out_of_memory_ends_in_one_line_and_keeps_its_trials(folder, monkeypatch, tmp_path):
    from planner.profiler import trial

    real, calls = trial.make_drafter, Counter()

    def make_drafter(*args, **options):
        calls["drafters"] += 1
        return real(*args, **options) if calls["drafters"] < 5 else out_of_memory()

    monkeypatch.setattr(trial, "make_drafter", make_drafter)
    with pytest.raises(Unfinished, match="memory does not suffice for 1 streams at context 24; .*--max-concurrency"):
        swept(folder, tmp_path / "out.json")
    assert len(whole_lines(journal_path(tmp_path / "out.json"))) == 1 + 3  # a warm-up, and three trials


def swept(folder: Path, out: Path, **changes):
    options = {"workload": Workload(context_len=24, output_len=8, sampler=Sampler()), "num_texts": 4, "configs": []}
    options |= {"dtype": "float32", "device": "cpu", "execution": "eager", "out": out} | changes
    model, dataset = options.pop("model", folder / "model"), options.pop("dataset", [str(folder / "first.txt")])
    return planner.sweep(str(model), dataset, **options)


# ---- what must agree


@pytest.fixture(scope="module")
def journals(folder, tmp_path_factory):
    """A profile and a sweep that are through, their journals still there."""
    found = tmp_path_factory.mktemp("journals")
    profiled(folder, found / "profile.json", settings=SETTINGS._replace(num_texts=4))
    swept(folder, found / "sweep.json")
    write_model(folder / "other", seed=1)
    write_model(folder / "retokenized", swapped=True)
    return found


def patched(monkeypatch, **changes):
    from planner.profiler import device

    real = device.describe_device
    monkeypatch.setattr(device, "describe_device", lambda of: msgspec.structs.replace(real(of), **changes))


BOTH = {
    "model": ({"model": "other"}, "fingerprint differs"),
    "tokenizer": ({"model": "retokenized"}, "prompts differs"),
    "weights": ({"weights": "int8"}, "fingerprint, weights differ"),
    "dtype": ({"dtype": "bfloat16"}, "dtype differ"),
    "dataset": ({"dataset": "second.txt"}, "texts, prompts differ"),
    "device": (lambda patch: patched(patch, name="another device"), "device differs"),
    "cores": (lambda patch: patched(patch, num_cores=99), "num_cores differs"),
    "execution": (lambda patch: patch.setattr("planner.runtime.kernels.Kernels.execution", "another"), "execution differs"),
    "version": (lambda patch: patch.setattr(planner, "__version__", "9.9"), "planner_version differs"),
    "torch": (lambda patch: patch.setattr(torch, "__version__", "9.9.0"), "torch differs"),
}
SETTING = {
    "output_len": SETTINGS._replace(num_texts=4, output_len=17), "contexts": SETTINGS._replace(num_texts=4, contexts=[24, 30]),
    "samplers": SETTINGS._replace(num_texts=4, samplers=[Sampler()]), "budgets": SETTINGS._replace(num_texts=4, policies=SETTINGS.policies[:1]),
    "drafters": SETTINGS._replace(num_texts=4, drafters=[DrafterSpec(kind="self_sparse", weights="int8")]), "texts": SETTINGS,
    "batches": SETTINGS._replace(num_texts=4, batches=[2]),
}  # fmt: skip
CASES = [("profile", *case) for case in BOTH.values()] + [("sweep", *case) for case in BOTH.values()]
CASES += [("profile", {"settings": settings}, "settings") for settings in SETTING.values()]
CASES += [("sweep", {"seed": 5}, "seed, texts, prompts differ"), ("sweep", {"num_texts": 3}, "texts, prompts differ")]
CASES += [("sweep", {"workload": Workload(context_len=24, output_len=9, sampler=Sampler())}, "workload differs")]


@pytest.mark.parametrize(("verb", "change", "words"), CASES)
def test_a_run_that_is_not_the_same_does_not_mix(folder, journals, tmp_path, monkeypatch, verb, change, words):
    run, out = {"profile": profiled, "sweep": swept}[verb], tmp_path / f"{verb}.json"
    shutil.copy(journal_path(journals / out.name), tmp_path)
    before = journal_path(out).read_bytes()
    options = {"settings": SETTINGS._replace(num_texts=4)} if verb == "profile" else {}
    if callable(change):
        change(monkeypatch)
    else:
        options |= change
    if "model" in options:
        options["model"] = folder / options["model"]
    if "dataset" in options:
        options["dataset"] = [str(folder / options["dataset"])]
    with pytest.raises(BadInput, match=rf"belongs to another run \(.*{words}"):
        run(folder, out, resume=True, **options)
    assert journal_path(out).read_bytes() == before


@pytest.mark.parametrize("verb", ["profile", "sweep"])
def test_the_same_run_goes_on(folder, journals, tmp_path, verb):
    """The other side of the test above: nothing differs, and nothing is measured again."""
    run, out = {"profile": profiled, "sweep": swept}[verb], tmp_path / f"{verb}.json"
    shutil.copy(journal_path(journals / out.name), tmp_path)
    before = journal_path(out).read_bytes()
    run(folder, out, resume=True, **({"settings": SETTINGS._replace(num_texts=4)} if verb == "profile" else {}))
    assert journal_path(out).read_bytes() == before
