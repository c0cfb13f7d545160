"""planner train multi-view: a drafter cut from its target and trained to keep its acceptance when its cache is cut.

A folder holds the run: checkpoint.safetensors, log.jsonl with the acceptance met on the way, and in the end drafter.safetensors,
the drafter's own layers. Needs the extra [runtime].
"""

import time
from pathlib import Path

import msgspec

from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, open_session
from planner.datasets import expand
from planner.errors import BadInput
from planner.files import read_bytes, write_whole
from planner.specs import SparseKV

CHECKPOINT, LOG, DRAFTER = "checkpoint.safetensors", "log.jsonl", "drafter.safetensors"
HELD_OUT_TOKENS, HELD_OUT_TEXTS, HELD_OUT_DRAFT_LEN = 128, 4, 4


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a training: a checkpoint of another is refused."""

    target: str  # fingerprint
    texts: str  # digest of their list
    settings: "MultiViewSettings"  # noqa: F821  planner.training.multi_view
    training: "TrainSettings"  # noqa: F821  planner.training.trainer
    ranks: int


class Met(msgspec.Struct, frozen=True, kw_only=True):
    """What held-out texts accepted after some steps."""

    step: int
    loss: float  # mean since the line before
    minutes: float  # of training, by all runs that led here
    acceptance: dict[str, float]  # "<temperature>/<budget>": chance that the first draft of a round is accepted


def train_multi_view(
    model: str, texts: str | Path, out: str | Path, *, settings: "MultiViewSettings", training: "TrainSettings",  # noqa: F821
    held_out: list[str] = (), context_len: int = 1024, temperatures: list[float] = (0.0, 1.0), budgets: list[int] = (64, 256), look_every: int = 200,
    device: str | None = None, progress: Progress = Silent(),
) -> list[Met]:  # fmt: skip
    """Train, or go on with what `out` holds; what held-out texts accepted on the way."""
    session = open_session(model, device=device, whole=True)
    import torch

    from planner.runtime.own_layers import save_own_layers
    from planner.training import multi_view, trainer
    from planner.training.data import TaughtTexts

    folder, ranks = Path(out), session.ranks
    if not folder.is_dir():
        if not folder.parent.is_dir():
            raise BadInput(f"the folder above the training's must exist, {folder.parent} does not; create it or change --out")
        folder.mkdir(exist_ok=True)
    taught = TaughtTexts(texts, session.model)
    drafter = multi_view.cut(session.model, settings.layers)
    parts = multi_view.MultiView(drafter, taught, settings, torch.bfloat16 if training.autocast else torch.float32)
    run = Run(target=session.model.fingerprint, texts=taught.digest, settings=settings, training=training, ranks=ranks.size)
    watched = _held_out(session, held_out, context_len, temperatures) if held_out and ranks.rank == 0 else []
    log = _log(folder / LOG)
    losses, began, before = [], time.perf_counter(), log[-1].minutes if log else 0.0
    progress.stage("steps", training.steps)

    def stepped(done: "trainer.StepDone") -> None:
        losses.append(done.loss)
        if not progress_started:
            progress_started.append(done.step)
            progress.advance(done.step - 1)
        progress.advance()
        last = done.step == training.steps
        if ranks.rank == 0 and (done.step % look_every == 0 or last):
            met = _met(session, drafter, watched, budgets, settings.selection) if watched else {}
            minutes = before + (time.perf_counter() - began) / 60
            log[:] = [line for line in log if line.step < done.step]
            log.append(Met(step=done.step, loss=sum(losses) / len(losses), minutes=minutes, acceptance=met))
            write_whole(folder / LOG, b"".join(msgspec.json.encode(line) + b"\n" for line in log))
            losses.clear()

    progress_started: list[int] = []
    trainer.train(multi_view.trainable(drafter), parts.learn, training, folder / CHECKPOINT, run, ranks=ranks, stepped=stepped)
    if ranks.rank == 0:
        card = {"run": run, "log": log, "trained": "multi-view" if settings.budgets else "full cache alone"}
        save_own_layers(folder / DRAFTER, drafter.spec, settings.layers, multi_view.own_weights(drafter), card)
    return log


def _log(path: Path) -> list[Met]:
    if not path.exists():
        return []
    try:
        return [msgspec.json.decode(line, type=Met) for line in read_bytes(path, "log").splitlines()]
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is not the log of a training: {error}; delete it") from None


def _held_out(session: Session, files: list[str], context_len: int, temperatures: list[float]) -> list["TargetText"]:  # noqa: F821
    """Texts that the target writes behind prompts nobody trains on."""
    import torch

    from planner.profiler.acceptance import write_texts
    from planner.profiler.texts import draw_prompts
    from planner.runtime.model import prefill
    from planner.specs import Sampler

    model = session.model
    prompts = draw_prompts(session.tokenizer, expand(list(files)), length=context_len, count=HELD_OUT_TEXTS, seed=0)
    written = []
    for temperature in temperatures:
        cache = model.new_cache(context_len + HELD_OUT_TOKENS, batch=len(prompts))
        first = prefill(model, torch.tensor([prompt.tokens for prompt in prompts], device=model.device), cache)
        found = write_texts(
            model, cache, prompts, context_len, first, Sampler(temperature=temperature), output_len=HELD_OUT_TOKENS, stop_tokens=(),
            seeds=list(range(len(prompts))),
        )  # fmt: skip
        written += [own.target_text for own in found if own is not None]
    return written


def _met(session: Session, drafter: "Transformer", texts: list, budgets: list[int], selection: str) -> dict[str, float]:  # noqa: F821
    """Mean acceptance of first drafts, by replay with the weights as they are."""
    import numpy as np

    from planner.runtime.drafters.draft_model import DraftModelDrafter
    from planner.runtime.model import build_model
    from planner.runtime.weights import Checkpoint
    from planner.specs import FullKV
    from planner.training.multi_view import own_weights

    target, found = session.model, {}
    tensors = {name: tensor.to(target.dtype) for name, tensor in own_weights(drafter).items()} | {"model.embed_tokens.weight": target.embedding}
    if not target.spec.tie_embeddings:
        tensors["lm_head.weight"] = target.head.restored(target.dtype)
    now = build_model(Checkpoint(drafter.spec, tensors, "training"), target.kernels)
    for budget in [*budgets, None]:
        kv = FullKV() if budget is None else SparseKV(budget=budget, selection=selection, storage="evict")
        for text in texts:
            own = DraftModelDrafter(now, kv, target.spec.vocab_size, draft_len=HELD_OUT_DRAFT_LEN, batch=1)
            chance = own.replay(text, HELD_OUT_DRAFT_LEN).accept_prob[:, 0].mean()
            found.setdefault(f"{text.sampler.temperature:g}/{budget or 'full'}", []).append(float(chance))
            text.prompt_caches.clear()
    return {name: float(np.mean(values)) for name, values in found.items()}
