"""planner drift: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import ApiKeyFile, AsJson, Quiet
from planner.errors import BadInput
from planner.units import parse_seconds


@app.command()
def drift(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan or a schedule, as `planner plan -o` writes it.")],
    metrics: Annotated[
        str | None, typer.Option(metavar="URL", help="Of a live server of vLLM, SGLang or llama.cpp; /metrics is put behind a bare host.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="How long to watch, e.g. 90s, 10m or 2h; default: 10m. With --once: what lies between the scrapes.")
    ] = None,
    interval: Annotated[str | None, typer.Option(help="Time between two scrapes; default: 15s.")] = None,
    once: Annotated[tuple[Path, Path] | None, typer.Option(metavar="BEFORE AFTER", help="Two scrapes on disk, in place of --metrics.")] = None,
    drafter: Annotated[str | None, typer.Option(help="That the server has loaded, where the schedule has several.")] = None,
    isl: Annotated[
        int | None, typer.Option("--isl", min=1, help="Prompt tokens, where the schedule has several contexts and the metrics say none.")
    ] = None,
    api_key_file: ApiKeyFile = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the report goes.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Does a plan still pay on a live server, and what moved: acceptance, latency or load. Exit 3 when it surely no longer pays. Needs no torch."""
    from planner.engines.http import read_key
    from planner.files import check_writable, write_whole
    from planner.measurements import encode
    from planner.report import terminal
    from planner.report.drift import show_drift

    if out is not None:
        check_writable(out)
    if once is not None:
        for flag, value in {"--interval": interval, "--api-key-file": api_key_file}.items():
            if value is not None:
                raise BadInput(f"{flag} is for a live server, got {value} with --once; drop it")
    with terminal.progress("drift", quiet=quiet) as progress:
        found = planner.drift(
            plan_path,
            metrics=metrics,
            window_s=None if window is None else parse_seconds(window, "--window"),
            interval_s=15.0 if interval is None else parse_seconds(interval, "--interval"),
            once=once,
            drafter=drafter,
            context_len=isl,
            key=None if once is not None else read_key(api_key_file),
            progress=progress,
        )
    if out is not None:
        write_whole(out, encode(found))
    terminal.print_json(found) if as_json else show_drift(found, out)
    if found.pays == "no":
        raise typer.Exit(3)
