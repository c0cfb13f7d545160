"""Answer and figures of what the own runtime measured: profile, plan, check, sweep."""

import math
from collections.abc import Sequence

from planner.measurements import Profile
from planner.plans import Check, Estimate, Interval, Plan, Sweep
from planner.report.figures import Rule, Series, chart, intervals, numbers
from planner.report.html import Answer, Fact, Figure, Markup, Numbers, Tile, tiles
from planner.report.layout import clean, format_interval, format_memory, format_percent
from planner.shown import AcceptanceCurve, RoundCurve, Shown, SpeedupMap
from planner.specs import (
    OBJECTIVES,
    DraftConfig,
    DrafterSpec,
    KVPolicy,
    SparseKV,
    describe,
    describe_drafter,
    describe_kv,
    describe_sampler,
    describe_workload,
)  # fmt: skip
from planner.units import GIB, format_bytes

PREDICTED, MEASURED = "s1", "s2"
MAX_CURVES = 6  # of one chart
LEVELS = 5  # of colour to either side of 1
LEAST_EXTENT = math.log2(1.1)  # that the colours span: differences below a few percent stay pale


def of_profile(shown: Shown, profile: Profile) -> tuple[Answer, list[Figure]]:
    """What plans it leads to, by time per token, and what it measured."""
    best = max(shown.plans, key=lambda plan: plan.speedup.value, default=None)
    if best is None:
        headline = "Measured; no plan follows from it"
    elif all(plan.chosen.draft_len == 0 for plan in shown.plans):
        headline = "Do not speculate: plain decoding is the best at every context and sampler measured"
    else:
        headline = f"{describe(best.chosen)} decodes {_times(best.speedup)} as fast as plain decoding at {best.workload.context_len} tokens"
    facts = [
        Fact(
            f"{plan.workload.context_len} tokens, {describe_sampler(plan.workload.sampler)}",
            format_interval(plan.speedup, decimals=2) if plan.chosen.draft_len else "off",
            f"{describe(plan.chosen)}; {_if_wrong(plan)[0]} if it is wrong",
        )
        for plan in shown.plans
    ]
    order = sorted(shown.maps, key=lambda one: best is None or one.workload != best.workload)
    maps = [_map(one, folded=i > 0) for i, one in enumerate(order)]
    figures = [*maps[:1], *_acceptance(shown.acceptance), *_rounds(shown.rounds), *maps[1:]]
    return Answer(headline, facts), [figure for figure in figures if figure]


def of_plan(shown: Shown, plan: Plan) -> tuple[Answer, list[Figure]]:
    """The choice, what it gains and what it costs if wrong; the map, the front, and what was measured of it."""
    speculates = plan.chosen.draft_len > 0
    way = "as cheap" if plan.objective == "price" else "as fast"
    headline = f"Run {describe(plan.chosen)}: {_times(plan.speedup)} {way} as plain decoding" if speculates else "Do not speculate"
    lost, why = _if_wrong(plan)
    facts = []
    if speculates:
        facts.append(
            Fact(
                "Expected speedup",
                format_interval(plan.speedup, decimals=2),
                f"times {way} as plain decoding, by {OBJECTIVES[plan.objective]}, predicted",
            )
        )
    chosen, plain = (format_interval(estimate.tpot_s, 1e3) for estimate in (plan.estimate, plan.baseline))
    facts += [
        Fact("If the choice is wrong", lost, why),
        Fact("Time per token, ms", chosen, f"plain decoding {plain}" if speculates else "of plain decoding"),
    ]
    if plan.best_speculative is not None:
        predicted = next((e for e in [plan.estimate, *plan.runners_up] if e.config == plan.best_speculative), None)
        text = "" if predicted is None else f"predicted {format_interval(predicted.tokens_per_round, decimals=2)}"
        name = "" if speculates else f"{describe(plan.best_speculative)}; "
        facts.append(Fact("Pays above, tokens per round", f"{plan.break_even_tokens_per_round:.2f}", f"{name}{text}"))
    cap = "no cap was given" if plan.memory_cap_bytes is None else f"of a cap of {format_bytes(plan.memory_cap_bytes)}"
    facts.append(Fact("Memory", format_memory(plan.estimate.memory_bytes), cap))
    measured = {} if shown.measured is None else _measured(shown.measured)
    if isinstance(shown.measured, Check):
        facts.append(Fact("Checked", "passed" if shown.measured.passed else "failed", clean(shown.measured.verdict)))

    whole = shown.profile is not None
    figures = [_map(one, measured, whole=whole) for one in shown.maps]
    figures += [_front(one, whole) for one in shown.maps]
    if isinstance(shown.measured, Check):
        figures.append(_predicted_measured(shown.measured))
    elif not whole:
        figures.append(_estimates(plan))
    return Answer(headline, facts, plan.command), [figure for figure in [*figures, *_acceptance(shown.acceptance), *_rounds(shown.rounds)] if figure]


