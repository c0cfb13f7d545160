"""Rounds of trees along a text: followed token by token, and in the model of acceptance beside those of chains."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import GREEDY, SELF_SPARSE, budgets, made_profile
from made_trees import made_sample, tree_of, with_trees

from planner.cost.acceptance import fit_acceptance
from planner.cost.tree_rounds import TreeText, nodes_of, tree_text, walk_trees
from planner.draft_trees import choose_size
from planner.errors import BadInput
from planner.measurements import TreeSample
from planner.specs import AdaptiveTree, FixedTree, SparseKV, TreeCosts, Workload

seeded = settings(derandomize=True, deadline=None, max_examples=60)
KV = SparseKV(budget=64)
COSTS = TreeCosts(draft_s=0.004, verify_s=tuple(0.010 + 2e-4 * n for n in range(17)), rate=150.0)


def made_text(seed: int, starts: int, levels: int = 3, max_size: int = 16) -> TreeSample:
    ranks = np.random.default_rng(seed).geometric(0.6, (starts + levels, levels)) - 1
    like = type("Like", (), {"text": 0, "drafter": SELF_SPARSE, "kv": KV})
    return made_sample(like, starts, levels, max_size, 0.7, ranks)


@seeded
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 16))
def test_rounds_begin_where_the_last_one_ended(seed, starts, size):
    text = tree_text(made_text(seed, starts), 1000)
    walk = walk_trees(text, np.full(starts, size))
    at, begun = 0, []
    while at < starts:
        begun.append(at)
        at += 1 + sum(0 < smallest <= size for smallest in text.sizes[at])
    assert at == starts  # decoding never writes beyond the end: rounds near it have fewer levels
    assert np.flatnonzero(walk.starts).tolist() == begun
    assert walk.by_nodes.sum() == walk.by_nodes[size] == len(begun)


@seeded
@given(st.integers(0, 2**32 - 1))
def test_larger_trees_never_need_more_tokens_of_the_target_from_any_start(seed):
    text = tree_text(made_text(seed, 30), 1000)
    written = [((text.sizes > 0) & (text.sizes <= size)).sum(1) for size in range(17)]
    assert (np.diff(written, axis=0) >= 0).all()
    assert (text.member.sum(1) == written[16]).all()  # the text goes through one node of each level that it reaches


@seeded
@given(st.integers(0, 2**32 - 1))
def test_an_adaptive_tree_is_sized_from_what_is_stored_as_it_is_while_decoding(seed):
    text = tree_text(made_text(seed, 30), 1000)
    nodes = nodes_of(AdaptiveTree(costs=COSTS), text)
    there = (text.probs > 0).sum(1)
    assert nodes.tolist() == [choose_size(row[:n], COSTS) for row, n in zip(text.probs, there, strict=True)]
    assert (nodes_of(FixedTree(size=5), text) == np.minimum(5, there)).all()


def test_probabilities_come_back_from_storage_within_four_percent_and_no_node_stays_none():
    probs = np.array([[1.0, 0.5, 1e-3, 3e-5, 0.0], [0.0] * 5])
    back = TreeSample.of(text=0, drafter=SELF_SPARSE, kv=KV, sizes=np.zeros((2, 2)), probs=probs).node_probs()
    np.testing.assert_allclose(back, probs, rtol=0.04)
    assert (back == 0).tolist() == (probs == 0).tolist()


@pytest.mark.parametrize(("sizes", "probs"), [((3, 2), (4, 8)), ((3, 2), (3, 256))])
def test_a_sample_that_contradicts_itself_is_refused(sizes, probs):
    with pytest.raises(ValueError, match="as many starts as probs|1 to 255 nodes"):
        TreeSample.of(text=0, drafter=SELF_SPARSE, kv=KV, sizes=np.zeros(sizes), probs=np.ones(probs))


# ------------------------------------------------------------------ the model

WORKLOAD = Workload(context_len=1024, output_len=33, sampler=GREEDY)


@pytest.fixture(scope="module")
def model():
    return fit_acceptance(with_trees(made_profile(drafters=budgets(64, 256), contexts=(1024, 4096)), levels=(2, 4)))


def rounds(model, workload=WORKLOAD, *, draft_len=4, size=16, budget=64):
    strata, notes = model.strata(tree_of(SELF_SPARSE, SparseKV(budget=budget), draft_len, FixedTree(size=size)), workload)
    return strata, notes


def test_rounds_of_a_tree_are_those_of_its_texts(model):
    ((weight, context_len, found),), _ = rounds(model)
    assert (weight, context_len) == (1.0, 1024)
    texts = [text for _, text in model.tree_texts(tree_of(SELF_SPARSE, SparseKV(budget=64), 4, FixedTree(size=16)), WORKLOAD)]
    for row, text in zip(found.by_drafted, texts, strict=True):
        np.testing.assert_allclose(row, walk_trees(text, nodes_of(FixedTree(size=16), text)).by_nodes[:17] / 32)
    assert not found.chance.any()


def test_budgets_and_contexts_are_interpolated_as_those_of_chains(model):
    (low,), _ = rounds(model)
    (high,), _ = rounds(model, budget=256)
    (between,), notes = rounds(model, budget=128)
    np.testing.assert_allclose(between.rounds.by_drafted, (low.rounds.by_drafted + high.rounds.by_drafted) / 2)
    assert "acceptance at kv budget 128 is interpolated between 64 and 256" in notes
    strata, _ = rounds(model, Workload(context_len=2560, output_len=33, sampler=GREEDY))
    assert [(stratum.weight, stratum.context_len) for stratum in strata] == [(0.5, 1024), (0.5, 4096)]


def test_a_shorter_output_is_the_beginning_of_the_text(model):
    (stratum,), _ = rounds(model, Workload(context_len=1024, output_len=17, sampler=GREEDY))
    assert 0.2 <= stratum.rounds.by_drafted.sum(1).min() <= 1.0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"draft_len": 3}, "trees of this drafter of 2 and 4 levels, got self_sparse window 64 K=3 tree 16 .*profile with --tree-sizes"),
        ({"size": 65}, "trees were replayed up to 64 nodes, got one of 65; profile with --tree-sizes 65"),
        ({"budget": 512}, "the profile covers kv budgets 64, 256, got 512"),
    ],
)
def test_what_was_not_replayed_is_refused(model, asked, message):
    with pytest.raises(BadInput, match=message):
        rounds(model, **asked)


def test_a_profile_without_trees_says_so():
    with pytest.raises(BadInput, match="the profile holds no trees of this drafter, got .*profile with --tree-sizes"):
        rounds(fit_acceptance(made_profile()))


def test_a_tree_text_is_not_changed_by_being_cut():
    sample = made_text(1, 20)
    whole, cut = tree_text(sample, 1000), tree_text(sample, 11)
    assert isinstance(cut, TreeText)
    np.testing.assert_array_equal(cut.sizes, whole.sizes[:10])
