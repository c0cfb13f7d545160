"""Drafters by kind."""

from planner.runtime.drafters.ngram import NgramDrafter
from planner.runtime.drafters.none import NoDrafter
from planner.runtime.drafters.protocol import Drafter
from planner.runtime.drafters.self_sparse import SelfSparseDrafter
from planner.runtime.model import Transformer
from planner.specs import DraftConfig


def make_drafter(config: DraftConfig, model: Transformer, *, batch: int = 1) -> Drafter:
    """The drafter of a configuration, for `batch` streams of this target."""
    match config.drafter.kind:
        case "none":
            return NoDrafter(model.spec.vocab_size, model.device)
        case "ngram":
            return NgramDrafter(model.spec.vocab_size, model.device)
        case "self_sparse":
            return SelfSparseDrafter(model, config.kv, draft_len=config.draft_len, batch=batch)
