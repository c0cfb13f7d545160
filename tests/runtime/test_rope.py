"""Rotary frequencies are those of transformers under every scaling, and scaling does what its paper says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny import tiny_spec
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from planner.runtime.model_spec import yarn_attention_factor
from planner.runtime.rope import inverse_frequency, rotate, rotation
from planner.specs import DynamicRope, FactorsRope, LinearRope, Llama3Rope, YarnRope

CPU = torch.device("cpu")
D, THETA, ORIGINAL = 64, 5e5, 2048
LLAMA31 = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=ORIGINAL)
YARN = YarnRope(factor=4.0, original_max_position=ORIGINAL, attention_factor=yarn_attention_factor(4.0))


def frequency(scaling=None, **changes) -> torch.Tensor:
    return inverse_frequency(tiny_spec(**{"head_dim": D, "rope_theta": THETA, "rope_scaling": scaling} | changes), CPU)


def theirs(kind: str, total_len: int | None = None, **values):
    """transformers' frequencies, and its factor of cosines and sines."""
    config = LlamaConfig(head_dim=D, max_position_embeddings=ORIGINAL, rope_parameters={"rope_type": kind, "rope_theta": THETA, **values})
    return ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=total_len)


YARN_VALUES = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}


@pytest.mark.parametrize(
    ("scaling", "kind", "values"),
    [
        (LinearRope(factor=3.0), "linear", {"factor": 3.0}),
        (LLAMA31, "llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
        (YARN, "yarn", YARN_VALUES),
        (YarnRope(factor=4.0, original_max_position=ORIGINAL, attention_factor=1.2, beta_fast=8.0, beta_slow=2.0, truncate=False), "yarn",
            YARN_VALUES | {"attention_factor": 1.2, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}),
        (YarnRope(factor=4.0, original_max_position=7, attention_factor=1.2), "yarn",
            YARN_VALUES | {"attention_factor": 1.2, "original_max_position_embeddings": 7}),  # all pairs but one are stretched whole
    ],
    ids=str,
)  # fmt: skip
def test_frequencies_are_those_of_transformers(scaling, kind, values):
    expected, factor = theirs(kind, **values)
    torch.testing.assert_close(frequency(scaling), expected, rtol=2e-6, atol=0)
    assert not torch.allclose(frequency(), expected, rtol=1e-3)
    if isinstance(scaling, YarnRope):
        assert scaling.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("total_len", [1, ORIGINAL, ORIGINAL + 1, 10_000])
def test_dynamic_frequencies_are_those_of_transformers_at_the_declared_length(total_len):
    expected, _ = theirs("dynamic", total_len, factor=2.0)
    found = frequency(DynamicRope(factor=2.0, original_max_position=ORIGINAL), max_context_len=total_len)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert torch.equal(found, frequency()) == (total_len <= ORIGINAL)


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(None, None), (0.7, 0.4), (1.0, 1.0)])
def test_yarns_attention_factor_is_that_of_transformers(mscale, mscale_all_dim):
    _, expected = theirs("yarn", mscale=mscale, mscale_all_dim=mscale_all_dim, **YARN_VALUES)
    given = () if mscale is None else (mscale, mscale_all_dim)
    assert yarn_attention_factor(4.0, *given) == pytest.approx(expected)


@pytest.mark.parametrize("scaling", [LLAMA31, YARN], ids=lambda scaling: type(scaling).__name__)
def test_fast_pairs_are_kept_and_slow_ones_stretched_whole(scaling):
    ratio = frequency() / frequency(scaling)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(scaling.factor)
    assert (ratio.diff() >= -1e-5).all() and (ratio >= 1).all()
    wavelength = 2 * math.pi / frequency()
    assert (ratio[wavelength < ORIGINAL / 40] == 1).all()
    torch.testing.assert_close(ratio[wavelength > 2 * ORIGINAL], torch.full_like(ratio[wavelength > 2 * ORIGINAL], scaling.factor))


@pytest.mark.parametrize(
    "scaling",
    [
        LinearRope(factor=1.0),
        replace(LLAMA31, factor=1.0),
        replace(YARN, factor=1.0),
        DynamicRope(factor=1.0, original_max_position=4096),
        FactorsRope(factors=(1.0,) * (D // 2)),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_a_factor_of_one_changes_nothing(scaling):
    torch.testing.assert_close(frequency(scaling), frequency(), rtol=1e-6, atol=0)
    assert yarn_attention_factor(1.0) == 1


def test_the_attention_factor_lengthens_and_does_not_turn():
    positions = torch.tensor([[0, 5, 1000]])
    plain, scaled = rotation(positions, frequency(YARN), 1.0), rotation(positions, frequency(YARN), YARN.attention_factor)
    assert plain.cos.dtype == torch.float32 and plain.cos.shape == (1, 3, D // 2)
    x = torch.randn(1, 2, 3, D, generator=torch.Generator().manual_seed(0))
    turned, longer = (rotate(x, cos[:, None], sin[:, None]) for cos, sin in (plain, scaled))
    torch.testing.assert_close(longer, turned * YARN.attention_factor)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))  # a rotation


@settings(derandomize=True, deadline=None, max_examples=30)
@given(shift=st.integers(0, 3000), distance=st.integers(0, 500))
def test_scores_depend_on_distance_alone_under_every_scaling(shift, distance):
    q, k = torch.randn(2, 1, 1, 1, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scaling in (None, LLAMA31, YARN):
        scores = []
        for start in (0, shift):
            turns = rotation(torch.tensor([[start, start + distance]]), frequency(scaling), 1.0)
            cos, sin = (part.double()[:, None] for part in turns)
            scores.append((rotate(q, cos[..., :1, :], sin[..., :1, :]) * rotate(k, cos[..., 1:, :], sin[..., 1:, :])).sum())
        torch.testing.assert_close(scores[0], scores[1], atol=0.02, rtol=0)
