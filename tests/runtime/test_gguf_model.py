"""GGUF metadata means what llama.cpp takes it for, and what the runtime cannot compute is refused by name."""

import math

import numpy as np
import pytest
import torch
from checkpoints import load, make_model, refused, write_gguf

from planner.runtime.rope import inverse_frequency
from planner.runtime.weights import checkpoint_bytes, read_spec
from planner.specs import FactorsRope, LinearRope, YarnRope


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"architecture": "gemma"}, "general.architecture"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.factor"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0}, "llama.rope.scaling.factor"),
        ({"llama.rope.scaling.original_context_length": 64}, "llama.rope.scaling.original_context_length"),
        ({"llama.attention.sliding_window": 255}, "--max-context 255"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length"),
        ({"llama.vocab_size": 95}, "token_embd.weight"),
        ({"split.count": 3}, "split.count"),
    ],
)
def test_gguf_that_the_runtime_cannot_run_is_refused(tmp_path, metadata, word):
    gguf_path = write_gguf(tmp_path / "other.gguf", make_model(), **metadata)
    for read in (load, read_spec):
        with refused("other.gguf", word):
            read(gguf_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_linear_and_yarn_scaling_are_read(tmp_path, architecture):
    model, at = make_model(architecture), f"{architecture}.rope.scaling."
    linear = write_gguf(tmp_path / "linear.gguf", model, **{at + "type": "linear", at + "factor": 4.0})
    assert read_spec(linear).rope_scaling == LinearRope(factor=4.0)
    yarn = {at + "type": "yarn", at + "factor": 4.0, at + "original_context_length": 256}
    spec = read_spec(write_gguf(tmp_path / "yarn.gguf", model, **yarn))
    assert spec.rope_scaling == YarnRope(factor=4.0, original_max_position=256, attention_factor=0.1 * math.log(4) + 1)
    assert spec.max_context_len == 1024


def llama3_factors() -> np.ndarray:
    """As convert_hf_to_gguf.py writes them: 1 for the fast frequencies, factor for the slow ones."""
    return np.array([1, 1, 2.5, 8], np.float32)


def test_llama_3_frequency_factors_are_read_and_divide(tmp_path):
    path = write_gguf(tmp_path / "llama3.gguf", make_model(), tensors={"rope_freqs.weight": llama3_factors()})
    spec = read_spec(path)
    assert spec.rope_scaling == FactorsRope(factors=(1.0, 1.0, 2.5, 8.0))
    assert load(path).spec == spec
    plain = write_gguf(tmp_path / "plain.gguf", make_model())
    ratio = inverse_frequency(read_spec(plain), torch.device("cpu")) / inverse_frequency(spec, torch.device("cpu"))
    torch.testing.assert_close(ratio, torch.tensor([1, 1, 2.5, 8]))
    assert load(path).fingerprint != load(plain).fingerprint


@pytest.mark.parametrize(
    ("factors", "metadata", "word"),
    [
        (np.ones(3, np.float32), {}, "head_dim / 2"),
        (np.ones((2, 2), np.float32), {}, "one dimension"),
        (np.array([1, 1, 0, 8], np.float32), {}, "above 0"),
        (np.array([1, 1, np.nan, 8], np.float32), {}, "above 0"),
        (llama3_factors(), {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.type"),
    ],
    ids=str,
)
def test_frequency_factors_that_make_no_sense_are_refused(tmp_path, factors, metadata, word):
    path = write_gguf(tmp_path / "odd.gguf", make_model(), tensors={"rope_freqs.weight": factors}, **metadata)
    with refused("odd.gguf", word):
        read_spec(path)


def test_bytes_of_a_gguf_file_are_those_of_its_tensors(tmp_path):
    model = make_model()
    assert checkpoint_bytes(write_gguf(tmp_path / "f32.gguf", model)) == 4 * read_spec(tmp_path / "f32.gguf").num_parameters
