"""planner train: flags to arguments."""

from pathlib import Path
from typing import Annotated

import typer

from planner.cli.app import app
from planner.cli.options import AsJson, Dataset, Device, Dtype, Model, Quiet, Seed, paths
from planner.errors import BadInput
from planner.units import parse_numbers

trains = typer.Typer(
    help="Train drafters for a target, and write them as ordinary checkpoints.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(trains, name="train")

Texts = Annotated[Path, typer.Argument(metavar="TEXTS", help="A folder that `planner train texts` has filled.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; one that was begun is gone on with.")]
Steps = Annotated[int, typer.Option(help="Steps of the optimizer.")]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate, behind the warm-up.")]
Warmup = Annotated[int, typer.Option(help="Steps in which the rate rises.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradients.")]
Accumulation = Annotated[int, typer.Option(help="Texts of a step, per process.")]
Autocast = Annotated[bool, typer.Option("--autocast/--float32", help="Matrix products in bfloat16, or all in float32.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
LookEvery = Annotated[int, typer.Option(help="Steps between looks at held-out texts.")]
HeldOut = Annotated[list[str] | None, typer.Option(help="Texts whose acceptance is met on the way; nothing of them is trained on.")]
HeldOutLen = Annotated[int, typer.Option("--held-out-isl", help="Tokens of their prompts.")]
HeldOutBudgets = Annotated[str, typer.Option(help="KV budgets that their acceptance is met with, beside the full cache.")]


@trains.command()
def texts(
    dataset: Dataset,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder; one that was begun is gone on with.")],
    model: Model = "smollm2",
    length: Annotated[int, typer.Option(help="Tokens of a stretch of a file.")] = 4096,
    written: Annotated[int, typer.Option(help="Texts that the target itself continues.")] = 48,
    prompt_len: Annotated[int, typer.Option(help="Tokens that it continues.")] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens that it writes.")] = 512,
    temperatures: Annotated[str, typer.Option(help="It writes at these in turn.")] = "0,0.7,1",
    top: Annotated[int, typer.Option(help="Tokens kept of each distribution, the likeliest.")] = 32,
    taps: Annotated[str | None, typer.Option(help="Layers whose output is kept, for drafters that read it; default: none.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Texts with what the target says of every position, written once for all trainings."""
    from planner.commands.train_texts import train_texts
    from planner.report import terminal, training

    with terminal.progress("train texts", quiet=quiet) as progress:
        count = train_texts(
            model, paths(dataset), out, length=length, written=written, prompt_len=prompt_len, output_len=output_len,
            temperatures=parse_numbers(temperatures, float, "--temperatures"), top=top,
            taps=[] if taps is None else parse_numbers(taps, int, "--taps"), seed=seed, dtype=dtype, device=device, progress=progress,
        )  # fmt: skip
    terminal.print_json({"texts": count, "folder": str(out)}) if as_json else training.show_texts(count, out)


@trains.command("multi-view")
def multi_view(
    taught: Texts,
    out: Out,
    model: Model = "smollm2",
    begin: Annotated[
        str | None, typer.Option(metavar="DRAFTER", help="Begin as a drafter that was trained before; default: as layers of the target.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of the target that the drafter is cut from; default: the first two and the last.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="N:WEIGHT[,..]",
            help="KV budgets of the sparse branch and how often each is drawn, or none; default: the paper's, scaled to the texts' length.",
        ),
    ] = None,
    selection: Annotated[str, typer.Option(help="What the sparse branch keeps: chunk, window, snapkv or retrieval.")] = "chunk",
    variant: Annotated[str, typer.Option(help="kl or sampling (for --temperature), or greedy (temperature 0, as the paper has it).")] = "kl",
    temperature: Annotated[float, typer.Option(help="That kl and sampling serve.")] = 1.0,
    consistency: Annotated[float, typer.Option(help="Weight of the sparse branch's loss.")] = 0.5,
    continuation: Annotated[int, typer.Option(help="Tokens of a text that a step's loss is about.")] = 512,
    sampled: Annotated[int, typer.Option(help="Tokens of the vocabulary that a step's softmax samples beside the frequent ones; 0: all.")] = 4096,
    bits: Annotated[int, typer.Option(help="Bits of the drafter's own weights in its file, 8 or 4.")] = 8,
    steps: Steps = 2000,
    learning_rate: LearningRate = 1e-3,
    warmup: Warmup = 50,
    clip: Clip = 1.0,
    accumulation: Accumulation = 2,
    autocast: Autocast = True,
    save_every: SaveEvery = 100,
    look_every: LookEvery = 200,
    held_out: HeldOut = None,
    held_out_isl: HeldOutLen = 1024,
    held_out_budgets: HeldOutBudgets = "64,256",
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A small drafter of the target's own layers that keeps its acceptance when its cache is cut (BudgetDraft)."""
    from planner.commands.configs import valid
    from planner.commands.session import needs_runtime
    from planner.commands.train_multi_view import train_multi_view
    from planner.report import terminal, training

    needs_runtime()
    from planner.training.multi_view import MultiViewSettings
    from planner.training.trainer import TrainSettings

    settings = valid(
        MultiViewSettings, layers=None if layers is None else parse_numbers(layers, int, "--layers"), budgets=_weighted(budgets), selection=selection,
        variant=variant, temperature=temperature, consistency=consistency, continuation=continuation, sampled=sampled or None, seed=seed,
    )  # fmt: skip
    schedule = valid(
        TrainSettings, steps=steps, learning_rate=learning_rate, warmup=warmup, clip=clip, accumulation=accumulation, autocast=autocast,
        save_every=save_every, seed=seed,
    )  # fmt: skip
    with terminal.progress("train multi-view", quiet=quiet) as progress:
        log = train_multi_view(
            model, taught, out, settings=settings, training=schedule, held_out=paths(held_out or []), context_len=held_out_isl,
            budgets=parse_numbers(held_out_budgets, int, "--held-out-budgets"), look_every=look_every, begin=begin, bits=bits,
            device=device, progress=progress,
        )  # fmt: skip
    terminal.print_json({"log": log, "folder": str(out)}) if as_json else training.show_training(log, out)


@trains.command("block-diffusion")
def block_diffusion(
    taught: Texts,
    out: Out,
    model: Model = "smollm2",
    layers: Annotated[str | None, typer.Option(help="Layers of the target that the head begins as; default: the first and the last two.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a block: the last one and the masks behind it.")] = 8,
    mask_token: Annotated[int | None, typer.Option(help="Token whose embedding is the mask's; default: the last special token.")] = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N:WEIGHT[,..]", help="KV budgets of blocks and how often each is drawn; all is no budget; default: all."),
    ] = None,
    anchors: Annotated[int, typer.Option(help="Blocks of a text in a step.")] = 64,
    span: Annotated[int, typer.Option(help="Tokens of the stretch that they are drawn from.")] = 512,
    decay: Annotated[float | None, typer.Option(help="Places of a block over which its loss weighs 1/e; default: the paper's.")] = None,
    variant: Annotated[str, typer.Option(help="kl or sampling (for --temperature), or greedy (temperature 0).")] = "kl",
    temperature: Annotated[float, typer.Option(help="That kl and sampling serve.")] = 1.0,
    sampled: Annotated[int, typer.Option(help="Tokens of the vocabulary that a step's softmax samples beside the frequent ones; 0: all.")] = 4096,
    head_dtype: Annotated[
        str, typer.Option(help="Of the head as it is written: bfloat16, or fp8, half the size (vLLM loads no quantised one).")
    ] = "bfloat16",
    steps: Steps = 1500,
    learning_rate: LearningRate = 1e-3,
    warmup: Warmup = 50,
    clip: Clip = 1.0,
    accumulation: Accumulation = 2,
    autocast: Autocast = True,
    save_every: SaveEvery = 100,
    look_every: LookEvery = 200,
    held_out: HeldOut = None,
    held_out_isl: HeldOutLen = 1024,
    held_out_budgets: HeldOutBudgets = "256",
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A head on the target's hidden states that drafts a whole block in one pass (DFlash). TEXTS need --taps."""
    from planner.commands.configs import valid
    from planner.commands.session import needs_runtime
    from planner.commands.train_block_diffusion import train_block_diffusion
    from planner.report import terminal, training

    needs_runtime()
    from planner.training.block_diffusion import BlockSettings
    from planner.training.trainer import TrainSettings

    drawn = [(None, 1.0)] if budgets is None else _weighted(budgets)
    settings = valid(
        BlockSettings, layers=None if layers is None else parse_numbers(layers, int, "--layers"), mask_token=mask_token,
        block_size=block_size, anchors=anchors, span=span, budgets=drawn, decay=decay, variant=variant, temperature=temperature,
        sampled=sampled or None, seed=seed,
    )  # fmt: skip
    schedule = valid(
        TrainSettings, steps=steps, learning_rate=learning_rate, warmup=warmup, clip=clip, accumulation=accumulation, autocast=autocast,
        save_every=save_every, seed=seed,
    )  # fmt: skip
    with terminal.progress("train block-diffusion", quiet=quiet) as progress:
        log = train_block_diffusion(
            model, taught, out, settings=settings, training=schedule, held_out=paths(held_out or []), context_len=held_out_isl,
            budgets=parse_numbers(held_out_budgets, int, "--held-out-budgets"), look_every=look_every, head_dtype=head_dtype,
            device=device, progress=progress,
        )  # fmt: skip
    terminal.print_json({"log": log, "folder": str(out)}) if as_json else training.show_training(log, out)


@trains.command()
def materialize(
    drafter: Annotated[str, typer.Argument(metavar="DRAFTER", help="A drafter's own layers: a file that training wrote, or smollm2-multi-view.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write: config.json, model.safetensors and the tokenizer's files.")],
    model: Model = "smollm2",
    gguf: Annotated[Path | None, typer.Option(help="Write a GGUF file as well, as llama.cpp loads it.")] = None,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """An ordinary checkpoint of a drafter, from its own layers and the target's embedding and head."""
    from planner.commands.materialize import materialize as write
    from planner.report import terminal, training

    written = write(drafter, out, model=model, gguf=gguf, dtype=dtype)
    terminal.print_json({"written": written}) if as_json else training.show_written(written)


def _weighted(text: str | None) -> list[tuple[int | None, float]] | None:
    """ "64:.4,all:.6" -> [(64, .4), (None, .6)]; none -> []."""
    if text is None:
        return None
    if text == "none":
        return []
    found = []
    for part in text.split(","):
        budget, colon, weight = part.partition(":")
        try:
            found.append((None if budget == "all" else int(budget), float(weight) if colon else 1.0))
        except ValueError:
            raise BadInput(f"--budgets are N:WEIGHT, separated by commas, or none, got {part!r}; write e.g. 64:0.4,128:0.6") from None
    return found
