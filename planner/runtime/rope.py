"""Rotary position embedding: how fast each pair of dimensions turns, under every scaling of specs.RopeScaling.

All in float32, whatever the weights are: bfloat16 angles are useless beyond 256 tokens.

Source: transformers 5 modeling_rope_utils.py, with which tests/runtime/test_rope.py compares. D is head_dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from planner.specs import DynamicRope, FactorsRope, LinearRope, Llama3Rope, ModelSpec, YarnRope


class Rotation(NamedTuple):
    """Cosines and sines of the new tokens' positions."""

    cos: Tensor  # [B, n, D/2]
    sin: Tensor


def inverse_frequency(spec: ModelSpec, device: torch.device) -> Tensor:  # [D/2]
    """Radians per position, the fastest first.

    Dynamic scaling takes spec.max_context_len for the total length, so that a token's rotation does not depend on how
    much text came with it; transformers recomputes the base whenever a pass reaches further than all before it.
    """
    theta, scaling, D = spec.rope_theta, spec.rope_scaling, spec.head_dim
    if isinstance(scaling, DynamicRope):
        stretch = scaling.factor * max(1.0, spec.max_context_len / scaling.original_max_position) - (scaling.factor - 1)
        theta *= stretch ** (D / (D - 2))
    exponent = torch.arange(0, D, 2, device=device, dtype=torch.float32) / D
    plain = 1.0 / theta**exponent
    match scaling:
        case LinearRope():
            return plain / scaling.factor
        case Llama3Rope():
            turns = scaling.original_max_position * plain / (2 * math.pi)  # within the original context
            kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
            return (1 - kept) * plain / scaling.factor + kept * plain
        case YarnRope():
            kept = 1 - _yarn_ramp(spec, scaling).to(device)
            return (1 - kept) * plain / scaling.factor + kept * plain
        case FactorsRope():
            return plain / torch.tensor(scaling.factors, device=device, dtype=torch.float32)
    return plain


def attention_factor(spec: ModelSpec) -> float:
    """What cosines and sines are multiplied by: YaRN's, 1 elsewhere."""
    return spec.rope_scaling.attention_factor if isinstance(spec.rope_scaling, YarnRope) else 1.0


def rotation(
    positions: Tensor,  # [B, n]
    frequency: Tensor,  # [D/2], as inverse_frequency gives it
    factor: float,  # as attention_factor gives it
) -> Rotation:
    angles = positions[..., None].float() * frequency
    if factor == 1:
        return Rotation(angles.cos(), angles.sin())
    return Rotation(angles.cos() * factor, angles.sin() * factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves not interleaved (arXiv:2104.09864 as Hugging Face lays it out).

    x  [B, heads, n, D]     cos, sin  [B, 1, n, D/2]
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _yarn_ramp(spec: ModelSpec, scaling: YarnRope) -> Tensor:  # [D/2]
    """0 where a frequency is kept, 1 where it is stretched whole."""

    def dimension(turns: float) -> float:
        """The pair that turns so many times within the original context."""
        return spec.head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    width = (high - low) or 0.001  # no passage at all
    return ((torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
