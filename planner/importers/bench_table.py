"""A table of benchmark runs, CSV: a row per cell, columns by name.

    drafter,draft_len,concurrency,context_len,output_len,tpot_s,tokens_per_round,output_tokens_per_s
    ,0,8,1024,256,0.0121,,640
    eagle3,3,8,1024,256,0.0068,2.31,1130

An empty drafter with draft_len 0 is off; a named one with 0 is loaded and idle. Other empty fields are not known. A row without
tpot_s is a run that failed: it is left out, and that is said.
"""

import csv
import io
import math
import re

from planner.errors import BadInput
from planner.importers.contract import MAX_CELLS, Given, Imported, decoded, make_cell, settle, shown
from planner.serving import OFF, ServedCell

MAX_TABLE_BYTES = 16 * 2**20
MAX_POSITIONS = 1024  # acceptance_1 .. acceptance_1024

NEEDED = ("drafter", "draft_len", "concurrency", "context_len", "output_len", "tpot_s")
OPTIONAL = ("itl_s", "output_tokens_per_s", "ttft_s", "tokens_per_round", "tp")
FILLED_BY_FLAGS = ("concurrency", "context_len", "output_len", "tp")
WHOLE = ("draft_len", "concurrency", "context_len", "output_len", "tp")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
ACCEPTANCE = re.compile(r"acceptance_([1-9][0-9]{0,3})")


def read_table(content: bytes, name: str, given: Given) -> Imported:
    """The cells of a table; BadInput names line, column and value."""
    if len(content) > MAX_TABLE_BYTES:
        raise BadInput(f"a table holds at most {MAX_TABLE_BYTES} bytes, {name} has {len(content)}; split it")
    reader = csv.reader(io.StringIO(decoded(content, name), newline=""), strict=True)
    cells, unmeasured = [], []
    try:
        columns = _columns(next(reader, []), name, given)
        positions = sorted(filter(_position, columns), key=_position)
        for row in reader:
            line = reader.line_num
            if len(row) <= len(columns) and not any(field.strip() for field in row):
                continue
            if len(row) != len(columns):
                raise BadInput(f"{name}, line {line} must have a field for each of the {len(columns)} columns, got {len(row)}; empty ones count")
            values = dict(zip(columns, map(str.strip, row), strict=True))
            if not values["tpot_s"]:
                unmeasured.append(line)
                continue
            if len(cells) == MAX_CELLS:
                raise BadInput(f"a profile holds at most {MAX_CELLS} cells, {name} has more; split it")
            cells.append(_cell(values, positions, name, line, given))
    except csv.Error as error:
        raise BadInput(f"{name}, line {reader.line_num} is not CSV: {error}") from None
    if not cells:
        raise BadInput(f"{name} must hold at least one row with tpot_s, got none")
    warnings = [f"{name}: left out for want of tpot_s: {lines_of(unmeasured)}"] if unmeasured else []
    return Imported(cells, warnings)


def known_columns() -> str:
    """For messages."""
    return ", ".join([*NEEDED, *OPTIONAL, "acceptance_1 .. acceptance_k"])


def lines_of(lines: list[int]) -> str:
    """line 3, or lines 3, 7, 9 and 12 more."""
    some = ", ".join(map(str, lines[:5]))
    return f"line{'s' * (len(lines) > 1)} {some}{f' and {len(lines) - 5} more' if len(lines) > 5 else ''}"


def _columns(header: list[str], name: str, given: Given) -> list[str]:
    columns = [field.strip() for field in header]
    unknown = [column for column in columns if column not in NEEDED + OPTIONAL and not _position(column)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise BadInput(f"{name}: unknown column {', '.join(map(shown, unknown[:3]))}{more}; known are {known_columns()}")
    if len(set(columns)) != len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise BadInput(f"{name}: column {twice} must be there once, got it {columns.count(twice)} times; drop one")
    flags = dict(zip(FILLED_BY_FLAGS, (given.concurrency, given.context_len, given.output_len, given.tensor_parallel), strict=True))
    missing = [column for column in NEEDED if column not in columns and flags.get(column) is None]
    if missing:
        raise BadInput(f"{name} must have the columns {', '.join(NEEDED)}, {', '.join(missing)} is missing")
    positions = sorted(filter(None, map(_position, columns)))
    if positions != list(range(1, len(positions) + 1)):
        gap = next(i for i in range(1, len(positions) + 1) if i not in positions)
        raise BadInput(f"{name}: acceptance_{positions[-1]} needs the columns of all positions before it, acceptance_{gap} is missing")
    return columns


def _position(column: str) -> int | None:
    match = ACCEPTANCE.fullmatch(column)
    return int(match[1]) if match and int(match[1]) <= MAX_POSITIONS else None


def _cell(values: dict[str, str], positions: list[str], name: str, line: int, given: Given) -> ServedCell:
    place = f"{name}, line {line}"
    numbers = {column: read_number(values[column], column, place, whole=column in WHOLE) for column in values if column != "drafter"}
    drafter = values["drafter"] or OFF
    if drafter.lower() == "off":
        raise BadInput(f"{place}, column drafter must be empty where no drafter is loaded, got {shown(drafter)}")
    draft_len = numbers["draft_len"]
    if draft_len is None:
        if drafter != OFF:
            raise BadInput(f"{place}, column draft_len must be given with a drafter, got nothing; 0 is loaded and idle")
        draft_len = 0
    acceptance = [numbers[column] for column in positions]
    while acceptance and acceptance[-1] is None:
        acceptance.pop()
    if None in acceptance:
        raise BadInput(f"{place}, column acceptance_{acceptance.index(None) + 1} must be given, acceptance_{len(acceptance)} is conditional on it")
    for i, share in enumerate(acceptance, 1):
        if not 0 <= share <= 1:
            raise BadInput(f"{place}, column acceptance_{i} must lie in [0, 1], got {share:g}; write a share, not percent")
    return make_cell(
        place, f"{name}:{line}", drafter=drafter, draft_len=draft_len, acceptance=acceptance, tpot_s=numbers["tpot_s"],
        concurrency=settle(place, "concurrency", numbers.get("concurrency"), given),
        context_len=settle(place, "context_len", numbers.get("context_len"), given),
        output_len=settle(place, "output_len", numbers.get("output_len"), given),
        tensor_parallel=settle(place, "tensor_parallel", numbers.get("tp"), given, default=1),
        **{column: numbers.get(column) for column in ("itl_s", "output_tokens_per_s", "ttft_s", "tokens_per_round")},
    )  # fmt: skip


def read_number(text: str, column: str, place: str, *, whole: bool) -> float | int | None:
    """The number of a field, None of an empty one; BadInput names the column."""
    if not text:
        return None
    value = float(text) if len(text) < 400 and NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise BadInput(f"{place}, column {column} must be a finite number with a decimal point, got {shown(text)}; leave it empty where unknown")
    if not whole:
        return value
    if not value.is_integer():
        raise BadInput(f"{place}, column {column} must be a whole number, got {shown(text)}")
    return int(value)
