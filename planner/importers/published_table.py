"""A table of published or own results, CSV: a row per claim, columns by name, as papers print them.

    table,drafter,texts,context_len,kv_budget,draft_len,acceptance,speedup,tokens_per_s
    AR,,books,8192,,0,,,30.1
    1,llama-68m,books,8192,256,5,0.2043,2.13,

An empty drafter with draft_len 0 is plain decoding, the baseline of its context. `acceptance` is accepted / drafted, a share;
`tokens_per_s` of all `batch` requests together; an empty kv_budget is the full cache, or a mean over budgets. `table` is where a
row was printed. What is held fixed (target, device, texts, batch, temperature) is compared only where it is the same.
"""

import csv
import io
from typing import NamedTuple

from planner.errors import BadInput
from planner.importers.bench_table import MAX_TABLE_BYTES, read_number
from planner.importers.claims import NOISE, Row, differ
from planner.importers.contract import decoded, shown
from planner.serving import OFF

NEEDED = ("drafter", "context_len", "draft_len")
WORDS = ("table", "drafter", "target", "device", "texts")
WHOLE = ("context_len", "draft_len", "kv_budget", "batch")
MEASURED = ("acceptance", "tokens_per_round", "speedup", "tpot_s", "round_s", "tokens_per_s")
COLUMNS = (*NEEDED, "table", "target", "device", "texts", "kv_budget", "batch", "temperature", *MEASURED)
MAX_ROWS = 10_000
MAX_WORD = 200
LARGEST = {"draft_len": 1024, "temperature": 1e3}


class Published(NamedTuple):
    rows: list[Row]
    doubtful: list[tuple[Row, str, str]]  # a row, what it contradicts itself in, and the values


def is_published(columns: set[str]) -> bool:
    """Whether a header is of this kind; a bench table says concurrency and output_len, or has them from flags."""
    return columns >= set(NEEDED) and columns <= set(COLUMNS) and bool(columns & {"speedup", "acceptance", "tokens_per_s", "round_s", "kv_budget"})


def read_published(content: bytes, name: str) -> Published:
    """The rows of a table; BadInput names line, column and value."""
    if len(content) > MAX_TABLE_BYTES:
        raise BadInput(f"a table holds at most {MAX_TABLE_BYTES} bytes, {name} has {len(content)}; split it")
    reader = csv.reader(io.StringIO(decoded(content, name), newline=""), strict=True)
    rows, doubtful = [], []
    try:
        columns = _columns(next(reader, []), name)
        for fields in reader:
            line = reader.line_num
            if len(fields) <= len(columns) and not any(field.strip() for field in fields):
                continue
            if len(fields) != len(columns):
                raise BadInput(f"{name}, line {line} must have a field for each of the {len(columns)} columns, got {len(fields)}; empty ones count")
            if len(rows) == MAX_ROWS:
                raise BadInput(f"a table holds at most {MAX_ROWS} rows, {name} has more; split it")
            row, against = _row(dict(zip(columns, map(str.strip, fields), strict=True)), f"{name}, line {line}", f"{name}:{line}")
            rows.append(row)
            doubtful += [(row, *contradiction) for contradiction in against]
    except csv.Error as error:
        raise BadInput(f"{name}, line {reader.line_num} is not CSV: {error}") from None
    if not rows:
        raise BadInput(f"{name} must hold at least one row, got none")
    return Published(rows, doubtful)


def _columns(header: list[str], name: str) -> list[str]:
    columns = [field.strip() for field in header]
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise BadInput(f"{name}: unknown column {', '.join(map(shown, unknown[:3]))}; known are {', '.join(COLUMNS)}")
    if len(set(columns)) != len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise BadInput(f"{name}: column {twice} must be there once, got it {columns.count(twice)} times; drop one")
    if missing := [column for column in NEEDED if column not in columns]:
        raise BadInput(f"{name} must have the columns {', '.join(NEEDED)}, {', '.join(missing)} is missing")
    return columns


def _row(values: dict[str, str], place: str, source: str) -> tuple[Row, list[tuple[str, str]]]:
    """A row, and in what it contradicts itself."""
    for column in WORDS:
        if len(values.get(column, "")) > MAX_WORD:
            raise BadInput(f"{place}, column {column} must have at most {MAX_WORD} characters, got {len(values[column])}")
    numbers = {column: read_number(text, column, place, whole=column in WHOLE) for column, text in values.items() if column not in WORDS}
    for column, value in numbers.items():
        least, most = (0 if column in ("draft_len", "temperature", "acceptance") else 1e-12), LARGEST.get(column, 1e12)
        if value is not None and not least <= value <= most:
            raise BadInput(f"{place}, column {column} must lie between {least:g} and {most:g}, got {value:g}; leave it empty where unknown")
    acceptance, context_len, draft_len = numbers.get("acceptance"), numbers["context_len"], numbers["draft_len"]
    drafter = values["drafter"] or OFF
    if context_len is None or draft_len is None:
        raise BadInput(f"{place} must say context_len and draft_len, got {values['context_len']!r} and {values['draft_len']!r}")
    if (drafter == OFF) != (draft_len == 0):
        raise BadInput(f"{place}: drafter must be empty where draft_len is 0, and only there, got {shown(values['drafter'])} with {draft_len}")
    if acceptance is not None and acceptance > 1:
        raise BadInput(f"{place}, column acceptance must lie in [0, 1], got {acceptance:g}; write a share, not percent")

    from_acceptance = None if acceptance is None or not draft_len else 1 + draft_len * acceptance
    per_round, batch, tpot_s = numbers.get("tokens_per_round"), numbers.get("batch"), numbers.get("tpot_s")
    tokens_per_s, round_s = numbers.get("tokens_per_s"), numbers.get("round_s")
    from_rate = tokens_per_s and (batch or 1) / tokens_per_s
    against = [
        (what, f"({a:.4g} and {b:.4g})")
        for what, a, b in (
            ("tokens_per_round is not 1 + draft_len x acceptance", per_round, from_acceptance),
            ("tpot_s is not batch / tokens_per_s", tpot_s, from_rate),
            ("tpot_s is not round_s / tokens_per_round", tpot_s or from_rate, round_s and per_round and round_s / per_round),
        )
        if a and b and differ(a, b, NOISE)
    ]
    row = Row(
        source=source, drafter=drafter, series=tuple(values.get(column, "") for column in ("target", "device", "texts")) + (batch,),
        context_len=context_len, draft_len=draft_len, sampler=numbers.get("temperature"), kv_budget=numbers.get("kv_budget"),
        table=values.get("table", ""), batch=batch, tokens_per_round=from_acceptance if per_round is None else per_round,
        speedup=numbers.get("speedup"), tpot_s=from_rate if tpot_s is None else tpot_s, round_s=round_s,
    )  # fmt: skip
    return row, against
