"""planner doctor: flags to arguments."""

import planner
from planner.cli.app import app
from planner.cli.options import AsJson


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has and lacks, and whether it is fit to measure on now. Exit code 0 whatever it finds. Needs no torch."""
    from planner.report import terminal
    from planner.report.doctor import show_checkup

    found = planner.doctor()
    terminal.print_json(found) if as_json else show_checkup(found)
