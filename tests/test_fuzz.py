"""A thousand damaged files of every kind are read or refused in one line; see fuzz.py, which also runs by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MUTATIONS = dict.fromkeys(("profile", "plan", "gguf", "safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "dataset"), 1000)
REAL = {"real profile": 50, "real gguf": 50}  # large files: a third of a second each


def run_fuzz(*arguments: str) -> str:
    pytest.importorskip("torch")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fuzz.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment).stdout


@pytest.mark.parametrize(("kind", "mutations"), [*MUTATIONS.items(), *(pytest.param(*item, marks=pytest.mark.model) for item in REAL.items())])
def test_damaged_files_are_read_or_refused_in_one_line(kind, mutations):
    out = run_fuzz(kind, "--mutations", str(mutations))
    found = re.match(rf"{re.escape(kind)}: {mutations} damaged files, (\d+) read, (\d+) refused, (\d+) failed", out)
    assert found, out
    read, refused, failed = map(int, found.groups())
    assert failed == 0, out
    assert read and refused > mutations // 10, out  # else the damage is too coarse, or too slight, to test anything
