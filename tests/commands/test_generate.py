"""planner.generate."""

import pytest

import planner
from planner.errors import BadInput
from planner.specs import PLAIN, Sampler


def test_a_model_is_loaded_before_the_text_is_asked_for(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(BadInput, match="a model must be an existing folder or GGUF file, got .*nowhere; check the path"):
        planner.generate(str(tmp_path / "nowhere"), "x", config=PLAIN, sampler=Sampler(), device="cpu", execution="eager")
