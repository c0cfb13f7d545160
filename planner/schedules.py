"""A Schedule: what to run by load and context, for a server whose load changes. Plain JSON.

Times are seconds, sizes bytes. Every predicted number is an interval; `low` and `high` bound it at 90 %.
"""

from typing import Annotated, Literal

from msgspec import Meta

from planner.measurements import Name
from planner.plans import PLAN_SCHEMA_VERSION, Interval, Real, Sentence
from planner.serving import OFF
from planner.specs import Count, DraftLen, KVPolicy, Spec


class Setting(Spec, kw_only=True):
    """What a server runs: off (`none`), a drafter that is loaded and idle (draft_len 0), or one that drafts."""

    drafter: Name = OFF
    draft_len: DraftLen = 0
    tree: None = None  # chains only, so far
    kv: KVPolicy | None = None  # of the drafter; None: as the engine has it


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
    e2e_s: Real | None
    notes: list[Sentence] = []  # interpolated, extrapolated, assumed
