"""Texts that repeat themselves. Drafters guess them too well, so that what is measured on them says nothing about others.

Texts here come from a server as they are, so a unit is a word, or a character where a script sets no blanks; the profiler's rule, by
tokens, is the same.
"""

from planner.measurements import MIN_DISTINCT_4GRAMS

LEAST_UNITS = 32  # of a text that is judged: shorter ones repeat themselves by chance
LONG_WORD = 20  # characters per word on average, above which blanks do not part words
LOOP_SHARE = 1 / 3  # of a text, at its end and of one period, that makes it a loop; measured on the texts named in the test
LOOP_PERIODS = 4  # and no fewer


def repeats_itself(text: str) -> bool:
    """Whether too few of a text's 4-grams are distinct, or it ends in a loop."""
    units: list[str] | str = text.split()
    if len(text) > LONG_WORD * len(units):
        units = "".join(units)
    if len(units) < LEAST_UNITS:
        return False
    return distinct_4grams(units) < MIN_DISTINCT_4GRAMS or loop_len(units) >= LOOP_SHARE * len(units)


def distinct_4grams(units: list[str] | str) -> float:
    """Share of distinct ones; 1 for a text without any."""
    grams = [tuple(units[i : i + 4]) for i in range(len(units) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loop_len(units: list[str] | str) -> int:
    """Units of the longest end that is one period at least LOOP_PERIODS times over, the last of them maybe not whole."""
    back = units[::-1]
    longest = 0
    for period, match in enumerate(_matches(back)):
        if period and period + match >= LOOP_PERIODS * period:
            longest = max(longest, period + match)
    return longest


def _matches(units: list[str] | str) -> list[int]:
    """[i] how far the units from i on agree with those from 0 on (the Z function)."""
    found, left, right = [0] * len(units), 0, 0
    for i in range(1, len(units)):
        same = min(right - i, found[i - left]) if i < right else 0
        while i + same < len(units) and units[same] == units[i + same]:
            same += 1
        found[i] = same
        if i + same > right:
            left, right = i, i + same
    return found
