"""planner diff: two files of a kind to what changed between them. Needs no torch."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from planner.commands.plan import check_objective, find_workload
from planner.commands.progress import Progress, Silent
from planner.commands.schedule import schedule
from planner.diffs import Changed, Choice, Difference, Ratio, Side, Unit
from planner.documents import Document, kind_of, load_document
from planner.errors import BadInput
from planner.files import read_bytes
from planner.measurements import Profile, RoundSample
from planner.plans import Interval, Plan, Sweep
from planner.schedules import LoadCurve, Schedule, ScheduleRow, Setting, describe_setting
from planner.serving import OFF, ServedCell, ServingProfile
from planner.specs import DraftConfig, Objective, Sampler, Workload, describe, describe_drafter, describe_kv, describe_sampler, describe_workload

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
    ratios, only_before, only_after = _matched(one, other)
    choices, notes = _choices(one, other, before, after, objective, progress)
    if isinstance(one, Plan | Schedule) and one.profile_sha256 == other.profile_sha256:
        notes.append("both were made from the same profile: what its errors share is counted twice, so the intervals are too wide")
    return Difference(
        kind=kind_of(one).name, before=_side(one, before), after=_side(other, after),
        changed=[Changed(what=name[:500], before=settings[0].get(name), after=settings[1].get(name)) for name in names],
        ratios=ratios, choices=choices, only_before=only_before, only_after=only_after, notes=notes,
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


# Quantities


def _matched(one: Document, other: Document) -> tuple[list[Ratio], list[str], list[str]]:
    """What both measured or predicted, and what only one of them did."""
    tables = {Profile: _profile_table, ServingProfile: _serving_table, Plan: _plan_table, Sweep: _sweep_table}
    if isinstance(one, Schedule):
        return _curve_ratios(one, other), [], []
    before, after = tables[type(one)](one), tables[type(other)](other)
    ratios = [_ratio(key, before[key], after[key]) for key in before if key in after]
    only = [list(dict.fromkeys(f"{key[1]}, {key[2]}" for key in a if key not in b)) for a, b in ((before, after), (after, before))]
    return [ratio for ratio in ratios if ratio is not None], *only


Key = tuple[str, str, str, Unit]  # quantity, of, at, unit
Value = Interval | dict[str, float]  # with its own interval, or by what can be paired: texts, loads


def _ratio(key: Key, before: Value, after: Value) -> Ratio | None:
    from planner.search.ratios import mean_of, paired, ratio_of

    quantity, of, at, unit = key
    known, pairs = True, None
    if isinstance(before, dict):
        shared = [name for name in before if name in after]
        if not shared:
            return None
        ratio, known = paired([after[name] for name in shared], [before[name] for name in shared])
        before, after = (mean_of([values[name] for name in shared]) for values in (before, after))
        pairs = len(shared)
    elif min(before.value, after.value) <= 0:
        return None
    else:
        ratio = ratio_of(after, before)
    return Ratio(quantity=quantity, of=of[:500], at=at[:500], unit=unit, before=before, after=after, ratio=ratio, pairs=pairs, known=known)


def _profile_table(profile: Profile) -> dict[Key, Value]:
    from planner.search.compare import mean_interval
    from planner.search.ratios import mean_of

    def name(drafter, kv) -> str:
        return "off" if drafter.kind == "none" else f"{describe_drafter(drafter)} {describe_kv(kv)}"

    def place(sample: RoundSample) -> tuple:
        return sample.drafter, sample.kv, sample.draft_len, sample.context_len, sample.batch

    first = {place(sample): float(np.median(sample.round_s)) for sample in profile.rounds if sample.role == "cell"}
    again = [(first.get(place(sample)), float(np.median(sample.round_s))) for sample in profile.rounds if sample.role == "drift"]
    drift = max((abs(np.log(new / old)) for old, new in again if old and new), default=0.0)
    table: dict[Key, Value] = {}
    for sample in sorted(profile.rounds, key=lambda sample: sample.draft_len > 0):
        positive = [seconds for seconds in sample.round_s if seconds > 0]
        if sample.role == "cell" and positive:
            k = f" K={sample.draft_len}" if sample.drafter.kind != "none" else ""
            at = f"context {sample.context_len}" + f", batch {sample.batch}" * (sample.batch > 1)
            table["round", f"{name(sample.drafter, sample.kv)}{k}", at, "s"] = mean_of(positive, drift)
    for sample in profile.prefill:
        table["prefill", "target", f"context {sample.context_len}", "s"] = mean_of(sample.seconds, drift)
    firsts: dict[Key, list[float]] = {}
    for sample in profile.acceptance:
        text, starts = profile.texts[sample.text], sample.drafted.unpack() > 0
        if starts.any():
            at = f"context {text.context_len}, {describe_sampler(text.sampler)}"
            firsts.setdefault(("P(first accepted)", name(sample.drafter, sample.kv), at, "share"), []).append(
                float((sample.accept_prob.unpack()[:, 0] / 255)[starts].mean())
            )
    return table | {key: mean_interval(shares) for key, shares in firsts.items()}


def _serving_table(profile: ServingProfile) -> dict[Key, Value]:
    """By setting: each load is a pair. A cell measured twice counts by its mean."""

    def where(cell: ServedCell) -> str:
        return f"{cell.concurrency} of {cell.context_len} tokens, output {cell.output_len}, {cell.tensor_parallel} devices"

    quantities = (("TPOT", "tpot_s", "s"), ("round", "itl_s", "s"), ("throughput", "output_tokens_per_s", "tokens/s"), ("TTFT", "ttft_s", "s"))
    gathered: dict[Key, dict[str, list[float]]] = {}
    for cell in sorted(profile.cells, key=lambda cell: (cell.drafter != OFF, cell.draft_len)):
        setting = describe_setting(Setting(drafter=cell.drafter, draft_len=cell.draft_len))
        for quantity, field, unit in (*quantities, ("tokens per round", "tokens_per_round", "tokens")):
            if (value := getattr(cell, field)) is not None:
                gathered.setdefault((quantity, setting, "all loads that both ran", unit), {}).setdefault(where(cell), []).append(value)
    ordered = sorted(
        gathered.items(), key=lambda item: [name for name, *_ in quantities].index(item[0][0]) if item[0][0] != "tokens per round" else 9
    )
    return {key: {load: float(np.mean(values)) for load, values in by_load.items()} for key, by_load in ordered}


def _plan_table(plan: Plan) -> dict[Key, Value]:
    table: dict[Key, Value] = {}
    at = describe_workload(plan.workload)
    for of, estimate in (("off", plan.baseline), ("choice", plan.estimate)):
        for quantity, field, unit in (
            ("TPOT", "tpot_s", "s"), ("end-to-end", "e2e_s", "s"), ("TTFT", "ttft_s", "s"), ("tokens per round", "tokens_per_round", "tokens"),
            ("memory", "memory_bytes", "bytes"),
        ):  # fmt: skip
            table[quantity, of, at, unit] = getattr(estimate, field)
    table["speedup", "choice", at, "x"] = plan.speedup
    return table


def _sweep_table(sweep: Sweep) -> dict[Key, Value]:
    at, table = describe_workload(sweep.workload), {}
    for cell in sorted(sweep.cells, key=lambda cell: cell.config.draft_len > 0):
        by_text = {trial.text: trial.tpot_s for trial in cell.trials if trial.output_len > 1 and trial.decode_s > 0}
        table["TPOT", describe(cell.config), at, "s"] = by_text or cell.measured_tpot_s
    return table


def _curve_ratios(one: Schedule, other: Schedule) -> list[Ratio]:
    """Of each setting that both predict, at the first, a middle and the last load that both know."""
    from planner.search.ratios import Z, around, ratio_of

    found = []
    later = {(curve.setting, curve.context_len): curve for curve in other.curves}
    for curve in one.curves:
        match = later.get((curve.setting, curve.context_len))
        shared = sorted({load for own in (curve, match) if own for load in own.concurrency if match and _at(curve, load) and _at(match, load)})
        for load in sorted({shared[0], shared[len(shared) // 2], shared[-1]} if shared else ()):
            sides = [around(tpot_s, Z * sd) for tpot_s, sd in (_at(curve, load), _at(match, load))]
            at = f"concurrency {load}, context {curve.context_len}"
            ratio = ratio_of(sides[1], sides[0])
            found.append(Ratio(quantity="TPOT", of=describe_setting(curve.setting), at=at, unit="s", before=sides[0], after=sides[1], ratio=ratio))
    return sorted(found, key=lambda ratio: (ratio.of != "off", ratio.of))


# Choices


def _choices(
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
            own = [curve and _at(curve, load) for curve in curves]
            ratio = None
            if all(own):
                ratio = ratio_of(*(around(tpot_s, Z * sd) for tpot_s, sd in reversed(own)))
            carried = (curve := _curve(other, rows[0].setting, context)) and _at(curve, load)
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


def _at(curve: LoadCurve, load: int) -> tuple[float, float] | None:
    """Time per token and the standard deviation of its logarithm, between the loads that a curve keeps as well."""
    if not curve.concurrency[0] <= load <= curve.concurrency[-1]:
        return None
    log_tpot, sd = (np.interp(np.log(load), np.log(curve.concurrency), values) for values in (np.log(curve.tpot_s), curve.sd_tpot))
    return float(np.exp(log_tpot)), float(sd)
