"""A training on disk, whatever is trained: a folder with checkpoint.safetensors and log.jsonl, which has the acceptance met on the way."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from planner.commands.progress import Progress
from planner.commands.session import Session
from planner.datasets import expand
from planner.errors import BadInput
from planner.files import read_bytes, write_whole

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
HELD_OUT_TOKENS, HELD_OUT_TEXTS = 128, 4


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What decides a training: a checkpoint of another is refused."""

    target: str  # fingerprint
    texts: str  # digest of their list
    settings: msgspec.Struct
    training: "TrainSettings"  # noqa: F821  planner.training.trainer
    ranks: int
    begin: str | None = None  # fingerprint of the drafter that it began as; None: layers of the target


class Met(msgspec.Struct, frozen=True, kw_only=True):
    """What held-out texts accepted after some steps."""

    step: int
    loss: float  # mean since the line before
    minutes: float  # of training, by all runs that led here
    acceptance: dict[str, float]  # "<temperature>/<budget>": chance that the first draft of a round is accepted
    tokens: dict[str, float] = {}  # of a round, likewise; mean over the places of a text


def training_folder(out: str | Path) -> Path:
    """Where a training is kept; BadInput where it cannot be."""
    folder = Path(out)
    if not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
        raise BadInput(f"a training is kept in a folder, and the one above must exist, got {folder}; create that or change --out")
    return folder


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {error.strerror or error}; change --out") from None


def followed(
    folder: Path,
    run: Run,
    parameters: dict[str, "Parameter"],  # noqa: F821  torch.nn
    learn: Callable[[int], "Learnt"],  # noqa: F821  planner.training.trainer
    *,
    ranks: "Ranks",  # noqa: F821  planner.runtime.ranks
    look_every: int,
    look: Callable[[], tuple[dict[str, float], dict[str, float]]],  # acceptance and tokens, by the weights as they are
    progress: Progress,
) -> list[Met]:
    """Train to the end, looking at held-out texts on the way."""
    from planner.training import trainer

    if look_every < 1:
        raise BadInput(f"looks at held-out texts lie at least 1 step apart, got {look_every}; change --look-every")
    make_folder(folder)
    steps, log = run.training.steps, _log(folder / LOG)
    losses, began, before = [], time.perf_counter(), log[-1].minutes if log else 0.0
    shown = [0]  # steps that the progress has been told of
    progress.stage("steps", steps)

    def stepped(done: trainer.StepDone) -> None:
        losses.append(done.loss)
        progress.advance(done.step - shown[0])
        shown[0] = done.step
        if ranks.rank == 0 and (done.step % look_every == 0 or done.step == steps):
            acceptance, tokens = look()
            minutes = before + (time.perf_counter() - began) / 60
            log[:] = [line for line in log if line.step < done.step]
            log.append(Met(step=done.step, loss=sum(losses) / len(losses), minutes=minutes, acceptance=acceptance, tokens=tokens))
            write_whole(folder / LOG, b"".join(msgspec.json.encode(line) + b"\n" for line in log))
            losses.clear()

    trainer.train(parameters, learn, run.training, folder / CHECKPOINT, run, ranks=ranks, stepped=stepped)
    return log


def held_out_texts(
    session: Session, files: list[str], trained_on: list[str], context_len: int, temperatures: list[float], taps: tuple[int, ...] = ()
) -> list["TargetText"]:  # noqa: F821  planner.runtime.drafters.protocol
    """Texts that the target writes behind prompts nobody trains on, with the hidden states that a head reads.

    trained_on  files, as prompts name their sources
    """
    import torch

    from planner.profiler.acceptance import write_texts
    from planner.profiler.texts import draw_prompts
    from planner.runtime.kv_cache import KVCache
    from planner.runtime.model import prefill
    from planner.specs import Sampler

    model, longest = session.model, session.model.spec.max_context_len - HELD_OUT_TOKENS
    if context_len > longest:
        raise BadInput(
            f"a held-out prompt has at most {longest} tokens, {HELD_OUT_TOKENS} are written behind it, got {context_len}; lower --held-out-isl"
        )
    prompts = draw_prompts(
        session.tokenizer, expand(list(files)), length=context_len, count=HELD_OUT_TEXTS, seed=0, remedy="lower --held-out-isl"
    )  # fmt: skip
    if seen := sorted({prompt.source for prompt in prompts} & set(trained_on)):
        raise BadInput(f"held-out texts are not trained on, {seen[0].partition('#')[0]} is among the texts; give other files with --held-out")
    written = []
    for temperature in temperatures:
        room = {"batch": len(prompts), "capacity": context_len + HELD_OUT_TOKENS}
        cache = KVCache(model.spec, dtype=model.dtype, device=model.device, taps=taps, **room)
        first = prefill(model, torch.tensor([prompt.tokens for prompt in prompts], device=model.device), cache)
        found = write_texts(
            model, cache, prompts, context_len, first, Sampler(temperature=temperature), output_len=HELD_OUT_TOKENS, stop_tokens=(),
            seeds=list(range(len(prompts))),
        )  # fmt: skip
        written += [own.target_text for own in found if own is not None]
    return written


def _log(path: Path) -> list[Met]:
    if not path.exists():
        return []
    try:
        return [msgspec.json.decode(line, type=Met) for line in read_bytes(path, "log").splitlines()]
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is not the log of a training: {error}; delete it") from None
