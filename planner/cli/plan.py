"""planner plan: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Concurrency, Isl, Objective, Osl, PricePerHour, ProfilePath, Temperature, TopK, TopP
from planner.units import parse_bytes


@app.command()
def plan(
    profile_path: ProfilePath,
    isl: Isl = None,
    osl: Osl = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_concurrency: Concurrency = 1,
    memory_cap: Annotated[str | None, typer.Option(help="Peak memory allowed, with its unit: 24GiB, 800MB.")] = None,
    objective: Objective = "e2e",
    price_per_hour: PricePerHour = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the plan goes, for check and export.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose drafter, kv budget and draft length from a profile, or say "do not speculate". Needs no torch."""
    from planner.files import check_writable
    from planner.plans import save_plan
    from planner.report import terminal

    if out is not None:
        check_writable(out)
    cap = None if memory_cap is None else parse_bytes(memory_cap)
    result = planner.plan(
        profile_path, context_len=isl, output_len=osl, temperature=temperature, top_p=top_p, top_k=top_k, batch=max_concurrency,
        memory_cap_bytes=cap, objective=objective, price_per_hour=price_per_hour,
    )  # fmt: skip
    if out is not None:
        save_plan(result, out)
    terminal.print_json(result) if as_json else terminal.show_plan(result, out)
