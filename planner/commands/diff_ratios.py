"""Of planner diff: what two files of a kind both measured or predicted, as ratios."""

import numpy as np

from planner.diffs import Ratio, Unit
from planner.documents import Document
from planner.measurements import Profile, RoundSample
from planner.plans import Interval, Plan, Sweep
from planner.schedules import LoadCurve, Schedule, Setting, describe_setting
from planner.serving import OFF, ServedCell, ServingProfile
from planner.specs import describe, describe_drafter, describe_kv, describe_sampler, describe_workload

Key = tuple[str, str, str, Unit]  # quantity, of, at, unit
Value = Interval | dict[str, float]  # with its own interval, or by what can be paired: texts, loads


def matched(one: Document, other: Document) -> tuple[list[Ratio], list[str], list[str]]:
    """What both measured or predicted, and what only one of them did."""
    tables = {Profile: _profile_table, ServingProfile: _serving_table, Plan: _plan_table, Sweep: _sweep_table}
    if isinstance(one, Schedule):
        return _curve_ratios(one, other), [], []
    before, after = tables[type(one)](one), tables[type(other)](other)
    ratios = [_ratio(key, before[key], after[key]) for key in before if key in after]
    only = [list(dict.fromkeys(f"{key[1]}, {key[2]}" for key in a if key not in b)) for a, b in ((before, after), (after, before))]
    return [ratio for ratio in ratios if ratio is not None], *only


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
        shared = sorted(
            {load for own in (curve, match) if own for load in own.concurrency if match and at_load(curve, load) and at_load(match, load)}
        )
        for load in sorted({shared[0], shared[len(shared) // 2], shared[-1]} if shared else ()):
            sides = [around(tpot_s, Z * sd) for tpot_s, sd in (at_load(curve, load), at_load(match, load))]
            at = f"concurrency {load}, context {curve.context_len}"
            ratio = ratio_of(sides[1], sides[0])
            found.append(Ratio(quantity="TPOT", of=describe_setting(curve.setting), at=at, unit="s", before=sides[0], after=sides[1], ratio=ratio))
    return sorted(found, key=lambda ratio: (ratio.of != "off", ratio.of))


def at_load(curve: LoadCurve, load: int) -> tuple[float, float] | None:
    """Time per token and the standard deviation of its logarithm, between the loads that a curve keeps as well."""
    if not curve.concurrency[0] <= load <= curve.concurrency[-1]:
        return None
    log_tpot, sd = (np.interp(np.log(load), np.log(curve.concurrency), values) for values in (np.log(curve.tpot_s), curve.sd_tpot))
    return float(np.exp(log_tpot)), float(sd)
