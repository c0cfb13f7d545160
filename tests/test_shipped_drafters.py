"""The drafters that come with the package, on the model they were trained for: lossless, better than chance would have it, small."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from llama import gguf_file

from planner.commands.generate import generate
from planner.specs import PLAIN, DraftConfig, DrafterSpec, FixedTree, FullKV, Sampler, SparseKV
from planner.trained import FOLDERS, NAMES, SUFFIX, checkpoint_path, own_layers_path

SPECS = [DrafterSpec(kind="draft_model", path=NAMES[0]), DrafterSpec(kind="dflash", path=FOLDERS[0])]
CHEAPER = [DrafterSpec(kind=spec.kind, path=spec.path, weights="int8", vocab=16384) for spec in SPECS]
TEXT = (
    "The lighthouse stood at the end of the long pier, and every evening the keeper climbed its stairs with a lamp and a book. "
    "The children of the village said that he read aloud to the ships. One winter the storms were so heavy that nobody could walk "
    "out to him for a week. When the wind fell at last, the baker and her two sons went to see whether he was well. They found him "
) * 2
FLOOR = {"draft_model": 0.1, "dflash": 0.03}  # of the drafts; of an untrained cut of the target about none is accepted


def written(config: DraftConfig, temperature: float = 0.0) -> tuple[list[int], float]:
    """The tokens, and the share of drafts that were accepted."""
    pieces = list(
        generate("smollm2", TEXT, config=config, sampler=Sampler(temperature=temperature), max_new_tokens=40, dtype="float32", device="cpu")
    )
    drafted = sum(piece.drafted for piece in pieces)
    return [token for piece in pieces for token in piece.tokens], sum(piece.accepted for piece in pieces) / max(1, drafted)


@pytest.fixture(scope="module")
def plain() -> list[int]:
    gguf_file()  # skips where the model is not installed
    return written(PLAIN)[0]


@pytest.mark.model
@pytest.mark.parametrize("spec", [*SPECS, *CHEAPER], ids=lambda spec: f"{spec.kind} {spec.weights}")
@pytest.mark.parametrize(
    ("kv", "tree"), [(FullKV(), FixedTree(size=12)), (SparseKV(budget=64, storage="evict"), None)], ids=["full, tree", "64, chain"]
)
def test_what_is_written_is_what_the_target_writes_alone(spec, kv, tree, plain):
    tokens, accepted = written(DraftConfig(drafter=spec, kv=kv, draft_len=3, tree=tree))
    assert tokens == plain and len(plain) == 40
    assert accepted > FLOOR[spec.kind] / (1 if tree is None else 4), accepted


def test_each_is_small_and_has_a_card_that_says_what_it_was_trained_on():
    own, head = own_layers_path(NAMES[0]), checkpoint_path(FOLDERS[0])
    for path, card in ((own, own.with_suffix(".md")), (head / f"model{SUFFIX}", head / "README.md")):
        assert path.stat().st_size <= 30e6
        text = Path(card).read_text().lower()
        assert all(words in text for words in ("trained on", "steps", "positions", "acceptance", "apache-2.0")) and "@" not in text, card
