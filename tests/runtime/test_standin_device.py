"""The decode loop, the drafters and the replay on a device that refuses CPU tensors: what would run on CUDA, shown without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs():
    """What tests/standin.py found, on the CPU and on the stand-in, in a process of its own: a backend is claimed for good."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, TESTS / "standin.py"], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["cpu"], result["standin:0"]


def test_every_drafter_decodes_on_the_device_what_it_decodes_on_the_cpu(runs):
    cpu, standin = runs
    assert len(standin["decode"]) == 21
    for name, run in standin["decode"].items():
        assert run["texts"] == cpu["decode"][name]["texts"], name
        assert run["device"] == "standin:0", name
        assert (run["accepted"] > 0) == (not name.startswith("none")), name


def test_greedy_output_on_the_device_is_plain_greedy_output(runs):
    texts = [run["texts"] for name, run in runs[1]["decode"].items() if "greedy" in name]
    assert len(texts) == 6 and texts == texts[:1] * 6


def test_what_a_graph_would_hold_needs_nothing_of_the_host(runs):
    """As many reads as an eager pass, no more uploads, and the same texts."""
    assert len(runs[1]["static shapes"]) == 15
    for name, run in runs[1]["static shapes"].items():
        eager = runs[1]["decode"][name]
        assert (run["texts"], run["reads"]) == (eager["texts"], eager["reads"]), name
        assert run["uploads"] <= eager["uploads"], name
        assert set(run["on_cpu"]) <= {"lift_fresh", "detach", "detach_"}, name


def test_replay_on_the_device_judges_as_on_the_cpu(runs):
    cpu, standin = runs
    assert len(standin["replay"]) == 19
    for name, run in standin["replay"].items():
        assert run["device"] == "standin:0", name
        assert run["texts"] == cpu["replay"][name]["texts"], name
        assert run["accept_prob"] == cpu["replay"][name]["accept_prob"], name


def test_a_round_reads_from_the_device_once_and_a_tree_once_more_to_be_shaped(runs):
    """A draft model with keys of its own also asks which of its drafts the text has left."""
    for name, run in runs[1]["decode"].items():
        first, *others = run["reads"]
        assert first == 1, name
        assert min(others) == 1 or "tree" in name, name  # a round without room for a draft shapes nothing
        assert max(others) == (1 if "tree" not in name else 3 if "draft model" in name else 2), name


def test_nothing_is_computed_on_the_cpu_in_between(runs):
    """Only torch.tensor(list) on its way to the device and results on their way back touch the CPU."""
    for run in [*runs[1]["decode"].values(), *runs[1]["replay"].values()]:
        assert set(run["on_cpu"]) <= {"lift_fresh", "detach", "detach_"}


def test_wrong_code_is_caught_on_the_device_alone(runs):
    cpu, standin = (run["wrong"] for run in runs)
    assert cpu["cpu index"] is None and "mixes standin:0 with cpu" in standin["cpu index"]
    assert cpu["drafter on the cpu"] is None and "mixes standin:0 with cpu" in standin["drafter on the cpu"]
    assert set(standin["reads"][1:]) == {2}
