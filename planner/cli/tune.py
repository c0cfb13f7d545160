"""planner tune: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import OBJECTIVE_HELP, ApiKeyFile, AsJson, Dataset, PricePerHour, Quiet, Seed, paths
from planner.cli.plan import TakesLimits
from planner.cli.stopping import journaled
from planner.commands.flags import AskedTune
from planner.errors import BadInput
from planner.units import parse_limits, parse_range

THERE = "Of a server that is there: "


@app.command(cls=TakesLimits)
def tune(
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the profile, the schedule, the report, logs and the journal.")],
    launch: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="What starts the server: 'vllm serve M', 'sglang serve ..', 'llama-server -m M.gguf'.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="How to draft: eagle3, mtp, draft_model, ngram, ...; default: as the command does.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="The drafter's checkpoint, as the engine takes it; default: the command's.")] = None,
    max_draft_len: Annotated[int, typer.Option(help="Longest draft to try.")] = 8,
    max_concurrency: Annotated[str, typer.Option(metavar="N|A..B", help="Requests in the system at once.")] = "1..16",
    objective: Annotated[str, typer.Option(help=f"{OBJECTIVE_HELP} Default: e2e, or goodput where limits are given.")] = "",
    goodput: Annotated[list[str] | None, typer.Option(metavar="LIMIT...", help="Limits in ms of objective goodput: tpot:50 ttft:500.")] = None,
    load: Annotated[Path | None, typer.Option(help="CSV table of the server's load: concurrency and weight.")] = None,
    price_per_hour: PricePerHour = None,
    isl: Annotated[int, typer.Option("--isl", help="Tokens, roughly, that raw text is cut to; chats are sent as they are.")] = 512,
    osl: Annotated[int, typer.Option("--osl", help="Generated tokens, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    texts: Annotated[int, typer.Option(help="Prompts at each load; of large loads twice as many as run at once.")] = 16,
    repeats: Annotated[int | None, typer.Option(help="Starts of each setting; default: 2 where a start is quick, else 1.")] = None,
    check_texts: Annotated[int, typer.Option(help="Prompts, none of them used before, that the choice is checked on; 0: no check.")] = 16,
    cap_requests: Annotated[int, typer.Option(help="Requests to send at most.")] = 5000,
    cap_minutes: Annotated[float, typer.Option(help="Begin no further load after so long.")] = 120.0,
    ready_timeout: Annotated[float | None, typer.Option(help="Seconds that a start may take; default: by engine.")] = None,
    base_url: Annotated[str | None, typer.Option(metavar="URL", help=f"{THERE}the one that drafts, in place of --launch.")] = None,
    baseline_url: Annotated[str | None, typer.Option(metavar="URL", help=f"{THERE}the same without a drafter.")] = None,
    draft_len: Annotated[int | None, typer.Option(help=f"{THERE}what it drafts.")] = None,
    engine: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION, where the command does not say it.")] = None,
    model: Annotated[str | None, typer.Option(help="Size of the target: a folder, a GGUF file or num_layers=..; default: by the command.")] = None,
    draft_size: Annotated[str | None, typer.Option(help="Size of the drafter, likewise.")] = None,
    system: Annotated[str | None, typer.Option(help="The device, as h100_sxm or memory_gib=80; default: this machine's.")] = None,
    served_model: Annotated[str | None, typer.Option(help="The name that the server answers to; default: its only one.")] = None,
    keep_repetitive: Annotated[bool, typer.Option(help="Count answers that repeat themselves as well.")] = False,
    api_key_file: ApiKeyFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted tuning with the same --out stopped.")] = False,
    seed: Seed = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Start your own engine a few times, measure it, and print what to set at each load: "+13 % over your K=5". Needs no torch."""
    from planner.commands.tune import TUNING
    from planner.engines.http import read_key
    from planner.files import check_writable
    from planner.report import terminal
    from planner.report.tune import show_tuning
    from planner.schedules import Limits

    check_writable(out / TUNING if out.is_dir() else out)
    if out.exists() and not out.is_dir():
        raise BadInput(f"a tuning is written into a folder, {out} is a file; change --out")
    limits = {f"{name}_s": seconds for name, seconds in parse_limits(goodput or [], ("tpot", "ttft"), "--goodput").items()}
    asked = AskedTune(
        launch=launch, base_url=base_url, baseline_url=baseline_url, engine=engine, method=method, draft_model=draft_model,
        max_draft_len=max_draft_len, draft_len=draft_len, concurrency=parse_range(max_concurrency, "--max-concurrency"), context_len=isl,
        output_len=osl, temperature=temperature, top_p=top_p, num_texts=texts, repeats=repeats, check_texts=check_texts, cap_requests=cap_requests,
        cap_minutes=cap_minutes, ready_s=ready_timeout, model=model, draft_size=draft_size, system=system, served_model=served_model,
        keep_repetitive=keep_repetitive,
    )  # fmt: skip
    with journaled(out / TUNING), terminal.progress("tune", quiet=quiet) as progress:
        found = planner.tune(
            paths(dataset), out, asked, objective=objective or ("goodput" if limits else "e2e"), goodput=Limits(**limits), histogram=load,
            price_per_hour=price_per_hour, seed=seed, key=read_key(api_key_file), resume=resume, progress=progress,
        )  # fmt: skip
    terminal.print_json(found) if as_json else show_tuning(found, out)
