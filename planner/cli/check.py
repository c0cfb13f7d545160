"""planner check: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import ApiKeyFile, AsJson, Dataset, Device, Quiet, Seed, paths
from planner.errors import BadInput
from planner.units import parse_numbers, parse_share

SERVED = "Of a canary: "


@app.command()
def check(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json, as `planner plan -o` writes it; of a canary maybe a schedule.")],
    dataset: Dataset,
    texts: Annotated[
        int | None,
        typer.Option(help="Prompts to run, none of which the profile saw, rounded up to whole groups of streams; default: 8, of a canary 16."),
    ] = None,
    epsilon: Annotated[str | None, typer.Option(help="Go on until the choice is within this of the best at 95 %, e.g. 3%.")] = None,
    base_url: Annotated[str | None, typer.Option(metavar="URL", help=f"{SERVED}a server that runs the plan. Needs no torch.")] = None,
    baseline_url: Annotated[str | None, typer.Option(metavar="URL", help=f"{SERVED}the same without it.")] = None,
    min_speedup: Annotated[float | None, typer.Option(help=f"{SERVED}what the plan's server must be shown to gain; default: 1.")] = None,
    max_concurrency: Annotated[str | None, typer.Option(help=f"{SERVED}requests side by side, e.g. 1,4,16; default: the plan's, up to 16.")] = None,
    served_model: Annotated[str | None, typer.Option(help=f"{SERVED}the name that both servers answer to; default: their only one.")] = None,
    api_key_file: ApiKeyFile = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the report goes.")] = None,
    device: Device = None,
    seed: Seed = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the choice, plain decoding and the runners-up on unseen texts: predicted beside measured, paired regret.

    With --base-url and --baseline-url a canary: the same prompts to two servers. Exit 1 when it surely gains less than --min-speedup, 4 when
    that is not decided.
    """
    from planner.files import check_writable, write_whole
    from planner.measurements import encode
    from planner.plans import save_check
    from planner.report import terminal

    if out is not None:
        check_writable(out)
    served = {
        "--base-url": base_url, "--baseline-url": baseline_url, "--min-speedup": min_speedup, "--max-concurrency": max_concurrency,
        "--served-model": served_model, "--api-key-file": api_key_file,
    }  # fmt: skip
    if base_url is not None:
        from planner.engines.http import read_key
        from planner.report.canary import show_canary

        _refuse({"--epsilon": epsilon, "--device": device}, "is for a check in the own runtime, got {} with --base-url")
        if baseline_url is None:
            raise BadInput("a canary compares two servers, got --base-url alone; give --baseline-url, the same server without the plan")
        with terminal.progress("canary", quiet=quiet) as progress:
            found = planner.canary(
                plan_path, paths(dataset), base_url=base_url, baseline_url=baseline_url, min_speedup=1.0 if min_speedup is None else min_speedup,
                concurrency=None if max_concurrency is None else parse_numbers(max_concurrency, int, "--max-concurrency"),
                num_texts=16 if texts is None else texts, served_model=served_model, seed=seed, key=read_key(api_key_file), progress=progress,
            )  # fmt: skip
        if out is not None:
            write_whole(out, encode(found))
        terminal.print_json(found) if as_json else show_canary(found, out)
        if not found.passed:
            raise typer.Exit(1 if found.decided else 4)
        return

    _refuse(served, "is for two servers, got {} without --base-url")
    share = None if epsilon is None else parse_share(epsilon)
    with terminal.progress("check", quiet=quiet) as progress:
        result = planner.check(
            plan_path, paths(dataset), num_texts=8 if texts is None else texts, epsilon=share, device=device, seed=seed, progress=progress
        )
    if out is not None:
        save_check(result, out)
    terminal.print_json(result) if as_json else terminal.show_check(result, out)
    if not result.passed:
        raise typer.Exit(1)


def _refuse(flags: dict[str, object], why: str) -> None:
    """BadInput for a flag that says nothing about this kind of check."""
    for flag, value in flags.items():
        if value is not None:
            raise BadInput(f"{flag} {why.format('an address' if flag.endswith('url') else value)}; drop it")
