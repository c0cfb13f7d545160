"""A study: nothing twice, nothing lost, whoever works on it and however a worker ends."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from planner.errors import BadInput, Unfinished
from planner.search import study as study_module
from planner.search.study import Evaluated, Failed, run_study, shown

GRID = [(drafter, budget, length) for drafter in ("int8", "int4") for budget in (64, 256, 1024) for length in (1, 2, 3, 4)]
CANDIDATES = ["off", *GRID]
COORDINATES = [{"drafter": "none"}, *({"drafter": d, "kv_budget": b, "draft_len": k} for d, b, k in GRID)]
FORK = multiprocessing.get_context("fork")


def cost(candidate) -> float:
    """Best at int8, 256, K = 3."""
    if candidate == "off":
        return 2.0
    drafter, budget, length = candidate
    return 1 + 0.3 * (drafter == "int4") + 0.2 * abs(np.log2(budget / 256)) + 0.1 * abs(length - 3)


def evaluated(candidate) -> Evaluated:
    return Evaluated(cost(candidate), json.dumps(candidate))


def studied(evaluate=evaluated, *, candidates=CANDIDATES, coordinates=COORDINATES, num_trials=6, seed=0, identity=None, **options):
    identity = {"model": "a"} if identity is None else identity
    return run_study(candidates, evaluate, coordinates=coordinates, num_trials=num_trials, seed=seed, identity=identity, **options)


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path) -> str:
    return {"journal": f"{tmp_path}/study.journal", "sqlite": f"sqlite:///{tmp_path}/study.db"}[request.param]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_run_twice_and_the_best_is_found_before_half_of_the_space(seed):
    ran = []
    tried = studied(lambda c: ran.append(c) or evaluated(c), seed=seed, num_trials=12, first=["off"])
    assert [one.candidate for one in tried] == ran and len(set(ran)) == 12 and ran[0] == "off"
    assert all(one.cost == cost(one.candidate) and one.record == json.dumps(one.candidate) for one in tried)
    assert ("int8", 256, 3) in ran


def test_more_trials_than_candidates_run_every_candidate():
    assert {one.candidate for one in studied(num_trials=100)} == set(CANDIDATES)


def test_a_seed_gives_one_order_and_another_seed_another():
    orders = [[one.candidate for one in studied(seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_failure_is_recorded_with_its_reason_and_passed_over(storage):
    def evaluate(candidate):
        if candidate == ("int8", 64, 1):
            raise Failed("too large")
        return evaluated(candidate)

    tried = studied(evaluate, num_trials=3, first=["off", ("int8", 64, 1)], storage=storage)
    assert [(one.cost, one.record) for one in tried][1] == (None, "too large") and len(tried) == 3
    assert len(studied(pytest.fail, num_trials=3, storage=storage)) == 3  # not tried again


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_evaluation_that_is_cut_short_is_let_go_and_the_study_goes_on(storage, error):
    ran = []

    def evaluate(candidate):
        ran.append(candidate)
        if len(ran) == 4:
            raise error
        return evaluated(candidate)

    with pytest.raises(error):
        studied(evaluate, storage=storage)
    tried = studied(evaluate, storage=storage)
    assert len(tried) == 6 and len(ran) == 7 and len(set(ran)) == 6
    assert ran == [*ran[:4], *ran[3:4], *(one.candidate for one in tried[4:])]  # as if nothing had happened


def test_a_larger_number_of_trials_goes_on(storage):
    before = studied(num_trials=3, storage=storage)
    after = studied(num_trials=5, storage=storage)
    assert after[:3] == before and len(after) == 5
    assert after == studied(pytest.fail, num_trials=2, storage=storage)  # all of the study, whatever was asked for now


def test_another_run_is_refused_by_name(storage):
    studied(num_trials=2, storage=storage)
    with pytest.raises(BadInput, match=r"belongs to another run \(model differs\)"):
        studied(storage=storage, identity={"model": "b"})
    with pytest.raises(BadInput, match=r"\(workload, candidates differ\)"):
        studied(storage=storage, identity={"model": "a", "workload": "x"}, candidates=CANDIDATES[:-1], coordinates=COORDINATES[:-1])
    assert len(studied(num_trials=2, storage=storage)) == 2


# Several workers


def slow(log: Path):
    """Evaluates in 20 ms and writes down what it ran."""

    def evaluate(candidate):
        with open(log, "a") as file:
            file.write(f"{candidate}\n")
        time.sleep(0.02)
        return evaluated(candidate)

    return evaluate


def work(storage: str, log: Path, out: Path) -> None:
    tried = studied(slow(log), num_trials=10, first=["off"], storage=storage)
    out.write_text(repr([(one.candidate, one.cost) for one in tried]))


def test_two_workers_share_a_study_without_repeating_and_both_see_all_of_it(storage, tmp_path):
    outs = [tmp_path / "a", tmp_path / "b"]
    workers = [FORK.Process(target=work, args=(storage, tmp_path / "log", out)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    ran = (tmp_path / "log").read_text().splitlines()
    assert len(ran) == len(set(ran)) == 10
    assert outs[0].read_text() == outs[1].read_text()
    workers = {one.worker for one in studied(num_trials=1, storage=storage)}
    assert len(workers) == 2


def hang(storage: str, mark: Path) -> None:
    ran = []

    def evaluate(candidate):
        ran.append(candidate)
        if len(ran) == 3:
            mark.write_text(repr(candidate))
            time.sleep(60)
        return evaluated(candidate)

    studied(evaluate, storage=storage)


@pytest.fixture
def hanging(storage, tmp_path):
    """A worker in the middle of its third evaluation, and what that is."""
    worker = FORK.Process(target=hang, args=(storage, tmp_path / "mark"))
    worker.start()
    while not (tmp_path / "mark").exists() or not (tmp_path / "mark").read_text():
        time.sleep(0.01)
    yield worker, (tmp_path / "mark").read_text()
    worker.kill()
    worker.join()


def test_what_a_killed_worker_was_at_is_run_again(storage, hanging):
    worker, candidate = hanging
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    ran = []
    tried = studied(lambda c: ran.append(c) or evaluated(c), storage=storage)
    assert len(tried) == 6 and len(ran) == 4 and repr(ran[0]) == candidate


def test_a_worker_waits_for_the_last_evaluation_of_another_and_takes_it_over_if_that_one_dies(storage, hanging):
    worker, _ = hanging
    ran, waited = [], []

    def waiting(running: int) -> None:
        waited.append(running)
        worker.kill()
        worker.join()

    tried = studied(lambda c: ran.append(c) or evaluated(c), storage=storage, waiting=waiting)
    assert waited == [1] and len(tried) == 6 and len(ran) == 4  # two were run by the other


def test_a_worker_on_another_machine_lives_as_long_as_it_gives_signs_of_life(storage, hanging, monkeypatch):
    monkeypatch.setattr(study_module, "_machine", lambda: "elsewhere")
    monkeypatch.setattr(study_module, "POLL_S", 0.02)
    waited = []

    def waiting(running: int) -> None:
        waited.append(running)
        monkeypatch.setattr(study_module, "HEARTBEAT_S", 0.01)  # so the other's last sign is long ago

    ran = []
    tried = studied(lambda c: ran.append(c) or evaluated(c), storage=storage, waiting=waiting)
    assert waited == [1] and len(tried) == 6 and len(ran) == 4


def test_signs_of_life_are_given_during_an_evaluation(storage, monkeypatch):
    monkeypatch.setattr(study_module, "HEARTBEAT_S", 0.02)

    def evaluate(candidate):
        time.sleep(0.15)
        return evaluated(candidate)

    import optuna

    studied(evaluate, num_trials=1, storage=storage)
    [trial] = optuna.load_study(study_name="planner", storage=study_module._storage(storage)).trials
    assert trial.user_attrs["beat"] - trial.datetime_start.timestamp() > 0.05


# Storages that cannot be used


def test_a_file_that_is_no_study_is_refused_and_left_alone(tmp_path):
    for content in ("{}\n", '["a"]\n', "text\n", "no end"):
        path = tmp_path / "profile.json"
        path.write_text(content)
        with pytest.raises(BadInput, match="holds something else"):
            studied(storage=str(path))
        assert path.read_text() == content


def test_a_damaged_journal_is_bad_input(tmp_path):
    path = tmp_path / "study.journal"
    studied(num_trials=2, storage=str(path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(BadInput, match="is damaged"):
        studied(storage=str(path))


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("{tmp}/no/such/study.journal", "folder that exists"),
        ("{tmp}", "journal file in a folder"),
        ("sqlite:////no/such/folder/x.db", "unable to open database file"),
        ("nonsense://user:secret@host/x", "--storage must be a database"),
        ("mysql://user:secret@host/x", "pip install mysqlclient"),
    ],
)
def test_a_storage_that_cannot_be_used_is_bad_input_without_its_password(storage, words, tmp_path):
    with pytest.raises(BadInput, match=words) as error:
        studied(storage=storage.format(tmp=tmp_path))
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_driver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(BadInput, match=r"postgresql://host/x needs a database driver .* pip install .*psycopg"):
        studied(storage="postgresql://user:secret@host/x")


def test_a_storage_that_stops_answering_is_unfinished(tmp_path):
    path = tmp_path / "study.db"

    def evaluate(candidate):
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE trial_values")
        return evaluated(candidate)

    with pytest.raises(Unfinished, match="does not answer: .*no such table"):
        studied(evaluate, storage=f"sqlite:///{path}")


def test_names_of_storages_show_no_password():
    assert shown("postgresql://user:secret@host:5432/x?password=secret") == "postgresql://host:5432/x"
    assert shown("a/study.journal") == "a/study.journal"


def test_optuna_says_nothing(tmp_path):
    code = f"""
from planner.search.study import Evaluated, run_study
for storage in (None, {str(tmp_path / "x.journal")!r}, {f"sqlite:///{tmp_path}/x.db"!r}):
    run_study([1, 2, 3], lambda c: Evaluated(c), coordinates=[{{"x": c}} for c in (1, 2, 3)], num_trials=3, seed=0, identity={{}}, storage=storage)
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_of_optuna_is_loaded_before_a_study_runs():
    code = "import sys, planner.search.study; assert not {'optuna', 'sqlalchemy', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
