"""What a drafter cut from its target does not share with it: a few layers and the last norm, in one safetensors file.

Tensors carry Hugging Face names; matrices are held in 8 or 4 bits with their scales beside them, as runtime/linear.py has
them in memory. Embedding and head are the target's, so that the file is small and no use without a target of the same shape.
"""

from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from planner.errors import BadInput
from planner.files import write_whole
from planner.runtime.fields import one_line
from planner.runtime.kernels import Kernels
from planner.runtime.linear import GROUP, check_groups, from_4_bits, from_8_bits, in_4_bits, in_8_bits
from planner.runtime.model import Transformer, build_model
from planner.runtime.safetensors_folder import header_bytes, reading
from planner.runtime.weights import Checkpoint, expected_shapes, fingerprint_of, finite
from planner.specs import ModelSpec
from planner.trained import FORMAT, Header, read_header

MAX_NAMES = 100_000
SCALES = ".scales"
SHARED = ("model.embed_tokens.weight", "lm_head.weight")
REMEDY = "make the file with `planner train`"


def save_own_layers(path: str | Path, spec: ModelSpec, layers: list[int], tensors: dict[str, Tensor], card: dict, bits: int = 8) -> None:
    """tensors  by Hugging Face names, in floats"""
    header = Header(format=FORMAT, spec=spec, layers=layers, card=card, bits=bits)
    write_whole(path, save(packed(tensors, bits), {"header": msgspec.json.encode(header).decode()}))


def load_own_layers(path: Path, target: Transformer, dtype: torch.dtype, kernels: Kernels | None = None) -> Transformer:
    """The drafter, its embedding and head shared with this target where it has the target's dtype. BadInput says what does not fit.

    kernels  None: the target's, which are compiled for its dtype
    """
    header = read_header(path)
    check_target(path, header, target.spec)
    return on_target(target, header.spec, own_tensors(path, header, dtype, target.device), dtype, own_fingerprint(path, header), kernels)


def on_target(
    target: Transformer, spec: ModelSpec, tensors: dict[str, Tensor], dtype: torch.dtype, fingerprint: str, kernels: Kernels | None = None
) -> Transformer:  # fmt: skip
    """The drafter of own layers, by Hugging Face names, that runs in dtype on a target of their shape."""
    whole = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"model.embed_tokens.weight": target.embedding.to(dtype)}
    if not spec.tie_embeddings:
        whole["lm_head.weight"] = target.head.restored(dtype)
    drafter = build_model(Checkpoint(spec, whole, fingerprint), kernels or target.kernels, target.special_tokens)
    if dtype == target.dtype:
        drafter.head = target.head  # in as many bits as the target's
    return drafter


def check_target(path: Path, header: Header, target: ModelSpec) -> None:
    """BadInput for a target of another shape than the drafter was cut from."""
    for field in ("hidden_size", "vocab_size", "tie_embeddings"):
        if (own := getattr(header.spec, field)) != (theirs := getattr(target, field)):
            raise BadInput(f"{path} was cut from a target with {field} {own}, {target.name} has {theirs}; take the target it was trained for")


def own_fingerprint(path: Path, header: Header) -> str:
    return fingerprint_of(header.spec, [(path, header_bytes(path))])


def own_tensors(path: Path, header: Header, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors of the file as floats, checked against the shapes that its header promises."""
    expected = {}
    for name, shape in expected_shapes(header.spec):
        expected |= {} if name in SHARED else {name: shape}
        if len(expected) > MAX_NAMES:
            raise BadInput(f"{path} must have fewer layers, got {header.spec.num_layers}; {REMEDY}")
    promised = _promised(path, expected, header.bits)
    with reading(path, safe_open, path, framework="pt", device=str(device)) as file:
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name in file.keys() for part in (file.get_slice(name),)}  # noqa: SIM118
        for name in sorted(found.keys() | promised.keys()):
            if found.get(name) != promised.get(name):
                must, got = (_shown(tensors.get(name)) for tensors in (promised, found))
                raise BadInput(f"{path}: tensor {one_line(name)} must be {must}, got {got}; {REMEDY}")
        stored = {name: file.get_tensor(name) for name in found}
    return {name: finite(path, name, tensor) for name, tensor in unpacked(stored, header.bits, dtype).items()}


def _promised(path: Path, expected: dict[str, tuple[int, ...]], bits: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a file with these bits, as safetensors spells dtypes, and its shape."""
    found = {}
    for name, shape in expected.items():
        if len(shape) == 1:
            found[name] = "F32", shape
        elif bits == 8:
            found |= {name: ("I8", shape), name + SCALES: ("F32", shape[:1])}
        elif shape[1] % GROUP:
            raise BadInput(f"{path}: tensor {name} in 4 bits must have a width that is a multiple of {GROUP}, got {shape[1]}; {REMEDY}")
        else:
            found |= {name: ("U8", (shape[0], shape[1] // 2)), name + SCALES: ("BF16", (shape[0], shape[1] // GROUP, 2))}
    return found


def _shown(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"[:120]


def check_packing(tensors: dict[str, Tensor], bits: int) -> None:
    """BadInput where these tensors cannot be packed so."""
    if bits not in (8, 4):
        raise BadInput(f"a drafter's own weights are written in 8 or 4 bits, got {bits}; change --bits")
    for tensor in tensors.values():
        if bits == 4 and tensor.dim() == 2:
            check_groups(tensor.shape[1])


def packed(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Matrices in so many bits, with scales beside them. The rest in float32."""
    check_packing(tensors, bits)
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().cpu()
        if tensor.dim() == 2:
            found[name], found[name + SCALES] = in_8_bits(tensor) if bits == 8 else in_4_bits(tensor)
        else:
            found[name] = tensor.contiguous()
    return found


def unpacked(tensors: dict[str, Tensor], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that were packed, to within half a step of their rows or groups."""
    restored, found = (from_8_bits if bits == 8 else from_4_bits), {}
    for name, tensor in tensors.items():
        if not name.endswith(SCALES):
            scales = tensors.get(name + SCALES)
            found[name] = (tensor if scales is None else restored(tensor, scales)).to(dtype)
    return found
