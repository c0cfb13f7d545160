"""A Difference: what changed from one profile, plan, schedule or sweep to another. Plain JSON.

A ratio is the later over the earlier. Its 90 % interval holds what each file knows of its own scatter, and nothing that both share.
"""

from typing import Literal

from planner.measurements import Name
from planner.plans import Interval, Real, Sentence
from planner.specs import Count, Spec

ROUNDING = 1e-9  # of a ratio of equal numbers that were computed in another order
Unit = Literal["s", "tokens", "tokens/s", "bytes", "share", "x"]


class Side(Spec, kw_only=True):
    """One of the two files."""

    path: Name
    sha256: Name
    date: Name  # of the measurement, ISO 8601; empty where the file does not say
    about: Sentence  # model and device


class Changed(Spec, kw_only=True):
    """A setting, a version or a size that is not the same; None where it is not there."""

    what: Name  # field names of the file, joined by dots
    before: str | float | bool | None
    after: str | float | bool | None


class Ratio(Spec, kw_only=True):
    """One quantity in both files."""

    quantity: Name
    of: Name  # configuration, drafter or setting
    at: Name  # context, sampler, load
    unit: Unit
    before: Interval
    after: Interval
    ratio: Interval
    pairs: Count | None = None  # texts or loads that were compared one by one; None: the two means were
    known: bool = True  # False: there is one value on each side, and no scatter to judge by

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.known and not self.ratio.low - ROUNDING <= 1 <= self.ratio.high + ROUNDING


class Choice(Spec, kw_only=True):
    """What either file leads to, at one workload or load."""

    at: Name
    before: Name
    after: Name
    ratio: Interval | None  # time per token of the later's choice over the earlier's, each by its own file; None where nobody says
    carried_loss: Real | None = None  # by the later file, what the earlier's choice would lose there; None where it does not know it


class Difference(Spec, kw_only=True):
    kind: Name  # of both files
    before: Side
    after: Side
    changed: list[Changed]
    ratios: list[Ratio]  # by quantity
    choices: list[Choice]
    only_before: list[Sentence]  # what was measured there alone
    only_after: list[Sentence]
    notes: list[Sentence]
