"""A Drift: what a live server was seen to do, beside what the plan predicted for the load it has. Plain JSON.

Times are seconds. Measured and predicted numbers are 90 % intervals.
"""

from typing import Literal

from planner.measurements import Name, Natural
from planner.plans import PLAN_SCHEMA_VERSION, Interval, Real, Sentence
from planner.schedules import Setting
from planner.specs import Spec


class Shift(Spec, kw_only=True):
    """One quantity, measured and predicted, at the same load and draft lengths."""

    measured: Interval
    predicted: Interval
    ratio: Interval  # measured / predicted
    moved: bool  # the ratio is shown to differ from 1 by more than the tolerance


class Position(Spec, kw_only=True):
    """Share of rounds in which a drafted token was accepted, by its place in the round."""

    measured: Real
    predicted: Real | None  # None: the plan has no prediction so far out


class Choice(Spec, kw_only=True):
    """What a setting should do now: predicted rounds, scaled as the measured ones are, with measured acceptance."""

    setting: Setting
    tpot_s: Real
    gain: Interval  # in the plan's objective over what runs, relatively
    restart: bool  # what drafts, or on llama.cpp how far, is settled when the server starts
    extrapolated: bool = False  # drafts longer than those seen are accepted as the plan thought


class Drift(Spec, kw_only=True):
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    kind: Literal["drift"] = "drift"
    planner_version: Name
    plan_sha256: Name
    model: Name
    engine: Name
    seconds: Real | None  # watched, of the later half where acceptance changed under way; None where nobody took the time
    num_scrapes: Natural
    num_restarts: Natural
    num_failed: Natural
    concurrency: Real  # requests in the system, as a generated token sees it: mean over tokens
    concurrency_low: Real
    concurrency_high: Real
    running_batch: Real | None  # requests that run at once, not waiting
    context_len: Natural | None  # mean prompt
    context_planned: Natural  # whose predictions are compared
    planned: Setting  # what the plan runs at this load
    running: Setting  # what the server was seen to run
    draft_len: Real  # drafted tokens per round that drafts
    positions: list[Position]
    tokens_per_round: Shift
    round_s: Shift
    tpot_s: Shift
    off_tpot_s: Interval  # as planned
    break_even_tokens_per_round: Interval  # of measured rounds: below it, off is quicker
    speedup: Interval  # of the objective over off, now
    speedup_planned: Real  # at this load, of the setting that runs
    load_moved: bool
    pays: Literal["yes", "no", "not known"]
    verdict: Sentence
    causes: list[Sentence]  # what moved: acceptance, latency, load
    choices: list[Choice]  # settings that a change could lead to, the best first
    advice: list[Sentence]
    notes: list[Sentence] = []
