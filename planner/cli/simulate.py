"""planner simulate: flags to arguments."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Quiet, TensorParallel
from planner.cli.plan import TakesLimits
from planner.cli.stopping import in_study
from planner.commands.flags import AskedSimulation
from planner.units import parse_limits, parse_numbers

GENERATED, STUDIED, SCHEDULED = "Without a trace: ", "Of a study: ", "Of a schedule: "


@app.command(cls=TakesLimits)
def simulate(
    path: Annotated[Path, typer.Argument(metavar="PROFILE|SCHEDULE|PLAN", help="A serving profile, or what `planner plan` wrote.")],
    trace: Annotated[
        Path | None, typer.Option(help="Requests: Mooncake JSONL, Azure CSV, or CSV of arrival_s,input_len,output_len; maybe .gz.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second; a trace's arrival times are rescaled to it.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="IN:OUT,..|FILE", help=f"{GENERATED}tokens of prompt and output, drawn evenly; or a CSV of input_len,output_len."),
    ] = None,
    arrivals: Annotated[str, typer.Option(metavar="poisson|gamma:CV", help=f"{GENERATED}times between arrivals.")] = "poisson",
    requests: Annotated[int, typer.Option(help=f"{GENERATED}how many.")] = 1000,
    speedup: Annotated[float | None, typer.Option(help="Of a trace's arrival times: 2 lets requests come twice as fast.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first N requests of the trace.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="K=3", help="Simulate one draft length for all loads too, or NAME:K=3; repeat it.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Whose schedule to run; default: the best deployment's.")] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="LIMIT...", help="Limits in ms: tpot:50 ttft:500; repeat it for several."),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Engines behind the router.")] = 1,
    router: Annotated[str, typer.Option(help="round_robin, or least_loaded (fewest requests).")] = "round_robin",
    max_num_seqs: Annotated[str | None, typer.Option(help="Requests that run at once, of each replica; several for a study. Default: 256.")] = None,
    max_num_batched_tokens: Annotated[str | None, typer.Option(help="Tokens of a step, several for a study. Default: 8192.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens that a replica's KV pool holds; default: by the sizes of models and device.")] = None,
    prefill_rate: Annotated[float | None, typer.Option(help="Prompt tokens per second; default: as measured, else a roofline.")] = None,
    prefix_caching: Annotated[bool, typer.Option(help="Keep prompts that begin alike, where the trace has their hashes.")] = True,
    spread: Annotated[float | None, typer.Option(help="Standard deviation between texts of the logit of acceptance; default: 0.5.")] = None,
    osl: Annotated[
        int | None, typer.Option("--osl", help="Output length that the schedule of a profile is made for; default: the trace's mean.")
    ] = None,
    tp: TensorParallel = None,
    model: Annotated[str | None, typer.Option(help=f"{SCHEDULED}size of the target, a folder, a GGUF file or num_layers=..")] = None,
    draft_size: Annotated[str | None, typer.Option(help=f"{SCHEDULED}size of the drafter, likewise.")] = None,
    system: Annotated[str | None, typer.Option(help=f"{SCHEDULED}the device, as h100_sxm or memory_gib=80,..")] = None,
    trials: Annotated[int | None, typer.Option(help="Study settings x max-num-seqs x max-num-batched-tokens: try so many of them.")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="FILE|URL", help=f"{STUDIED}a journal file, or a database that workers on several machines share.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and texts.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the document goes.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let requests come and go: TTFT, TPOT and goodput of off and of what the schedule says, on the same arrivals. Needs no torch."""
    from planner.files import check_writable
    from planner.report import terminal
    from planner.report.simulate import show_simulation
    from planner.schedules import Limits
    from planner.simulations import save_simulation

    if out is not None:
        check_writable(out)
    limits = [Limits(**{f"{name}_s": s for name, s in parse_limits([text], ("tpot", "ttft"), "--goodput").items()}) for text in goodput or []]
    asked = AskedSimulation(
        trace=None if trace is None else str(trace), rate=rate, lengths=lengths, arrivals=arrivals, num_requests=requests, speedup=speedup, limit=limit,
        also=tuple(also or ()), drafter=drafter, output_len=osl, tensor_parallel=tp, model=model, draft_size=draft_size, system=system,
        kv_tokens=kv_tokens, prefill_rate=prefill_rate, spread=spread, max_num_seqs=_several(max_num_seqs, "--max-num-seqs"),
        max_num_batched_tokens=_several(max_num_batched_tokens, "--max-num-batched-tokens"), replicas=replicas, router=router,
        prefix_caching=prefix_caching, num_trials=trials, storage=storage, workers=workers,
    )  # fmt: skip
    with in_study(storage) if storage else nullcontext(), terminal.progress("simulate", quiet=quiet) as progress:
        found = planner.simulate(path, asked, limits=limits, seed=seed, progress=progress)
    if out is not None:
        save_simulation(found, out)
    terminal.print_json(found) if as_json else show_simulation(found, out)


def _several(text: str | None, name: str) -> tuple[int, ...]:
    return () if text is None else tuple(parse_numbers(text, int, name))
