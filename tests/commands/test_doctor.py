"""planner doctor, as a user calls it: it says what is there, never fails for it, and imports no torch."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import msgspec
import pynvml
import pytest

from planner import machine
from planner.checkups import Checkup
from planner.commands import doctor as module
from planner.machine import Watched
from planner.report.doctor import show_checkup

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.setattr(module, "watch_cpu", lambda: Watched(0.02, 0.0, []))
    monkeypatch.setattr(module, "memory_bytes", lambda: (2**34, 2**33))


def test_it_exits_with_0_and_loads_no_torch():
    code = "import sys; sys.argv = ['planner', 'doctor', '--json']\nfrom planner.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\n"
    code += "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = msgspec.json.decode(done.stdout, type=Checkup)
    assert done.stderr == "" and found.python == ".".join(map(str, sys.version_info[:3]))
    versions = {package.name: package.version for package in found.packages}
    assert versions["numpy"] == metadata.version("numpy") and {"torch", "matplotlib", "pytest"} <= set(versions)


def test_a_machine_at_rest_is_fit_and_a_busy_one_is_not(monkeypatch, capsys):
    assert module.doctor().unfit == []
    monkeypatch.setattr(module, "watch_cpu", lambda: Watched(0.6, 0.3, [machine.Neighbour(7, "train", 1.5)]))
    monkeypatch.setattr(module, "memory_bytes", lambda: (2**34, 2**29))
    found = module.doctor()
    assert all(word in sentence for word, sentence in zip(("60%", "30%", "0.50 GiB"), found.unfit, strict=True))
    show_checkup(found)
    out = capsys.readouterr().out
    assert "Not fit" in out and "train (process 7) used 1.50 cores" in out


def test_what_is_missing_is_named_with_the_command_that_adds_it(monkeypatch, capsys):
    there = metadata.version
    monkeypatch.setattr(module, "DISTRIBUTION", "nobody-has-this")
    monkeypatch.setattr(module.metadata, "version", lambda name: "1.0" if name == "torch" else missing(name) if name == "gguf" else there(name))
    monkeypatch.setattr(module, "compiler_version", lambda: None)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    found = module.doctor()
    runtime = next(extra for extra in found.extras if extra.name == "runtime")
    assert runtime.missing == ["gguf", "torch"] and runtime.install == f"pip install '{ROOT}[runtime]'"  # torch 1.0 is older than wanted
    assert any("g++" in sentence for sentence in found.advice)
    show_checkup(found)
    assert "gguf, torch: measuring and running models here" in " ".join(capsys.readouterr().out.split())


def test_gpus_are_listed_with_their_state(monkeypatch, capsys):
    memory = type("Memory", (), {"total": 80 * 2**30, "free": 79 * 2**30})
    for name, answer in {
        "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 2, "nvmlDeviceGetHandleByIndex": 0, "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, name, lambda *of, answer=answer: answer)
    monkeypatch.setattr(module, "gpu_state", lambda handle: {"driver": "580.1", "throttle_reasons": "0x4", "other_processes": 0})
    found = module.doctor()
    assert [gpu.memory_bytes for gpu in found.gpus] == [80 * 2**30] * 2 and sum("throttled (0x4)" in reason for reason in found.unfit) == 2
    show_checkup(found)
    assert "NVIDIA H100 80GB HBM3, 80.00 GiB, 79.00 GiB free; driver 580.1" in " ".join(capsys.readouterr().out.split())
    assert json.loads(msgspec.json.encode(found))["gpus"][0]["state"]["driver"] == "580.1"
