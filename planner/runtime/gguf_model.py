"""Metadata of a GGUF file -> ModelSpec, and the names of its tensors.

Source: llama.cpp convert_hf_to_gguf.py and src/llama-model.cpp. Mistral's files say that their architecture is llama.
"""

import math
from pathlib import Path

from planner.errors import BadInput
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
)
from planner.runtime.gguf_file import GGUF, dequantized
from planner.runtime.model_spec import Overrides, built, make_spec, model_name, yarn_attention_factor
from planner.specs import FactorsRope, LinearRope, ModelSpec, RopeScaling, YarnRope

ARCHITECTURES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, kind = name.rpartition(".")  # weight or bias
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def gguf_spec(path: Path, gguf: GGUF, overrides: Overrides) -> ModelSpec:
    metadata = Fields(path, gguf.metadata)
    at = metadata.text("general.architecture")
    if at not in ARCHITECTURES:
        raise metadata.refusal("general.architecture", f"must be one of {', '.join(ARCHITECTURES)}, the supported architectures")
    metadata.only("split.count", 1)
    metadata.only(f"{at}.expert_count", 0)
    if len(embedding := gguf.tensors["token_embd.weight"].shape if "token_embd.weight" in gguf.tensors else ()) != 2:
        raise BadInput(f"{path}: tensor token_embd.weight must have two dimensions, got {list(embedding) or 'none'}")

    num_heads = metadata.integer(f"{at}.attention.head_count", MAX_HEADS)
    hidden_size = metadata.integer(f"{at}.embedding_length", MAX_WIDTH)
    if metadata.get(f"{at}.attention.key_length") is None and hidden_size % num_heads:
        raise metadata.refusal(f"{at}.embedding_length", f"must be a multiple of head_count ({num_heads}) where key_length is absent")
    head_dim = metadata.integer(f"{at}.attention.key_length", MAX_HEAD_DIM, hidden_size // num_heads)
    metadata.only(f"{at}.attention.value_length", head_dim)
    metadata.only(f"{at}.rope.dimension_count", head_dim)
    return make_spec(
        path,
        overrides,
        metadata.integer(f"{at}.attention.sliding_window", MAX_CONTEXT, 0, least=0) or None,
        name=model_name(path),
        architecture=at,
        num_layers=metadata.integer(f"{at}.block_count", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=metadata.integer(f"{at}.attention.head_count_kv", MAX_HEADS, num_heads),
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=metadata.integer(f"{at}.feed_forward_length", MAX_WIDTH),
        vocab_size=metadata.integer(f"{at}.vocab_size", MAX_VOCAB, embedding[0]),
        max_context_len=metadata.integer(f"{at}.context_length", MAX_CONTEXT),
        rope_theta=metadata.positive(f"{at}.rope.freq_base", MAX_THETA, 10_000.0),
        rms_norm_eps=metadata.positive(f"{at}.attention.layer_norm_rms_epsilon", 1.0),
        tie_embeddings="output.weight" not in gguf.tensors,
        rope_scaling=_rope_scaling(path, gguf, metadata, at),
    )


def _rope_scaling(path: Path, gguf: GGUF, metadata: Fields, at: str) -> RopeScaling | None:
    metadata.only(f"{at}.rope.scale_linear", 1)  # of files from before rope.scaling
    prefix = f"{at}.rope.scaling."
    kind = metadata.text(prefix + "type", "none")
    known = {"none": (), "linear": ("factor",), "yarn": ("factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")}
    if kind not in known:
        raise metadata.refusal(prefix + "type", f"must be one of {', '.join(known)}")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        metadata.only(prefix + key, 1)
    ignored = {"type", "finetuned", "attn_factor", "yarn_attn_factor", "yarn_ext_factor"}
    if unknown := {key for key in metadata.values if key.startswith(prefix)} - {prefix + key for key in (*known[kind], *ignored)}:
        raise metadata.refusal(min(unknown), f"must be absent with rope scaling {kind}")
    if ROPE_FACTORS in gguf.tensors:
        if kind != "none":
            raise metadata.refusal(prefix + "type", f"must be none where the file holds {ROPE_FACTORS}")
        return _factors(path, gguf)
    if kind == "none":
        return None
    factor = metadata.number(prefix + "factor", 1, MAX_FACTOR)
    if kind == "linear":
        return LinearRope(factor=factor)
    return built(
        YarnRope,
        path,
        factor=factor,
        original_max_position=metadata.integer(prefix + "original_context_length", MAX_CONTEXT),
        attention_factor=yarn_attention_factor(factor),
        beta_fast=metadata.positive(prefix + "yarn_beta_fast", MAX_FACTOR, 32.0),
        beta_slow=metadata.positive(prefix + "yarn_beta_slow", MAX_FACTOR, 1.0),
    )


def _factors(path: Path, gguf: GGUF) -> FactorsRope:
    """Llama 3's scaling, worked out by the converter."""
    info = gguf.tensors[ROPE_FACTORS]
    if len(info.shape) != 1 or info.shape[0] > MAX_HEAD_DIM:
        raise BadInput(f"{path}: tensor {ROPE_FACTORS} must have one dimension of at most {MAX_HEAD_DIM}, got {list(info.shape)}")
    factors = tuple(float(value) for rows in dequantized(path, info) for value in rows.flat)
    if not all(0 < value <= MAX_FACTOR and math.isfinite(value) for value in factors):
        raise BadInput(f"{path}: tensor {ROPE_FACTORS} must hold numbers above 0 and at most {MAX_FACTOR:g}; get the file again")
    return FactorsRope(factors=factors)
