"""What better choices of draft_len could gain: order of the three, closed forms, and a simulation that knows no recursion."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.headroom import additive_rule, align, best_adaptive, estimate_rule, fixed_rule, oracle_cost, pair_rule, rule_costs
from planner.cost.renewal import expected_rounds

seeded = settings(derandomize=True, deadline=None, max_examples=40)


def unit_cost(N, K, each):
    return np.tile(1 + each * np.arange(K + 1.0), (N, 1))


def fixed_cost(accept_prob, drafted, round_cost, k):
    walks = [expected_rounds(w[None], d[None], k).by_drafted[0] for w, d in zip(accept_prob, drafted, strict=True)]
    return np.array([by @ cost[: k + 1] for by, cost in zip(walks, round_cost, strict=True)])


@st.composite
def texts(draw, least=1, sharp=False):
    """Texts of different lengths, and costs of a round that need not grow with what it drafts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    K, N = draw(st.integers(1, 4)), draw(st.integers(least, 4))
    lengths = rng.integers(1, 12, N)
    accept_prob = [rng.uniform(size=(S, K)) ** draw(st.sampled_from([0.3, 1, 3])) for S in lengths]
    if sharp:
        accept_prob = [(w > 0.4).astype(float) for w in accept_prob]
    drafted = [rng.integers(0, K + 2, S) for S in lengths]
    return accept_prob, drafted, rng.uniform(0.5, 2, (N, K + 1))


@seeded
@given(texts())
def test_a_rule_of_one_state_is_a_fixed_draft_len(made):
    accept_prob, drafted, round_cost = made
    K = round_cost.shape[1] - 1
    expected = np.stack([fixed_cost(accept_prob, drafted, round_cost, k) for k in range(K + 1)], 1)
    for rules in ([fixed_rule(k, K) for k in range(K + 1)], [pair_rule(k, k, K) for k in range(K + 1)]):
        np.testing.assert_allclose(rule_costs(align(accept_prob, drafted), rules, round_cost), expected, rtol=1e-12)


@seeded
@given(texts())
def test_rules_cost_together_what_they_cost_alone(made):
    accept_prob, drafted, round_cost = made
    aligned, K = align(accept_prob, drafted), round_cost.shape[1] - 1
    rules = [additive_rule(2, 1, 1, K), estimate_rule(0.3, 0.5, round_cost.mean(0)), pair_rule(0, K, K), estimate_rule(0.1, 0.9, round_cost.mean(0))]
    alone = [rule_costs(aligned, [rule], round_cost) for rule in rules]
    np.testing.assert_allclose(rule_costs(aligned, rules, round_cost), np.concatenate(alone, axis=1), rtol=1e-12)


@seeded
@given(texts(least=2))
def test_nothing_that_is_causal_beats_the_oracle(made):
    accept_prob, drafted, round_cost = made
    K = round_cost.shape[1] - 1
    aligned = align(accept_prob, drafted)
    oracle = oracle_cost(aligned, round_cost)
    for k in range(K + 1):
        assert np.all(oracle <= fixed_cost(accept_prob, drafted, round_cost, k) + 1e-9)
    rules = [estimate_rule(0.3, 0.5, round_cost.mean(0)), additive_rule(1, 1, 1, K), additive_rule(2, 1, 1, K), pair_rule(0, K, K)]
    assert np.all(oracle[:, None] <= rule_costs(aligned, rules, round_cost) + 1e-9)
    assert np.all(oracle <= best_adaptive(aligned, round_cost).cost + 1e-9)


@seeded
@given(texts(sharp=True))
def test_where_acceptance_is_certain_the_oracle_takes_the_shortest_path(made):
    accept_prob, drafted, round_cost = made
    K = round_cost.shape[1] - 1
    for w, offered, cost, found in zip(accept_prob, drafted, round_cost, oracle_cost(align(accept_prob, drafted), round_cost), strict=True):
        S = len(w)
        best = [*[np.inf] * S, 0.0]
        for s in range(S - 1, -1, -1):
            for k in range(min(K, int(offered[s]), S - 1 - s) + 1):
                kept = int(np.cumprod(w[s, :k]).sum())
                best[s] = min(best[s], cost[k] + best[s + kept + 1])
        assert found == pytest.approx(best[0])


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 1.0])
def test_constant_acceptance_gives_the_geometric_sum(a):
    """Where nothing is gained by stopping early the oracle drafts what will be kept: its rounds are those of the longest draft_len, without waste."""
    S, K, each = 4000, 3, 0.05
    accept_prob, drafted = [np.full((S, K), a)], [np.full(S, K)]
    tokens = sum(a**n for n in range(K + 1))
    cost = unit_cost(1, K, each)
    assert fixed_cost(accept_prob, drafted, cost, K)[0] / S == pytest.approx((1 + K * each) / tokens, rel=1e-3)
    assert oracle_cost(align(accept_prob, drafted), cost)[0] / S == pytest.approx((1 + each * (tokens - 1)) / tokens, rel=1e-3)


