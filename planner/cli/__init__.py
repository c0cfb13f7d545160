"""The command line: parse, call one function, show one report. Exit codes: 0, 1 (the check failed), 2 (bad input, a full disk),
130 (Ctrl-C), 143 (SIGTERM).

Importing this imports neither torch nor scipy; each command imports what it runs.
"""

import sys
from importlib import import_module
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.stopping import Stopped, stoppable
from planner.errors import PlannerError

for _command in ("profile", "plan", "estimate", "check", "sweep", "generate", "quickstart"):  # as --help lists them
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

    try:
        with stoppable():
            app()
    except (PlannerError, Stopped) as error:
        terminal.show_error("; ".join([str(error), *getattr(error, "__notes__", [])]))
        sys.exit(error.code if isinstance(error, Stopped) else 2)
