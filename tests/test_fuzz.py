"""A thousand damaged files of every kind are read or refused in one line; see fuzz.py, which also runs by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = ("profile", "plan", "gguf", "safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "dataset")
BENCHES = ("bench table", "claims", "layer table", "vllm bench", "sglang bench", "metrics", "serving profile", "schedule", "scrapes")  # quick to read
SERVED = ("stream",)  # over a socket
REAL = ("real profile", "real gguf")  # large files: a third of a second each


def run_fuzz(kinds: tuple[str, ...], mutations: int) -> str:
    pytest.importorskip("torch")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fuzz.py"), *kinds, "--mutations", str(mutations)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, env=environment)
    return done.stdout + done.stderr


def check(out: str, kind: str, mutations: int) -> None:
    found = re.search(rf"^{re.escape(kind)}: {mutations} damaged files, (\d+) read, (\d+) refused, (\d+) failed", out, re.MULTILINE)
    assert found, out
    read, refused, failed = map(int, found.groups())
    assert failed == 0, out
    assert read and refused > mutations // 10, out  # else the damage is too coarse, or too slight, to test anything


@pytest.fixture(scope="module")
def small():
    return run_fuzz(SMALL, 1000)


@pytest.mark.parametrize("kind", SMALL)
def test_damaged_files_are_read_or_refused_in_one_line(kind, small):
    check(small, kind, 1000)


@pytest.fixture(scope="module")
def benches():
    return run_fuzz(BENCHES, 1000)


@pytest.mark.parametrize("kind", BENCHES)
def test_damaged_benchmark_files_are_read_or_refused_in_one_line(kind, benches):
    check(benches, kind, 1000)


def test_damaged_answers_of_a_server_are_read_or_refused_in_one_line():
    out = run_fuzz(SERVED, 200)
    check(out, "stream", 200)


@pytest.mark.model
def test_damaged_real_files_are_read_or_refused_in_one_line():
    out = run_fuzz(REAL, 40)
    for kind in REAL:
        check(out, kind, 40)
