"""Rounds with trees: the times that were measured come back, and what lies between them is interpolated."""

import numpy as np
import pytest
from made import DRAFT_MODEL, SELF_SPARSE, budgets, linear_round_s, made_profile
from made_trees import stepped_s, tree_of, with_trees
from msgspec.structs import replace

from planner.cost.latency import fit_latency
from planner.errors import BadInput
from planner.specs import AdaptiveTree, DraftConfig, FixedTree, FullKV, SparseKV, TreeCosts

KV = SparseKV(budget=64)
SIZES = (1, 4, 16, 64)


def tree(size: int, draft_len: int = 4, budget: int = 64) -> DraftConfig:
    return tree_of(SELF_SPARSE, SparseKV(budget=budget), draft_len, FixedTree(size=size))


@pytest.fixture(scope="module")
def latency():
    return fit_latency(with_trees(made_profile(contexts=(1024, 4096), draft_lens=(1, 2, 4)), sizes=SIZES))


@pytest.mark.parametrize("context_len", [1024, 4096])
@pytest.mark.parametrize("size", SIZES)
def test_a_round_that_was_timed_takes_as_long(latency, size, context_len):
    found = latency.round_s(tree(size), context_len, context_len + 7.5)  # the middle of the timed rounds
    assert found.shape[1] == size + 1
    np.testing.assert_allclose(found[:, size], sum(stepped_s(size, 4, context_len)), rtol=1e-6)  # whatever cell of the chains is left out


def test_sizes_and_contexts_between_are_linear(latency):
    found = latency.round_s(tree(64), 2560, 2567.5)[0]
    np.testing.assert_allclose(found[40], (found[16] + found[64]) / 2)
    ends = [latency.round_s(tree(64), c, c + 7.5)[0, 64] for c in (1024, 4096)]
    assert found[64] == pytest.approx(np.mean(ends), rel=1e-3)


def test_fewer_levels_and_other_caches_change_what_drafting_takes_as_for_chains(latency):
    for other in (tree(16, draft_len=2), tree(16, budget=256)):
        drafts = [linear_round_s(config.kv, config.draft_len, 1024)[0] for config in (tree(16), other)]
        moved = latency.round_s(other, 1024, 1031.5)[0, 16] - latency.round_s(tree(16), 1024, 1031.5)[0, 16]
        assert moved == pytest.approx(drafts[1] - drafts[0], rel=0.02)


def test_no_node_costs_a_pass_over_one_token_behind_the_draft(latency):
    found = latency.round_s(tree(64), 1024, 1031.5)[0, 0]
    draft_s, _, _ = stepped_s(1, 4, 1024)
    plain = linear_round_s(FullKV(), 0, 1031.5)
    assert found == pytest.approx(draft_s + plain[1] + plain[2], rel=0.02)


def test_the_costs_of_an_adaptive_tree_sum_up_to_its_rounds_and_never_fall(latency):
    table = TreeCosts(draft_s=0.0, verify_s=(0.01,) * 65)
    config = tree_of(SELF_SPARSE, KV, 4, AdaptiveTree(costs=table))
    draft_s, verify_s = latency.tree_costs(config, 1024, 1031.5)
    np.testing.assert_allclose(draft_s + verify_s, latency.round_s(config, 1024, 1031.5)[0], rtol=1e-6)
    assert (np.diff(verify_s) >= 0).all()
    assert verify_s[17] - verify_s[16] < 1e-3 < verify_s[64] - verify_s[16]  # a step that was timed at its ends only


def test_a_pass_that_was_timed_faster_with_more_nodes_is_not_believed():
    def falling(nodes, levels, context_len):
        return 0.0, 0.010 + 0.002 * (nodes == 16), 0.0

    latency = fit_latency(with_trees(made_profile(), sizes=SIZES, tree_s=falling))
    _, verify_s = latency.tree_costs(tree(64), 1024, 1031.5)
    assert verify_s[64] == verify_s[16]


def test_trees_do_not_change_what_is_known_of_chains():
    profile = made_profile(draft_lens=(1, 2, 4), noise=0.03)
    plain, both = fit_latency(profile), fit_latency(with_trees(profile))
    config = DraftConfig(drafter=SELF_SPARSE, kv=KV, draft_len=4)
    np.testing.assert_allclose(both.round_s(config, 1024, 1040), plain.round_s(config, 1024, 1040), rtol=0.05)  # the pace is of all cells
    assert both.round_s(config, 1024, 1040).shape == plain.round_s(config, 1024, 1040).shape
    assert both.max_draft_len == plain.max_draft_len


def test_a_batch_between_two_is_linear_in_it():
    profile = with_trees(made_profile(batches={1: linear_round_s, 3: linear_round_s}))
    slow = [replace(r, verify_s=[2 * s for s in r.verify_s]) if r.tree_size and r.batch == 3 else r for r in profile.rounds]
    latency = fit_latency(replace(profile, rounds=slow))
    one, two, three = (latency.round_s(tree(16), 1024, 1031.5, batch)[0, 16] for batch in (1, 2, 3))
    assert two == pytest.approx((one + three) / 2)
    assert three > 1.3 * one
    assert latency.tree_sizes(SELF_SPARSE, 2) == list(SIZES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tree(65), "timed with trees of up to 64 nodes, got self_sparse window 64 K=4 tree 65; profile with --tree-sizes"),
        (tree_of(DRAFT_MODEL, FullKV(), 4, FixedTree(size=4)), "timed no round of draft_model"),
    ],
)
def test_what_was_not_timed_is_refused(latency, config, message):
    with pytest.raises(BadInput, match=message):
        latency.round_s(config, 1024, 1040)


def test_a_profile_without_trees_says_so():
    latency = fit_latency(made_profile(drafters=budgets(64)))
    assert latency.tree_sizes(SELF_SPARSE) == []
    with pytest.raises(BadInput, match="the profile timed no trees of drafter self_sparse, got .*profile with --tree-sizes"):
        latency.round_s(tree(4), 1024, 1040)
