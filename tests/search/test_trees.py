"""Plans that weigh trees: beside chains, of fixed sizes and adaptive, each by what texts and timed rounds say."""

import msgspec
import numpy as np
import pytest
from made import FIFTH, GREEDY, NGRAM, SELF_SPARSE, budgets, linear_round_s, made_profile
from made_trees import stepped_s, with_trees

from planner.cost.adaptive_tree import adaptive_tree
from planner.cost.tree_rounds import nodes_of, walk_trees
from planner.errors import BadInput
from planner.plans import Plan
from planner.search.objective import fit_models, predict
from planner.search.optimize import LEAST_ADAPTIVE, candidates, make_plan, tree_candidates
from planner.specs import AdaptiveTree, DraftConfig, FixedTree, FullKV, SparseKV, Workload, describe

WORKLOAD = Workload(context_len=1024, output_len=129, sampler=GREEDY)
CHAIN = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=64), draft_len=4)
SIZES = (1, 4, 16, 64)


def mixed(text: int) -> float:
    """Easy texts and hard ones."""
    return 0.9 if text % 2 else 0.35


def profile(**changes):
    drafters = [*budgets(64), (NGRAM, FullKV())]
    made = made_profile(
        drafters=drafters,
        accept=lambda kv, *_: FIFTH * (4 if kv == CHAIN.kv else 1),
        output_len=129,
        texts_per_cell=8,
        contexts=(1024,),
        draft_lens=(1, 2, 4),
    )
    return with_trees(made, **({"true": mixed, "reported": 0.6, "levels": (2, 4), "sizes": SIZES} | changes))


@pytest.fixture(scope="module")
def models():
    return fit_models(profile())


@pytest.fixture(scope="module")
def plan():
    return planned(profile())


def planned(made, **asked) -> Plan:
    return make_plan(made, "0" * 64, WORKLOAD, **({"objective": "tpot", "memory_cap_bytes": None} | asked))


def with_tree(tree, draft_len=4) -> DraftConfig:
    return msgspec.structs.replace(CHAIN, draft_len=draft_len, tree=tree)


def test_every_size_that_was_timed_and_adaptive_trees_up_to_it_are_candidates_of_each_number_of_levels(models):
    found, unanswered = tree_candidates(models, WORKLOAD)
    assert not unanswered
    for draft_len in (2, 4):
        own = [config.tree for config in found if config.draft_len == draft_len]
        assert [tree.size for tree in own if isinstance(tree, FixedTree)] == list(SIZES)
        assert [tree.max_size for tree in own if isinstance(tree, AdaptiveTree)] == [size for size in SIZES if size >= LEAST_ADAPTIVE]
    assert {config.drafter for config in found} == {SELF_SPARSE}  # n-grams have no probabilities
    assert all(config.tree is None for config in candidates(models))


@pytest.mark.parametrize("size", SIZES)
def test_time_per_token_is_that_of_the_rounds_along_the_texts(models, size):
    config = with_tree(FixedTree(size=size))
    found = predict(models, config, WORKLOAD).estimate
    texts = [text for _, text in models.acceptance.tree_texts(config, WORKLOAD)]
    rounds = np.mean([walk_trees(text, nodes_of(config.tree, text)).by_nodes.sum() for text in texts])
    assert found.tokens_per_round.value == pytest.approx(128 / rounds)
    assert found.tpot_s.value == pytest.approx(rounds / 128 * sum(stepped_s(size, 4, 1088)), rel=0.02)  # the last rounds verify less
    assert found.num_texts == 8
    assert found.joules_per_token is None  # none was counted with a tree


def test_the_adaptive_tree_beats_every_fixed_one_where_rounds_differ(models):
    """On what was replayed, not by what its own calibration promises."""
    adaptive = with_tree(adaptive_tree(models.acceptance, models.latency, with_tree(FixedTree(size=64)), WORKLOAD))
    times = {size: predict(models, with_tree(FixedTree(size=size)), WORKLOAD).estimate.tpot_s.value for size in SIZES}
    assert predict(models, adaptive, WORKLOAD).estimate.tpot_s.value <= 1.01 * min(times.values())


def test_the_rate_it_is_told_is_about_the_rate_it_gets(models):
    adaptive = with_tree(adaptive_tree(models.acceptance, models.latency, with_tree(FixedTree(size=64)), WORKLOAD))
    found = predict(models, adaptive, WORKLOAD).estimate
    assert adaptive.tree.costs.rate == pytest.approx(1 / found.tpot_s.value, rel=0.05)


def test_an_overconfident_drafter_is_told_what_its_probabilities_are_worth():
    models = fit_models(profile(true=0.3, reported=0.8))
    costs = adaptive_tree(models.acceptance, models.latency, with_tree(FixedTree(size=64)), WORKLOAD).costs
    assert np.interp(0.8, costs.calibration.reported, costs.calibration.observed) == pytest.approx(0.3, abs=0.05)
    by_round = adaptive_tree(models.acceptance, models.latency, with_tree(FixedTree(size=64)), WORKLOAD, by_round=True).costs
    assert by_round.rate is None and by_round.calibration is not None


def test_a_plan_takes_a_tree_where_nodes_are_cheap_and_says_what_to_run(plan):
    assert plan.chosen.tree is not None
    assert plan.speedup.low > 1
    kinds = {type(config.tree) for config in [plan.chosen, *(estimate.config for estimate in plan.runners_up)]}
    assert kinds == {type(None), FixedTree, AdaptiveTree}  # so that a check compares the best of each
    assert [e.tpot_s.value for e in plan.runners_up] == sorted(e.tpot_s.value for e in plan.runners_up)
    assert "--tree-size" in plan.command


def test_a_plan_stays_with_chains_where_nodes_are_dear():
    def dear(nodes, levels, context_len):
        draft_s, verify_s, commit_s = linear_round_s(SparseKV(budget=64), levels, context_len)
        return draft_s, verify_s + 0.01 * nodes, commit_s

    chosen = planned(profile(tree_s=dear)).chosen
    assert chosen.tree is None, describe(chosen)


def test_a_plan_with_an_adaptive_tree_comes_back_from_json_with_its_costs(plan):
    again = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert again == plan
    assert any(isinstance(config.tree, AdaptiveTree) for config in [again.chosen, *(e.config for e in again.runners_up)])


def test_nodes_take_room_in_the_cache_and_among_the_logits(models):
    small, large = (predict(models, with_tree(FixedTree(size=size)), WORKLOAD).estimate.memory_bytes.value for size in (16, 64))
    spec = models.profile.target
    assert large - small == 48 * (spec.kv_bytes_per_token("float32") + 4 * spec.vocab_size)


def test_what_the_profile_does_not_know_of_trees_is_refused_in_a_sentence(models):
    with pytest.raises(BadInput, match="trees of this drafter of 2 and 4 levels"):
        predict(models, with_tree(FixedTree(size=16), draft_len=3), WORKLOAD)
    with pytest.raises(BadInput, match="got one of 100; profile with --tree-sizes 100|trees of up to 64 nodes"):
        predict(models, with_tree(FixedTree(size=100)), WORKLOAD)
