"""planner train multi-view: a drafter cut from its target and trained to keep its acceptance when its cache is cut.

A folder holds the run: checkpoint.safetensors, log.jsonl with the acceptance met on the way, and in the end drafter.safetensors,
the drafter's own layers. Needs the extra [runtime].
"""

import time
from pathlib import Path

import msgspec

from planner.commands.configs import valid
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
    if look_every < 1:
        raise BadInput(f"looks at held-out texts lie at least 1 step apart, got {look_every}; change --look-every")
    if not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
        raise BadInput(f"a training is kept in a folder, and the one above must exist, got {folder}; create that or change --out")
    taught = TaughtTexts(texts, session.model)
    settings = settings.filled(session.target.num_layers, taught.manifest.settings.length)
    policies = [valid(SparseKV, budget=budget, selection=settings.selection, storage="evict") for budget in budgets]
    drafter = multi_view.cut(session.model, settings.layers)
    parts = multi_view.MultiView(drafter, taught, settings, torch.bfloat16 if training.autocast else torch.float32)
    run = Run(target=session.model.fingerprint, texts=taught.digest, settings=settings, training=training, ranks=ranks.size)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {error.strerror or error}; change --out") from None
    log = _log(folder / LOG)
    watched = _held_out(session, held_out, taught.manifest.settings.files, context_len, temperatures) if held_out and ranks.rank == 0 else []
    losses, began, before = [], time.perf_counter(), log[-1].minutes if log else 0.0
    shown = 0  # steps that the progress bar knows of
    progress.stage("steps", training.steps)

    def stepped(done: "trainer.StepDone") -> None:
        nonlocal shown
        losses.append(done.loss)
        progress.advance(done.step - shown)
        shown = done.step
        last = done.step == training.steps
        if ranks.rank == 0 and (done.step % look_every == 0 or last):
            met = _met(session, drafter, watched, policies) if watched else {}
            minutes = before + (time.perf_counter() - began) / 60
            log[:] = [line for line in log if line.step < done.step]
            log.append(Met(step=done.step, loss=sum(losses) / len(losses), minutes=minutes, acceptance=met))
            write_whole(folder / LOG, b"".join(msgspec.json.encode(line) + b"\n" for line in log))
            losses.clear()

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


def _held_out(
    session: Session, files: list[str], trained_on: list[str], context_len: int, temperatures: list[float]
) -> list["TargetText"]:  # noqa: F821
    """Texts that the target writes behind prompts nobody trains on. trained_on  files, as prompts name their sources"""
    import torch

    from planner.profiler.acceptance import write_texts
    from planner.profiler.texts import draw_prompts
    from planner.runtime.model import prefill
    from planner.specs import Sampler

    model, longest = session.model, session.model.spec.max_context_len - HELD_OUT_TOKENS
    if context_len > longest:
        raise BadInput(f"a held-out prompt has at most {longest} tokens, {HELD_OUT_TOKENS} are written behind it, got {context_len}; lower --held-out-isl")
    prompts = draw_prompts(
        session.tokenizer, expand(list(files)), length=context_len, count=HELD_OUT_TEXTS, seed=0, remedy="lower --held-out-isl"
    )  # fmt: skip
    if seen := sorted({prompt.source for prompt in prompts} & set(trained_on)):
        raise BadInput(f"held-out texts are not trained on, {seen[0].partition('#')[0]} is among the texts; give other files with --held-out")
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


def _met(session: Session, drafter: "Transformer", texts: list, policies: list[SparseKV]) -> dict[str, float]:  # noqa: F821
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
    for kv in [*policies, FullKV()]:
        budget = kv.budget if isinstance(kv, SparseKV) else "full"
        for text in texts:
            own = DraftModelDrafter(now, kv, target.spec.vocab_size, draft_len=HELD_OUT_DRAFT_LEN, batch=1)
            chance = own.replay(text, HELD_OUT_DRAFT_LEN).accept_prob[:, 0].mean()
            found.setdefault(f"{text.sampler.temperature:g}/{budget}", []).append(float(chance))
            text.prompt_caches.clear()
    return {name: float(np.mean(values)) for name, values in found.items()}
