"""The safetensors files of a Hugging Face folder: which they are, and what lies in them, from their headers alone.

Source: safetensors README (format). Both the files and their index are untrusted.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from safetensors import SafetensorError, safe_open

from planner.errors import BadInput
from planner.runtime.fields import Fields, one_line, read_json

INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "F16", "BF16")  # as files spell them
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
PICKLE_REMEDY = "convert to safetensors (save_pretrained of transformers writes it)"


class Stored(NamedTuple):
    """A tensor in its file."""

    file: Path
    dtype: str  # as safetensors spells it: F32, BF16, F8_E4M3, I32, ..
    shape: tuple[int, ...]
    num_bytes: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name; index and files must agree."""
    files, placed = _weight_files(folder)
    found = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in found:
                raise BadInput(f"{file}: tensor {one_line(name)} is also in {found[name].file.name}; a tensor must be in one file")
            found[name] = stored
    for name, file in (placed or {}).items():
        if name not in found or found[name].file.name != file:
            raise BadInput(f"{folder / INDEX}: weight_map[{one_line(name)}] must name the file that holds the tensor, got {file}")
    return found


def header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def reading(file: Path, action, *args: Any, **options: Any) -> Any:
    """What the action returns; BadInput names the file if it cannot be read."""
    try:
        return action(*args, **options)
    except (SafetensorError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not a readable safetensors file: {one_line(error)}; download it again") from error


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _header(file: Path) -> dict[str, Stored]:
    with reading(file, safe_open, file, framework="np"):  # holds the header to 100 MB, and its offsets to shapes, dtypes and file size
        pass
    with file.open("rb") as opened:
        content = opened.read(header_bytes(file))[8:]
    raw = reading(file, msgspec.json.decode, content, type=dict[str, msgspec.Raw])
    entries = {name: reading(file, msgspec.json.decode, value, type=_Entry) for name, value in raw.items() if name != "__metadata__"}
    return {name: Stored(file, entry.dtype, entry.shape, entry.data_offsets[1] - entry.data_offsets[0]) for name, entry in entries.items()}


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
