"""The walk along a text: closed forms, enumeration of every outcome, and simulation agree with the recursion."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from planner.cost.renewal import expected_rounds

seeded = settings(derandomize=True, deadline=None, max_examples=60)
unit = st.floats(0, 1, allow_subnormal=False)


def walk(accept_prob, draft_len, drafted=None):
    """Of one text: rounds, variance, by_drafted."""
    w = np.asarray(accept_prob, dtype=float)
    drafted = np.full(len(w), draft_len) if drafted is None else np.asarray(drafted)
    result = expected_rounds(w[None], drafted[None], draft_len)
    return float(result.rounds[0]), float(result.variance[0]), result.by_drafted[0]


def enumerated(w, drafted, K):
    """Chance of each (rounds, how many of them drafted 0..K), by following every outcome of every round."""
    S = len(w)

    @cache
    def behind(s):
        if s >= S:
            return {(0, (0,) * (K + 1)): 1.0}
        offered = min(int(drafted[s]), K, S - 1 - s)
        outcomes = Counter()
        reached = 1.0
        for n in range(offered + 1):
            ended = reached * (1 - w[s][n]) if n < offered else reached
            for (rounds, counts), chance in behind(s + n + 1).items():
                more = tuple(count + (k == offered) for k, count in enumerate(counts))
                outcomes[rounds + 1, more] += ended * chance
            if n < offered:
                reached *= w[s][n]
        return dict(outcomes)

    return behind(0)


@st.composite
def texts(draw):
    S, K = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    w = draw(arrays(float, (S, K), elements=unit))
    drafted = draw(arrays(int, S, elements=st.integers(0, 5)))
    return w, drafted, K


@seeded
@given(texts())
def test_the_recursion_is_the_sum_over_all_outcomes(text):
    w, drafted, K = text
    rounds, variance, by_drafted = walk(w, K, drafted)
    outcomes = enumerated(w, drafted, K)
    mean = sum(n * chance for (n, _), chance in outcomes.items())
    assert rounds == pytest.approx(mean, abs=1e-12)
    assert variance == pytest.approx(sum((n - mean) ** 2 * chance for (n, _), chance in outcomes.items()), abs=1e-12)
    assert by_drafted == pytest.approx(sum(np.array(counts) * chance for (_, counts), chance in outcomes.items()), abs=1e-12)


@seeded
@given(texts())
def test_rounds_lie_between_full_acceptance_and_plain_decoding(text):
    w, drafted, K = text
    rounds, variance, by_drafted = walk(w, K, drafted)
    S = len(w)
    assert -(-S // (K + 1)) - 1e-9 <= rounds <= S + 1e-9
    assert variance >= -1e-12
    assert by_drafted.sum() == pytest.approx(rounds)
    assert (by_drafted >= -1e-12).all()


@pytest.mark.parametrize("S", [1, 2, 7, 8, 9, 100])
@pytest.mark.parametrize("K", [0, 1, 3, 8])
def test_when_all_is_accepted_a_round_takes_draft_len_plus_one_tokens(S, K):
    rounds, variance, by_drafted = walk(np.ones((S, K)), K)
    assert rounds == -(-S // (K + 1))
    assert variance == 0
    assert by_drafted @ np.arange(K + 1) == S - rounds  # every token is a draft or the one token a round adds


@pytest.mark.parametrize("K", [1, 5])
def test_when_nothing_is_accepted_every_token_takes_a_round(K):
    rounds, variance, by_drafted = walk(np.zeros((40, K)), K)
    assert (rounds, variance) == (40, 0)
    assert by_drafted.tolist() == [1] * K + [40 - K]  # the last K rounds have less and less room


def test_a_drafter_that_offers_nothing_is_plain_decoding():
    assert walk(np.ones((20, 3)), 3, drafted=np.zeros(20, int)) == (20, 0, pytest.approx([20, 0, 0, 0]))


def test_acceptance_beyond_what_is_drafted_does_not_count():
    w = np.random.default_rng(0).random((20, 4))
    offered = np.random.default_rng(1).integers(0, 3, 20)
    assert walk(w, 4, offered)[0] == walk(np.where(np.arange(4) < offered[:, None], w, 1.0), 4, offered)[0]


@pytest.mark.parametrize("a", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("K", [1, 4, 10])
def test_constant_acceptance_on_a_long_text_gives_the_geometric_sum(a, K):
    S = 4000
    rounds, variance, _ = walk(np.full((S, K), a), K)
    n = np.arange(K + 1)
    tokens = a**n * np.where(n < K, 1 - a, 1)  # chance of n accepted, so of n + 1 tokens
    mean = tokens @ (n + 1)
    assert mean == pytest.approx((1 - a ** (K + 1)) / (1 - a))  # arXiv:2211.17192, equation 1
    assert abs(rounds - S / mean) < 2  # only the two ends of the text differ
    spread = tokens @ (n + 1 - mean) ** 2
    assert variance == pytest.approx(S * spread / mean**3, rel=0.02)  # the renewal central limit theorem


def test_mean_and_variance_are_those_of_a_simulated_walk():
    rng = np.random.default_rng(0)
    S, K, runs = 30, 4, 20_000
    w, drafted = rng.random((S, K)) ** 0.5, rng.integers(0, K + 1, S)
    position, rounds = np.zeros(runs, int), np.zeros(runs)
    while (alive := position < S).any():
        at = position.clip(max=S - 1)
        room = np.minimum(drafted[at], S - 1 - at)
        kept = ((rng.random((runs, K)) < w[at]) & (np.arange(K) < room[:, None])).cumprod(1).sum(1)
        rounds += alive
        position += np.where(alive, kept + 1, 0)
    mean, variance, _ = walk(w, K, drafted)
    squares = (rounds - rounds.mean()) ** 2
    assert abs(rounds.mean() - mean) < 4 * rounds.std() / runs**0.5
    assert abs(squares.mean() - variance) < 4 * squares.std() / runs**0.5
    assert abs(squares.mean() - 1.1 * variance) > 4 * squares.std() / runs**0.5  # the test would see 10 %


@seeded
@given(arrays(float, 20, elements=unit), st.integers(0, 19), unit, st.integers(1, 4))
def test_raising_the_acceptance_of_a_token_never_costs_rounds(accept, where, raised, K):
    def rounds(by_token):  # acceptance that depends on the token alone, not on where the round began
        padded = np.append(by_token, np.zeros(K))
        return walk(np.stack([padded[i : i + 20] for i in range(K)], axis=1), K)[0]

    better = accept.copy()
    better[where] = max(raised, accept[where])
    assert rounds(better) <= rounds(accept) + 1e-9


def test_raising_one_start_can_cost_rounds_where_the_next_start_is_worse():
    """Why no shortcut may assume otherwise: keeping one draft more lets the next round begin at a worse place."""
    w = np.zeros((6, 4))
    w[1] = 1  # a round behind token 1 gets through; one behind token 2 does not
    rejected = walk(w, 4)[0]
    w[0, 0] = 1
    assert (rejected, walk(w, 4)[0]) == (2, 5)


def test_texts_are_walked_independently():
    rng = np.random.default_rng(0)
    w, drafted = rng.random((3, 12, 4)), rng.integers(0, 5, (3, 12))
    together = expected_rounds(w, drafted, 2)
    for i in range(3):
        rounds, variance, by_drafted = walk(w[i], 2, drafted[i])
        assert (together.rounds[i], together.variance[i]) == (rounds, variance)
        assert together.by_drafted[i].tolist() == by_drafted.tolist()
