"""An Export: what a folder of an engine's files says of the plan it was written from. Plain JSON, the folder's plan.json."""

from typing import Annotated, Literal

from msgspec import Meta

from planner.measurements import Name
from planner.plans import PLAN_SCHEMA_VERSION, Interval, Real, Sentence
from planner.specs import Count, DraftLen, Objective, Spec

EXPORT_FILE = "plan.json"
Fidelity = Literal["exact", "approximated", "dropped"]


class Step(Spec, kw_only=True):
    """How much is drafted while so many requests decode at once, both ends included."""

    batch_from: Count
    batch_to: Count
    draft_len: DraftLen


class Knob(Spec, kw_only=True):
    """What became of one knob of the plan."""

    knob: Name
    planned: Sentence
    exported: Sentence
    fidelity: Fidelity
    reason: Sentence = ""  # of what is not exact


class CostRow(Spec, kw_only=True):
    """What was planned and what the engine can do, each over off, at one load."""

    concurrency: Count
    context_len: Count
    planned: Sentence
    exported: Sentence
    planned_speedup: Interval
    exported_speedup: Interval
    loss: Real  # of the objective, relatively


class Export(Spec, kw_only=True):
    schema_version: Literal[1] = PLAN_SCHEMA_VERSION
    kind: Literal["export"] = "export"
    planner_version: Name
    plan_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    profile_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    engine: Name
    engine_version: Name
    engine_versions: Name  # for which the same would be written
    checked: Sentence  # by what
    model: str
    method: Name | None  # None: nothing is drafted
    draft_model: str | None
    objective: Objective
    context_len: Count
    output_len: Count
    steps: list[Step]
    knobs: list[Knob]
    cost: list[CostRow]  # of what the engine lacks; empty where it lacks nothing, or nothing could be computed
    cost_note: Sentence  # why it is empty, or how it was computed
    files: list[Name]
    argv: list[str]  # the engine's command without its configuration file, for containers
    run: str  # one line of shell
    measure: str
    notes: list[Sentence] = []
