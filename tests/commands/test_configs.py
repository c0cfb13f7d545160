"""Flags become one configuration, with what was profiled where they leave something open."""

import pytest

from planner.commands.configs import drafter_specs, make_config, policies
from planner.commands.flags import Asked, AskedGrid
from planner.errors import BadInput
from planner.specs import DrafterSpec, FullKV

HEAD, SMALL = DrafterSpec(kind="eagle3", path="head"), DrafterSpec(kind="draft_model", path="folders/small", weights="int8")
PROFILED = [(HEAD, FullKV()), (SMALL, FullKV())]


@pytest.mark.parametrize("drafter", [HEAD, SMALL])
def test_the_only_checkpoint_of_a_profile_goes_without_saying(drafter):
    assert make_config(Asked(drafter=drafter.kind, draft_len=2), PROFILED).drafter == drafter


@pytest.mark.parametrize("path", ["folders/small/", "./folders/small", "folders//small"])
def test_a_folder_is_the_same_however_it_is_spelled(path):
    assert make_config(Asked(drafter="draft_model", draft_model=path, draft_len=2), PROFILED).drafter == SMALL
    (spec,) = drafter_specs(AskedGrid(drafters="", draft_model=[path, "folders/small"], drafter_weights="int8"), "full")
    assert spec == SMALL


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"drafter": "eagle3"}, "drafter eagle3 has a checkpoint of its own, got none; give --draft-model PATH"),
        ({"drafter": "none", "draft_model": "small"}, "goes with --drafter draft_model, eagle3 or dflash, got drafter none with small"),
        (
            {"drafter": "eagle3", "draft_model": "head", "kv_budget": 64},
            "--kv-budget goes with drafter self_sparse, draft_model or dflash, got drafter eagle3; drop",
        ),
        ({"drafter": "draft_model", "draft_model": "small", "recent": 64}, "--recent goes with a kv budget, got none; give --kv-budget or drop it"),
        ({"drafter": "ngram"}, "got 0 with ngram; set --draft-len"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_refused_with_a_remedy(asked, match):
    with pytest.raises(BadInput, match=match):
        make_config(Asked(**({"draft_len": 0 if asked["drafter"] in ("none", "ngram") else 2} | asked)))


def test_a_grid_has_every_weights_and_head_size_of_the_drafters_that_may_have_them(tmp_path):
    for name, architecture in (("head", "LlamaForCausalLMEagle3"), ("block", "DFlashDraftModel")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    head, block = str(tmp_path / "head"), str(tmp_path / "block")
    asked = AskedGrid(draft_model=["small", head, block], drafter_weights="full,int8", drafter_vocabs="all,4096")
    found = drafter_specs(asked, "full")
    variants = [{"weights": weights, "vocab": vocab} for weights in ("full", "int8") for vocab in (None, 4096)]
    of = {kind: [spec for spec in found if spec.kind == kind] for kind in ("self_sparse", "ngram", "draft_model", "eagle3", "dflash")}
    for kind, path in (("self_sparse", None), ("draft_model", "small"), ("dflash", block)):
        assert of[kind] == [DrafterSpec(kind=kind, path=path, **variant) for variant in variants]
    assert of["ngram"] == [DrafterSpec(kind="ngram")] and of["eagle3"] == [DrafterSpec(kind="eagle3", path=head)]
    few = Asked(drafter="dflash", draft_model=block, drafter_vocab="4096", draft_len=2)
    assert make_config(few).drafter == DrafterSpec(kind="dflash", path=block, vocab=4096)
    int8 = [(spec, FullKV()) for spec in of["dflash"] if spec.weights == "int8"]
    assert make_config(few, int8).drafter == int8[1][0] and make_config(few._replace(drafter_vocab="all"), int8).drafter == int8[0][0]
    with pytest.raises(BadInput, match="int8; dflash block int8 vocab 4096.*choose one with .* and --drafter-vocab"):
        make_config(few._replace(drafter_vocab=None), int8)
    with pytest.raises(BadInput, match="--drafter-vocab takes one number of tokens, or all, got '1,2'"):
        make_config(few._replace(drafter_vocab="1,2"))


def test_flags_of_draft_models_are_refused_in_a_grid_without_one():
    with pytest.raises(BadInput, match="--kv-storage evict .* give --draft-model or drop it"):
        policies(AskedGrid(storage="evict"))
    with pytest.raises(BadInput, match="--draft-dtype goes with a draft model, got float32 without one"):
        drafter_specs(AskedGrid(draft_dtype="float32"), "full")
    policies(AskedGrid(storage="evict", draft_model=["small"]))
