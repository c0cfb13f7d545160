"""Bytes, seconds and lists as people write them. Inside the package everything is bytes and seconds."""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches

from planner.errors import BadInput

BYTES_PER_UNIT = {"B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}, **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}}
GIB = BYTES_PER_UNIT["GiB"]
MAX_NUMBER = 2**40  # larger than any length, share or temperature that means something; also keeps NaN out


def parse_bytes(text: str) -> int:
    """Bytes in "24GiB", "800 MB" or "1e9B"; GiB is 2^30, GB is 10^9. A bare number is refused."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in BYTES_PER_UNIT:
        raise BadInput(f"a size needs a number and a unit ({', '.join(BYTES_PER_UNIT)}), got {text!r}; write for example 24GiB")
    try:
        size = float(match[1]) * BYTES_PER_UNIT[match[2]]
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size >= 1):
        raise BadInput(f"a size must be a positive number of bytes, got {text!r}")
    return int(size)


def parse_share(text: str) -> float:
    """A fraction in (0, 1) from "3%" or "0.03"."""
    number = text.strip()
    try:
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise BadInput(f"a share must lie between 0 and 100 %, got {text!r}; write for example 3%")
    return share


def parse_seconds(text: str, name: str) -> float:
    """Seconds in "500ms", "15s", "10m" or "2h". A bare number is refused."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*(ms|s|m|h)\s*", text, re.ASCII)
    seconds = float(match[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]] if match else 0.0
    if not seconds > 0:
        raise BadInput(f"{name} takes a time above 0 with its unit (ms, s, m, h), got {text[:80]!r}; write for example 15s")
    return seconds


def parse_numbers(text: str, kind: type, name: str) -> list:
    """The comma-separated numbers of a flag, in the order given, each once."""
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or not all(abs(value) <= MAX_NUMBER for value in values):
        what, example = ("whole numbers", "1024,4096") if kind is int else ("numbers", "0,0.7")
        raise BadInput(f"{name} takes comma-separated {what}, got {text[:80]!r}; write for example {example}")
    return list(dict.fromkeys(values))


def parse_range(text: str, name: str) -> tuple[int, int]:
    """First and last of "1..256", or of one number, which is both."""
    match = re.fullmatch(r"\s*(\d{1,18})(?:\s*\.\.\s*(\d{1,18}))?\s*", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= MAX_NUMBER:
        raise BadInput(f"{name} takes a whole number from 1 up, or a range from low to high such as 1..256, got {text[:80]!r}")
    return first, last


def parse_limits(texts: list[str], known: tuple[str, ...], name: str) -> dict[str, float]:
    """Seconds by what they limit, from "tpot:50" in milliseconds; several in a text are separated by commas or spaces."""
    limits = {}
    for word in " ".join(texts).replace(",", " ").split():
        what, _, number = word.partition(":")
        try:
            limit = float(number) / 1e3
        except ValueError:
            limit = math.nan
        if what not in known or not 0 < limit <= MAX_NUMBER:
            raise BadInput(f"{name} takes limits in ms of {' and '.join(known)}, got {word[:80]!r}; write for example {name} tpot:50 ttft:500")
        if what in limits:
            raise BadInput(f"{name} takes one limit of each kind, got two of {what}; drop one")
        limits[what] = limit
    return limits


def meant(text: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, as the end of a message: those that begin with it or are spelt much like it; empty if none is."""
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in known}
    own = re.sub(r"[\W_]", "", text[:100].lower())
    begun = [name for key, name in plain.items() if own and key.startswith(own)]
    near = begun or [plain[key] for key in get_close_matches(own, plain, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def words(text: str) -> list[str]:
    """The comma-separated words of a flag."""
    return [part.strip() for part in text.split(",") if part.strip()]


def format_bytes(size: float) -> str:
    """A size for people, in GiB from 0.1 GiB up, else in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
