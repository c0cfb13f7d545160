"""What ends a run before its time, and the line that says how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from planner.errors import Unfinished
from planner.files import journal_path, remove_journal

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(SystemExit):
    """A signal that asks the process to end. Not a KeyboardInterrupt, which typer turns into an exit without a word."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {NAMES[number]}")
        self.code = 128 + number  # as a shell counts


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise Stopped; those that whoever started the process ignores stay ignored."""

    def stop(number, frame):
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in NAMES if signal.getsignal(number) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def journaled(out: Path) -> Iterator[None]:
    """Around a run that ends with writing `out`: then its journal goes; where the run is cut short, the error names it."""
    journal = journal_path(out)
    try:
        yield
    except (Stopped, Unfinished) as error:
        if journal.exists():
            error.add_note(f"what was finished is in {journal}, --resume goes on from there")
        raise
    remove_journal(out)


@contextmanager
def in_study(storage: str) -> Iterator[None]:
    """Around a run whose finished pieces stand in a study: where it is cut short, the error says so."""
    try:
        yield
    except Stopped as error:
        from planner.search.study import shown

        error.add_note(f"what was finished is in {shown(storage)}, the same command goes on from there")
        raise
