"""planner profile: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

import planner
from planner.cli.app import app
from planner.cli.options import AsJson, Dataset, Device, Dtype, Execution, MaxContext, Model, Quiet, RopeTheta, Seed, TargetWeights, paths, takes
from planner.cli.stopping import journaled
from planner.commands.flags import AskedGrid
from planner.units import parse_numbers


@app.command()
@takes(AskedGrid)
def profile(
    asked: AskedGrid,
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the profile goes.")],
    model: Model = "smollm2",
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "2048",
    temperatures: Annotated[str, typer.Option(help="Samplers to profile; acceptance does not carry over between them.")] = "1",
    top_p: Annotated[float, typer.Option(help="Nucleus sampling at every temperature above 0.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Top-k sampling at every temperature above 0; 0 keeps all.")] = 0,
    max_draft_len: Annotated[int, typer.Option(help="Longest draft of interest, in tokens.")] = 8,
    tree_sizes: Annotated[
        str, typer.Option(help="Nodes of draft trees to profile, e.g. 8,16,32,64: a plan then weighs these, and adaptive ones up to the largest.")
    ] = "",
    tree_levels: Annotated[
        str | None,
        typer.Option(help="Levels of those trees; default: --max-draft-len, its half and so on down to 2. A block drafter needs only the first."),
    ] = None,
    texts: Annotated[int, typer.Option(help="Prompts per context, at least 4; 16 give useful intervals.")] = 16,
    output_len: Annotated[int, typer.Option(help="Tokens that the target writes behind each prompt.")] = 128,
    batches: Annotated[str, typer.Option(help="Streams side by side to time rounds at, e.g. 1,4,8; plans need batches within them.")] = "1",
    max_minutes: Annotated[float | None, typer.Option(help="Stop replaying further texts after this.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted profile with the same --out stopped.")] = False,
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
    """Measure this device: acceptance by replay, latency by whole rounds. A journal lies beside --out until it is complete."""
    from planner.commands.configs import drafter_specs, policies, valid
    from planner.commands.profile_settings import Settings
    from planner.commands.session import usual_weights
    from planner.commands.trees import parse_sizes
    from planner.files import check_writable
    from planner.measurements import save_profile
    from planner.report import terminal
    from planner.specs import Sampler

    check_writable(out)
    samplers = [
        valid(Sampler, temperature=t, top_p=top_p if t > 0 else 1.0, top_k=top_k if t > 0 else 0)
        for t in parse_numbers(temperatures, float, "--temperatures")
    ]
    settings = Settings(
        contexts=parse_numbers(contexts, int, "--contexts"), samplers=samplers, policies=policies(asked),
        drafters=drafter_specs(asked, usual_weights(device)), max_draft_len=max_draft_len,
        num_texts=texts, output_len=output_len, seed=seed, max_minutes=max_minutes,
        batches=parse_numbers(batches, int, "--batches"), tree_sizes=parse_sizes(tree_sizes),
        tree_levels=None if tree_levels is None else parse_numbers(tree_levels, int, "--tree-levels"),
    )  # fmt: skip
    with journaled(out):
        with terminal.progress("profile", quiet=quiet) as progress:
            result = planner.profile(
                model, paths(dataset), settings=settings, dtype=dtype, device=device, execution=execution, weights=weights, rope_theta=rope_theta,
                max_context_len=max_context, out=out, resume=resume, progress=progress,
            )  # fmt: skip
        save_profile(result, out)
    terminal.print_json(result) if as_json else terminal.show_profile(result, out)
