"""Drafters by kind."""

from planner.errors import BadInput
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
        case "draft_model":
            own = drafting_model(config.drafter, model)
            return DraftModelDrafter(own, config.kv, model.spec.vocab_size, draft_len=config.draft_len, batch=batch, tree=config.tree)


def drafting_model(drafter: DrafterSpec, model: Transformer) -> Transformer | EagleHead:
    """The model that a drafter runs: the one loaded beside the target, or the target or a cheaper copy of it.

    BadInput for a vocabulary that cannot be.
    """
    if drafter.kind in LOADED:
        own = model.beside[drafter.path, drafter.dtype]
        return own if drafter.weights == "full" else own.cheaper(drafter.weights)
    if drafter.vocab is None:
        return model.cheaper(drafter.weights)
    return model.cheaper(drafter.weights, frequent_tokens(model, drafter.vocab))


def frequent_tokens(model: Transformer, count: int) -> tuple[int, ...]:
    """`count` ids in ascending order: the special tokens and, for the rest, the smallest ids.

    A byte-level BPE vocabulary numbers its tokens in the order they were merged, so small ids are frequent ones.
    """
    size, special = model.spec.vocab_size, sorted(token for token in model.special_tokens if token < model.spec.vocab_size)
    if not len(special) < count < size:
        raise BadInput(f"a reduced vocabulary holds more than the {len(special)} special tokens and fewer than all {size}, got {count}")
    kept = set(special)
    others = (token for token in range(size) if token not in kept)
    return tuple(sorted([*special, *(token for token, _ in zip(others, range(count - len(special))))]))
