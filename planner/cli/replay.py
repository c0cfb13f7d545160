"""planner replay: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Device, Dtype, Execution, MaxContext, Model, Quiet, RopeTheta, Seed, TargetWeights, takes
from planner.commands.flags import AskedGrid
from planner.errors import BadInput

DRAFT_COST = 0.1


@app.command()
@takes(AskedGrid, kv_budgets="64,256,1024", selections="window")
def replay(
    asked: AskedGrid,
    log: Annotated[
        Path,
        typer.Option(
            help="Served traffic, a JSON object per line: prompt (or messages, prompt_tokens), output (or output_tokens), temperature, top_p, top_k."
        ),
    ],
    model: Model = "smollm2",
    max_draft_len: Annotated[int, typer.Option(help="Longest draft of interest, in tokens.")] = 8,
    texts: Annotated[int, typer.Option(help="Lines to replay, at least 4, drawn with --seed from all of the log.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="Of lines that give none; 0 is greedy. Without it they are refused.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling of lines that give none, in (0, 1]; default: 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Top-k of lines that give none, 0 keeps all; default: 0.")] = None,
    profile_path: Annotated[
        Path | None, typer.Option("--profile", help="A profile of this model: rounds cost the seconds that it measured, else plain steps.")
    ] = None,
    draft_cost: Annotated[
        float | None, typer.Option(help=f"Without --profile: what a drafted token costs, in plain steps; default: {DRAFT_COST:g}.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the replay goes, with what every line gave.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    execution: Execution = None,
    weights: TargetWeights = "full",
    rope_theta: RopeTheta = None,
    max_context: MaxContext = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Acceptance of any drafter, budget and K on text that was already served, and what better choices of K could gain."""
    from planner.commands.configs import drafter_specs, grid, policies, valid
    from planner.commands.session import usual_weights
    from planner.files import check_writable
    from planner.replays import save_replay
    from planner.report import terminal
    from planner.specs import Sampler

    if out is not None:
        check_writable(out)
    if profile_path is not None and draft_cost is not None:
        raise BadInput("a round costs what --profile or --draft-cost says, got both; drop one")
    if temperature is None and (top_p, top_k) != (None, None):
        raise BadInput("--top-p and --top-k go with --temperature, the default of lines without a sampler; add it")
    default = None if temperature is None else valid(Sampler, temperature=temperature, top_p=1.0 if top_p is None else top_p, top_k=top_k or 0)
    configs = grid(drafter_specs(asked, usual_weights(device)), policies(asked), [max_draft_len])
    costs_from = profile_path or (DRAFT_COST if draft_cost is None else draft_cost)
    with terminal.progress("replay", quiet=quiet) as progress:
        result = planner.replay(
            model, log, configs=configs, num_texts=texts, default_sampler=default, costs_from=costs_from, dtype=dtype, device=device,
            execution=execution, weights=weights, rope_theta=rope_theta, max_context_len=max_context, seed=seed, progress=progress,
        )  # fmt: skip
    if out is not None:
        save_replay(result, out)
    terminal.print_json(result) if as_json else terminal.show_replay(result, out)