def of_check(check: Check) -> tuple[Answer, list[Figure]]:
    """Whether the plan held, predicted beside measured."""
    chosen = next(cell for cell in check.cells if cell.role == "chosen")
    plain = next((cell for cell in check.cells if cell.config.draft_len == 0), None)
    facts = []
    if plain is not None and plain is not chosen:
        gain = plain.cost_over_choice
        measured = Interval(value=1 + gain.value, low=1 + gain.low, high=1 + gain.high)
        name = OBJECTIVES[check.objective]
        facts = [
            Fact("Measured speedup", format_interval(measured, decimals=2), f"times as fast as plain decoding, by {name}, on the same texts"),
            Fact("Predicted speedup", format_interval(chosen.predicted.speedup, decimals=2), f"times as fast as plain decoding, by {name}"),
        ]
    facts += [
        Fact("Regret, %", format_percent(check.regret), f"against the best measured, {describe(check.best)}"),
        Fact("Texts", str(check.num_texts), "that the profile did not see"),
    ]
    word = "Passed" if check.passed else "Failed"
    figures = [_predicted_measured(check), _rounds_measured(check)]
    return Answer(f"{word}: {check.verdict}", facts, tone="" if check.passed else "bad"), figures


def of_sweep(sweep: Sweep) -> tuple[Answer, list[Figure]]:
    """The best of what was run, and everything beside it."""
    best = next(cell for cell in sweep.cells if cell.config == sweep.best)
    off = sweep.best.draft_len == 0
    headline = (
        "Plain decoding was the best of those run"
        if off
        else f"{describe(sweep.best)} was the best of those run, {_times(best.speedup)} as fast as plain decoding"
    )
    facts = [
        Fact(
            "Measured speedup",
            format_interval(best.speedup, decimals=2),
            "times as fast as plain decoding, by time per token, on the same texts",
        ),
        Fact("Time per token, ms", format_interval(best.measured_tpot_s, 1e3), describe(sweep.best)),
        Fact("Run", f"{len(sweep.cells)} configurations", f"in {sweep.minutes:.1f} minutes"),
    ]
    found = [(cell.config, cell.speedup) for cell in sweep.cells if cell.config.draft_len > 0]
    figures = []
    if found:
        cells = {
            config: Tile(f"{value.value:.2f}", _level(value.value, found), "best" if config == sweep.best else "", _bounds(value))
            for config, value in found
        }
        rows = [[describe(config), config.draft_len, value] for config, value in found]
        figures.append(
            Figure(
                "Measured speedup by kv budget and K", "Time per token over plain decoding, with 90 % intervals below; the best is framed.",
                _tiles("Measured speedup over plain decoding", cells), Numbers(["configuration", "K", "measured speedup x"], rows), wide=True,
            )
        )  # fmt: skip
    order = sorted(sweep.cells, key=lambda cell: cell.measured_tpot_s.value)
    shown = [(describe(cell.config), [("measured", cell.measured_tpot_s.scaled(1e3), MEASURED)]) for cell in order[:12]]
    rows = [[describe(cell.config), cell.measured_tpot_s.scaled(1e3), cell.measured_e2e_s, cell.measured_tokens_per_round] for cell in order]
    columns = ["configuration", "measured TPOT ms", "measured end-to-end s", "measured tokens per round"]
    text = (
        f"The fastest {len(shown)} of {len(order)}, means over texts with 90 % intervals."
        if len(order) > len(shown)
        else "Means over texts with 90 % intervals."
    )
    figures.append(Figure("Time per token", text, intervals(shown, "ms per token"), Numbers(columns, rows)))
    return Answer(headline, facts), figures


# Figures


