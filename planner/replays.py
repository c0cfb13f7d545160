"""A ServedReplay: what every drafter, budget and draft_len would have had accepted on served traffic. Plain JSON.

Lines weigh by the tokens they wrote, as they did on the server. Every estimate is an interval over lines, 90 %.
"""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from planner.files import write_whole
from planner.measurements import AcceptanceSample, Environment, Name, Natural, Share, encode
from planner.plans import Interval, Real, Sentence
from planner.specs import Count, DrafterSpec, DraftLen, DType, KVPolicy, Sampler, Spec, Weights

REPLAY_SCHEMA_VERSION = 1


class UnitCosts(Spec, kw_only=True, tag_field="kind", tag="unit"):
    """A round costs 1, as a plain step does, and draft_cost for every token it drafts."""

    draft_cost: Annotated[float, Meta(ge=0, le=1000)]


class ProfiledCosts(Spec, kw_only=True, tag_field="kind", tag="profile"):
    """A round costs the seconds that a profile's latency fit gives it at the line's length."""

    profile_sha256: Name


Costs = UnitCosts | ProfiledCosts


class ServedText(Spec, kw_only=True):
    """A line that was replayed."""

    line: Count  # in the log
    context_len: Count  # prompt tokens
    output_len: Annotated[int, Meta(ge=2, le=2**30)]
    sampler: Sampler
    distinct_4grams: Share  # of the output
    impossible: Natural  # output tokens that the sampler could not have drawn, by the model as it runs here


class Length(Spec, kw_only=True):
    """One draft_len for all rounds."""

    draft_len: DraftLen
    tokens_per_round: Interval
    acceptance_rate: Interval | None  # accepted / drafted; None where nothing was ever drafted
    cost: Interval  # per token


class Headroom(Spec, kw_only=True):
    """What choosing draft_len better could gain, in cost per token."""

    draft_len: DraftLen  # the best fixed one; 0 is off
    fixed: Interval
    rule: Name  # the best adaptive rule
    adaptive: Interval  # of rules tuned on the other half of the lines
    adaptive_over_fixed: Interval  # minus 1, paired by line
    oracle: Interval  # sees what a round would accept before it drafts: no rule costs less
    oracle_over_fixed: Interval


class ServedDrafter(Spec, kw_only=True):
    drafter: DrafterSpec
    kv: KVPolicy
    lengths: list[Length]  # draft_len 1, 2, .. in order
    headroom: Headroom


class ServedGroup(Spec, kw_only=True):
    """Lines that are summed up together: all of them, or those of one sampler."""

    samplers: list[Sampler]  # several: the whole log, in the mixture it was served in
    num_texts: Count
    num_tokens: Count  # written, the first of each line included
    impossible: Natural
    plain_cost: Real  # per token without a drafter
    drafters: list[ServedDrafter]
    best: Natural  # index into drafters: the least fixed cost


class ServedReplay(Spec, kw_only=True):
    schema_version: Literal[1] = REPLAY_SCHEMA_VERSION
    planner_version: Name
    log: Name  # file name and the beginning of its sha256
    num_lines: Count  # in the log; texts has those that were drawn
    skipped: dict[Name, Natural]  # reason -> lines that were drawn and could not be replayed
    model: Name
    target_fingerprint: Name
    dtype: DType
    execution_mode: Name
    weights: Weights
    device: Name
    environment: Environment
    seed: int  # that drew the lines
    costs: Costs
    max_draft_len: Annotated[int, Meta(ge=1, le=255)]
    groups: list[ServedGroup]  # the whole log first, then each of several samplers
    texts: list[ServedText]
    acceptance: list[AcceptanceSample]  # raw: every drafter along every text
    minutes: Real
    warnings: list[Sentence] = []


def save_replay(replay: ServedReplay, path: str | Path) -> None:
    """Write a replay whole."""
    write_whole(path, encode(replay))
