"""What every importer takes and gives: the bytes of a file and what flags say of it, and the cells it holds, with doubts.

A file is the truth about itself. Flags fill in what it does not say; one that contradicts it is refused.
"""

from pathlib import Path
from typing import NamedTuple

import msgspec

from planner.errors import BadInput
from planner.serving import ServedCell, ServingProfile

MAX_CELLS = 100_000  # of one profile
SLACK = 0.05  # by which a length that was asked for and the mean of those that were sent may differ


class Given(NamedTuple):
    """What the flags say. None: nothing."""

    drafter: str | None = None
    draft_len: int | None = None
    concurrency: int | None = None
    context_len: int | None = None
    output_len: int | None = None
    tensor_parallel: int | None = None


FLAGS = {"drafter": "--drafter", "draft_len": "--draft-len", "concurrency": "--max-concurrency", "context_len": "--isl", "output_len": "--osl",
         "tensor_parallel": "--tp"}  # fmt: skip


class Imported(NamedTuple):
    """What one file holds."""

    cells: list[ServedCell]
    warnings: list[str] = []
    engine: str = ""  # that was measured, with its version where the file says it
    date: str = ""  # ISO 8601, of the measurement
    assumed: bool = False  # some cells drafted by the word of the flags alone, where the tool would have written counters
    profile: ServingProfile | None = None  # that the cells were already in


def settle(place: str, field: str, said: int | None, given: Given, default: int | None = None, slack: float = 0.0) -> int:
    """What the file says, else the flag, else the default. BadInput where they contradict each other or nobody says it."""
    flag = getattr(given, field)
    if said is not None:
        if flag is not None and abs(flag - said) > slack * said:
            raise BadInput(f"{place}: {field} is {said} in the file, {FLAGS[field]} says {flag}; drop the flag, it is for files that do not say it")
        return said
    if flag is None and default is None:
        raise BadInput(f"{place} does not say {field}; give {FLAGS[field]}")
    return default if flag is None else flag


def make_cell(place: str, source: str, **values) -> ServedCell:
    """A cell, its ranges checked; BadInput names the place and the field.

    source  file and line; the folder is left out, a profile may be published
    """
    known = {name: value for name, value in values.items() if value is not None}
    try:
        return msgspec.convert({**known, "source": Path(source).name[-500:]}, ServedCell)
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at `$.")
        field = field.rstrip("`")
        got = f", got {shown(known[field])}" if field in known else ""
        raise BadInput(f"{place}: {f'{field}: ' if field else ''}{message[:1].lower()}{message[1:]}{got}; correct it, or leave the run out") from None


def conditional(place: str, unconditional: list[float]) -> list[float]:
    """[i] P(draft i is accepted | those before it were), of the shares of rounds in which draft i was accepted.

    It ends where no round got that far: behind it nothing was seen. BadInput where the shares rise.
    """
    found, before = [], 1.0
    for position, share in enumerate(unconditional, 1):
        if not 0 <= share <= before * (1 + 1e-6):
            raise BadInput(
                f"{place}: the share of rounds that accept position {position} must lie between 0 and that of the position before ({before:.4g}), "
                f"got {share:.4g}; these are not per-position acceptance rates"
            )
        if before == 0:
            break
        found.append(min(1.0, share / before))
        before = share
    return found


def shown(value: object) -> str:
    """A value from outside, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def decoded(content: bytes, name: str) -> str:
    """The text of a file, without a byte order mark. BadInput where it is not text."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BadInput(f"{name} must be UTF-8, it looks like UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} must be UTF-8 text, byte {error.start} is not; it may be compressed or binary") from None
    if "\0" in text:
        raise BadInput(f"{name} must be text, it holds zero bytes; it may be binary")
    return text
