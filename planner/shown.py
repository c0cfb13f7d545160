"""What a page of a document shows: the document, what it was made from and measured by, and what they say together."""

from pathlib import Path
from typing import NamedTuple

from planner.documents import Document
from planner.measurements import Profile
from planner.plans import Check, Estimate, Interval, Plan, Sweep
from planner.schedules import Schedule
from planner.serving import Summary
from planner.specs import DraftConfig, DrafterSpec, KVPolicy, Objective, Sampler, Workload


class SpeedupMap(NamedTuple):
    """Predicted speedups over plain decoding of every configuration, for one workload."""

    workload: Workload
    objective: Objective
    estimates: list[Estimate]  # all that speculate and could be predicted, those over the cap among them
    baseline: Estimate
    chosen: DraftConfig
    ties: list[DraftConfig]
    cap_bytes: int | None = None


class RoundCurve(NamedTuple):
    """Rounds of one drafter and policy by how much is drafted in them, seconds: tokens of chains, or nodes of trees."""

    drafter: DrafterSpec
    kv: KVPolicy
    context_len: int
    batch: int
    predicted: list[tuple[int, Interval]]  # drafted, round time; the interval of a cell not measured
    measured: list[tuple[int, float]]  # drafted, median
    levels: int = 0  # of the trees; 0: chains


class AcceptanceCurve(NamedTuple):
    """P(first draft is accepted) by kv budget, means over texts."""

    drafter: DrafterSpec
    kv: KVPolicy  # any of them: the budget varies
    context_len: int
    sampler: Sampler
    by_budget: list[tuple[int | None, Interval]]  # None: full KV


class Shown(NamedTuple):
    """A document, what it was made from and checked by where that was given, and what both say together."""

    document: Document
    reported: Document | Summary  # what stands for it in a report: a serving profile in short
    path: Path
    sha256: str
    plans: list[Plan] = []  # that a profile leads to, for each context and sampler
    maps: list[SpeedupMap] = []
    rounds: list[RoundCurve] = []
    acceptance: list[AcceptanceCurve] = []
    schedule: Schedule | None = None  # that a serving profile leads to
    measured: Check | Sweep | None = None  # that ran the plan, or its grid
    profile: Profile | None = None
    refused: str = ""  # why nothing could be predicted from a profile
