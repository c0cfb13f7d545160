"""A folder as transformers saves it, for the tests of whatever reads one."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A folder to copy from: saving is the slow part of these tests."""
    from checkpoints import make_model  # transformers takes seconds, and other tests do without

    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path
