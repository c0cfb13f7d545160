"""Times of one decoder layer's kernels under a serving engine, a folder of three CSV files, plain or gzipped, in microseconds:

    attention.csv     prefill_chunk,kv_prefill,n_decode,kv_decode,time_us    one prompt's chunk beside n_decode requests of kv_decode tokens
    dense.csv         layer,tokens,time_us                                   everything whose time follows from the tokens of a step
    per_sequence.csv  layer,sequences,time_us                                the head and the sampler, by requests that get a token

As LLMServingSim's profiler writes them (github.com/casys-kaist/LLMServingSim). Points between the measured ones are not filled in here.
"""

import csv
import io
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from planner.errors import BadInput
from planner.files import read_bytes
from planner.importers.contract import decoded, shown

MAX_TABLE_BYTES = 64 * 2**20  # unpacked
MAX_COUNT = 2**24
MICRO = 1e-6
ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")


class Curve(NamedTuple):
    """Seconds by a count."""

    at: np.ndarray  # [n] ascending, from 1
    seconds: np.ndarray  # [n]


class LayerTables(NamedTuple):
    """Raw times, in seconds."""

    dense: dict[str, Curve]  # by tokens
    per_sequence: dict[str, Curve]  # by requests
    attention: np.ndarray  # [rows, 4] whole numbers, the columns ATTENTION
    attention_s: np.ndarray  # [rows]


def read_layer_tables(folder: str | Path) -> LayerTables:
    """The tables of a folder; BadInput names file, line and column."""
    rows = _read(Path(folder), "attention", ATTENTION)
    points = {}
    for at, seconds, place in rows:
        if points.setdefault(at, seconds) != seconds:
            raise BadInput(f"{place}: {dict(zip(ATTENTION, at, strict=True))} must be there once, it has two times; drop one")
    return LayerTables(
        dense=_curves(Path(folder), "dense", "tokens"), per_sequence=_curves(Path(folder), "per_sequence", "sequences"),
        attention=np.array(list(points), dtype=np.int64), attention_s=np.array(list(points.values())),
    )  # fmt: skip


def _curves(folder: Path, name: str, count: str) -> dict[str, Curve]:
    by_layer: dict[str, dict[int, float]] = {}
    for (layer, at), seconds, place in _read(folder, name, ("layer", count)):
        if at < 1:
            raise BadInput(f"{place}: {count} must be 1 or more, got {at}")
        if by_layer.setdefault(layer, {}).setdefault(at, seconds) != seconds:
            raise BadInput(f"{place}: {shown(layer)} at {at} {count} must be there once, it has two times; drop one")
    return {layer: Curve(np.array(sorted(points)), np.array([points[at] for at in sorted(points)])) for layer, points in by_layer.items()}


def _read(folder: Path, name: str, keys: tuple[str, ...]) -> list[tuple[tuple, float, str]]:
    """Keys, seconds, and file and line of each row."""
    path = next((path for path in (folder / f"{name}.csv", folder / f"{name}.csv.gz") if path.is_file()), None)
    if path is None:
        raise BadInput(f"{folder} must hold {name}.csv or {name}.csv.gz, it has neither; give the folder that a layer profiler wrote")
    reader = csv.reader(io.StringIO(decoded(_unpacked(read_bytes(path, "layer table"), path), str(path)), newline=""), strict=True)
    columns, rows = (*keys, "time_us"), []
    try:
        header = [field.strip() for field in next(reader, [])]
        if sorted(header) != sorted(columns):
            raise BadInput(f"{path} must have the columns {', '.join(columns)}, got {shown(header)}")
        order = [header.index(column) for column in columns]
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise BadInput(f"{path}, line {reader.line_num} must have {len(header)} fields, got {len(fields)}")
            place = f"{path}, line {reader.line_num}"
            *key, time_us = (fields[i].strip() for i in order)
            at = tuple(value if column == "layer" else _whole(value, column, place) for column, value in zip(keys, key, strict=True))
            rows.append((at, MICRO * _time(time_us, place), place))
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    if not rows:
        raise BadInput(f"{path} must hold at least one row, got none")
    return rows


def _unpacked(content: bytes, path: Path) -> bytes:
    if content[:2] != b"\x1f\x8b":
        return content
    unpack = zlib.decompressobj(wbits=31)
    try:
        content = unpack.decompress(content, MAX_TABLE_BYTES)
    except zlib.error as error:
        raise BadInput(f"cannot unpack {path}: {error}") from None
    if unpack.unconsumed_tail or unpack.unused_data or not unpack.eof:
        raise BadInput(f"a gzipped table must be one whole member of at most {MAX_TABLE_BYTES} bytes, {path} is not; unpack it yourself")
    return content


def _whole(text: str, column: str, place: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= MAX_COUNT):
        raise BadInput(f"{place}, column {column} must be a whole number up to {MAX_COUNT}, got {shown(text)}")
    return int(text)


def _time(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e9:
        raise BadInput(f"{place}, column time_us must be a number of microseconds above 0, got {shown(text)}")
    return value
