"""planner show: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

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
    from planner.commands.show import gather, reported
    from planner.documents import load_document
    from planner.files import check_writable
    from planner.report import terminal
    from planner.report.show import show_document, write_page

    if html is None:
        if profile is not None or measured is not None:
            raise BadInput("--profile and --measured are for a page, got no --html; add it, or drop them")
        document = load_document(path)
        terminal.print_json(document) if as_json else show_document(reported(document, path), path)
        return
    check_writable(html)
    shown = gather(path, profile_path=profile, measured_path=measured)
    write_page(shown, html)
    terminal.print_json(shown.document) if as_json else terminal.show_saved(html)