def _map(one: SpeedupMap, measured: dict[DraftConfig, float] | None = None, whole: bool = True, folded: bool = False) -> Figure | None:
    """Predicted speedup of each configuration; with measured ones, the best of them is marked."""
    estimates = [estimate for estimate in one.estimates if estimate.speedup.value > 0]
    if not estimates:
        return None
    measured = measured or {}
    best = max(measured, key=measured.get, default=None)
    found = [(estimate.config, estimate.speedup) for estimate in estimates]
    cells = {}
    for estimate in estimates:
        config, cap = estimate.config, one.cap_bytes
        marks = ["choice"] if config == one.chosen else ["tie"] if config in one.ties else []
        marks += ["over the cap"] if cap is not None and estimate.memory_bytes.value > cap else []
        marks += ["measured best"] if config == best else []
        cells[config] = Tile(f"{estimate.speedup.value:.2f}", _level(estimate.speedup.value, found), ", ".join(marks), _bounds(estimate.speedup))
    columns = [
        "configuration",
        "K",
        "predicted speedup x",
        *(["measured speedup x"] if measured else []),
        "predicted TPOT ms",
        "predicted tokens per round",
        "mark",
    ]
    rows = [
        [
            describe(e.config),
            e.config.draft_len,
            e.speedup,
            *([measured.get(e.config)] if measured else []),
            e.tpot_s.scaled(1e3),
            e.tokens_per_round,
            cells[e.config].mark,
        ]
        for e in estimates
    ]
    about = describe_workload(one.workload)
    text = f"Predicted, by {OBJECTIVES[one.objective]}, 90 % interval below; plain decoding is 1. The choice is framed, what cannot be told from it is dashed."
    text += "" if one.chosen.draft_len else " The choice is plain decoding itself."
    text += "" if best is None else f" Measured best: {describe(best)}, {measured[best]:.2f}."
    text += "" if whole else " Only what the plan names: give its profile with --profile for all configurations."
    title = f"Speedup by kv budget and K: {about}"
    return Figure(title, text, _tiles(f"Predicted speedup over plain decoding, {about}", cells), Numbers(columns, rows), wide=True, folded=folded)


def _tiles(caption: str, cells: dict[DraftConfig, Tile]) -> Markup:
    """Drafters, policies and trees down, K across; larger budgets first."""
    lengths = sorted({config.draft_len for config in cells})
    rows: dict[tuple, dict[int, Tile]] = {}
    for config, tile in cells.items():
        before, _, tree = describe(config).rpartition(f" K={config.draft_len}")
        selection, budget = (config.kv.selection, -config.kv.budget) if isinstance(config.kv, SparseKV) else ("", 0)
        order = describe_drafter(config.drafter), selection, budget, tree, str(config.kv)  # the last: sinks and the recent, which a name leaves out
        rows.setdefault((*order, clean(before + tree)), {})[config.draft_len] = tile
    shown = [(key[-1], [rows[key].get(length) for length in lengths]) for key in sorted(rows)]
    return tiles(caption, "drafter, kv budget", [f"K={length}" for length in lengths], shown)


def _level(speedup: float, found: Sequence[tuple[DraftConfig, Interval]]) -> int:
    """Symmetric in the ratio, 1/2 is as far from 1 as 2; the best is always inside."""
    gain = max([math.log2(value.value) for _, value in found] + [LEAST_EXTENT])
    loss = max([-math.log2(value.value) for _, value in found] + [LEAST_EXTENT])
    extent = max(gain, min(loss, 1.0))
    return round(max(-1.0, min(1.0, math.log2(speedup) / extent)) * LEVELS)


def _front(one: SpeedupMap, whole: bool) -> Figure | None:
    """Time per token against memory, and which of all configurations no other beats in both."""
    everything = [one.baseline, *(e for e in one.estimates if e.config != one.baseline.config)]
    if len(everything) < 2:
        return None

    def point(estimate: Estimate) -> tuple[float, float]:
        return estimate.memory_bytes.value / GIB, 1e3 * estimate.tpot_s.value

    ordered = sorted(everything, key=point)
    front = [e for i, e in enumerate(ordered) if all(point(e)[1] < point(other)[1] for other in ordered[:i])]
    chosen = [e for e in everything if e.config == one.chosen]
    series = [
        Series("configurations", "", [point(e) for e in everything], line=False, color="muted", hollow=True),
        Series("front", "", [point(e) for e in front], step=True, color="s1"),
        Series("choice", "", [point(e) for e in chosen], line=False, color="s2"),
    ]
    rules = [] if one.cap_bytes is None else [Rule(one.cap_bytes / GIB, "memory cap", upright=True, color="bad")]
    text = "Predicted. Configurations on the front are beaten by no other in both; " + (
        "those right of the cap are refused." if rules else "no memory cap was given."
    )
    rows = [[describe(e.config), e.memory_bytes.scaled(1 / GIB), e.tpot_s.scaled(1e3), "front" if e in front else ""] for e in everything]
    columns = ["configuration", "predicted memory GiB", "predicted TPOT ms", "front"]
    drawing = chart(series, "memory, GiB", "ms per token", rules=rules)
    return Figure("Time per token against memory", text + ("" if whole else " Only what the plan names."), drawing, Numbers(columns, rows))


