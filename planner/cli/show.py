"""planner show: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson
from planner.errors import BadInput


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="Any JSON document that a command of planner wrote.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page instead of the terminal's report.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Of a plan's page: the profile it was made from, for the map of all configurations, the fits and the front.")
    ] = None,
    measured: Annotated[Path | None, typer.Option(help="Of a plan's page: a check of it, or a sweep of its workload, to stand beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a document again, on the terminal or as one page with figures: profile, plan, check, sweep, tuning, simulation and the rest. Needs no torch."""
    from planner.documents import load_document
    from planner.report import terminal

    if html is not None:
        planner.show(path, html, profile_path=profile, measured_path=measured)
        terminal.print_json(load_document(path)) if as_json else terminal.show_saved(html)
        return
    if profile is not None or measured is not None:
        raise BadInput("--profile and --measured are for a page, got no --html; add it, or drop them")
    document = load_document(path)
    if as_json:
        terminal.print_json(document)
    else:
        from planner.commands.show import reported
        from planner.report.show import show_document

        show_document(reported(document, path), path)
