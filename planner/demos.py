"""A Demo: a published table of measurements, half of it hidden, predicted, and judged by what was measured. Plain JSON."""

from planner.measurements import Name, Share
from planner.plans import Interval, Real, Sentence
from planner.schedules import Schedule, Setting
from planner.specs import Count, Spec


class DemoCell(Spec, kw_only=True):
    """A cell that planner did not see."""

    setting: Setting
    concurrency: Count
    predicted: Interval  # tokens per second of all requests
    measured: Real

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted.value / self.measured - 1


class DemoLoad(Spec, kw_only=True):
    """The choice at one load among the settings that the table holds, by what was measured of them."""

    concurrency: Count
    chosen: Setting
    best: Setting
    chosen_tokens_per_s: Real
    best_tokens_per_s: Real

    @property
    def regret(self) -> float:
        return 1 - self.chosen_tokens_per_s / self.best_tokens_per_s


class Rule(Spec, kw_only=True):
    """What a simpler rule would have lost over the same loads."""

    rule: Name
    regret: Real  # mean over loads
    worst: Real


class Demo(Spec, kw_only=True):
    source: Sentence
    num_cells: Count  # of the table
    num_seen: Count  # of these, given to planner
    commands: list[Sentence]  # that do the same
    schedule: Schedule
    cells: list[DemoCell]
    mean_error: Real  # of the throughput of unseen cells, absolute and relative
    inside: Share  # of unseen cells, those within their 90 % interval
    loads: list[DemoLoad]
    rules: list[Rule]  # planner's first
    files: list[Name]
    seconds: Real