def _estimates(plan: Plan) -> Figure:
    found = [plan.baseline, *(e for e in [plan.estimate, *plan.runners_up] if e.config != plan.baseline.config)]
    rows = [(describe(e.config), [("predicted", e.tpot_s.scaled(1e3), PREDICTED)]) for e in found]
    columns, table = (
        ["configuration", "predicted TPOT ms", "predicted end-to-end s"],
        [[describe(e.config), e.tpot_s.scaled(1e3), e.e2e_s] for e in found],
    )
    text = "Predicted, with 90 % intervals: plain decoding, the choice, and the next best. Intervals of two settings may overlap and their difference be known."
    return Figure("Time per token", text, intervals(rows, "ms per token"), Numbers(columns, table))


def _predicted_measured(check: Check) -> Figure:
    cells = sorted(check.cells, key=lambda cell: (cell.role != "baseline", cell.role != "chosen"))
    rows = [
        (
            describe(cell.config),
            [("predicted", cell.predicted.tpot_s.scaled(1e3), PREDICTED), ("measured", cell.measured_tpot_s.scaled(1e3), MEASURED)],
        )
        for cell in cells
    ]
    table = [[describe(cell.config), cell.predicted.tpot_s.scaled(1e3), cell.measured_tpot_s.scaled(1e3)] for cell in cells]
    text = f"Time per token with 90 % intervals, on {check.num_texts} texts that the profile did not see."
    return Figure(
        "Predicted against measured",
        text,
        intervals(rows, "ms per token"),
        Numbers(["configuration", "predicted TPOT ms", "measured TPOT ms"], table),
    )


def _rounds_measured(check: Check) -> Figure:
    cells = [cell for cell in check.cells if cell.config.draft_len > 0] or check.cells

    def exact(value: float) -> Interval:
        return Interval(value=value, low=value, high=value)

    rows = [
        (
            describe(cell.config),
            [("predicted", cell.expected_tokens_per_round, PREDICTED), ("measured", exact(cell.measured_tokens_per_round), MEASURED)],
        )
        for cell in cells
    ]
    table = [
        [
            describe(cell.config),
            cell.expected_tokens_per_round,
            cell.measured_tokens_per_round,
            cell.predicted.round_s.scaled(1e3),
            1e3 * cell.measured_round_s,
        ]
        for cell in cells
    ]
    columns = ["configuration", "predicted tokens per round", "measured tokens per round", "predicted round ms", "measured round ms"]
    text = "What was predicted for as many texts as were run, 90 % interval, and the mean over all rounds measured."
    return Figure("Tokens per round", text, intervals(rows, "tokens per round"), Numbers(columns, table))


def _acceptance(curves: Sequence[AcceptanceCurve]) -> list[Figure]:
    """A chart for each sampler and drafter, a line for each context and selection."""
    figures = []
    sparse = [curve for curve in curves if isinstance(curve.kv, SparseKV)]
    for sampler, drafter in dict.fromkeys((curve.sampler, curve.drafter) for curve in sparse):
        own = [curve for curve in sparse if (curve.sampler, curve.drafter) == (sampler, drafter)]
        selections = {describe_kv(curve.kv).replace(f" {curve.kv.budget}", "") for curve in own}
        series = []
        for curve in own:
            selection = describe_kv(curve.kv).replace(f" {curve.kv.budget}", "")
            name = f"{curve.context_len} tokens" + (f", {selection}" if len(selections) > 1 else "")
            points = sorted(((budget, value) for budget, value in curve.by_budget if budget is not None), key=lambda point: point[0])
            series.append(Series(name, "measured P(first draft accepted)", points))
        others = [
            f"{describe_drafter(curve.drafter)} at {curve.context_len} tokens {format_interval(curve.by_budget[0][1], decimals=2)}"
            for curve in curves
            if curve.sampler == sampler and not isinstance(curve.kv, SparseKV)
        ]
        text = "Measured: the probability that the first drafted token is accepted, mean over texts with its 90 % interval."
        text += f" Without a budget: {'; '.join(map(clean, others))}." if others else ""
        title = f"Acceptance by kv budget: {clean(describe_drafter(drafter))}, {describe_sampler(sampler)}"
        drawing = chart(series[:MAX_CURVES], "kv budget, tokens", "P(first draft accepted)", log_x=True)
        figures.append(Figure(title, text, drawing, numbers(series, "kv budget", "context")))
    if sparse or not curves:
        return figures
    rows = [(f"{describe_drafter(c.drafter)} at {c.context_len}, {describe_sampler(c.sampler)}", c.by_budget[0][1]) for c in curves]
    drawing = intervals([(name, [("measured", value, MEASURED)]) for name, value in rows[:12]], "P(first draft accepted)")
    text = "Measured: the probability that the first drafted token is accepted, mean over texts with its 90 % interval."
    return [Figure("Acceptance", text, drawing, Numbers(["drafter", "measured P(first draft accepted)"], [list(row) for row in rows]))]


