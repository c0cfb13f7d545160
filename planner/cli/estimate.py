"""planner estimate: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Isl, Objective, Osl, PricePerHour, ProfilePath, Temperature, TensorParallel, TopK, TopP, takes
from planner.commands.flags import Asked
from planner.errors import BadInput
from planner.units import parse_range


@app.command()
@takes(Asked)
def estimate(
    profile_path: ProfilePath,
    asked: Asked,
    isl: Isl = None,
    osl: Osl = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_concurrency: Annotated[
        str | None, typer.Option("--max-concurrency", metavar="N", help="Requests in the system at once, all the time; default: 1.")
    ] = None,
    cells: Annotated[Path | None, typer.Option(help="CSV table of settings and loads: drafter, draft_len, concurrency, context_len.")] = None,
    tp: TensorParallel = None,
    objective: Objective = "e2e",
    price_per_hour: PricePerHour = None,
    as_json: AsJson = False,
) -> None:
    """The same estimate for one configuration of your choosing, or for each row of a table. Needs no torch."""
    from planner.commands.schedule import asked_cell, is_serving, read_cells
    from planner.report import terminal
    from planner.report.schedule import show_estimates

    first, last = (1, 1) if max_concurrency is None else parse_range(max_concurrency, "--max-concurrency")
    if first != last:
        raise BadInput(f"an estimate is for one load, got --max-concurrency {max_concurrency}; give one number, or --cells")
    if cells is None and not is_serving(profile_path):
        if tp is not None:
            raise BadInput(f"--tp is for a profile of a serving engine, got {tp} with one of the own runtime; drop it")
        found, baseline = planner.estimate(
            profile_path, asked, context_len=isl, output_len=osl, temperature=temperature, top_p=top_p, top_k=top_k, batch=first,
            objective=objective, price_per_hour=price_per_hour,
        )  # fmt: skip
        terminal.print_json({"estimate": found, "baseline": baseline}) if as_json else terminal.show_estimate(found, baseline)
        return

    for flag, value in {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k}.items():
        if value is not None:
            raise BadInput(f"{flag} means nothing to a profile of a serving engine, whose runs had their own, got {value}; drop it")
    if cells is not None and (asked != Asked() or max_concurrency is not None or isl is not None):
        raise BadInput(
            "--cells names drafters, lengths and loads itself, got flags beside it; drop --drafter, --draft-len, --max-concurrency and --isl"
        )
    rows = asked_cell(asked, first, isl) if cells is None else read_cells(cells)
    pairs = planner.estimate_served(profile_path, rows, output_len=osl, objective=objective, price_per_hour=price_per_hour, tensor_parallel=tp)
    if not as_json:
        show_estimates(pairs, objective)
    elif cells is None:
        terminal.print_json(pairs[0])
    else:
        terminal.print_json({"estimates": [pair.estimate for pair in pairs]})
