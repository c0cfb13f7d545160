"""Texts have the tokens per round asked for, and do not depend on how they are run."""

import numpy as np
import pytest

from planner.errors import BadInput
from planner.simulator.texts import Acceptance

ASKED = (1.75, 2.25, 2.6, 2.8)


def tokens_over_rounds(
    acceptance: Acceptance, draft_len: int, *, drawn: int | None = None, input_len: int = 1, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Of all texts together, and [texts] of each."""
    texts, output_len = 4000, 400
    lengths = np.full(texts, output_len)
    walk = acceptance.draw(np.full(texts, input_len), lengths, drawn or draft_len, seed).walk(draft_len)
    rounds = np.diff(walk.last, prepend=-1) - 1
    return (lengths - 1).sum() / rounds.sum(), (lengths - 1) / rounds


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("draft_len", [1, 2, 3, 4])
def test_tokens_per_round_are_what_was_asked_for(draft_len, spread):
    acceptance = Acceptance(tokens_per_round=(ASKED,), spread=spread)
    whole, each = tokens_over_rounds(acceptance, draft_len, drawn=4)
    error = each.std() / np.sqrt(len(each))
    assert whole == pytest.approx(ASKED[draft_len - 1], abs=4 * error + 0.003 * draft_len)  # the last round of a text is cut


def test_texts_differ_as_much_as_the_spread_says():
    sds = [tokens_over_rounds(Acceptance(tokens_per_round=(ASKED,), spread=spread), 4)[1].std() for spread in (0.0, 0.5, 1.0)]
    assert sds[0] == pytest.approx(1.55 / np.sqrt(400 / 2.8), rel=0.15)  # independent rounds
    assert 2 * sds[0] < sds[1] < sds[2]


@pytest.mark.parametrize("relative_sd", [0.05, 0.2])
def test_texts_differ_as_much_as_was_measured(relative_sd):
    acceptance = Acceptance.with_sd(tokens_per_round=(ASKED,), relative_sd=relative_sd, draft_len=4)
    assert acceptance.relative_sd(4) == pytest.approx(relative_sd, rel=0.02)
    whole, each = tokens_over_rounds(acceptance, 4)
    sampling = tokens_over_rounds(Acceptance(tokens_per_round=(ASKED,), spread=0.0), 4)[1].std()  # of rounds within a text
    assert np.sqrt(each.var() - sampling**2) / each.mean() == pytest.approx(relative_sd, rel=0.15)
    assert whole == pytest.approx(ASKED[3], rel=0.02)
    with pytest.raises(BadInput, match="differ by at most"):
        Acceptance.with_sd(tokens_per_round=(ASKED,), relative_sd=2.0, draft_len=4)


def test_rounds_of_a_text_do_not_depend_on_the_longest_draft_drawn():
    acceptance = Acceptance(tokens_per_round=(ASKED,))
    one, other = (acceptance.draw(np.ones(9), np.full(9, 50), drawn, seed=1) for drawn in (2, 4))
    assert (np.minimum(other.accepted, 2) == one.accepted).all()


def test_the_first_texts_are_the_same_when_more_follow():
    acceptance = Acceptance(tokens_per_round=(ASKED,))
    few, many = (acceptance.draw(np.ones(n), np.full(n, 30), 4, seed=1).accepted for n in (5, 500))
    assert (few[: 5 * 30 - 4] == many[: 5 * 30 - 4]).all()


def test_acceptance_follows_the_context_between_those_given():
    acceptance = Acceptance(tokens_per_round=((1.8,), (1.2,)), contexts=(100, 10_000))
    short, middle, long, beyond = (tokens_over_rounds(acceptance, 1, input_len=n)[0] for n in (50, 1000, 10_000, 10**6))
    assert short == pytest.approx(1.8, abs=0.02) and long == pytest.approx(1.2, abs=0.02) and beyond == long
    assert 1.4 < middle < 1.65


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tokens_per_round": ((2.1,),)}, "lie in"),
        ({"tokens_per_round": ((1.5, 1.4),)}, "lie in"),
        ({"tokens_per_round": ((1.5, 2.1),)}, "lie in"),
        ({"tokens_per_round": ((float("nan"),),)}, "lie in"),
        ({"tokens_per_round": ()}, "one row per context"),
        ({"tokens_per_round": ((1.5,), (1.4,)), "contexts": (5, 5)}, "ascend"),
        ({"tokens_per_round": ((1.5,),), "spread": -1.0}, "spread"),
    ],
)
def test_what_no_drafter_does_is_refused(wrong, says):
    with pytest.raises(BadInput, match=says):
        Acceptance(**wrong)


def test_extremes_are_exact():
    all_kept = Acceptance(tokens_per_round=((2.0, 3.0),)).draw(np.ones(3), np.full(3, 20), 2, seed=0)
    none_kept = Acceptance(tokens_per_round=((1.0, 1.0),)).draw(np.ones(3), np.full(3, 20), 2, seed=0)
    assert (all_kept.accepted[:-1] == 2).all() and not none_kept.accepted.any()
