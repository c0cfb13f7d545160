"""Of planner diff: what two files of a kind lead to, and what the choice of the one would lose by the other."""

from pathlib import Path

from planner.commands.diff_ratios import at_load
from planner.commands.plan import find_workload
from planner.commands.progress import Progress
from planner.commands.schedule import schedule
from planner.diffs import Choice
from planner.documents import Document
from planner.errors import BadInput
from planner.measurements import Profile
from planner.plans import Plan
from planner.schedules import LoadCurve, Schedule, ScheduleRow, Setting, describe_setting
from planner.serving import ServingProfile
from planner.specs import DraftConfig, Objective, Workload, describe, describe_sampler, describe_workload


def choices(
    one: Document, other: Document, before: str | Path, after: str | Path, objective: Objective, progress: Progress
) -> tuple[list[Choice], list[str]]:
    from planner.search.ratios import ratio_of

    match one, other:
        case Profile(), Profile():
            return _profile_choices(one, other, objective, progress)
        case ServingProfile(), ServingProfile():
            return _served_choices(one, other, before, after, objective, progress)
        case Schedule(), Schedule():
            return _schedule_choices(one, other), []
        case Plan(), Plan():
            at = describe_workload(one.workload) if one.workload == other.workload else "the workload of each"
            ratio = ratio_of(other.estimate.tpot_s, one.estimate.tpot_s)
            carried = next((e for e in (other.estimate, *other.runners_up, other.baseline) if e.config == one.chosen), None)
            loss = carried.tpot_s.value / other.estimate.tpot_s.value - 1 if carried else None
            return [Choice(at=at, before=describe(one.chosen), after=describe(other.chosen), ratio=ratio, carried_loss=loss)], []
    sides = [next(cell for cell in sweep.cells if cell.config == sweep.best) for sweep in (one, other)]
    carried = next((cell for cell in other.cells if cell.config == one.best), None)
    loss = carried.measured_tpot_s.value / sides[1].measured_tpot_s.value - 1 if carried else None
    at = describe_workload(one.workload) if one.workload == other.workload else "the workload of each"
    ratio = ratio_of(sides[1].measured_tpot_s, sides[0].measured_tpot_s)
    return [Choice(at=at, before=describe(one.best), after=describe(other.best), ratio=ratio, carried_loss=loss)], []


def _profile_choices(one: Profile, other: Profile, objective: Objective, progress: Progress) -> tuple[list[Choice], list[str]]:
    """The plans both profiles lead to, at each context and sampler that both have."""
    from planner.search.objective import fit_models
    from planner.search.optimize import make_plan
    from planner.search.ratios import ratio_of

    shared = [(context, sampler) for context in one.contexts if context in other.contexts for sampler in one.samplers if sampler in other.samplers]
    batch = next(iter(sorted({s.batch for s in one.rounds} & {s.batch for s in other.rounds})), None)
    if not shared or batch is None:
        return [], ["the profiles share no context, sampler and batch: what they lead to cannot be compared"]
    found, notes = [], []
    output_len = min(max((text.output_len for text in profile.texts), default=128) for profile in (one, other))
    progress.stage("plans of both", 2 * len(shared))
    models = fit_models(other)
    for context, sampler in shared:
        workload = find_workload(one, context, output_len, sampler.temperature, sampler.top_p, sampler.top_k, batch)
        try:
            plans = []
            for profile in (one, other):
                plans.append(make_plan(profile, "0" * 64, workload, objective=objective, memory_cap_bytes=None))
                progress.advance()
        except BadInput as error:
            notes.append(f"context {context}, {describe_sampler(sampler)}: {error}")
            continue
        loss = _carried(models, plans[0].chosen, plans[1], workload)
        found.append(
            Choice(
                at=describe_workload(workload), before=describe(plans[0].chosen), after=describe(plans[1].chosen), carried_loss=loss,
                ratio=ratio_of(plans[1].estimate.tpot_s, plans[0].estimate.tpot_s),
            )
        )  # fmt: skip
    return found, notes


def _carried(models, chosen: DraftConfig, plan: Plan, workload: Workload) -> float | None:
    """What another profile's choice would lose in time per token here, where it was measured."""
    from planner.search.objective import predict

    try:
        return predict(models, chosen, workload).estimate.tpot_s.value / plan.estimate.tpot_s.value - 1
    except BadInput:
        return None


def _served_choices(
    one: ServingProfile, other: ServingProfile, before: str | Path, after: str | Path, objective: Objective, progress: Progress
) -> tuple[list[Choice], list[str]]:
    """The schedules both profiles lead to, over the loads that both were measured at."""
    contexts = sorted({cell.context_len for cell in one.cells} & {cell.context_len for cell in other.cells})
    first = max(min(cell.concurrency for cell in profile.cells) for profile in (one, other))
    last = min(max(cell.concurrency for cell in profile.cells) for profile in (one, other))
    if not contexts or first > last:
        return [], ["the profiles share no context or no range of loads: what they lead to cannot be compared"]
    output_len = min(max(cell.output_len for cell in profile.cells) for profile in (one, other))
    try:
        progress.stage("schedules of both", 2)
        made = []
        for path in (before, after):
            made.append(schedule(path, concurrency=(first, last), contexts=contexts, output_len=max(2, output_len), objective=objective))
            progress.advance()
    except BadInput as error:
        return [], [f"what the profiles lead to cannot be compared: {error}"]
    return _schedule_choices(*made), []


def _schedule_choices(one: Schedule, other: Schedule) -> list[Choice]:
    """At doubling loads, from the first to the last that both cover."""
    from planner.search.ratios import Z, around, ratio_of

    first, last = max(one.concurrency_from, other.concurrency_from), min(one.concurrency_to, other.concurrency_to)
    loads = sorted({min(last, first * 2**i) for i in range(40)}) if first <= last else []
    found = []
    for context in [context for context in one.contexts if context in other.contexts]:
        for load in loads:
            rows = [_row(made, load, context) for made in (one, other)]
            curves = [_curve(made, row.setting, context) for made, row in zip((one, other), rows, strict=True)]
            own = [curve and at_load(curve, load) for curve in curves]
            ratio = None
            if all(own):
                ratio = ratio_of(*(around(tpot_s, Z * sd) for tpot_s, sd in reversed(own)))
            carried = (curve := _curve(other, rows[0].setting, context)) and at_load(curve, load)
            found.append(
                Choice(
                    at=f"concurrency {load}" + f", context {context}" * (len(one.contexts) > 1), before=describe_setting(rows[0].setting),
                    after=describe_setting(rows[1].setting), ratio=ratio, carried_loss=carried[0] / own[1][0] - 1 if carried and own[1] else None,
                )
            )  # fmt: skip
    return found


def _row(made: Schedule, load: int, context: int) -> ScheduleRow:
    return next(
        row for row in made.schedule if row.concurrency_from <= load <= row.concurrency_to and row.context_from <= context <= row.context_to
    )  # fmt: skip


def _curve(made: Schedule, setting: Setting, context: int) -> LoadCurve | None:
    return next((curve for curve in made.curves if curve.setting == setting and curve.context_len == context), None)
