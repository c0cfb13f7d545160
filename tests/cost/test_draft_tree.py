"""Trees hold the best nodes and as many as they are worth: against exhaustive search, enumeration and published figures."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.cost.draft_tree import fit_calibration, long_run_rate
from planner.cost.static_tree import best_in_rank_order
from planner.draft_trees import best_first, choose_size, choose_sizes, greedy_stop
from planner.specs import Calibration, TreeCosts

seeded = settings(derandomize=True, deadline=None)

# Sequoia's positional acceptance (arXiv:2402.12374), as issue 9 gives it
POSITIONAL = np.array([.63418, .10795, .05697, .02249, .01949, .01499, .0045, .003, .01199, .0045, .0075, .0045, .006, .003, .0015, .003])  # fmt: skip


@st.composite
def level_probs(draw, most_levels: int = 3, most_candidates: int = 3) -> np.ndarray:
    """[D, R], each row falling and at most 1 in sum; zeros and ties among them."""
    D, R = draw(st.integers(1, most_levels)), draw(st.integers(1, most_candidates))
    rows = [[draw(st.integers(0, 4)) for _ in range(R)] for _ in range(D)]
    return np.array([sorted((x / max(1, sum(row)) for x in row), reverse=True) for row in rows])


@st.composite
def path_probs(draw, most: int = 24) -> np.ndarray:
    return np.array(sorted((draw(st.floats(0, 1)) for _ in range(draw(st.integers(0, most)))), reverse=True))


def paths(probs: np.ndarray, branching: str) -> dict[tuple[int, ...], float]:
    """Every path that could be in a tree, by its ranks, and its probability."""
    D, R = probs.shape
    found = {}
    for depth in range(1, D + 1):
        for ranks in itertools.product(range(R), repeat=depth):
            if branching == "all" or not any(ranks[:-1]):
                found[ranks] = float(np.prod([probs[level, rank] for level, rank in enumerate(ranks)]))
    return found


def nodes(tree) -> list[tuple[int, ...]]:
    """The path of every node, by ranks."""
    found = []
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), int(rank)))
    return found


def costs(verify_s, draft_s: float = 0.0, rate: float | None = None, calibration: Calibration | None = None) -> TreeCosts:
    return TreeCosts(draft_s=draft_s, verify_s=tuple(map(float, verify_s)), rate=rate, calibration=calibration)


# ------------------------------------------------------------------ which nodes


@seeded
@given(level_probs(), st.integers(1, 8), st.sampled_from(["all", "chain"]))
def test_no_tree_of_as_many_nodes_is_better_than_best_first(probs, size, branching):
    """Exhaustive: every subset of the paths that holds the parents of its members."""
    candidates = {path: value for path, value in paths(probs, branching).items() if value > 0}
    if len(candidates) > 14:
        candidates = dict(sorted(candidates.items(), key=lambda item: -item[1])[:14])
    best = 0.0
    for count in range(min(size, len(candidates)) + 1):
        for chosen in itertools.combinations(candidates, count):
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                best = max(best, sum(candidates[path] for path in chosen))
    assert best_first(probs, size, branching=branching).probs.sum() == pytest.approx(best)


@seeded
@given(level_probs(4, 4), st.integers(1, 40), st.sampled_from(["all", "chain"]))
def test_a_tree_is_a_tree_of_its_paths_with_the_best_first(probs, size, branching):
    tree, possible = best_first(probs, size, branching=branching), paths(probs, branching)
    assert len(tree.probs) == min(size, sum(value > 0 for value in possible.values()))
    assert (tree.parents < np.arange(len(tree.parents))).all()
    assert len(set(nodes(tree))) == len(tree.probs)
    np.testing.assert_allclose(tree.probs, [possible[path] for path in nodes(tree)])
    assert [len(path) for path in nodes(tree)] == tree.depths.tolist()
    assert (np.diff(tree.probs) <= 0).all()


@seeded
@given(level_probs(4, 4), st.integers(1, 20), st.integers(1, 20), st.sampled_from(["all", "chain"]))
def test_a_smaller_tree_is_the_beginning_of_a_larger_one(probs, size, more, branching):
    small, large = best_first(probs, size, branching=branching), best_first(probs, size + more, branching=branching)
    for ours, theirs in zip(small, large.first(size), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_behind_a_chain_only_the_first_candidates_branch():
    probs = np.array([[0.5, 0.4], [0.6, 0.3], [0.9, 0.1]])
    assert nodes(best_first(probs, 5, branching="chain")) == [(0,), (1,), (0, 0), (0, 0, 0), (0, 1)]
    assert nodes(best_first(probs, 5, branching="all")) == [(0,), (1,), (0, 0), (0, 0, 0), (1, 0)]


def test_probabilities_in_single_precision_keep_parents_before_children():
    probs = np.ones((12, 1), np.float32) * np.float32(1.0)
    probs[0] = np.float32(0.1)
    assert best_first(probs, 12, branching="chain").parents.tolist() == list(range(-1, 11))


def test_nothing_drafted_is_no_tree():
    for branching in ("all", "chain"):
        assert [len(column) for column in best_first(np.zeros((0, 4)), 8, branching=branching)] == [0, 0, 0, 0]


# ------------------------------------------------------------------ how many of them

steps = st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.02, 0.5]), min_size=24, max_size=24)
rates = st.none() | st.floats(0.5, 200)


@seeded
@given(path_probs(), steps, st.floats(0, 0.05), rates)
def test_the_chosen_size_is_the_best_of_all(probs, more, draft_s, rate):
    table = costs(0.01 + np.cumsum([0.0, *more]), draft_s, rate)
    worth = []
    for n in range(len(probs) + 1):
        tokens, seconds = 1 + probs[:n].sum(), draft_s + table.verify_s[n]
        worth.append(tokens / seconds if rate is None else tokens - rate * seconds)
    assert worth[choose_size(probs, table)] == pytest.approx(max(worth), rel=1e-12, abs=1e-9)


@seeded
@given(path_probs(), st.lists(st.floats(0, 0.02), min_size=24, max_size=24), st.floats(0, 0.05), rates)
def test_stopping_greedily_is_right_where_the_cost_is_convex(probs, more, draft_s, rate):
    table = costs(0.01 + np.cumsum([0.0, *sorted(more)]), draft_s, rate)
    best, stopped = choose_size(probs, table), greedy_stop(probs, table)
    seconds = draft_s + np.array(table.verify_s)
    phi = np.concatenate([[1.0], 1 + np.cumsum(probs)])

    def worth(n: int) -> float:
        return phi[n] / seconds[n] if rate is None else phi[n] - rate * seconds[n]

    assert worth(stopped) == pytest.approx(worth(best), rel=1e-9, abs=1e-9)


def test_stopping_greedily_stays_before_a_step_that_pays():
    """The second node costs a step that it is not worth; the six behind it cost nothing more."""
    table, probs = costs([0.010] * 2 + [0.014] * 7), np.full(8, 0.6)
    assert (greedy_stop(probs, table), choose_size(probs, table)) == (1, 8)
    assert 1.6 / 0.010 < 0.4 * (1 + 8 * 0.6) / 0.014  # what the greedy stop leaves: more than half of the speed


# C_verify in ms of a tree of so many nodes at contexts 1, 4000 and 8000, linear between and n = 0 as n = 1; C_draft is 6.5 ms.
# Published for Qwen3-8B on an A800 (CaDDTree, arXiv:2606.01813)
A800_NODES = [1, 8, 16, 32, 64, 128, 256, 384, 512]
A800_MS = {
    1: [34.790, 34.792, 34.794, 34.799, 34.808, 34.826, 38.542, 46.862, 55.181],
    4000: [34.347, 34.360, 34.799, 35.678, 37.478, 41.713, 55.223, 70.349, 86.014],
    8000: [47.915, 48.406, 48.967, 50.089, 52.334, 57.060, 73.600, 93.229, 117.274],
}  # fmt: skip


def test_on_the_published_surface_the_greedy_stop_is_right_and_short_contexts_afford_the_largest_tree():
    level = 0.75 * 0.35 ** np.arange(24)  # of candidates, falling: a drafter that is right three times in four
    probs = best_first(np.tile(level, (15, 1)), 512, branching="all").probs
    sizes = []
    for published in A800_MS.values():
        table = costs(np.interp(np.arange(513), A800_NODES, published) / 1e3, 0.0065)
        sizes.append(choose_size(probs, table))
        assert greedy_stop(probs, table) == sizes[-1]
    assert sizes[0] > 1.5 * max(sizes[1:]) > 0  # launch-bound at context 1: nodes are free up to about 128


def test_a_round_that_promises_nothing_verifies_nothing():
    assert choose_size(np.array([0.01, 0.01]), costs([0.01, 0.011, 0.012])) == 0
    assert choose_size(np.zeros(0), costs([0.01, 0.011, 0.012])) == 0


def test_costs_of_smaller_trees_than_asked_for_are_refused():
    with pytest.raises(ValueError, match="the costs cover trees of up to 2 nodes, got 3"):
        choose_size(np.array([0.5, 0.4, 0.3]), costs([0.01, 0.011, 0.012]))


def test_overconfident_probabilities_are_corrected_before_they_are_weighed():
    table = costs([0.01, 0.012, 0.014])
    probs = np.array([0.9, 0.8])
    assert choose_size(probs, table) == 2
    assert choose_size(probs, replace(table, calibration=Calibration(reported=(0.0, 1.0), observed=(0.0, 0.1)))) == 0


@seeded
@given(st.integers(0, 2**32 - 1))
def test_many_rounds_at_once_are_sized_as_each_alone(seed):
    rng = np.random.default_rng(seed)
    probs = -np.sort(-(rng.random((7, 12)) ** 4), axis=1)
    table = costs(0.01 + np.cumsum(rng.choice([0, 0.004], 13)), 0.002, rng.choice([50.0, 150.0]))
    assert choose_sizes(probs, table).tolist() == [choose_size(row, table) for row in probs]


# ------------------------------------------------------------------ in the long run


def ran(probs: np.ndarray, table: TreeCosts) -> float:
    """Tokens per second over all rounds, each sized by the rule of `table`."""
    sizes = choose_sizes(probs, table)
    tokens = len(probs) + sum(row[:n].sum() for row, n in zip(probs, sizes, strict=True))
    return tokens / (table.draft_s + np.array(table.verify_s)[sizes]).sum()


@seeded
@given(st.integers(0, 2**32 - 1))
def test_one_rate_for_the_run_is_never_below_the_best_ratio_of_each_round(seed):
    rng = np.random.default_rng(seed)
    probs = -np.sort(-(rng.random((40, 16)) ** rng.choice([1, 3, 9], (40, 1))), axis=1)
    table = costs(0.01 + np.cumsum(rng.choice([0, 0.001, 0.006], 17)), 0.003)
    tokens = np.concatenate([np.ones((40, 1)), 1 + np.cumsum(probs, axis=1)], axis=1)
    rate = long_run_rate(tokens, table.draft_s + np.array(table.verify_s))
    by_run = ran(probs, replace(table, rate=rate))
    assert by_run == pytest.approx(rate)  # the fixed point: the rate that the rule is told is the rate that it gets
    assert by_run >= ran(probs, table) * (1 - 1e-12)
    for size in range(17):
        assert rate >= tokens[:, size].mean() / (table.draft_s + table.verify_s[size]) * (1 - 1e-12)


def test_the_ratio_of_each_round_loses_where_rounds_differ():
    """A poor round looks best with a long pass that lifts its own ratio, at a rate the run does not need to accept."""
    probs = np.array([[0.95] * 8, [0.5, 0.5] + [0.0] * 6])
    table = costs([0.010, 0.0125] + [0.0145] * 7)
    tokens = np.concatenate([np.ones((2, 1)), 1 + np.cumsum(probs, axis=1)], axis=1)
    rate = long_run_rate(tokens, np.array(table.verify_s))
    assert choose_sizes(probs, table).tolist() == [8, 2]
    assert choose_sizes(probs, replace(table, rate=rate)).tolist() == [8, 0]
    assert rate > 1.02 * ran(probs, table)


def test_rounds_count_by_how_often_they_occur():
    tokens, seconds = np.array([[1.0, 1.9], [1.0, 1.0]]), np.array([0.01, 0.011])
    assert long_run_rate(tokens, seconds, np.array([1.0, 0.0])) == pytest.approx(1.9 / 0.011)
    assert long_run_rate(tokens, seconds, np.array([0.0, 1.0])) == pytest.approx(1.0 / 0.01)


# ------------------------------------------------------------------ what probabilities are worth


def test_a_calibration_finds_the_law_that_made_the_data():
    rng = np.random.default_rng(0)
    reported = rng.random(40_000) ** 3
    found = fit_calibration(reported, rng.random(40_000) < 0.8 * reported**1.3)
    at = np.array([0.02, 0.1, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(np.interp(at, found.reported, found.observed), 0.8 * at**1.3, atol=0.02)
    assert (found.reported[0], found.observed[0]) == (0.0, 0.0)
    assert len(found.reported) < 40


@seeded
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30))
def test_any_nodes_give_a_calibration_that_never_falls(pairs):
    reported, member = np.array([p for p, _ in pairs], float), np.array([m for _, m in pairs], bool)
    found = fit_calibration(reported, member)  # the type itself refuses one that falls
    assert (found is None) == (len(pairs) == 0)


def test_nodes_that_no_round_meets_do_not_count():
    reported, member = np.array([0.5, 0.5, 0.5]), np.array([True, True, False])
    assert fit_calibration(reported, member, np.array([1.0, 0.0, 1.0])).observed == (0.0, 0.5)
    assert fit_calibration(reported, member, np.zeros(3)) is None


# ------------------------------------------------------------------ trees of fixed shape


@pytest.mark.parametrize(
    ("expected", "grown"),
    [
        (4.1921, lambda: best_in_rank_order(POSITIONAL, 127, 9)),
        (4.1977, lambda: best_first(np.tile(np.sort(POSITIONAL)[::-1], (9, 1)), 127, branching="all")),
    ],
    ids=["in rank order", "freely"],
)
def test_the_best_static_tree_has_the_published_yield_and_takes_no_time(expected, grown):
    began = time.process_time()
    tree = grown()
    assert time.process_time() - began < 0.1
    assert 1 + tree.probs.sum() == pytest.approx(expected, abs=5e-5)
    assert len(tree.probs) == 127
    assert tree.depths.max() <= 9


@seeded
@given(st.lists(st.floats(0.01, 0.4), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 3))
def test_no_static_tree_in_rank_order_is_better(acceptance, size, num_levels):
    acceptance = np.array(acceptance) / max(1.0, sum(acceptance))
    tree = best_in_rank_order(acceptance, size, num_levels)
    possible = paths(np.tile(acceptance, (num_levels, 1)), "all")
    near = [path for path in possible if len(path) + sum(path) <= size]  # what a tree of that size can reach in rank order
    best = 0.0
    for chosen in itertools.combinations(near, min(size, len(near))):
        held = set(chosen)
        if all((len(p) == 1 or p[:-1] in held) and (p[-1] == 0 or (*p[:-1], p[-1] - 1) in held) for p in chosen):
            best = max(best, sum(possible[path] for path in chosen))
    assert tree.probs.sum() == pytest.approx(best)
    assert (tree.parents < np.arange(len(tree.parents))).all()
    assert (np.diff(tree.probs) <= 0).all()
