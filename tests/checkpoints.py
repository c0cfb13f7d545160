"""Small checkpoints on disk, written by transformers and by the gguf package, and what a refusal has to look like."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from planner.errors import BadInput
from planner.runtime.gguf_model import gguf_name
from planner.runtime.weights import load_checkpoint

CPU = torch.device("cpu")
F32 = gguf.GGMLQuantizationType.F32


def make_model(architecture: str = "llama", **changes) -> PreTrainedModel:
    """Random weights; 4 heads of 8 over 2 KV heads, so that heads, KV heads and head_dim all differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 256, "head_dim": 8}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    config = AutoConfig.for_model(architecture, **sizes | counts | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False} | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):  # which would be all 0 or all 1
                parameter.add_(torch.randn(parameter.shape) / 4)
    return model


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def write_gguf(path: Path, model: PreTrainedModel, kind=F32, tensors: dict[str, np.ndarray] | None = None, **metadata) -> Path:
    """As llama.cpp's convert_hf_to_gguf.py does: norms and biases in float32, q and k permuted for llama alone.

    `metadata` adds or replaces numbers and strings, `tensors` adds tensors under GGUF's names.
    """
    config = model.config
    name = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", name))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3" or config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
    for key, value in metadata.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)](key, value)
    for key, tensor in weights_of(model).items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads and name == "llama":
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if kind is F32 or array.ndim == 1:
            writer.add_tensor(gguf_name(key), np.ascontiguousarray(array))
        else:
            writer.add_tensor(gguf_name(key), quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    for key, array in (tensors or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, dtype=torch.float32, **options):
    return load_checkpoint(path, dtype, CPU, **options)


def edit(file: Path, **changes) -> None:
    """Replaces fields of a JSON file; those set to "absent" go."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


@contextmanager
def refused(*words: str, within_s: float = 1.0):
    """BadInput on one line that names all the words, well before anything of a claimed size could be allocated or looped over."""
    start = time.perf_counter()
    with pytest.raises(BadInput) as caught:
        yield
    assert time.perf_counter() - start < within_s
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
