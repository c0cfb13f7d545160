"""planner diff: two files of a kind to what changed between them. Needs no torch."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from planner.commands.diff_choices import choices
from planner.commands.diff_ratios import matched
from planner.commands.plan import check_objective
from planner.commands.progress import Progress, Silent
from planner.diffs import Changed, Difference, Side
from planner.documents import Document, kind_of, load_document
from planner.errors import BadInput
from planner.files import read_bytes
from planner.measurements import Profile
from planner.plans import Plan, Sweep
from planner.schedules import Schedule
from planner.serving import ServingProfile
from planner.specs import Objective, Sampler, describe_sampler

SETTINGS: dict[type, tuple[str, ...]] = {  # fields that say what was measured or asked, and how; lists of samples are not among them
    Profile: (
        "model", "target", "target_fingerprint", "weights_bytes", "dtype", "execution_mode", "weights", "tensor_parallel", "rope_theta",
        "max_context_len", "device", "environment", "source", "seed", "contexts", "samplers", "max_draft_len",
    ),
    ServingProfile: ("source", "model", "drafters", "system"),
    Plan: (
        "model", "target_fingerprint", "device", "dtype", "execution_mode", "weights", "tensor_parallel", "rope_theta", "max_context_len", "source",
        "workload", "objective", "price_per_hour", "memory_cap_bytes", "profile_sha256",
    ),
    Schedule: (
        "model", "system", "source", "tensor_parallel", "objective", "goodput", "price_per_hour", "memory_cap_bytes", "concurrency_from",
        "concurrency_to", "contexts", "output_len", "weighted", "deployment", "profile_sha256",
    ),
    Sweep: ("model", "environment", "workload"),
}  # fmt: skip
MOMENT = ("environment.date", "environment.busy_share", "environment.load_1min")  # of one run, not a setting


def diff(before: str | Path, after: str | Path, *, objective: Objective = "e2e", progress: Progress = Silent()) -> Difference:
    """What changed from one file to the other: two profiles, plans, schedules or sweeps. BadInput unless both are of one kind.

    objective  that profiles are planned for, to compare the choices they lead to; plans, schedules and sweeps have their own
    """
    if objective in ("goodput", "price"):
        raise BadInput(f"profiles are compared by e2e, tpot or throughput, got {objective}; {objective} needs limits or a price, plan with them")
    check_objective(objective, None)
    one, other = load_document(before), load_document(after)
    if type(one) is not type(other):
        raise BadInput(
            f"diff compares two files of a kind, got a {kind_of(one).name} and a {kind_of(other).name}; give two profiles, plans or sweeps"
        )
    if type(one) not in SETTINGS:
        raise BadInput(f"diff compares profiles, plans, schedules and sweeps, got two of kind {kind_of(one).name}")
    settings = [_flat(document) for document in (one, other)]
    names = [name for name in dict.fromkeys([*settings[0], *settings[1]]) if settings[0].get(name) != settings[1].get(name)]
    ratios, only_before, only_after = matched(one, other)
    led, notes = choices(one, other, before, after, objective, progress)
    if isinstance(one, Plan | Schedule) and one.profile_sha256 == other.profile_sha256:
        notes.append("both were made from the same profile: what its errors share is counted twice, so the intervals are too wide")
    return Difference(
        kind=kind_of(one).name, before=_side(one, before), after=_side(other, after),
        changed=[Changed(what=name[:500], before=settings[0].get(name), after=settings[1].get(name)) for name in names],
        ratios=ratios, choices=led, only_before=only_before, only_after=only_after, notes=notes,
    )  # fmt: skip


# Settings


def _side(document: Document, path: str | Path) -> Side:
    content = read_bytes(path, "document")
    model = document.model.name if isinstance(document, ServingProfile) else document.model
    device = {
        Profile: lambda: document.device.name, Plan: lambda: document.device, Sweep: lambda: document.environment.platform,
        ServingProfile: lambda: document.system.name, Schedule: lambda: document.system,
    }[type(document)]()  # fmt: skip
    environment = getattr(document, "environment", None)
    return Side(
        path=str(path)[:500], sha256=hashlib.sha256(content).hexdigest(), about=f"{model} on {device}",
        date=environment.date if environment else getattr(document, "date", ""),
    )  # fmt: skip


def _flat(document: Document) -> dict[str, str | float | bool | None]:
    """Every setting by its dotted name; a list as one text."""
    return {
        name: value for field in SETTINGS[type(document)] for name, value in _leaves(field, getattr(document, field)) if name not in MOMENT
    }  # fmt: skip


def _leaves(name: str, value: object) -> Iterator[tuple[str, str | float | bool | None]]:
    if isinstance(value, Sampler):
        yield name, describe_sampler(value)
    elif isinstance(value, msgspec.Struct):
        yield from _leaves(name, msgspec.structs.asdict(value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        yield name, ", ".join(str(inner) for _, part in _listed(name, value) for inner in part)[:500]
    else:
        yield name, value if isinstance(value, str | float | int | bool | None) else str(value)


def _listed(name: str, values: Sequence) -> Iterator[tuple[str, list]]:
    for value in values:
        yield name, [leaf for _, leaf in _leaves(name, value)]