def test_nobody_drafts_where_drafts_cost_more_than_they_save():
    accept_prob, drafted = [np.full((50, 4), 0.9)] * 4, [np.full(50, 4)] * 4
    cost = unit_cost(4, 4, 1.5)
    aligned = align(accept_prob, drafted)
    assert oracle_cost(aligned, cost) == pytest.approx(50)
    adaptive = best_adaptive(aligned, cost)
    assert adaptive.cost == pytest.approx(50) and adaptive.name == "always 0"


def stretches(N, S, K, rng, length=40):
    """Good and bad stretches in turn: what an adaptive rule is for."""
    good = [(np.arange(S) + rng.integers(0, 2 * length)) // length % 2 for _ in range(N)]
    return [np.where(g[:, None], 0.95, 0.1) * np.ones((S, K)) for g in good], [np.full(S, K)] * N


def test_a_rule_gains_where_acceptance_comes_in_stretches_and_not_where_it_is_constant():
    rng = np.random.default_rng(0)
    K, N, S = 6, 6, 400
    cost = unit_cost(N, K, 0.15)
    accept_prob, drafted = stretches(N, S, K, rng)
    fixed = min(fixed_cost(accept_prob, drafted, cost, k).sum() for k in range(K + 1))
    aligned = align(accept_prob, drafted)
    adaptive, oracle = best_adaptive(aligned, cost), oracle_cost(aligned, cost).sum()
    assert oracle < adaptive.cost.sum() < 0.93 * fixed
    accept_prob = [np.full((S, K), 0.7)] * N
    fixed = min(fixed_cost(accept_prob, drafted, cost, k).sum() for k in range(K + 1))
    adaptive = best_adaptive(align(accept_prob, drafted), cost)
    assert adaptive.cost.sum() == pytest.approx(fixed) and adaptive.name.startswith("always")


def test_a_text_does_not_tune_the_rule_that_it_is_judged_under():
    K, N, S = 4, 6, 60
    cost = unit_cost(N, K, 0.1)
    accept_prob, drafted = stretches(N, S, K, np.random.default_rng(1), 10)
    before = best_adaptive(align(accept_prob, drafted), cost).cost
    one_odd_worse = best_adaptive(align([w * (i != 1) for i, w in enumerate(accept_prob)], drafted), cost).cost
    assert one_odd_worse[3::2] == pytest.approx(before[3::2], abs=0) and one_odd_worse[1] > before[1]
    even_worse = best_adaptive(align([w * (i % 2) for i, w in enumerate(accept_prob)], drafted), cost).cost
    assert not np.allclose(even_worse[1::2], before[1::2])


@pytest.mark.parametrize(
    "make",
    [lambda cost: estimate_rule(0.3, 0.6, cost), lambda cost: additive_rule(2, 1, 2, 4), lambda cost: pair_rule(1, 3, 4)],
    ids=["estimate", "additive", "pair"],
)
def test_a_rule_costs_what_running_it_costs(make):
    rng = np.random.default_rng(2)
    S, K, runs = 25, 4, 2000
    w, offered = rng.uniform(size=(S, K)), rng.integers(0, K + 1, S)
    cost = rng.uniform(0.5, 2, K + 1)
    rule = make(cost)
    totals = np.zeros(runs)
    for run in range(runs):
        s, state = 0, rule.start
        while s < S:
            drafted = min(int(rule.draft_len[state]), int(offered[s]), S - 1 - s)
            accepted = int(np.cumprod(rng.uniform(size=drafted) < w[s, :drafted]).sum())
            totals[run] += cost[drafted]
            state = rule.low[state, drafted, accepted] + (rng.uniform() < rule.share[state, drafted, accepted])
            s += accepted + 1
    exact = rule_costs(align([w], [offered]), [rule], cost[None])[0, 0]
    assert abs(totals.mean() - exact) < 4 * totals.std() / runs**0.5


def test_an_estimate_follows_what_is_accepted():
    cost = 1 + 0.2 * np.arange(5.0)
    rule = estimate_rule(0.3, 0.5, cost)
    mean = rule.low + rule.share
    z = np.arange(len(rule.draft_len))
    assert np.all(mean[1:-1, 4, 4] > z[1:-1]) and np.all(mean[1:, 4, 0] < z[1:])
    assert np.all(np.diff(rule.draft_len) >= 0) and rule.draft_len[0] == 0 and rule.draft_len[-1] == 4
    off = z[rule.draft_len == 0]
    assert np.all(mean[off, 0, 0] > off)  # it tries again
    assert np.all((rule.low >= 0) & (rule.low <= len(z) - 2) & (rule.share >= 0) & (rule.share <= 1))


def test_pairs_and_steps_move_as_their_names_say():
    pair, steps = pair_rule(1, 3, 4), additive_rule(2, 1, 2, 4)
    assert pair.draft_len[pair.start] == 3
    for drafted in range(1, 5):
        for accepted in range(drafted + 1):
            kept = accepted == drafted
            assert list(pair.draft_len[pair.low[:, drafted, accepted]]) == ([3, 3] if kept else [1, 1])
            assert list(steps.draft_len[steps.low[1:, drafted, accepted]]) == ([3, 4, 4, 4] if kept else [1, 1, 2, 3])
    assert list(steps.low[1:, 0, 0]) == [1, 2, 3, 4]  # a round that had nothing to draft says nothing
