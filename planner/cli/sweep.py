"""planner sweep: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import (
    AsJson,
    Concurrency,
    Dataset,
    Device,
    Dtype,
    Execution,
    MaxContext,
    Model,
    Quiet,
    RopeTheta,
    Seed,
    TargetWeights,
    paths,
    takes,
)
from planner.cli.stopping import in_study, journaled
from planner.commands.flags import AskedGrid
from planner.units import parse_numbers


@app.command()
@takes(AskedGrid, kv_budgets="64,256,1024", selections="window")
def sweep(
    asked: AskedGrid,
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sweep goes; a journal lies beside it until it is complete.")],
    model: Model = "smollm2",
    isl: Annotated[int, typer.Option("--isl", help="Prompt tokens.")] = 2048,
    osl: Annotated[int, typer.Option("--osl", help="Generated tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens, 0 keeps all.")] = 0,
    max_concurrency: Concurrency = 1,
    draft_lens: Annotated[str, typer.Option(help="Draft lengths in tokens.")] = "1,2,4,8",
    tree_sizes: Annotated[
        str,
        typer.Option(help="Nodes of draft trees to run beside the chains, e.g. 8,16,32,64; default: none. A plan's adaptive tree is run by check."),
    ] = "",
    texts: Annotated[int, typer.Option(help="Prompts to run every configuration on; rounded up to whole groups of --max-concurrency.")] = 8,
    trials: Annotated[
        int | None,
        typer.Option(help="Run so many configurations of the grid, chosen one after the other by what those before took; default: all of them."),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="Where the study of --trials stands, for all processes that are to share it: a journal file (study.journal) or a database "
            "(sqlite:///study.db, postgresql://...). It goes on by itself; default: memory, and the journal beside --out.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted sweep with the same --out stopped.")] = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    execution: Execution = None,
    weights: TargetWeights = "full",
    rope_theta: RopeTheta = None,
    max_context: MaxContext = None,
    seed: Seed = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The brute-force grid that a plan replaces: every configuration run on every text, or with --trials those that a study chooses."""
    from planner.commands.configs import drafter_specs, grid, policies, valid
    from planner.commands.session import usual_weights
    from planner.commands.trees import parse_sizes, tree_grid
    from planner.files import check_writable
    from planner.plans import save_sweep
    from planner.report import terminal
    from planner.specs import Sampler, Workload

    check_writable(out)
    configs = grid(drafter_specs(asked, usual_weights(device)), policies(asked), parse_numbers(draft_lens, int, "--draft-lens"))
    configs += tree_grid(configs, parse_sizes(tree_sizes))
    sampler = valid(Sampler, temperature=temperature, top_p=top_p, top_k=top_k)
    workload = Workload(context_len=isl, output_len=osl, sampler=sampler, batch=max_concurrency)
    with journaled(out) if study is None else in_study(study):
        with terminal.progress("sweep", quiet=quiet) as progress:
            result = planner.sweep(
                model, paths(dataset), workload=workload, configs=configs, num_texts=texts, dtype=dtype, device=device, execution=execution,
                weights=weights, rope_theta=rope_theta, max_context_len=max_context, seed=seed, out=out, resume=resume, num_trials=trials, storage=study, progress=progress,
            )  # fmt: skip
        save_sweep(result, out)
    terminal.print_json(result) if as_json else terminal.show_sweep(result, out)
