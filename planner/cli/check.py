"""planner check: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Dataset, Device, Quiet, Seed, paths
from planner.units import parse_share


@app.command()
def check(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json, as `planner plan -o` writes it.")],
    dataset: Dataset,
    texts: Annotated[int, typer.Option(help="Prompts to run, none of which the profile saw; rounded up to whole groups of the plan's streams.")] = 8,
    epsilon: Annotated[str | None, typer.Option(help="Go on until the choice is within this of the best at 95 %, e.g. 3%.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the report goes.")] = None,
    device: Device = None,
    seed: Seed = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the choice, plain decoding and the runners-up on unseen texts: predicted beside measured, paired regret."""
    from planner.files import check_writable
    from planner.plans import save_check
    from planner.report import terminal

    if out is not None:
        check_writable(out)
    share = None if epsilon is None else parse_share(epsilon)
    with terminal.progress("check", quiet=quiet) as progress:
        result = planner.check(plan_path, paths(dataset), num_texts=texts, epsilon=share, device=device, seed=seed, progress=progress)
    if out is not None:
        save_check(result, out)
    terminal.print_json(result) if as_json else terminal.show_check(result, out)
    if not result.passed:
        raise typer.Exit(1)
