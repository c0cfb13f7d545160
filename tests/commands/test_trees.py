"""Flags of trees: to configurations, to cells of a profile, and to commands that give the same tree again."""

import json

import msgspec
import pytest
from made import GREEDY, made_profile
from made_trees import with_trees

import planner
from planner.commands.configs import make_config
from planner.commands.flags import Asked, AskedExport
from planner.commands.profile_settings import Settings, latency_cells
from planner.commands.trees import make_tree_config, parse_sizes, read_adaptive, tree_grid
from planner.errors import BadInput
from planner.measurements import save_profile
from planner.plans import save_plan
from planner.specs import AdaptiveTree, DraftConfig, DrafterSpec, FixedTree, FullKV, SparseKV

SPARSE = Asked(drafter="self_sparse", draft_len=4, kv_budget=64)
NGRAM, SELF_SPARSE = DrafterSpec(kind="ngram"), DrafterSpec(kind="self_sparse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile, and a plan of it that chose an adaptive tree."""
    folder = tmp_path_factory.mktemp("trees")
    profile = with_trees(made_profile(output_len=65, texts_per_cell=8, contexts=(1024,)), true=lambda text: 0.9 if text % 2 else 0.3)
    save_profile(profile, folder / "profile.json")
    plan = planner.plan(folder / "profile.json", objective="tpot")
    adaptive = next(e for e in [plan.estimate, *plan.runners_up] if isinstance(e.config.tree, AdaptiveTree))
    fixed = next(e for e in [plan.estimate, *plan.runners_up] if isinstance(e.config.tree, FixedTree))
    for name, estimate in (("adaptive", adaptive), ("fixed", fixed)):
        save_plan(msgspec.structs.replace(plan, chosen=estimate.config, estimate=estimate), folder / f"{name}.json")
    return folder


def test_a_tree_size_makes_the_chain_a_tree():
    assert make_tree_config(SPARSE).tree is None
    assert make_tree_config(SPARSE._replace(tree_size="16")) == msgspec.structs.replace(make_config(SPARSE), tree=FixedTree(size=16))


def test_an_adaptive_tree_has_the_costs_of_the_plan_that_chose_it(folder):
    config = make_tree_config(SPARSE._replace(tree_size="adaptive", tree_costs=str(folder / "adaptive.json")))
    assert config.tree == read_adaptive(folder / "adaptive.json")
    assert config.tree.costs.rate > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree_size": "many"}, "--tree-size takes a number of nodes, adaptive or adaptive-by-round, got 'many'"),
        ({"tree_size": "0"}, "takes a number of nodes, .* got '0'"),
        ({"tree_size": "99999"}, "1024"),
        ({"tree_size": "adaptive"}, "needs the costs that a plan carries, got none; give --tree-costs PLAN.json"),
        ({"tree_size": "8", "tree_costs": "plan.json"}, "--tree-costs goes with --tree-size adaptive, got --tree-size 8"),
        ({"tree_costs": "plan.json"}, "--tree-costs goes with --tree-size adaptive, got --tree-size None"),
        ({"drafter": "ngram", "kv_budget": None, "tree_size": "8"}, "a tree is made of a drafter's probabilities, ngram has none"),
        ({"drafter": "none", "draft_len": 0, "kv_budget": None, "tree_size": "8"}, "none has none"),
    ],
    ids=str,
)
def test_flags_that_make_no_tree_are_refused_with_a_remedy(changes, message):
    with pytest.raises(BadInput, match=message):
        make_tree_config(SPARSE._replace(**changes))


def test_costs_of_a_plan_that_chose_another_are_refused(folder):
    with pytest.raises(BadInput, match="takes a plan whose choice is an adaptive tree, .* chose another"):
        read_adaptive(folder / "fixed.json")


@pytest.mark.parametrize("text", ["0", "8,256", "8,-1", "eight"])
def test_sizes_that_cannot_be_stored_are_refused(text):
    with pytest.raises(BadInput, match="--tree-sizes"):
        parse_sizes(text)


