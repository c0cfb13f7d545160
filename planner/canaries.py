"""A Canary: the same prompts sent to two servers in turn, one with the plan and one without, compared pair by pair. Plain JSON.

Times are seconds. Intervals hold at 90 % for all loads together.
"""

from typing import Literal

from planner.measurements import Name, Natural
from planner.plans import PLAN_SCHEMA_VERSION, Interval, Real, Sentence
from planner.specs import Count, Positive, Spec


class Answer(Spec, kw_only=True):
    """One streamed request, as its client saw it."""

    ttft_s: Real
    decode_s: Real  # from the first token to the last
    output_tokens: Count  # as the server counts them
    prompt_tokens: Natural
    chunks: Count  # that held text
    longest_gap_s: Real  # between two of them

    @property
    def tpot_s(self) -> float:
        return self.decode_s / (self.output_tokens - 1)


class Group(Spec, kw_only=True):
    """Requests that ran side by side against one server."""

    wall_s: Real
    answers: list[Answer]

    @property
    def output_tokens_per_s(self) -> float:
        return sum(answer.output_tokens for answer in self.answers) / self.wall_s


class CanaryCell(Spec, kw_only=True):
    """One concurrency. Speedups are of the plan's server over the baseline's."""

    concurrency: Count
    num_prompts: Count
    tpot_s: Real  # geometric mean over prompts
    baseline_tpot_s: Real
    tpot_speedup: Interval
    output_tokens_per_s: Real  # geometric mean over groups
    baseline_output_tokens_per_s: Real
    throughput_speedup: Interval
    predicted_speedup: Real | None  # of the plan, by time per token; None where it has no prediction for this load
    verdict: Literal["pass", "fail", "undecided"]
    more_prompts: Natural | None  # that would probably decide; None: decided, or no number would
    groups: list[Group]
    baseline_groups: list[Group]


class Canary(Spec, kw_only=True):
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    kind: Literal["canary"] = "canary"
    planner_version: Name
    plan_sha256: Name
    model: Name
    server: Name  # address
    baseline_server: Name
    measure: Literal["tpot", "throughput"]  # whose speedup decides
    min_speedup: Positive
    output_len: Count  # asked for; a text may end early
    temperature: Real
    seed: int
    cells: list[CanaryCell]
    passed: bool
    decided: bool
    verdict: Sentence
    notes: list[Sentence] = []
