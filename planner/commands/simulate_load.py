"""The requests of a simulation, from a trace or generated."""

import csv
import io
import re
from pathlib import Path

from planner.commands.flags import AskedSimulation
from planner.errors import BadInput
from planner.files import read_bytes
from planner.simulations import Load
from planner.simulator.workload import Request, generate, read_trace, rescaled

MAX_LENGTHS = 100_000  # of a table


def find_requests(asked: AskedSimulation, seed: int) -> tuple[list[Request], Load]:
    """The requests, and what is to be said of them."""
    if (asked.trace is None) == (asked.lengths is None):
        raise BadInput("a simulation takes either --trace FILE, or --rate R with --lengths IN:OUT; give one of them")
    if asked.trace is None:
        if asked.rate is None:
            raise BadInput("generated requests need a rate, got --lengths without; give --rate in requests per second")
        _refuse(asked, {"--speedup": asked.speedup, "--limit": asked.limit}, "a trace, got --lengths")
        requests = _generated(asked, seed)
        return requests, _load(f"{asked.arrivals} arrivals, lengths {asked.lengths}"[:200], requests, 1.0)
    if asked.rate is not None and asked.speedup is not None:
        raise BadInput(f"--rate and --speedup both rescale a trace, got {asked.rate:g} and {asked.speedup:g}; give one of them")
    _refuse(asked, {"--arrivals": None if asked.arrivals == "poisson" else asked.arrivals}, "generated requests, got --trace")
    requests = read_trace(asked.trace)
    if asked.limit is not None:
        if asked.limit < 1:
            raise BadInput(f"--limit takes the first N requests, at least 1, got {asked.limit}")
        requests = requests[: asked.limit]
    speed = 1.0 if asked.speedup is None else asked.speedup
    if asked.rate is not None:
        span_s = requests[-1].arrival_s - requests[0].arrival_s
        if span_s <= 0:
            raise BadInput(f"--rate rescales arrival times, and all {len(requests)} requests of {asked.trace} come at once; take more of it")
        speed = asked.rate * span_s / len(requests)
    if speed != 1.0:
        requests = rescaled(requests, speed)
    return requests, _load(Path(asked.trace).name, requests, speed)


def _generated(asked: AskedSimulation, seed: int) -> list[Request]:
    name, _, cv = asked.arrivals.partition(":")
    if name not in ("poisson", "gamma") or (name == "poisson" and cv):
        raise BadInput(f"--arrivals is poisson or gamma:CV, got {asked.arrivals[:80]!r}")
    try:
        own = {"cv": float(cv or "1")} if name == "gamma" else {}
    except ValueError:
        raise BadInput(f"--arrivals gamma takes a coefficient of variation as in gamma:2, got {asked.arrivals[:80]!r}") from None
    return generate(rate=asked.rate, lengths=read_lengths(asked.lengths), count=asked.num_requests, seed=seed, arrivals=name, **own)


def read_lengths(text: str) -> list[tuple[int, int]]:
    """Pairs of prompt and output lengths from "500:100,2000:50", or from a CSV file with columns input_len and output_len."""
    if re.fullmatch(r"\s*\d+:\d+\s*(,\s*\d+:\d+\s*)*", text):
        pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",")]
    elif not Path(text).is_file():
        raise BadInput(f"--lengths takes IN:OUT pairs such as 500:100,2000:50, or a CSV file with input_len and output_len, got {text[:80]!r}")
    else:
        try:
            rows = list(csv.DictReader(io.StringIO(read_bytes(text, "table of lengths").decode("utf-8-sig"), newline=""), strict=True))
            pairs = [(int(row["input_len"]), int(row["output_len"])) for row in rows]
        except (UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError):
            raise BadInput(f"the table of lengths {text} needs the columns input_len and output_len, whole numbers in every row") from None
    if not 1 <= len(pairs) <= MAX_LENGTHS or not all(1 <= length <= 2**24 for pair in pairs for length in pair):
        raise BadInput(f"--lengths takes 1 to {MAX_LENGTHS} pairs of lengths from 1 to {2**24}, got {text[:80]!r}")
    return pairs


def _load(source: str, requests: list[Request], speed: float) -> Load:
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    inputs, outputs = ([getattr(request, name) for request in requests] for name in ("input_len", "output_len"))
    return Load(
        source=source, requests=len(requests), duration_s=span_s, requests_per_s=len(requests) / span_s if span_s > 0 else 0.0,
        input_len_mean=sum(inputs) / len(inputs), input_len_max=max(inputs), output_len_mean=sum(outputs) / len(outputs),
        output_len_max=max(outputs), speedup=speed,
    )  # fmt: skip


def _refuse(asked: AskedSimulation, flags: dict[str, object], whose: str) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise BadInput(f"{flag} is for {whose}; drop it")