def test_a_grid_has_trees_of_the_drafters_that_can():
    chains = [DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=64), draft_len=4), DraftConfig(drafter=NGRAM, draft_len=4)]
    assert [(config.drafter, config.tree.size) for config in tree_grid(chains, parse_sizes("16,8"))] == [(SELF_SPARSE, 8), (SELF_SPARSE, 16)]
    assert tree_grid(chains, []) == []
    with pytest.raises(BadInput, match="got --tree-sizes without a drafter that has some"):
        tree_grid(chains[1:], [8])


def test_trees_are_timed_with_the_smallest_cache_at_most_levels_and_small_ones_come_along():
    settings = Settings(
        contexts=[512], samplers=[GREEDY], policies=[SparseKV(budget=256), SparseKV(budget=64)], drafters=[SELF_SPARSE, NGRAM], max_draft_len=8,
        tree_sizes=[8, 32], tree_levels=[2, 4], batches=[1, 4],
    )  # fmt: skip
    cells = [config for config in latency_cells(settings) if config.tree]
    assert [config.tree.size for config in cells] == [1, 2, 4, 8, 32]
    assert {(config.drafter, config.kv, config.draft_len) for config in cells} == {(SELF_SPARSE, SparseKV(budget=64), 4)}
    assert [config.tree.size for config in latency_cells(settings, batch=4) if config.tree] == [8, 32]
    assert not any(config.tree for config in latency_cells(settings._replace(tree_sizes=[], tree_levels=None)))


# ------------------------------------------------------------------ estimates and exports


@pytest.mark.parametrize("size", ["16", "adaptive", "adaptive-by-round"])
def test_an_estimate_takes_a_tree_as_a_plan_does(folder, size):
    found, baseline = planner.estimate(folder / "profile.json", SPARSE._replace(tree_size=size))
    assert found.config.tree.max_size == (16 if size == "16" else 64)
    assert found.tpot_s.value < baseline.tpot_s.value


def test_the_own_runtime_is_told_the_tree_and_gets_its_costs_in_a_file(folder, tmp_path):
    planner.export(folder / "adaptive.json", "planner", tmp_path / "own", AskedExport())
    assert read_adaptive(tmp_path / "own" / "plan.tree.json") == read_adaptive(folder / "adaptive.json")
    run = (tmp_path / "own" / "run").read_text()
    assert '--tree-size adaptive --tree-costs "$(dirname -- "$0")/plan.tree.json"' in run
    planner.export(folder / "fixed.json", "planner", tmp_path / "fixed", AskedExport())
    assert "--tree-size" in (tmp_path / "fixed" / "run").read_text()
    assert not (tmp_path / "fixed" / "plan.tree.json").exists()


@pytest.mark.parametrize(("engine", "reason"), [("vllm", "42121"), ("sglang", "EAGLE heads"), ("tensorrt-llm", "EAGLE heads")])
def test_an_engine_that_cannot_be_told_the_tree_drops_it_aloud(folder, tmp_path, engine, reason):
    """Of an EAGLE-3 head, which these engines load; the plan's own drafter they do not know at all."""
    head = DraftConfig(drafter=DrafterSpec(kind="eagle3", path="org/head"), kv=FullKV(), draft_len=4, tree=FixedTree(size=16))
    content = json.loads((folder / "fixed.json").read_bytes())
    content["chosen"] = msgspec.to_builtins(head)
    content["model"] = "org/target"
    (tmp_path / "plan.json").write_text(json.dumps(content))
    found = planner.export(tmp_path / "plan.json", engine, tmp_path / "out", AskedExport())
    (tree,) = [knob for knob in found.knobs if knob.knob == "tree"]
    assert (tree.fidelity, tree.planned, tree.exported) == ("dropped", "tree 16", "a chain of 4")
    assert reason in tree.reason
