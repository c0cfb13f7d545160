"""planner diff: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Quiet


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A profile, plan, schedule or sweep.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another of the same kind: of another device, day, version or setting.")],
    objective: Annotated[
        str, typer.Option(help="What profiles are planned for, to compare the choices they lead to: e2e, tpot or throughput.")
    ] = "e2e",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What changed between two files: device, settings, acceptance, latency, the choice; two GPUs by their profiles. Needs no torch."""
    from planner.report import terminal
    from planner.report.diff import show_difference

    with terminal.progress("diff", quiet=quiet) as progress:
        found = planner.diff(before, after, objective=objective, progress=progress)
    terminal.print_json(found) if as_json else show_difference(found)
