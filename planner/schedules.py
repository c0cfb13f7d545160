"""A Schedule: what to run by load and context, for a server whose load changes. Plain JSON.

Times are seconds, sizes bytes. Every predicted number is an interval; `low` and `high` bound it at 90 %.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from planner.files import read_bytes, write_whole
from planner.measurements import Name, decode_checked, encode
from planner.plans import PLAN_SCHEMA_VERSION, Interval, Real, Sentence
from planner.serving import OFF
from planner.specs import Count, DraftLen, KVPolicy, Objective, Positive, Price, Size, SparseKV, Spec, describe_kv


class Setting(Spec, kw_only=True):
    """What a server runs: off (`none`), a drafter that is loaded and idle (draft_len 0), or one that drafts."""

    drafter: Name = OFF
    draft_len: DraftLen = 0
    tree: None = None  # chains only, so far
    kv: KVPolicy | None = None  # of the drafter; None: as the engine has it

    @property
    def idle(self) -> bool:
        return self.drafter != OFF and self.draft_len == 0


class ServedEstimate(Spec, kw_only=True):
    """What one setting should do at one load."""

    setting: Setting
    concurrency: Count  # requests in the system
    context_len: Count
    output_len: Count
    tpot_s: Interval
    output_tokens_per_s: Interval  # of all requests together
    round_s: Interval
    tokens_per_round: Interval
    running_batch: Real  # requests that decode at once; the rest waits or is prefilled
    ttft_s: Real | None  # queueing included; None where none was measured
    e2e_s: Real | None  # of a request, when each is followed by the next: concurrency x output_len / output_tokens_per_s
    price_per_million_tokens: Interval | None = None  # of output; None without a price per device-hour
    notes: list[Sentence] = []  # interpolated, extrapolated, assumed


class Compared(Spec, kw_only=True):
    """A setting beside off at the same load."""

    estimate: ServedEstimate
    baseline: ServedEstimate
    speedup: Interval  # of the objective; of throughput where that is goodput


class Limits(Spec, kw_only=True):
    """What a request may take for its tokens to count as goodput; None: no limit."""

    tpot_s: Positive | None = None
    ttft_s: Positive | None = None


class SettingTie(Spec, kw_only=True):
    """A setting that cannot be told from a row's."""

    setting: Setting
    difference: Interval  # how much worse than the row's it is, relatively, mean over the row's loads
    cost_of_being_wrong: Real  # how much worse the row's setting is, should this one turn out at its best


class ScheduleRow(Spec, kw_only=True):
    """One setting for a range of loads, both ends included."""

    concurrency_from: Count
    concurrency_to: Count
    context_from: Count
    context_to: Count
    drafter: Name
    draft_len: DraftLen
    tree: None = None
    kv: KVPolicy | None = None
    margin: Real  # advantage in the objective over the runner-up, relatively, mean over the row's loads; 0 where there is none
    margin_low: Real
    margin_high: Real
    runner_up: Setting | None  # the best other setting for the whole row; None where there is no other
    ties: list[SettingTie] = []
    violation: Real = 0.0  # 0: the limits are kept throughout; else nowhere, by nothing, and this least: at most by so much, relatively
    extrapolated: bool = False  # beyond what was measured, somewhere in the row
    weight: Real | None = None  # share of the load that falls here; None without a histogram

    @property
    def setting(self) -> Setting:
        return Setting(drafter=self.drafter, draft_len=self.draft_len, tree=self.tree, kv=self.kv)


class Flip(Spec, kw_only=True):
    """Where the choice changes as load grows, and between which loads the two settings cannot be told apart."""

    context_len: Count
    concurrency: Count  # the first with the new setting
    lowest: Count  # the change may lie anywhere from here
    highest: Count  # to here
    before: Setting
    after: Setting


class Deployment(Spec, kw_only=True):
    """What a server with one drafter can run: it cannot unload it, but leave it idle. Off is a deployment, too."""

    drafter: Name
    schedule: list[ScheduleRow]
    loss: Real  # of the objective, relatively, against a free choice at each load
    gain_over_off: Interval | None  # of the objective over all loads, relatively; None where off keeps the limits at none of them


class Disagreement(Spec, kw_only=True):
    """Loads at which time per token and throughput ask for different settings, and what each choice costs by the other."""

    concurrency_from: Count
    concurrency_to: Count
    context_len: Count
    by_tpot: Setting
    by_throughput: Setting
    throughput_lost: Real  # by the setting with the best time per token, relatively, mean over these loads
    tpot_lost: Real  # by the setting with the best throughput


class LoadCurve(Spec, kw_only=True):
    """What one setting should do as load grows: columns, one entry for each load at which it can run."""

    setting: Setting
    context_len: Count
    concurrency: list[Count]  # ascending
    running_batch: list[Real]
    tokens_per_round: list[Real]
    round_s: list[Real]
    tpot_s: list[Real]
    sd_tokens: list[Real]  # standard deviations of logarithms
    sd_round: list[Real]
    sd_tpot: list[Real]

    def __post_init__(self):
        columns = [getattr(self, name) for name in self.__struct_fields__[2:]]
        if not self.concurrency or any(len(column) != len(self.concurrency) for column in columns):
            raise ValueError(f"columns must have one entry for each of 1 or more loads, got {[len(column) for column in columns]}")
        if any(a >= b for a, b in pairwise(self.concurrency)) or min(min(column) for column in columns[:5]) <= 0 or min(map(min, columns[5:])) < 0:
            raise ValueError("loads must ascend, predictions be above 0, and standard deviations not below")


class Schedule(Spec, kw_only=True):
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    kind: Literal["schedule"] = "schedule"
    planner_version: Name
    profile_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    model: Name
    system: Name
    source: Name
    tensor_parallel: Count = 1
    objective: Objective
    goodput: Limits | None = None
    price_per_hour: Price | None = None
    memory_cap_bytes: Size | None = None
    concurrency_from: Count
    concurrency_to: Count
    contexts: list[Count]
    output_len: Count
    weighted: bool  # by a histogram of load; else every load counts alike
    deployment: Name | None  # whose schedule it is; None: the best of all at each load, deployments free to differ
    schedule: list[ScheduleRow]
    flips: list[Flip]
    deployments: list[Deployment]  # the best first
    disagreements: list[Disagreement]
    estimates: list[Compared]  # of each row at its ends
    curves: list[LoadCurve] = []  # of off and of all settings of the drafters that rows use, for what watches a server
    num_candidates: Count  # settings x loads x contexts
    notes: list[Sentence] = []


def describe_setting(setting: Setting) -> str:
    """A setting in a few words, as tables show it."""
    if setting.drafter == OFF:
        return "off"
    if setting.idle:
        return f"{setting.drafter} idle"
    kv = f" {describe_kv(setting.kv)}" if isinstance(setting.kv, SparseKV) else ""
    return f"{setting.drafter}{kv} K={setting.draft_len}"


def load_schedule(path: str | Path) -> Schedule:
    """Read and check a schedule; BadInput names the field that is wrong."""
    return decode_checked(read_bytes(path, "schedule"), Schedule, PLAN_SCHEMA_VERSION, f"schedule {path}", "schedule")


def save_schedule(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule whole."""
    write_whole(path, encode(schedule))
