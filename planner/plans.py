"""A Plan: what to run, what it should cost, what was nearly as good, and what was refused and why. Plain JSON.

Times are seconds, sizes bytes. Every predicted number is an interval; `low` and `high` bound it at 90 %.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from planner.files import read_bytes, write_whole
from planner.measurements import DrafterModel, Environment, Name, Natural, Seconds, decode_checked, encode
from planner.specs import AdaptiveTree, Count, DraftConfig, DraftLen, Objective, Positive, Price, Size, Spec, Weights, Workload

PLAN_SCHEMA_VERSION = 1
CONFIDENCE = 0.90
PER_MILLION_TOKENS = 1e6 / 3600  # price per hour x seconds per token -> price per million tokens

Real = Annotated[float, Meta(ge=-1e15, le=1e15)]
Sentence = Annotated[str, Meta(max_length=2000)]


class Interval(Spec, kw_only=True):
    """An estimate and its 90 % interval."""

    value: Real
    low: Real
    high: Real

    def __post_init__(self):
        if not self.low <= self.value <= self.high:
            raise ValueError(f"an interval needs low <= value <= high, got {self.low}, {self.value}, {self.high}")

    def scaled(self, factor: float) -> "Interval":
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


class Estimate(Spec, kw_only=True):
    """What one configuration should cost and gain under a workload."""

    config: DraftConfig
    tokens_per_round: Interval
    round_s: Interval  # mean over the rounds of a text
    tpot_s: Interval
    ttft_s: Interval
    e2e_s: Interval
    memory_bytes: Interval
    speedup: Interval  # of the objective over plain decoding
    sd_rounds_per_token: Real  # between texts of output_len tokens, chance within a text included
    num_texts: Natural  # behind the acceptance
    notes: list[Sentence] = []  # interpolated, extrapolated, repetitive text
    joules_per_token: Interval | None = None  # of decoding, after the first token; None where no energy was measured
    price_per_million_tokens: Interval | None = None  # of output, prefill charged; None without a price per device-hour


class Tie(Spec, kw_only=True):
    """A configuration that cannot be told from the choice."""

    config: DraftConfig
    difference: Interval  # objective of this one over the choice's, minus 1
    cost_of_being_wrong: Real  # how much worse the choice is, relatively, should this one turn out at its best
    settle: Sentence


class Rejected(Spec, kw_only=True):
    """A configuration that was not considered, and why."""

    config: DraftConfig
    reason: Sentence


class Plan(Spec, kw_only=True):
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    planner_version: Name
    profile_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    model: Name
    target_fingerprint: Name
    drafter_models: list[DrafterModel] = []
    device: Name
    dtype: Name
    execution_mode: Name = "eager"
    weights: Weights = "full"  # of the target
    tensor_parallel: Count = 1  # devices that share the target
    rope_theta: Positive | None = None  # as the profile's user gave it, in place of the checkpoint's
    max_context_len: Count | None = None  # likewise
    source: Name
    workload: Workload
    objective: Objective
    price_per_hour: Price | None = None
    memory_cap_bytes: Size | None
    chosen: DraftConfig
    estimate: Estimate
    baseline: Estimate
    speedup: Interval
    break_even_tokens_per_round: Real  # below this the best speculative configuration loses to plain decoding
    best_speculative: DraftConfig | None  # what the break-even is about: the choice, or the best refused in favour of off
    runners_up: list[Estimate]  # the next best, best first
    by_draft_len: list[Estimate] = []  # chains of the best speculative drafter and kv policy, by every draft_len that may be used
    ties: list[Tie]
    rejected: list[Rejected]
    num_candidates: Count
    latency_error: Real  # relative rms error of round time on cells left out of the fit
    latency_form: Name
    seen_texts: list[str]  # "source@offset+length" of the profile, so that check can use others
    command: Sentence
    notes: list[Sentence] = []


class TreeFile(Spec, kw_only=True):
    """An adaptive tree by itself, for who runs it without the plan."""

    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    kind: Literal["tree"] = "tree"
    tree: AdaptiveTree


class Trial(Spec, kw_only=True):
    """One prompt decoded with one configuration, measured; in a batch, the rounds and bytes are those of the whole batch."""

    config: DraftConfig
    text: Name  # which prompt
    batch: Count = 1  # streams that were decoded side by side, this one included
    output_len: Count
    prefill_s: Seconds
    start_s: Seconds  # selection and the first token
    decode_s: Seconds  # everything after the first token, to the end of the round that wrote the last
    drafted: list[DraftLen]  # by round, of this stream; of a tree, nodes
    accepted: list[Natural]
    round_s: list[Seconds]  # up to the one in which this stream ended
    cache_bytes: Size  # caches, and weights of the drafter's own
    peak_bytes: Size
    decode_joules: Annotated[float, Meta(ge=0, le=1e9)] | None = None  # this stream's share of the rounds until its end, as decode_s

    @property
    def tpot_s(self) -> float:
        return self.decode_s / max(1, self.output_len - 1)

    @property
    def e2e_s(self) -> float:
        return self.prefill_s + self.start_s + self.decode_s

    @property
    def device_s_per_token(self) -> float:
        """Of the device's time, per token written: a prefill is its request's own, rounds are shared by the batch."""
        return (self.prefill_s + self.start_s + self.decode_s / self.batch) / self.output_len


class CheckCell(Spec, kw_only=True):
    """One configuration: predicted beside measured, each in its own field."""

    config: DraftConfig
    role: Literal["chosen", "baseline", "runner_up"]
    predicted: Estimate
    measured_tpot_s: Interval  # over texts
    measured_e2e_s: Interval
    measured_price_per_million_tokens: Interval | None = None
    measured_joules_per_token: Interval | None = None  # None where the device counts no energy
    measured_round_s: Real  # mean over rounds
    measured_tokens_per_round: Real
    expected_tokens_per_round: Interval  # where that mean should lie, for as many texts as were run
    measured_memory_bytes: Real
    cost_over_choice: Interval  # objective over the choice's on the same texts, minus 1
    trials: list[Trial]


class Check(Spec, kw_only=True):
    """A plan that was run."""

    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    planner_version: Name
    plan_sha256: Name
    environment: Environment
    objective: Objective
    num_texts: Count
    cells: list[CheckCell]
    best: DraftConfig  # of those measured
    regret: Interval  # objective of the choice over the best measured one's, minus 1, paired by text
    passed: bool
    verdict: Sentence
    minutes: Real
    warnings: list[Sentence] = []


class SweepCell(Spec, kw_only=True):
    """One configuration of a brute-force grid, measured."""

    config: DraftConfig
    measured_tpot_s: Interval
    measured_e2e_s: Interval
    measured_tokens_per_round: Real
    speedup: Interval  # of TPOT over plain decoding, paired by text
    trials: list[Trial]


class Studied(Spec, kw_only=True):
    """How a part of a grid was chosen, and what became of the rest."""

    num_candidates: Count
    chosen_by: Name
    failed: list[Rejected]  # begun, and not measured
    left_out: list[DraftConfig]


class Sweep(Spec, kw_only=True):
    """The grid that a plan replaces, or the part of it that a study chose."""

    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    planner_version: Name
    model: Name
    environment: Environment
    workload: Workload
    cells: list[SweepCell]
    best: DraftConfig  # of those measured
    minutes: Real
    warnings: list[Sentence] = []
    study: Studied | None = None  # None: all of the grid was run


def tokens_per_round(trials: list[Trial]) -> float:
    """Tokens after the first over rounds, pooled."""
    return sum(trial.output_len - 1 for trial in trials) / max(1, sum(len(trial.round_s) for trial in trials))


def mean_round_s(trials: list[Trial]) -> float:
    return float(np.mean([seconds for trial in trials for seconds in trial.round_s]))


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan; BadInput names the field that is wrong."""
    return decode_checked(read_bytes(path, "plan"), Plan, PLAN_SCHEMA_VERSION, f"plan {path}")


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan whole."""
    write_whole(path, encode(plan))


def save_check(check: Check, path: str | Path) -> None:
    """Write the report of a check whole."""
    write_whole(path, encode(check))


def save_sweep(sweep: Sweep, path: str | Path) -> None:
    """Write a sweep whole."""
    write_whole(path, encode(sweep))