def _rounds(curves: Sequence[RoundCurve]) -> list[Figure]:
    """A chart for each context and batch, of chains and of trees, a line for each drafter and policy that was timed."""
    figures = []
    several = len({curve.batch for curve in curves}) > 1
    for context_len, batch, trees in dict.fromkeys((curve.context_len, curve.batch, curve.levels > 0) for curve in curves):
        own = [curve for curve in curves if (curve.context_len, curve.batch, curve.levels > 0) == (context_len, batch, trees)]
        own = sorted(own, key=lambda curve: curve.drafter.kind != "none")
        series = []
        for curve in own:
            name = "off" if curve.drafter.kind == "none" else clean(_policy(curve.drafter, curve.kv)) + f", {curve.levels} levels" * trees
            series.append(Series(name, "fitted round ms", [(k, value.scaled(1e3)) for k, value in curve.predicted], marker=False))
            series.append(Series(name, "measured round ms", [(k, 1e3 * value) for k, value in curve.measured], line=False))
        shown = [one for one in series if one.name in list(dict.fromkeys(one.name for one in series))[:MAX_CURVES]]
        title = f"Round time by {'nodes of the tree' if trees else 'tokens drafted'}: {context_len} tokens" + (
            f", {batch} streams" if several else ""
        )
        text = "Points are medians of measured rounds, lines the fit that plans use, bands its 90 % interval for a cell that was not measured."
        figures.append(
            Figure(
                title,
                text,
                chart(shown, "nodes verified in the round" if trees else "tokens drafted in the round", "ms per round", from_zero=True),
                numbers(series, "nodes" if trees else "tokens drafted", "drafter"),
            )
        )
    return figures


# Words


def _measured(measured: Check | Sweep) -> dict[DraftConfig, float]:
    """Speedups over plain decoding on the same texts."""
    if isinstance(measured, Sweep):
        return {cell.config: cell.speedup.value for cell in measured.cells}
    plain = next((cell for cell in measured.cells if cell.config.draft_len == 0), None)
    if plain is None:
        return {}
    return {cell.config: (1 + plain.cost_over_choice.value) / (1 + cell.cost_over_choice.value) for cell in measured.cells}


def _if_wrong(plan: Plan) -> tuple[str, str]:
    """What is lost should another setting be the better one."""
    if not plan.ties:
        return "nothing known", f"none of the {plan.num_candidates} configurations ties with it at 90 %"
    worst = max(plan.ties, key=lambda tie: tie.cost_of_being_wrong)
    count = len(plan.ties)
    tied = (
        f"{count} other{'s' * (count > 1)} cannot be told from it: "
        + ", ".join(describe(tie.config) for tie in plan.ties[:2])
        + (", .." if count > 2 else "")
    )
    return f"at most {100 * worst.cost_of_being_wrong:.1f} % lost", tied


def _times(speedup: Interval) -> str:
    return f"{speedup.value:.2f} times"


def _bounds(interval: Interval) -> str:
    return "" if interval.low == interval.high else f"[{interval.low:.2f}, {interval.high:.2f}]"


def _policy(drafter: DrafterSpec, kv: KVPolicy) -> str:
    return f"{describe_drafter(drafter)} {describe_kv(kv)}" if isinstance(kv, SparseKV) else describe_drafter(drafter)
