"""Which starts of a server, and which loads against each, tell what drafting does at every load.

The longest draft length has counters for every position's acceptance; the shortest and one between say what a drafted token costs. An
engine that takes a draft length by running batch shows another one at each load of one start: a staircase, and idle is one of its steps.
Loads lie a factor of SPREAD apart, and each well inside its step, since the running batch dips whenever a request is followed by the next.
"""

import math
from itertools import pairwise
from typing import NamedTuple

from planner.exports import Step

SPREAD = 4.0  # between two loads, at most
MIN_LOADS = 3  # where the range holds as many


class Probe(NamedTuple):
    """One start of the server, and the loads to run against it."""

    steps: tuple[Step, ...]  # by running batch; empty: off
    loads: tuple[int, ...]  # concurrencies, ascending

    def draft_len(self, load: int) -> int:
        return next((step.draft_len for step in self.steps if load <= step.batch_to), self.steps[-1].draft_len if self.steps else 0)


def loads_between(first: int, last: int) -> list[int]:
    """Concurrencies from first to last, evenly spread on a log scale."""
    most = max(MIN_LOADS, math.ceil(math.log(last / first) / math.log(SPREAD)) + 1) if last > first else 1
    return sorted({round(first * (last / first) ** (i / max(1, most - 1))) for i in range(most)})


def draft_lens(longest: int, yours: int | None = None) -> list[int]:
    """The longest, one between and 1, the longest first; what the user runs now stands for the one between, as it is to be beaten."""
    between = yours if yours is not None and 1 < yours < longest else round(math.sqrt(longest))
    return sorted({longest, between, 1}, reverse=True)


def probes(loads: list[int], lengths: list[int], *, scheduled: bool) -> list[Probe]:
    """Off, and then a start for each length: at every load the same one, or of staircases that shift from start to start.

    lengths  the longest first
    """
    off, last = Probe((), tuple(loads)), loads[-1]
    if not scheduled or len(loads) == 1:
        return [off, *(Probe((Step(batch_from=1, batch_to=last, draft_len=K),), tuple(loads)) for K in lengths)]
    rungs = [*lengths, 0]
    return [off, *(staircase(loads, [rungs[(i + shift) % len(rungs)] for i in range(len(loads))]) for shift in range(len(lengths)))]


def staircase(loads: list[int], lengths: list[int]) -> Probe:
    """A draft length for each load; a step ends in the middle between two loads, on a log scale."""
    ends = [math.ceil(math.sqrt(a * b)) - 1 for a, b in pairwise(loads)]
    ends = [max(end, load) for end, load in zip(ends, loads, strict=False)] + [loads[-1]]
    starts = [1, *(end + 1 for end in ends[:-1])]
    steps = [Step(batch_from=a, batch_to=b, draft_len=K) for a, b, K in zip(starts, ends, lengths, strict=True)]
    merged = steps[:1]
    for step in steps[1:]:
        if step.draft_len == merged[-1].draft_len:
            merged[-1] = Step(batch_from=merged[-1].batch_from, batch_to=step.batch_to, draft_len=step.draft_len)
        else:
            merged.append(step)
    return Probe(tuple(merged), tuple(loads))
