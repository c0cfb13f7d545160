"""What heads have in common on disk: tensors that must be there and no others, and the layers of the target that they read.

A head is a drafter in a Hugging Face folder that shares embedding or head with its target and reads its hidden states.
The folder is untrusted.
"""

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from planner.errors import BadInput
from planner.runtime import fp8
from planner.runtime.config_json import read_config
from planner.runtime.fields import Fields, one_line
from planner.runtime.safetensors_folder import FLOAT_DTYPES, Stored, header_bytes, reading
from planner.runtime.weights import fingerprint_of, finite
from planner.specs import ModelSpec

MAX_TAPS = 16


def check_folder(folder: Path, kind: str) -> None:
    if not folder.is_dir():
        raise BadInput(f"{kind} is a folder with config.json and model.safetensors, got {folder}; give its folder")


def _check_tensors(
    folder: Path, kind: str, expected: dict[str, tuple[int, ...]], found: dict[str, Stored], scales: dict[str, str], integers: Collection[str],
    unread: Collection[str],
) -> None:  # fmt: skip
    """Before anything is allocated: every tensor in its shape and a dtype that can be read, and nothing that would be left out in silence."""
    for name, shape in expected.items():
        if name not in found:
            raise BadInput(f"{folder}: tensor {name} is missing; {kind} needs {len(expected)} tensors, the files hold {len(found)}")
        if found[name].shape != shape:
            raise BadInput(
                f"{found[name].file}: tensor {name} must have shape {list(shape)} by the config and the target, got {one_line(list(found[name].shape))}"
            )
        dtypes = ("I64", "I32") if name in integers else FLOAT_DTYPES
        if found[name].dtype not in dtypes and (name in integers or name not in scales):
            raise BadInput(f"{found[name].file}: tensor {name} must be one of {', '.join(dtypes)}, got {found[name].dtype}")
    known = {*expected, *unread, *scales.values()}
    extra = sorted(name for name in found.keys() - known if not name.endswith(".rotary_emb.inv_freq"))
    if extra:
        raise BadInput(f"{folder}: tensor {one_line(extra[0])} is not part of {kind}, got {len(extra)} such; use another head")


def read_tensors(
    folder: Path,
    kind: str,  # of head, with its article
    spec: ModelSpec,
    names: dict[str, str],  # as we have them -> as the files do
    found: dict[str, Stored],  # by our names
    expected: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    integers: Collection[str] = (),  # tensors of ids, which stay as they are stored
    unread: Collection[str] = (),  # tensors that may be there
) -> tuple[dict[str, Tensor], str]:
    """The expected tensors, in floats or FP8, and the fingerprint of the files; BadInput if they are not there, or others are."""
    # Heads are published in floats beside the config of a quantised target, which says nothing about them then.
    in_fp8 = any(part.dtype == fp8.DTYPE for part in found.values())
    block = fp8.scale_block(read_config(folder)) if in_fp8 else None
    scales = fp8.scales_of(found, block)
    _check_tensors(folder, kind, expected, found, scales, integers, unread)
    tensors, files = {}, sorted({entry.file for entry in found.values()})
    with ExitStack() as stack:
        opened = {file: stack.enter_context(reading(file, safe_open, file, framework="pt")) for file in files}

        def read(name: str) -> Tensor:
            file = found[name].file
            tensor = reading(file, opened[file].get_tensor, names[name])
            return tensor if name not in scales else fp8.restored(tensor, read(scales[name]), block)

        for name in expected:
            tensors[name] = read(name)
            if name not in integers:  # copy: pages of a mapped file would be timed as if they were memory
                tensors[name] = finite(found[name].file, names[name], tensors[name].to(device=device, dtype=dtype, copy=True))
    return tensors, fingerprint_of(spec, [(file, header_bytes(file)) for file in files])


def listed_layers(config: Fields, name: str | None, usual: list[int]) -> list[int]:
    """Numbers of layers under a name of the config, or the usual ones where there is none."""
    ids = usual if name is None else config.get(name)
    if not isinstance(ids, list) or not 1 <= len(ids) <= MAX_TAPS or not all(type(layer) is int for layer in ids):
        raise config.refusal(name, f"must be a list of 1 to {MAX_TAPS} integers")
    return ids


def check_taps(source: Path, name: str, ids: list[int], taps: tuple[int, ...], num_layers: int) -> None:
    """taps: the layers that the listed ids mean, counted from 0."""
    if len(set(taps)) < len(taps) or min(taps) < 0 or max(taps) >= num_layers:
        raise BadInput(f"{source}: {name} must be different layers of the target, which has {num_layers}, got {ids}; use its own head")
