"""planner plan: flags to arguments."""

import re
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

import planner
from planner.cli.app import app
from planner.cli.options import OBJECTIVE_HELP, AsJson, Load, Osl, PricePerHour, ProfilePath, Temperature, TensorParallel, TopK, TopP
from planner.errors import BadInput
from planner.units import parse_bytes, parse_limits, parse_numbers, parse_range


class TakesLimits(TyperCommand):
    """A command whose --goodput takes several words: `--goodput tpot:50 ttft:500`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        joined, open_ended = [], False
        for word in args:
            if open_ended and re.fullmatch(r"[a-z0-9_]+:[0-9.eE+-]+", word):
                joined[-1] += f" {word}"
            else:
                open_ended = (joined[-1:] == ["--goodput"] and not word.startswith("-")) or word.startswith("--goodput=")
                joined.append(word)
        return super().parse_args(ctx, joined)


@app.command(cls=TakesLimits)
def plan(
    profile_path: ProfilePath,
    isl: Annotated[str | None, typer.Option(help="Prompt tokens, several separated by commas for a schedule; default: the profile's.")] = None,
    osl: Osl = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_concurrency: Load = None,
    memory_cap: Annotated[str | None, typer.Option(help="Peak memory allowed, with its unit: 24GiB, 800MB.")] = None,
    objective: Annotated[str, typer.Option(help=f"{OBJECTIVE_HELP} Default: e2e, or goodput where limits are given.")] = "",
    goodput: Annotated[list[str] | None, typer.Option(metavar="LIMIT...", help="Limits in ms of objective goodput: tpot:50 ttft:500.")] = None,
    load: Annotated[Path | None, typer.Option(help="CSV table of the server's load: concurrency, weight and maybe context_len.")] = None,
    tp: TensorParallel = None,
    price_per_hour: PricePerHour = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the plan goes, for check and export.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose drafter, kv budget and draft length from a profile, or say "do not speculate"; by load if asked. Needs no torch."""
    from planner.commands.schedule import is_serving
    from planner.files import check_writable
    from planner.plans import save_plan
    from planner.report import terminal
    from planner.report.schedule import show_schedule
    from planner.schedules import Limits, save_schedule

    if out is not None:
        check_writable(out)
    cap = None if memory_cap is None else parse_bytes(memory_cap)
    contexts = None if isl is None else parse_numbers(isl, int, "--isl")
    concurrency = None if max_concurrency is None else parse_range(max_concurrency, "--max-concurrency")
    limits = {f"{name}_s": seconds for name, seconds in parse_limits(goodput or [], ("tpot", "ttft"), "--goodput").items()}
    objective = objective or ("goodput" if limits else "e2e")
    given = {"output_len": osl, "temperature": temperature, "top_p": top_p, "top_k": top_k, "memory_cap_bytes": cap,
             "objective": objective, "price_per_hour": price_per_hour}  # fmt: skip
    if is_serving(profile_path) or ".." in (max_concurrency or ""):
        result = planner.schedule(
            profile_path, concurrency=concurrency, contexts=contexts, goodput=Limits(**limits), histogram=load, tensor_parallel=tp, **given
        )
        if out is not None:
            save_schedule(result, out)
        terminal.print_json(result) if as_json else show_schedule(result, out)
        return
    for flag, value in {"--goodput": goodput, "--load": load, "--isl with several contexts": (contexts or [])[1:], "--tp": tp}.items():
        if value:
            raise BadInput(
                f"{flag} is for schedules, got one concurrency of the own runtime; give a range such as --max-concurrency 1..8, or drop it"
            )
    result = planner.plan(profile_path, context_len=contexts and contexts[0], batch=concurrency[0] if concurrency else 1, **given)
    if out is not None:
        save_plan(result, out)
    terminal.print_json(result) if as_json else terminal.show_plan(result, out)
