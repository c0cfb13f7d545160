import numpy as np
import pytest

from planner.cost.engine_acceptance import PRIOR_MEAN, AcceptanceCurve, Row, _survival

CONTEXT = 1000


def rounds_of(easy, hard, hard_share, persistence, draft_len, tokens=200_000, seed=0):
    """Tokens per round and unconditional survival of rounds along one text of two alternating states, by running them."""
    rng = np.random.default_rng(seed)
    jump, draw, accept = rng.random(tokens) > persistence, rng.random(tokens) < hard_share, rng.random(tokens)
    state, states = False, np.empty(tokens, bool)
    for i in range(tokens):
        state = draw[i] if jump[i] else state
        states[i] = state
    kept = accept < np.where(states, hard, easy)
    at, starts, reached = 0, 0, np.zeros(draft_len)
    while at + draft_len + 1 < tokens:
        run = kept[at : at + draft_len]
        accepted = draft_len if run.all() else int(run.argmin())
        reached[:accepted] += 1
        at, starts = at + accepted + 1, starts + 1
    return at / starts, reached / starts


def theta_of(easy, hard, hard_share, persistence):
    logit = lambda p: np.log(p / (1 - p))
    return np.array([logit(easy), logit(hard), logit(hard_share), logit(persistence), 0.0, 0.0])


@pytest.mark.parametrize("draft_len", [1, 3, 8])
def test_the_mixture_is_what_rounds_along_a_text_show(draft_len):
    law = 0.95, 0.3, 0.4, 0.8
    tokens, reached = rounds_of(*law, draft_len)
    survival = _survival(theta_of(*law), draft_len, 0.0)
    assert survival == pytest.approx(reached, abs=0.01)
    assert 1 + survival.sum() == pytest.approx(tokens, rel=0.01)


def test_rounds_that_draft_longer_start_in_harder_stretches():
    first = [_survival(theta_of(0.95, 0.3, 0.4, 0.8), k, 0.0)[0] for k in (1, 2, 4, 8)]
    assert first == sorted(first, reverse=True) and first[0] - first[-1] > 0.01


def test_counters_at_two_lengths_say_the_others():
    law = 0.95, 0.3, 0.4, 0.8
    rows = []
    for k in (2, 6):
        tokens, reached = rounds_of(*law, k, seed=k)
        rows.append(Row(k, CONTEXT, tokens, tuple(reached / np.concatenate([[1], reached[:-1]])), 1))
    curve = AcceptanceCurve(rows, 0.005)
    lengths = np.array([1, 3, 4, 8])
    found, sd = curve.predict(lengths, np.full(4, CONTEXT))
    truth = np.array([rounds_of(*law, int(k), seed=9)[0] for k in lengths])
    assert np.abs(found / truth - 1).max() < 0.03
    assert (np.abs(np.log(found / truth)) < 2.5 * sd).all()


def test_tokens_per_round_stay_between_one_and_all_drafts_kept():
    curve = AcceptanceCurve([Row(3, CONTEXT, 4.0, (), 1), Row(1, CONTEXT, 1.0, (), 1)], 0.005)
    found, _ = curve.predict(np.arange(1, 20), np.full(19, CONTEXT))
    assert (found >= 1).all() and (found <= np.arange(2, 21)).all()


def test_repeating_a_measurement_narrows_it():
    widths = [AcceptanceCurve([Row(3, CONTEXT, 2.5, (), n)], 0.02).predict(np.array([3]), np.array([CONTEXT]))[1][0] for n in (1, 4, 16)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 1.5 * widths[-1]


def test_without_rows_it_is_a_usual_drafters_and_doubts_nothing():
    tokens, sd = AcceptanceCurve([], 0.01).predict(np.array([4]), np.array([CONTEXT]))
    assert tokens[0] == pytest.approx(1 + _survival(PRIOR_MEAN, 4, 0.0).sum()) and sd[0] == 0


def test_two_lengths_of_one_drafter_err_alike():
    curve = AcceptanceCurve([Row(2, CONTEXT, 2.2, (), 1), Row(6, CONTEXT, 3.4, (), 1)], 0.02)
    one, other = np.array([3]), np.array([4])
    at = np.array([CONTEXT])
    (_, a), (_, b) = curve.predict(one, at), curve.predict(other, at)
    assert 0 < curve.covariance(one, at, other, at)[0] <= a[0] * b[0]


def test_few_texts_widen_a_level_and_not_a_comparison_of_lengths():
    """Which texts were asked for moves every draft length alike: tokens per round are known less well, what one length has over another is not."""
    rows = [Row(k, CONTEXT, 1 + sum(0.8 ** (i + 1) for i in range(k)), (0.8,) * k, 3) for k in (1, 3, 8)]
    lengths, contexts = np.array([3, 5]), np.array([CONTEXT, CONTEXT])

    def sds(text_sd):
        curve = AcceptanceCurve(rows, max(0.008, text_sd), text_sd)
        _, sd = curve.predict(lengths, contexts)
        shared = curve.covariance(lengths[:1], contexts[:1], lengths[1:], contexts[1:])[0]
        return sd, np.sqrt(sd[0] ** 2 + sd[1] ** 2 - 2 * shared)

    (exact, apart), (few, few_apart) = sds(0.0), sds(0.1)
    assert (few > 0.1).all() and (few < 0.13).all() and (exact < 0.02).all()
    assert few_apart < apart + 0.02 and few_apart < few.min() / 3
