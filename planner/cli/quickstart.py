"""planner quickstart: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

from planner.cli.app import app
from planner.cli.options import AsJson, Device, Quiet, paths


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what it writes.")] = Path("quickstart"),
    dataset: Annotated[list[str] | None, typer.Option(help="Text to prompt with; default: documentation and code that Python carries.")] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Profile, plan and check the default model at 2K tokens on this machine; a few minutes."""
    from planner.commands.quickstart import quickstart as run
    from planner.report import terminal

    with terminal.progress("quickstart", quiet=quiet) as progress:
        result = run(out, dataset=paths(dataset or []), device=device, progress=progress)
    profile_path, plan_path, check_path, _ = result.files
    if as_json:
        terminal.print_json({"plan": result.plan, "check": result.check, "files": [str(file) for file in result.files], "minutes": result.minutes})
        return
    terminal.show_profile(result.profile, profile_path)
    terminal.show_plan(result.plan, plan_path)
    terminal.show_check(result.check, check_path)
    terminal.show_files(result.files, result.minutes)
