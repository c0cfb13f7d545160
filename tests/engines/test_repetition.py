"""Texts that repeat themselves are known, and real ones are not taken for such: short ones, lists, code."""

import pydoc_data.topics
import random

import pytest

from planner.engines.repetition import distinct_4grams, loop_len, repeats_itself

MANUAL = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))  # prose, lists and code


def test_a_share_is_that_of_distinct_4grams():
    assert distinct_4grams(["a", "b", "c", "d", "a", "b", "c", "d"]) == 4 / 5
    assert distinct_4grams([]) == distinct_4grams("abc") == 1


def test_a_loop_is_as_long_as_its_last_periods():
    assert loop_len("start " + "abc" * 5) == 15
    assert loop_len("x" + "abc" * 2) == 0, "twice is not yet a loop"
    assert loop_len("abcdefg") == 0 and loop_len("") == 0
    assert loop_len("xyz" + "bc" + "abc" * 4) == 14, "a first period may be cut"


@pytest.mark.parametrize("length", [256, 512, 1024])
def test_real_texts_are_hardly_ever_taken_for_loops(length):
    pieces = [MANUAL[at : at + length] for at in range(0, len(MANUAL) - length, length)]
    taken = [piece for piece in pieces if repeats_itself(piece)]
    assert len(pieces) > 300 and len(taken) <= 0.005 * len(pieces), taken


@pytest.mark.parametrize("period", [1, 7, 40, 80])
@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_a_text_that_falls_into_a_loop_is_known_wherever_it_is_cut(period, share):
    rng = random.Random(0)
    for _ in range(20):
        at, length = rng.randrange(len(MANUAL) - 2000), 480 + rng.randrange(80)
        loop = MANUAL[at + 1000 : at + 1000 + period]
        text = MANUAL[at : at + int(length * (1 - share))] + (loop * length)[: int(length * share)]
        assert repeats_itself(text), text


def test_scripts_without_blanks_are_judged_by_their_characters():
    rng = random.Random(0)
    text = "".join(chr(0x4E00 + rng.randrange(500)) for _ in range(200))
    assert not repeats_itself(text) and repeats_itself(text[:60] + text[60:66] * 20)


def test_short_answers_and_lists_are_not_judged_harshly():
    assert not repeats_itself("yes " * 10) and not repeats_itself("")
    assert not repeats_itself("\n".join(f"{i}. {name}" for i, name in enumerate(sorted(pydoc_data.topics.topics)[:40])))
    assert repeats_itself("no " * 100)
