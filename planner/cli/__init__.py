"""The command line: parse, call one function, show one report. Exit codes: 0, 1 (the check failed), 2 (bad input, a full disk, a
server that does not answer), 3 (drift: the plan no longer pays), 4 (a canary is not decided), 130 (Ctrl-C), 143 (SIGTERM).

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
from planner.cli.stopping import Stopped, stoppable
from planner.errors import PlannerError
from planner.files import process_rank

for _command in (
    "profile",
    "plan",
    "estimate",
    "capacity",
    "check",
    "tune",
    "export",
    "drift",
    "diff",
    "sweep",
    "simulate",
    "replay",
    "generate",
    "show",
    "import_",
    "quickstart",
    "demo",
    "doctor",
):  # as --help lists them
    import_module(f"planner.cli.{_command}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from planner.report import terminal

        terminal.write_text(f"planner {planner.__version__}\n")
        raise typer.Exit()


def main() -> None:
    """Entry point; turns our own errors and signals into one line and an exit code."""
    from planner.report import terminal

    rank = process_rank()
    try:
        with stoppable(), nullcontext() if rank == 0 else _silent():
            app(prog_name="planner")
    except (PlannerError, Stopped) as error:
        message = "; ".join([str(error), *getattr(error, "__notes__", [])])
        terminal.show_error(f"rank {rank}: {message}" if rank else message)  # the trouble may be that rank's alone
        sys.exit(error.code if isinstance(error, Stopped) else 2)


@contextmanager
def _silent() -> Iterator[None]:
    """For all but the first of torchrun's processes, which run along and say nothing."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
