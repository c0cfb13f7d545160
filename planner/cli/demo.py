"""planner demo: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Quiet


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for what it writes.")] = Path("demo"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Seconds, nothing to install or measure: half of a published table in, the rest predicted, and the schedule judged. Needs no torch."""
    from planner.report import terminal
    from planner.report.demo import show_demo

    with terminal.progress("demo", quiet=quiet) as progress:
        found = planner.demo(out, progress=progress)
    terminal.print_json(found) if as_json else show_demo(found)
