"""Which requests arrive when: traces from files, and generated arrivals. Times are seconds, lengths tokens.

Trace files, plain or gzipped, are told apart by their content:
    Mooncake   JSON lines of timestamp (ms), input_length, output_length, hash_ids
    Azure      CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens
    ours       CSV with the columns arrival_s, input_len, output_len
"""

import csv
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from planner.errors import BadInput
from planner.files import read_bytes

MAX_REQUESTS = 2_000_000
MAX_TRACE_BYTES = 2**30  # unpacked
MAX_LEN = 2**24  # tokens of a prompt or an output
MAX_ARRIVAL_S = 1e9
HASHED_TOKENS = 512  # that one hash of a Mooncake trace stands for, the tokens before it included

Arrivals = Literal["poisson", "gamma"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of a workload."""

    arrival_s: float
    input_len: int
    output_len: int  # generated, whatever is drafted
    blocks: tuple[int, ...] = ()  # one hash per HASHED_TOKENS of the prompt, of all that came before: equal hashes, equal prefixes

    def __post_init__(self):
        if not (0 <= self.arrival_s <= MAX_ARRIVAL_S):
            raise ValueError(f"arrival_s must lie in [0, {MAX_ARRIVAL_S:g}], got {self.arrival_s}")
        if not (1 <= self.input_len <= MAX_LEN and 1 <= self.output_len <= MAX_LEN):
            raise ValueError(f"input_len and output_len must lie in [1, {MAX_LEN}], got {self.input_len} and {self.output_len}")
        if len(self.blocks) > math.ceil(self.input_len / HASHED_TOKENS):
            raise ValueError(f"a prompt of {self.input_len} tokens has at most one hash per {HASHED_TOKENS}, got {len(self.blocks)}")


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0, le=1e3 * MAX_ARRIVAL_S)]  # ms
    input_length: int
    output_length: int
    hash_ids: list[Annotated[int, Meta(ge=0, le=2**62)]] = []


def read_trace(path: str | Path) -> list[Request]:
    """The requests of a trace by arrival, the first of an Azure trace at 0. BadInput names file and line."""
    text = _text(read_bytes(path, "trace"), path)
    first = text.lstrip()[:1]
    found = []
    for request in _mooncake(text, path) if first == "{" else _csv(text, path):
        if len(found) == MAX_REQUESTS:
            raise BadInput(f"a trace holds at most {MAX_REQUESTS} requests, {path} has more; split it")
        found.append(request)
    if not found:
        raise BadInput(f"a trace must hold a request, {path} holds none; check the file")
    return sorted(found, key=lambda request: request.arrival_s)


def generate(
    *,
    rate: float,  # requests per second
    lengths: Sequence[tuple[int, int]],  # (input_len, output_len), drawn with replacement; one pair: fixed lengths
    count: int,
    seed: int,
    arrivals: Arrivals = "poisson",
    cv: float = 1.0,  # of the times between gamma arrivals: standard deviation over mean
) -> list[Request]:
    """Requests whose times between arrivals are independent, with mean 1 / rate. The same seed draws the same at every rate, rescaled."""
    if not (0 < rate <= 1e6):
        raise BadInput(f"the rate must lie in (0, 1e6] requests per second, got {rate}")
    if not (1 <= count <= MAX_REQUESTS):
        raise BadInput(f"the number of requests must lie in [1, {MAX_REQUESTS}], got {count}")
    if not (0.01 <= cv <= 100):
        raise BadInput(f"the coefficient of variation of arrivals must lie in [0.01, 100], got {cv}")
    if arrivals == "poisson" and cv != 1:
        raise BadInput(f"poisson arrivals have a coefficient of variation of 1, got {cv}; use gamma arrivals")
    if not lengths:
        raise BadInput("lengths must hold at least one pair of input and output length, got none")
    times, which = (np.random.default_rng([seed, stream]) for stream in range(2))
    gaps = times.exponential(size=count) if arrivals == "poisson" else times.gamma(cv**-2, cv**2, size=count)
    chosen = which.integers(len(lengths), size=count)
    return [
        Request(arrival_s=float(at), input_len=lengths[i][0], output_len=lengths[i][1]) for at, i in zip(np.cumsum(gaps) / rate, chosen, strict=True)
    ]


def lognormal_lengths(*, input_mean: float, output_mean: float, cv: float, count: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of independent lengths with these means and one coefficient of variation, at least 1 each; cv = 0 is fixed lengths."""
    if not (1 <= input_mean <= MAX_LEN and 1 <= output_mean <= MAX_LEN and 0 <= cv <= 10):
        raise BadInput(f"mean lengths must lie in [1, {MAX_LEN}] and cv in [0, 10], got {input_mean}, {output_mean} and {cv}")
    sd = math.sqrt(math.log1p(cv**2))
    drawn = np.exp(sd * np.random.default_rng(seed).standard_normal((count, 2)) - sd**2 / 2) * [input_mean, output_mean]
    return [(int(a), int(b)) for a, b in np.clip(np.rint(drawn), 1, MAX_LEN)]


def rescaled(requests: Sequence[Request], speed: float) -> list[Request]:
    """The same requests arriving `speed` times as fast."""
    if not (0 < speed < math.inf):
        raise BadInput(f"the speed of a trace must be above 0, got {speed}")
    return [replace(request, arrival_s=request.arrival_s / speed) for request in requests]


def _text(content: bytes, path: str | Path) -> str:
    if content[:2] == b"\x1f\x8b":
        unpack = zlib.decompressobj(wbits=31)
        try:
            content = unpack.decompress(content, MAX_TRACE_BYTES)
        except zlib.error as error:
            raise BadInput(f"cannot unpack the trace {path}: {error}") from None
        if unpack.unconsumed_tail or unpack.unused_data or not unpack.eof:
            raise BadInput(f"a gzipped trace must be one whole member of at most {MAX_TRACE_BYTES} bytes, {path} is not; unpack it yourself")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"the trace {path} must be UTF-8, byte {error.start} is not") from None


def _mooncake(text: str, path: str | Path) -> Iterator[Request]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            one = decoder.decode(line)
            yield Request(arrival_s=one.timestamp / 1e3, input_len=one.input_length, output_len=one.output_length, blocks=tuple(one.hash_ids))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{number}: {error}") from None


def _csv(text: str, path: str | Path) -> Iterator[Request]:
    rows = csv.reader(io.StringIO(text))
    try:
        header = [name.strip() for name in next(rows, [])]
        azure = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
        columns = azure if azure[0] in header else ["arrival_s", "input_len", "output_len"]
        if missing := [name for name in columns if name not in header]:
            raise BadInput(f"{path}:1: a trace has the columns {', '.join(columns)}, got {','.join(header)[:80]!r} without {', '.join(missing)}")
        time, *lengths = (header.index(name) for name in columns)
        start = None
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(header):
                raise BadInput(f"{path}:{rows.line_num}: a row must have {len(header)} fields as the header has, got {len(row)}")
            try:
                at = datetime.fromisoformat(row[time].strip()) if columns is azure else float(row[time])
                if columns is azure:
                    start = at if start is None else start
                    at = (at - start).total_seconds()
                yield Request(arrival_s=at, input_len=int(row[lengths[0]]), output_len=int(row[lengths[1]]))
            except (ValueError, TypeError, OverflowError) as error:
                raise BadInput(f"{path}:{rows.line_num}: {error}") from None
    except csv.Error as error:
        raise BadInput(f"{path}:{rows.line_num}: {error}") from None
