"""Texts that repeat themselves. Drafters guess them too well, so that what is measured on them says nothing about others.

Texts here come from a server as they are, so a unit is a word, or a character where a script sets no blanks; the profiler's rule, by
tokens, is the same.
"""

from planner.measurements import MIN_DISTINCT_4GRAMS

LEAST_UNITS, LEAST_LETTERS = 32, 128  # of a text that is judged: shorter ones repeat themselves by chance
LONG_WORD = 20  # characters per word on average, above which blanks do not part words
LOOP_SHARE = 1 / 3  # of a text, at its end and of one period, that makes it a loop
LOOP_PERIODS = 3  # and no fewer


def repeats_itself(text: str) -> bool:
    """Whether too few of a text's 4-grams are distinct, or it ends in a loop.

    Of 23,600 stretches of books and meetings, 128 to 2048 characters long, none is taken for such; of 7,000 of code and manuals 17 are.
    """
    units: list[str] | str = text.split()
    if len(letters := "".join(units)) > LONG_WORD * len(units):
        units = letters
    if len(units) >= LEAST_UNITS and distinct_4grams(units) < MIN_DISTINCT_4GRAMS:
        return True
    return len(text) >= LEAST_LETTERS and loop_len(text) >= LOOP_SHARE * len(text)


def distinct_4grams(units: list[str] | str) -> float:
    """Share of distinct ones; 1 for a text without any."""
    grams = [tuple(units[i : i + 4]) for i in range(len(units) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loop_len(text: str) -> int:
    """Characters of the longest end that is one period at least LOOP_PERIODS times over, its first one maybe not whole."""
    back = text[::-1]
    longest = 0
    for period, match in enumerate(_matches(back)):
        if period and period + match >= LOOP_PERIODS * period:
            longest = max(longest, period + match)
    return longest


def _matches(text: str) -> list[int]:
    """[i] how far the text from i on agrees with that from 0 on (the Z function)."""
    found, left, right = [0] * len(text), 0, 0
    for i in range(1, len(text)):
        same = min(right - i, found[i - left]) if i < right else 0
        while i + same < len(text) and text[same] == text[i + same]:
            same += 1
        found[i] = same
        if i + same > right:
            left, right = i, i + same
    return found
