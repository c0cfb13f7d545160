"""Drafters by kind."""

from planner.errors import BadInput
from planner.runtime.dflash_head import DFlashHead
from planner.runtime.drafters.dflash import DFlashDrafter
from planner.runtime.drafters.draft_model import DraftModelDrafter
from planner.runtime.drafters.eagle3 import EagleDrafter
from planner.runtime.drafters.ngram import NgramDrafter
from planner.runtime.drafters.none import NoDrafter
from planner.runtime.drafters.protocol import Drafter
from planner.runtime.drafters.self_sparse import SelfSparseDrafter
from planner.runtime.eagle_head import EagleHead
from planner.runtime.model import Transformer
from planner.specs import LOADED, DraftConfig, DrafterSpec


def make_drafter(config: DraftConfig, model: Transformer, *, batch: int = 1) -> Drafter:
    """The drafter of a configuration, for `batch` streams of this target."""
    match config.drafter.kind:
        case "none":
            return NoDrafter(model.spec.vocab_size, model.device)
        case "ngram":
            return NgramDrafter(model.spec.vocab_size, model.device)
        case "self_sparse":
            drafter = drafting_model(config.drafter, model)
            return SelfSparseDrafter(
                drafter, config.kv, draft_len=config.draft_len, batch=batch, weights_bytes=model.extra_nbytes(drafter), tree=config.tree
            )
        case "eagle3":
            head = drafting_model(config.drafter, model)
            return EagleDrafter(head, draft_len=config.draft_len, weights_bytes=model.extra_nbytes(head), tree=config.tree)
        case "dflash":
            head = drafting_model(config.drafter, model)
            return DFlashDrafter(
                head, config.kv, draft_len=config.draft_len, batch=batch, weights_bytes=model.extra_nbytes(head), tree=config.tree
            )  # fmt: skip
        case "draft_model":
            own, size = drafting_model(config.drafter, model), model.spec.vocab_size
            return DraftModelDrafter(
                own, config.kv, size, draft_len=config.draft_len, batch=batch, weights_bytes=model.extra_nbytes(own), tree=config.tree
            )  # fmt: skip


def drafting_model(drafter: DrafterSpec, model: Transformer) -> Transformer | EagleHead | DFlashHead:
    """The model that a drafter runs: the one loaded beside the target, or the target, or a cheaper copy of either.

    BadInput for a vocabulary that cannot be.
    """
    key, variant = (drafter.path, drafter.dtype), (drafter.weights, drafter.vocab)
    if (*key, *variant) in model.beside:
        return model.beside[*key, *variant]
    own = model.beside[key] if drafter.kind in LOADED else model
    if variant == ("full", None):
        return own
    return own.cheaper(drafter.weights, None if drafter.vocab is None else frequent_tokens(own, drafter.vocab))


def frequent_tokens(model: Transformer | DFlashHead, count: int) -> tuple[int, ...]:
    """`count` ids in ascending order: the special tokens and, for the rest, the smallest ids.

    A byte-level BPE vocabulary numbers its tokens in the order they were merged, so small ids are frequent ones.
    """
    size, special = model.spec.vocab_size, sorted(token for token in model.special_tokens if token < model.spec.vocab_size)
    if not len(special) < count < size:
        raise BadInput(f"a reduced vocabulary holds more than the {len(special)} special tokens and fewer than all {size}, got {count}")
    kept = set(special)
    others = (token for token in range(size) if token not in kept)
    return tuple(sorted([*special, *(token for token, _ in zip(others, range(count - len(special))))]))
