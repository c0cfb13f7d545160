"""How reports look: consoles, titles, labelled lines, tables and figures. What they say is in the modules beside this one.

"43.1 [41.9, 44.6]" is an estimate with its 90 % interval. Nothing is interpreted as markup, and control characters of names
never reach the terminal.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.plans import Interval
from planner.units import format_bytes

GAP = 2  # spaces between columns; rich puts one of them
RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # a line below the header, in any encoding


def clean(text: object) -> str:
    """One line without control, direction and surrogate characters: what a terminal may show of a name from outside."""
    return "".join(char for char in re.sub(r"\s+", " ", str(text)) if unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


# Output


class Heading(NamedTuple):
    text: str


class Lines(NamedTuple):
    lines: Sequence[tuple[str, str]]  # label and sentence


class Grid(NamedTuple):
    headers: list[str]  # with the unit; may have several lines
    right: list[bool]
    rows: list[list[str]]
    strong: list[bool]  # rows that stand out


class Pasted(NamedTuple):
    text: str  # to be copied as it is


class Recorder:
    """Takes a report in a console's place, block by block, for a page that shows the same tables and sentences."""

    def __init__(self):
        self.blocks: list[Heading | Lines | Grid | Pasted] = []
        self.file = self  # what is written as it is

    def print(self, text: Text, **_) -> None:
        self.blocks.append(Pasted(text.plain))

    def write(self, text: str) -> None:
        self.blocks.append(Pasted(text.rstrip("\n")))


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[Recorder]:
    """While it lasts, reports go to a recorder and not to stdout."""
    token = _recorder.set(Recorder())
    try:
        yield _recorder.get()
    finally:
        _recorder.reset(token)


def open_console(stderr: bool = False) -> Console | Recorder:
    """A console on the present stdout or stderr that takes every string literally; the recorder where a report is recorded."""
    if not stderr and (recorder := _recorder.get()) is not None:
        return recorder
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")  # a name that the terminal's encoding lacks must not end the report
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def put_title(console: Console | Recorder, text: str) -> None:
    if isinstance(console, Recorder):
        console.blocks.append(Heading(text))
        return
    put(console, Text(text, style="bold", overflow="fold"))


def put_lines(console: Console | Recorder, lines: Sequence[tuple[str, str]]) -> None:
    """Labelled sentences, wrapped behind their labels; a label is shown once in a row of equal ones."""
    if isinstance(console, Recorder):
        console.blocks.append(Lines(lines))
        return
    if not lines:
        return
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    previous = None
    for label, text in lines:
        grid.add_row("" if label == previous else label, text)
        previous = label
    put(console, grid)


def put(console: Console, what: Table | Text) -> None:
    """A block and a blank line, without the spaces that rich fills lines up with."""
    with console.capture() as capture:
        console.print(what)
    console.file.write("\n".join(line.rstrip() for line in capture.get().split("\n")) + "\n")


def saved_lines(path: str | Path | None) -> list[tuple[str, str]]:
    return [] if path is None else [("File", clean(path))]


# Tables


class Column(NamedTuple):
    header: str  # with the unit
    cell: Callable[[object], str]
    right: bool = True


def show_table(
    console: Console | Recorder,
    keys: Sequence[Column],  # repeated in every part
    groups: Sequence[Sequence[Column]],  # columns that stay together
    rows: Sequence[object],
    style: Callable[[object], str] = lambda row: "",
) -> None:
    """A table; where it is too wide for the console, several below each other, as many groups in each as fit."""
    if isinstance(console, Recorder):
        columns = [*keys, *(column for group in groups for column in group)]
        cells = [[column.cell(row) for column in columns] for row in rows]
        headers, right = [column.header for column in columns], [column.right for column in columns]
        console.blocks.append(Grid(headers, right, cells, [bool(style(row)) for row in rows]))
        return
    if not rows:
        put(console, Text("(none)"))
        return

    def texts(column: Column, folded: bool) -> list[str]:
        shown = [column.cell(row) for row in rows]
        return [_fold(text) for text in shown] if folded and column in keys else shown

    def width(columns: Sequence[Column], folded: bool, words: bool = False) -> int:
        """What the columns need; with `words`, where all that is not a figure may break at every space."""
        widths = [
            max(
                len(piece)
                for text in [column.header, *texts(column, folded)]
                for piece in (text.split() if words and not column.right else text.split("\n")) or [""]
            )
            for column in columns
        ]
        return sum(widths) + GAP * (len(columns) - 1)

    parts = [[*keys, *groups[0]]]
    for group in groups[1:]:
        if width([*parts[-1], *group], folded=True) <= console.width:
            parts[-1] += group
        else:
            parts.append([*keys, *group])
    for columns in parts:
        folded = width(columns, False) > console.width >= width(columns, True)
        unbroken = width(columns, folded, words=True) <= console.width  # else figures break too, which beats cutting them
        table = Table(box=RULE, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(column.header, justify="right" if column.right else "left", overflow="fold", no_wrap=column.right and unbroken)
        for row, *shown in zip(rows, *(texts(column, folded) for column in columns), strict=True):
            table.add_row(*shown, style=style(row))
        put(console, table)


def _fold(text: str) -> str:
    """self_sparse window 512 K=4 on two lines, as even as they can be."""
    words = text.split(" ")
    if len(words) < 3:
        return text
    halves = ((" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words)))
    return "\n".join(min(halves, key=lambda pair: max(map(len, pair))))


# Charts


def bars(intervals: Sequence[Interval], width: int, mark: float) -> list[str]:
    """A line for each: # up to the low end, - to the high end, and | where `mark` is. ASCII, on one scale that begins at 0."""
    most = max([mark, *(interval.high for interval in intervals)])
    lines = []
    for interval in intervals:
        low, high, at = (round((width - 1) * max(0.0, bound) / most) for bound in (interval.low, interval.high, mark))
        line = list(("#" * low + "-" * (high - low)).ljust(at + 1))
        line[at] = "|"
        lines.append("".join(line).rstrip())
    return lines


# Figures


def _decimals(value: float) -> int:
    """Three significant digits or so."""
    return next((decimals for bound, decimals in ((1, 3), (10, 2), (1000, 1)) if abs(value) < bound), 0)


def format_number(value: float) -> str:
    return f"{value:.{_decimals(value)}f}"


def format_interval(interval: Interval, scale: float = 1.0, decimals: int | None = None) -> str:
    """An estimate and its interval; what is exact by definition stands alone."""
    value, low, high = (scale * bound for bound in (interval.value, interval.low, interval.high))
    decimals = _decimals(value) if decimals is None else decimals
    shown = f"{value:.{decimals}f}"
    return shown if low == value == high else f"{shown} [{low:.{decimals}f}, {high:.{decimals}f}]"


def format_percent(interval: Interval) -> str:
    """A relative difference in percent, without the sign of percent."""
    value, low, high = (f"{100 * bound:+.1f}" for bound in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def format_memory(interval: Interval) -> str:
    """A size and its interval, the unit once where it is the same."""
    value, low, high = (format_bytes(bound) for bound in (interval.value, interval.low, interval.high))
    if low == value == high:
        return value
    number, unit = value.split()
    if low.endswith(unit) and high.endswith(unit):
        return f"{number} [{low.split()[0]}, {high.split()[0]}] {unit}"
    return f"{value} [{low}, {high}]"
