"""Drafters cut from their target and trained: those that come with this package, and what a file of one says of itself.

Such a file holds a drafter's own layers alone (runtime/own_layers.py reads them). Its header is read here, without torch.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from planner.errors import BadInput
from planner.specs import ModelSpec

FORMAT = "specplan own layers 1"
SUFFIX = ".safetensors"
NAMES = ("smollm2-multi-view",)
FOLDERS = ("smollm2-dflash",)  # heads, which come as they are published, a folder each: they hold nothing of the target's
MAX_HEADER_BYTES = 100 * 2**20  # as safetensors has it


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the file says of itself."""

    format: str
    spec: ModelSpec  # of the drafter
    layers: list[int]  # of the target, that they were cut from
    card: dict[str, Any]  # how it was trained
    bits: Literal[8, 4] = 8  # of a weight in a matrix


class _Metadata(msgspec.Struct):
    header: str | None = None


class _File(msgspec.Struct):
    metadata: _Metadata | None = msgspec.field(name="__metadata__", default=None)


def is_own_layers(name: str) -> bool:
    """Whether a drafter's name or path stands for its own layers and no whole checkpoint."""
    return name in NAMES or name.endswith(SUFFIX)


def checkpoint_path(name: str) -> Path:
    """Where a drafter's checkpoint lies: the shipped folder of that name, or what the name says."""
    if name not in FOLDERS:
        return Path(name)
    path = Path(__file__).with_name(name)
    if not path.is_dir():
        raise BadInput(f"the drafter {name} comes with the package, and its folder {path} is missing; install specplan again")
    return path


def own_layers_path(name: str) -> Path:
    """The file of a drafter's own layers: the one given, or the shipped one of that name. BadInput if it is not there."""
    path = Path(__file__).with_name(name + SUFFIX) if name in NAMES else Path(name)
    if path.is_file():
        return path
    if name in NAMES:
        raise BadInput(f"the drafter {name} comes with the package, and its file {path} is missing; install specplan again")
    known = ", ".join(NAMES)
    raise BadInput(f"a drafter's own layers are a file that `planner train` has written, or {known}, got {name[:200]!r}; check the path")


def read_header(path: Path) -> Header:
    """BadInput for any other file, a whole checkpoint among them."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = file.read(size) if size <= min(MAX_HEADER_BYTES, path.stat().st_size) else b""
        metadata = msgspec.json.decode(content, type=_File).metadata
        if metadata is None or metadata.header is None:
            raise BadInput(f"{path} holds no drafter's own layers, which `planner train` writes; for a whole checkpoint give its folder")
        header = msgspec.json.decode(metadata.header, type=Header)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"{path} holds no drafter's own layers: {why}; give a file that `planner train` has written") from None
    if header.format != FORMAT:
        raise BadInput(f"{path}: format must be {FORMAT!r}, got {header.format[:100]!r}; update the package that reads it")
    return header
