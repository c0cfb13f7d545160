"""The command line: parse, call one function, show one report. Exit codes: 0, 1 (the check failed), 2 (bad input), 130 (Ctrl-C).

Importing this imports neither torch nor scipy; each command imports what it runs.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.errors import PlannerError
from planner.files import process_rank

for _command in ("profile", "plan", "estimate", "check", "sweep", "replay", "generate", "quickstart"):  # as --help lists them
    import_module(f"planner.cli.{_command}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from planner.report import terminal

        terminal.write_text(f"planner {planner.__version__}\n")
        raise typer.Exit()


def main() -> None:
    """Entry point; turns our own errors into one line and exit code 2."""
    from planner.report import terminal

    rank = process_rank()
    try:
        with nullcontext() if rank == 0 else _silent():
            app()
    except PlannerError as error:
        terminal.show_error(f"rank {rank}: {error}" if rank else error)  # the trouble may be that rank's alone
        sys.exit(2)
    except KeyboardInterrupt:
        terminal.show_error("stopped by Ctrl-C")
        sys.exit(130)


@contextmanager
def _silent() -> Iterator[None]:
    """For all but the first of torchrun's processes, which run along and say nothing."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
