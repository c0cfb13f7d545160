"""JSON documents and JSON lines of benchmark tools, field by field, each refused by name where it is not what it should be."""

import math
from typing import NamedTuple

import msgspec

from planner.errors import BadInput
from planner.importers.contract import MAX_CELLS, decoded, shown

NUMBERS = (int, float)


class Record(NamedTuple):
    """One JSON object of a file."""

    place: str  # for messages: the file, and the line where there are several
    source: str
    fields: dict

    def number(self, key: str) -> float | None:
        """A finite number; None where the field is missing or null."""
        value = self.fields.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, NUMBERS) or not abs(value) < 1e300:  # nor NaN
            raise BadInput(f"{self.place}: {key} must be a finite number, got {shown(value)}")
        return float(value)

    def needed(self, key: str) -> float:
        """A number above 0."""
        value = self.number(key)
        if value is None or value <= 0:
            raise BadInput(f"{self.place}: {key} must be a number above 0, got {shown(self.fields.get(key))}")
        return value

    def whole(self, key: str) -> int | None:
        """A whole number, also in quotes, as metadata come; None where the field is missing or null."""
        value = self.fields.get(key)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            return int(value)
        value = self.number(key)
        if value is not None and not value.is_integer():
            raise BadInput(f"{self.place}: {key} must be a whole number, got {shown(value)}")
        return None if value is None else int(value)

    def text(self, key: str) -> str | None:
        """A string; None where the field is missing or null."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, str):
            raise BadInput(f"{self.place}: {key} must be a string, got {shown(value)}")
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers; empty where the field is missing or null."""
        values = self.fields.get(key) or []
        if not isinstance(values, list) or not all(
            isinstance(value, NUMBERS) and not isinstance(value, bool) and abs(value) < 1e300 for value in values
        ):
            raise BadInput(f"{self.place}: {key} must be a list of finite numbers, got {shown(values)}")
        return values

    def below(self, key: str) -> "Record | None":
        """The object in a field; None where it is missing or null."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise BadInput(f"{self.place}: {key} must be an object, got {shown(value)}")
        return None if value is None else Record(f"{self.place}, {key}", self.source, value)

    def mean(self, total: str, count: float) -> int:
        """The mean length in tokens, rounded; at least 1."""
        return max(1, math.floor(self.needed(total) / count + 0.5))


def read_records(content: bytes, name: str) -> list[Record]:
    """The objects of a file: one document, a list of them, or one a line."""
    text = decoded(content, name)
    try:
        document = msgspec.json.decode(text)
        values = [(name, name, value) for value in (document if isinstance(document, list) else [document])]
        if isinstance(document, list):
            values = [(f"{name}, entry {i}", f"{name}:{i}", value) for i, (*_, value) in enumerate(values, 1)]
    except (msgspec.MsgspecError, RecursionError):
        values = _lines(text, name)
    if not values:
        raise BadInput(f"{name} must hold at least one JSON object, got none")
    for place, _, value in values:
        if not isinstance(value, dict):
            raise BadInput(f"{place} must be a JSON object, got {shown(value)}")
    if len(values) > MAX_CELLS:
        raise BadInput(f"a profile holds at most {MAX_CELLS} cells, {name} has {len(values)} records; split it")
    return [Record(*value) for value in values]


def _lines(text: str, name: str) -> list[tuple[str, str, object]]:
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append((f"{name}, line {number}", f"{name}:{number}", msgspec.json.decode(line)))
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadInput(
                f"{name}, line {number} is not JSON ({shown(str(error))}); the file may be cut off, or hold NaN where nothing was measured"
            ) from None
    return values
