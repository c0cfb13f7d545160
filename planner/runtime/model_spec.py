"""What a checkpoint of either kind says of its model, and what the user puts in its place -> ModelSpec."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import BadInput
from planner.runtime.fields import MAX_CONTEXT, MAX_THETA
from planner.specs import DynamicRope, LinearRope, ModelSpec, YarnRope


class Overrides(NamedTuple):
    """In place of what the checkpoint says, where not None."""

    rope_theta: float | None = None
    max_context_len: int | None = None


def checked_overrides(rope_theta: float | None, max_context_len: int | None) -> Overrides:
    if rope_theta is not None and not 0 < rope_theta <= MAX_THETA:  # False for NaN
        raise BadInput(f"rope_theta must be above 0 and at most {MAX_THETA:g}, got {rope_theta}")
    if max_context_len is not None and not 1 <= max_context_len <= MAX_CONTEXT:
        raise BadInput(f"the longest context must lie in 1..{MAX_CONTEXT} tokens, got {max_context_len}; change --max-context")
    return Overrides(None if rope_theta is None else float(rope_theta), max_context_len)


def make_spec(source: Path, overrides: Overrides, window: int | None, **values: Any) -> ModelSpec:
    """Fields of ModelSpec as the checkpoint has them, overrides applied, limits checked.

    window  tokens that attention sees back, where that is limited; a context within it sees the same as without

    YaRN's context is what it stretches to. The total length that fixes the base of dynamic scaling is max_context_len:
    by default what the checkpoint declares, which leaves the base as it is.
    """
    scaling = values["rope_scaling"]
    if isinstance(scaling, YarnRope):
        values["max_context_len"] = max(values["max_context_len"], min(MAX_CONTEXT, int(scaling.factor * scaling.original_max_position)))
    reach = declared = values["max_context_len"]
    if overrides.rope_theta is not None or isinstance(scaling, DynamicRope):
        reach = MAX_CONTEXT
    elif isinstance(scaling, LinearRope):
        reach = int(scaling.factor * declared)
    context = overrides.max_context_len or declared
    if context > reach:
        raise BadInput(f"{source}: the model reaches {reach} tokens, got --max-context {context}; lower it, or give --rope-theta as well")
    if window is not None and window < context:
        raise BadInput(
            f"{source}: sliding windows are not supported, this one of {window} tokens is shorter than the context of {context}; "
            f"within the window nothing differs: open the model with --max-context {window}, or use one without"
        )
    theta = values["rope_theta"] if overrides.rope_theta is None else overrides.rope_theta
    return built(ModelSpec, source, **(values | {"max_context_len": context, "rope_theta": theta}))


def built(kind: type, source: Path, **values: Any):
    """A value of specs; its own rules turned into BadInput that names the file."""
    try:
        return kind(**values)
    except ValueError as error:
        raise BadInput(f"{source}: {error}") from error


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """What cosines and sines are multiplied by where the checkpoint does not say (arXiv:2309.00071, equation 22).

    The two scales are DeepSeek's: the rule at the one over the rule at the other.
    """
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)


def model_name(path: Path) -> str:
    """Folder name or file stem; org/name for a snapshot in the Hugging Face cache."""
    path = path.resolve() if path.name in ("", "..") else path.absolute()
    name = path.name if path.is_dir() else path.stem
    if path.parent.name == "snapshots":
        name = path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return name.encode(errors="replace").decode()  # file names may hold bytes that JSON cannot
