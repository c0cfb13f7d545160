"""A model as an ordinary Hugging Face folder: the files beside its weights.

Source: transformers, whose versions 4 and 5 both read these keys; config_json.py and tokenizer.py read them back.
"""

import json
import os
from pathlib import Path
from typing import Any

from planner.errors import BadInput
from planner.runtime.tokenizer import Tokenizer
from planner.specs import DType, DynamicRope, FactorsRope, LinearRope, Llama3Rope, ModelSpec, YarnRope

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json",
    "merges.txt", "generation_config.json",
)  # fmt: skip


def config_values(spec: ModelSpec, dtype: DType, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says. BadInput for a rope scaling that it has no words for."""
    values = {
        "architectures": [CLASSES[spec.architecture]], "model_type": spec.architecture, "hidden_act": "silu", "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size, "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context_len, "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_embeddings, "torch_dtype": dtype,
    }  # fmt: skip
    if spec.architecture == "mistral":
        values["sliding_window"] = None  # absent means 4096
    stops = list(tokenizer.stop_tokens)
    values |= {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    for name in ("bos_token", "pad_token"):
        if (text := tokenizer.named_tokens.get(name)) in tokenizer.vocabulary:
            values[f"{name}_id"] = tokenizer.vocabulary[text]
    match spec.rope_scaling:
        case LinearRope(factor=factor):
            values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case DynamicRope(factor=factor, original_max_position=declared):
            values |= {"rope_scaling": {"rope_type": "dynamic", "factor": factor}, "max_position_embeddings": declared}
        case Llama3Rope() as rope:
            values["rope_scaling"] = {
                "rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_position,
            }  # fmt: skip
        case YarnRope() as rope:
            values["rope_scaling"] = {
                "rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_max_position,
                "attention_factor": rope.attention_factor, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate,
            }  # fmt: skip
        case FactorsRope():
            raise BadInput(
                f"config.json has no words for the rope factors of {spec.name}, which a GGUF file carries; train the drafter from the target's "
                "Hugging Face folder"
            )
    return values


def tokenizer_files(target: Path, tokenizer: Tokenizer, max_context_len: int) -> dict[str, bytes]:
    """Name -> content: those of the target's folder as they are, those of a GGUF file rebuilt."""
    if target.is_dir():
        try:
            return {name: (target / name).read_bytes() for name in TOKENIZER_FILES if os.path.isfile(target / name)}
        except OSError as error:
            raise BadInput(f"cannot read the tokenizer of {target}: {error.strerror or error}") from None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_context_len, "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.bos_token is not None, **tokenizer.named_tokens,
    }  # fmt: skip
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return {"tokenizer.json": tokenizer.to_json().encode(), "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode()}
