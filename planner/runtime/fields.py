"""Values of an untrusted file, each checked as it is taken out. A broken rule raises BadInput, which names the file and the field."""

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from planner.errors import BadInput

MIB = 2**20
MAX_JSON_BYTES = 64 * MIB  # the index of the largest published models is under 10 MiB

# Far above any published model, and small enough that no product of them is a nuisance.
MAX_LAYERS = MAX_HEADS = MAX_HEAD_DIM = 2**14
MAX_WIDTH = MAX_VOCAB = 2**24
MAX_CONTEXT = 2**32
MAX_THETA = 1e15
MAX_FACTOR = 1e6  # of rope scaling
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # as model hubs call models


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

    def number(self, name: str, least: float, most: float) -> float:
        value = self._required(name, None)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.refusal(name, f"must be a number from {least:g} to {most:g}")
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
        shown = name if len(name) <= 120 else name[:117] + "..."  # a key may be as long as the file
        return BadInput(f"{self.source}: {shown} {rule}, got {one_line(self.values.get(name))}")

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


def where_from(path: str) -> str:
    """How to come by a model that is called as hubs call them, as the end of a message; empty for other paths."""
    return "; nothing is fetched from a hub, download it first (hf download NAME --local-dir FOLDER)" if HUB_NAME.fullmatch(path) else ""


def one_line(value: object) -> str:
    """A value on one line, cut to a bearable length."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
