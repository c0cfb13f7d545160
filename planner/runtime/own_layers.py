"""What a drafter cut from its target does not share with it: a few layers and the last norm, in one safetensors file.

Tensors carry Hugging Face names; matrices are held in 8 bits with a float32 scale per row. Embedding and head are the
target's, so that the file is small and no use without a target of the same shape.
"""

import hashlib
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from planner.errors import BadInput
from planner.files import read_bytes, write_whole
from planner.runtime.fields import one_line
from planner.runtime.linear import Linear
from planner.runtime.model import Transformer, build_model
from planner.runtime.safetensors_folder import reading
from planner.runtime.weights import Checkpoint, expected_shapes
from planner.specs import ModelSpec

FORMAT = "specplan own layers 1"
MAX_BYTES = 2**34
SCALES = ".scales"
SHARED = ("model.embed_tokens.weight", "lm_head.weight")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of itself."""

    format: str
    spec: ModelSpec  # of the drafter
    layers: list[int]  # of the target, that they were cut from
    card: dict[str, msgspec.Raw] = {}  # how it was trained


def save_own_layers(path: str | Path, spec: ModelSpec, layers: list[int], tensors: dict[str, Tensor], card: dict) -> None:
    """tensors  by Hugging Face names, in floats"""
    header = Header(format=FORMAT, spec=spec, layers=layers, card={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in card.items()})
    write_whole(path, save(packed(tensors), {"header": msgspec.json.encode(header).decode()}))


def read_header(path: str | Path) -> Header:
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"a drafter's own layers are a file, {path} is none; check the path")
    with reading(path, safe_open, path, framework="np") as file:
        metadata = file.metadata() or {}
    try:
        header = msgspec.json.decode(metadata.get("header", ""), type=Header)
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} does not hold a drafter's own layers: {one_line(str(error))}; make it with `planner train`") from None
    if header.format != FORMAT:
        raise BadInput(f"{path}: format must be {FORMAT!r}, got {one_line(header.format)}; update the package that reads it")
    return header


def load_own_layers(path: str | Path, target: Transformer, dtype: torch.dtype) -> Transformer:
    """The drafter, its embedding and head shared with this target. BadInput says what does not fit."""
    header, ours = read_header(path), target.spec
    for field in ("hidden_size", "vocab_size", "tie_embeddings"):
        if (own := getattr(header.spec, field)) != getattr(ours, field):
            raise BadInput(
                f"{path} was cut from a target with {field} {own}, this one has {getattr(ours, field)}; take the target it was trained for"
            )
    own = dict(own_tensors(path, header, dtype, target.device))
    shared = {"model.embed_tokens.weight": target.embedding.to(dtype)}
    if not ours.tie_embeddings:
        head = target.head
        shared["lm_head.weight"] = head.weights if type(head) is Linear and head.weights.dtype == dtype else head.restored(dtype)
    digest = hashlib.sha256(read_bytes(path, "drafter")).hexdigest()[:16]
    return build_model(Checkpoint(header.spec, shared | own, digest), target.kernels, target.special_tokens)


def own_tensors(path: str | Path, header: Header, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors of the file as floats, checked against the shapes that its header promises."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path} must have at most {MAX_BYTES} bytes, got {path.stat().st_size}; take another file")
    expected = {}
    for name, shape in expected_shapes(header.spec):
        expected |= {} if name in SHARED else {name: shape}
        if len(expected) > 100_000:
            raise BadInput(f"{path} names too many layers ({header.spec.num_layers}); take another file")
    with reading(path, safe_open, path, framework="pt", device=str(device)) as file:
        names = set(file.keys())
        wrong = names ^ (set(expected) | {name + SCALES for name in expected if name + SCALES in names})
        if wrong:
            raise BadInput(f"{path}: tensor {one_line(min(wrong))} is missing or unknown; make the file with `planner train`")
        for name, shape in expected.items():
            found = {part: tuple(file.get_slice(part).get_shape()) for part in (name, name + SCALES) if part in names}
            if found != {name: shape} | ({name + SCALES: shape[:1]} if name + SCALES in names else {}):
                raise BadInput(
                    f"{path}: tensor {name} must have shape {shape} (and a scale per row), got {found}; make the file with `planner train`"
                )
        return unpacked({name: file.get_tensor(name) for name in names}, dtype)


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in 8 bits: the largest weight of a row becomes 127. The rest in float32."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().cpu()
        if tensor.dim() == 2:
            scales = tensor.abs().amax(1).clamp(min=1e-12) / 127
            found[name], found[name + SCALES] = (tensor / scales[:, None]).round().to(torch.int8), scales
        else:
            found[name] = tensor.contiguous()
    return found


def unpacked(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that were packed, to within half a step of their rows."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(SCALES):
            scales = tensors.get(name + SCALES)
            found[name] = (tensor if scales is None else tensor.float() * scales[:, None]).to(dtype)
    return found
