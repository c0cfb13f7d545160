"""config.json of a Hugging Face folder, as transformers 4 and 5 write it -> ModelSpec.

What is absent means what transformers takes it for. What the runtime would compute differently is refused.
"""

from pathlib import Path
from typing import get_args

from planner.runtime.fields import (
    MAX_CONTEXT,
    MAX_FACTOR,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_THETA,
    MAX_VOCAB,
    MAX_WIDTH,
    Fields,
    read_json,
)
from planner.runtime.model_spec import Overrides, built, make_spec, model_name, yarn_attention_factor
from planner.specs import Architecture, DynamicRope, LinearRope, Llama3Rope, ModelSpec, RopeScaling, YarnRope

ARCHITECTURES = get_args(Architecture)
DEFAULT_WINDOW = 4096  # of transformers, for mistral and qwen
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip


def read_config(folder: Path) -> Fields:
    source = folder / "config.json"
    return Fields(source, read_json(source))


def folder_spec(folder: Path, config: Fields, overrides: Overrides) -> ModelSpec:
    architecture = config.text("model_type")
    if architecture not in ARCHITECTURES:
        raise config.refusal("model_type", f"must be one of {', '.join(ARCHITECTURES)}, the supported architectures")
    if architecture != "qwen2":  # which has its biases whatever this says
        config.only("attention_bias", False)
    config.only("mlp_bias", False)
    config.only("hidden_act", "silu")
    config.only("partial_rotary_factor", 1)

    num_heads = config.integer("num_attention_heads", MAX_HEADS)
    num_layers = config.integer("num_hidden_layers", MAX_LAYERS)
    hidden_size = config.integer("hidden_size", MAX_WIDTH)
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise config.refusal("hidden_size", f"must be a multiple of num_attention_heads ({num_heads}) where head_dim is absent")
    theta, scaling = _rope(config)
    return make_spec(
        config.source,
        overrides,
        _window(config, architecture, num_layers),
        name=model_name(folder),
        architecture=architecture,
        num_layers=num_layers,
        num_heads=num_heads,
        # where these two are absent, transformers has numbers of certain models for them
        num_kv_heads=config.integer("num_key_value_heads", MAX_HEADS, num_heads if architecture == "llama" else None),
        head_dim=config.integer("head_dim", MAX_HEAD_DIM, None if architecture == "qwen3" else hidden_size // num_heads),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", MAX_WIDTH),
        vocab_size=config.integer("vocab_size", MAX_VOCAB),
        max_context_len=config.integer("max_position_embeddings", MAX_CONTEXT),
        rope_theta=theta,
        rms_norm_eps=config.positive("rms_norm_eps", 1.0, 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        rope_scaling=scaling,
    )


def _window(config: Fields, architecture: str, num_layers: int) -> int | None:
    """Tokens that the shortest-sighted layer attends to; None where all of them see everything."""
    match architecture:
        case "llama":
            return None
        case "qwen2" | "qwen3":
            layers = config.get("layer_types") or []
            if not isinstance(layers, list):
                raise config.refusal("layer_types", "must be a list")
            slides = "sliding_attention" in layers if layers else config.integer("max_window_layers", MAX_LAYERS, 28, least=0) < num_layers
            if not config.flag("use_sliding_window", False) or not slides:
                return None
    if "sliding_window" in config.values and config.get("sliding_window") is None:  # null is not absent here
        return None
    return config.integer("sliding_window", MAX_CONTEXT, DEFAULT_WINDOW)


def _rope(config: Fields) -> tuple[float, RopeScaling | None]:
    """theta, and how frequencies are scaled."""
    theta = config.positive("rope_theta", MAX_THETA, 10_000.0)
    given = [name for name in ("rope_scaling", "rope_parameters") if config.get(name) is not None]  # transformers 4, 5
    if not given:
        return theta, None
    if len(given) == 2:
        raise config.refusal("rope_scaling", "must be absent where rope_parameters is given")
    (name,) = given
    if not isinstance(config.get(name), dict):
        raise config.refusal(name, "must be an object")
    rope = Fields(config.source, {f"{name}.{key}": value for key, value in config.get(name).items()})
    rope.only(f"{name}.partial_rotary_factor", 1)
    theta = rope.positive(f"{name}.rope_theta", MAX_THETA, theta)

    kind = rope.text(f"{name}.rope_type", rope.text(f"{name}.type", "default"))
    if kind not in ROPE_KEYS:
        raise rope.refusal(f"{name}.rope_type", f"must be one of {', '.join(ROPE_KEYS)}")
    known = {f"{name}.{key}" for key in ("rope_type", "type", "partial_rotary_factor", "rope_theta", *ROPE_KEYS[kind])}
    if unknown := rope.values.keys() - known:
        raise rope.refusal(min(unknown), f"must be absent with rope scaling {kind}")
    if kind == "default":
        return theta, None

    declared = config.integer("max_position_embeddings", MAX_CONTEXT)
    factor = rope.number(f"{name}.factor", 1, MAX_FACTOR)
    if kind == "linear":
        return theta, LinearRope(factor=factor)
    if kind == "dynamic":
        return theta, DynamicRope(factor=factor, original_max_position=declared)
    original = rope.integer(f"{name}.original_max_position_embeddings", MAX_CONTEXT, declared)
    original = config.integer("original_max_position_embeddings", MAX_CONTEXT, original)  # transformers prefers it where there are two
    if kind == "llama3":
        low, high = (rope.positive(f"{name}.{key}", MAX_FACTOR) for key in ("low_freq_factor", "high_freq_factor"))
        scaling = built(Llama3Rope, config.source, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=original)
        return theta, scaling
    scales = [rope.positive(f"{name}.{key}", MAX_FACTOR) for key in ("mscale", "mscale_all_dim") if rope.get(f"{name}.{key}") is not None]
    inferred = yarn_attention_factor(factor, *(scales if len(scales) == 2 else ()))
    return theta, built(
        YarnRope,
        config.source,
        factor=factor,
        original_max_position=original,
        attention_factor=rope.positive(f"{name}.attention_factor", MAX_FACTOR, inferred),
        beta_fast=rope.positive(f"{name}.beta_fast", MAX_FACTOR, 32.0),
        beta_slow=rope.positive(f"{name}.beta_slow", MAX_FACTOR, 1.0),
        truncate=rope.flag(f"{name}.truncate", True),
    )
