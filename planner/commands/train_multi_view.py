"""planner train multi-view: a drafter cut from its target and trained to keep its acceptance when its cache is cut.

A folder holds the run: checkpoint.safetensors, log.jsonl with the acceptance met on the way, and in the end drafter.safetensors,
the drafter's own layers. Needs the extra [runtime].
"""

from pathlib import Path

import msgspec

from planner.commands.configs import valid
from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, open_session
from planner.commands.training_run import Met, Run, followed, held_out_texts, training_folder
from planner.errors import BadInput
from planner.specs import SparseKV
from planner.trained import own_layers_path, read_header

DRAFTER = "drafter.safetensors"
HELD_OUT_DRAFT_LEN = 4


def train_multi_view(
    model: str, texts: str | Path, out: str | Path, *, settings: "MultiViewSettings", training: "TrainSettings",  # noqa: F821
    held_out: list[str] = (), context_len: int = 1024, temperatures: list[float] = (0.0, 1.0), budgets: list[int] = (64, 256), look_every: int = 200,
    begin: str | None = None, bits: int = 8, device: str | None = None, progress: Progress = Silent(),
) -> list[Met]:  # fmt: skip
    """Train, or go on with what `out` holds; what held-out texts accepted on the way.

    begin  own layers that the drafter begins as, of an earlier training; None: the target's
    bits   of the drafter's own weights in its file, 8 or 4; nothing of the training depends on them
    """
    session = open_session(model, device=device, whole=True)
    import torch

    from planner.runtime.own_layers import check_packing, save_own_layers
    from planner.training import multi_view
    from planner.training.data import TaughtTexts

    folder, ranks = training_folder(out), session.ranks
    taught = TaughtTexts(texts, session.model)
    drafter, settings = _begun(begin, settings, session.model)
    settings = settings.filled(session.target.num_layers, taught.manifest.settings.length)
    policies = [valid(SparseKV, budget=budget, selection=settings.selection, storage="evict") for budget in budgets]
    drafter = drafter or multi_view.cut(session.model, settings.layers)
    check_packing(multi_view.own_weights(drafter), bits)
    parts = multi_view.MultiView(drafter, taught, settings, torch.bfloat16 if training.autocast else torch.float32)
    began = None if begin is None else drafter.fingerprint
    run = Run(target=session.model.fingerprint, texts=taught.digest, settings=settings, training=training, ranks=ranks.size, begin=began)
    watched = held_out_texts(session, held_out, taught.manifest.settings.files, context_len, temperatures) if held_out and ranks.rank == 0 else []

    def look() -> tuple[dict[str, float], dict[str, float]]:
        return (_met(session, drafter, watched, policies) if watched else {}), {}

    log = followed(
        folder, run, multi_view.trainable(drafter), parts.learn, ranks=ranks, look_every=look_every, look=look, progress=progress
    )  # fmt: skip
    if ranks.rank == 0:
        card = {"run": run, "log": log, "trained": "multi-view" if settings.budgets else "full cache alone"}
        save_own_layers(folder / DRAFTER, drafter.spec, settings.layers, multi_view.own_weights(drafter), card, bits)
    return log


def _begun(
    begin: str | None, settings: "MultiViewSettings", target: "Transformer",  # noqa: F821
) -> tuple["Transformer | None", "MultiViewSettings"]:  # noqa: F821  # fmt: skip
    """A drafter that was trained before, to be trained on, and the settings with its layers."""
    if begin is None:
        return None, settings
    import torch

    from planner.runtime.own_layers import load_own_layers
    from planner.training.multi_view import cut

    if settings.layers is not None:
        raise BadInput(f"a drafter that begins as {begin} has that one's layers, got --layers {','.join(map(str, settings.layers))}; drop it")
    path = own_layers_path(begin)
    earlier = load_own_layers(path, target, torch.float32)
    return cut(earlier, list(range(earlier.spec.num_layers))), msgspec.structs.replace(settings, layers=read_header(path).layers)


def _met(session: Session, drafter: "Transformer", texts: list, policies: list[SparseKV]) -> dict[str, float]:  # noqa: F821
    """Mean acceptance of first drafts, by replay with the weights as they are."""
    import numpy as np

    from planner.runtime.drafters.draft_model import DraftModelDrafter
    from planner.runtime.own_layers import on_target
    from planner.specs import FullKV
    from planner.training.multi_view import own_weights

    target, found = session.model, {}
    now = on_target(target, drafter.spec, own_weights(drafter), target.dtype, "training")
    for kv in [*policies, FullKV()]:
        budget = kv.budget if isinstance(kv, SparseKV) else "full"
        for text in texts:
            own = DraftModelDrafter(now, kv, target.spec.vocab_size, draft_len=HELD_OUT_DRAFT_LEN, batch=1)
            chance = own.replay(text, HELD_OUT_DRAFT_LEN).accept_prob[:, 0].mean()
            found.setdefault(f"{text.sampler.temperature:g}/{budget}", []).append(float(chance))
            text.prompt_caches.clear()
    return {name: float(np.mean(values)) for name, values in found.items()}
