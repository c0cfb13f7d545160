"""Answer and figures of servers under load: serving profile, schedule, tuning, simulation."""

from collections.abc import Sequence

from planner.plans import Interval
from planner.report.figures import MAX_LINES, Rule, Series, Span, chart, intervals, numbers
from planner.report.html import Answer, Fact, Figure, Numbers
from planner.report.layout import clean, format_interval, format_percent
from planner.schedules import Compared, LoadCurve, Schedule, ScheduleRow, Setting, describe_setting
from planner.serving import OFF, ServedCell, ServingProfile
from planner.shown import Shown
from planner.simulations import QUANTILES, Arm, Latency, Simulation
from planner.specs import OBJECTIVES
from planner.tunings import Run, Tuning

LOADS = "concurrency, requests in the system"
MAX_STEPS = 6  # of a headline
MAX_CONTEXTS = 3  # that have figures of their own; the report has all
PREDICTED, MEASURED = "s1", "s2"
PERCENTILES = ("mean", "p50", "p90", "p99")


def of_serving(shown: Shown, profile: ServingProfile) -> tuple[Answer, list[Figure]]:
    """What was measured, and the schedule that it leads to."""
    facts = [
        Fact("Measured", f"{len(profile.cells)} cells", f"of {profile.model.name} on {profile.system.name}, {profile.source}"),
        Fact("Drafters", ", ".join(dict.fromkeys(cell.drafter for cell in profile.cells if cell.drafter != OFF)) or "none"),
    ]
    headline, figures = f"{len(profile.cells)} cells measured", []
    if shown.schedule is not None:
        answer, _ = of_schedule(shown.schedule)
        headline, facts = answer.headline, [*answer.facts, *facts]
    for context_len in sorted({cell.context_len for cell in profile.cells})[:MAX_CONTEXTS]:
        own = [cell for cell in profile.cells if cell.context_len == context_len]
        curves = [curve for curve in (shown.schedule.curves if shown.schedule else []) if curve.context_len == context_len]
        figures.append(_curves(own, curves, context_len))
    if any(cell.acceptance for cell in profile.cells):
        figures.append(_positions(profile.cells))
    if shown.schedule is not None:
        figures += _of_schedule(shown.schedule)
    return Answer(headline, facts), figures


def of_schedule(schedule: Schedule) -> tuple[Answer, list[Figure]]:
    """What to run at each load, and what it gains over off."""
    best = next(
        (one for one in schedule.deployments if one.drafter == schedule.deployment), schedule.deployments[0] if schedule.deployments else None
    )
    rows = schedule.schedule
    drafts = any(row.draft_len for row in rows)
    headline = _staircase(schedule) if drafts else "Do not speculate at any load"
    facts = []
    if best is not None and best.gain_over_off is not None and best.drafter != OFF:
        over = "over the load's histogram" if schedule.weighted else "over all loads, each counting alike"
        facts.append(Fact("Expected gain over off, %", format_percent(best.gain_over_off), f"{OBJECTIVES[schedule.objective]}, {over}"))
    ties = [(tie, row) for row in rows for tie in row.ties]
    if ties:
        worst, row = max(ties, key=lambda pair: pair[0].cost_of_being_wrong)
        lost = f"at most {100 * worst.cost_of_being_wrong:.1f} % lost"
        facts.append(
            Fact(
                "If a row is wrong", lost, f"{describe_setting(worst.setting)} ties at concurrency {_span(row.concurrency_from, row.concurrency_to)}"
            )
        )
    else:
        facts.append(Fact("If a row is wrong", "nothing known", "no setting ties with a row's at 90 %"))
    if schedule.flips:
        flip = schedule.flips[0]
        text = f"or anywhere in {_span(flip.lowest, flip.highest)}, to {describe_setting(flip.after)}"
        facts.append(Fact("First change at concurrency", str(flip.concurrency), text))
    if any(row.extrapolated for row in rows):
        facts.append(Fact("Extrapolated", f"{sum(row.extrapolated for row in rows)} of {len(rows)} rows", "reach beyond what was measured"))
    return Answer(headline, facts), _of_schedule(schedule)


def of_tuning(tuning: Tuning) -> tuple[Answer, list[Figure]]:
    """What to set, what it gains, and how that held."""
    if not tuning.chosen:
        headline = "Set: off, do not draft"
    else:
        steps = [f"{'idle' if step.draft_len == 0 else f'K={step.draft_len}'} for {_span(step.batch_from, step.batch_to)}" for step in tuning.chosen]
        headline = f"Set {tuning.method} " + (
            f"K={tuning.chosen[0].draft_len} at every load" if len(steps) == 1 else ", ".join(steps) + " requests at once"
        )
    facts = []
    if tuning.predicted_gain is not None:
        over = "off" if tuning.yours in (None, Setting()) else f"your {describe_setting(tuning.yours)}"
        facts.append(Fact("Expected gain, %", format_percent(tuning.predicted_gain), f"over {over}, over all loads, predicted"))
    facts += [
        Fact(
            f"Measured gain at {one.concurrency}",
            f"{format_percent(one.gain)} %",
            f"over {describe_setting(one.setting)}, on prompts not used before",
        )
        for one in tuning.checked
        if one.gain is not None
    ][:3]
    facts.append(Fact("Took", f"{tuning.minutes:.1f} minutes", f"{tuning.requests} requests, {len(tuning.launches)} starts"))
    if tuning.defects:
        facts.append(Fact("Found", f"{len(tuning.defects)} defects", tuning.defects[0].what))
    figures = [*([_gains(tuning)] if tuning.loads else []), *([_runs(tuning)] if tuning.runs else [])]
    if tuning.checked:
        figures.insert(0, _checked(tuning))
    return Answer(headline, facts, tuning.paste), figures


def of_simulation(simulation: Simulation) -> tuple[Answer, list[Figure]]:
    """What each setting changes against off on the same arrivals."""
    others = [arm for arm in simulation.arms if arm.against_off is not None and arm.against_off.e2e is not None]
    best = min(others, key=lambda arm: arm.against_off.e2e.value, default=None)
    if best is None:
        headline = f"{simulation.load.requests:,} requests simulated"
    elif best.against_off.e2e.value < 0:
        headline = f"{best.name}: {-100 * best.against_off.e2e.value:.1f} % less time end to end than off"
    else:
        headline = "Off: no other setting takes less time end to end"
    facts = [
        Fact(f"{arm.name}, %", format_percent(arm.against_off.e2e), "end-to-end time against off, the same requests at the same moments")
        for arm in others
    ]
    if limits := simulation.limits[:1]:
        known = [f"{name} {1e3 * limit:g} ms" for name, limit in (("TPOT", limits[0].tpot_s), ("TTFT", limits[0].ttft_s)) if limit is not None]
        shares = {arm.name: arm.goodput[0].share for arm in simulation.arms if arm.goodput}
        if shares:
            name = max(shares, key=lambda one: shares[one].value)
            facts.append(
                Fact(
                    f"Within {', '.join(known)}",
                    f"{format_interval(shares[name], 100, 1)} %",
                    f"of requests, {name}; {format_interval(shares[simulation.arms[0].name], 100, 1)} % with off",
                )
            )
    figures = [
        _percentiles(simulation.arms, "ttft_s", 1.0, "TTFT s", "Simulated time to the first token"),
        _percentiles(simulation.arms, "tpot_s", 1e3, "TPOT ms", "Simulated time per later token"),
        _distribution(simulation.arms, "ttft_s", 1.0, "TTFT s", "Distribution of the time to the first token"),
        _distribution(simulation.arms, "tpot_s", 1e3, "TPOT ms", "Distribution of the time per later token"),
        _over_time(simulation.arms),
        _changes(others),
        *_goodput(simulation),
    ]
    return Answer(headline, facts), [figure for figure in figures if figure]


# Schedules


def _of_schedule(schedule: Schedule) -> list[Figure]:
    contexts = list(dict.fromkeys(row.context_from for row in schedule.schedule))[:MAX_CONTEXTS]
    figures = []
    for first in contexts:
        rows = [row for row in schedule.schedule if row.context_from == first]
        name = f", contexts {_span(first, rows[0].context_to)}" if len(schedule.contexts) > 1 else ""
        figures.append(_steps(schedule, rows, name))
    for context_len in schedule.contexts[:MAX_CONTEXTS]:
        curves = [curve for curve in schedule.curves if curve.context_len == context_len]
        compared = [pair for pair in schedule.estimates if pair.estimate.context_len == context_len]
        figures.append(_speedups(curves, compared, f", context {context_len}" if len(schedule.contexts) > 1 else "", schedule))
    return [figure for figure in figures if figure]


def _steps(schedule: Schedule, rows: Sequence[ScheduleRow], where: str) -> Figure:
    """K by concurrency; where the change between two rows may lie, and where a drafter is another."""
    flips = [flip for flip in schedule.flips if rows[0].context_from <= flip.context_len <= rows[0].context_to]
    series = []
    for drafter in dict.fromkeys(row.drafter for row in rows):
        own = [row for row in rows if row.drafter == drafter]
        for run in _neighbours(own):
            points = [(row.concurrency_from, row.draft_len) for row in run] + [(run[-1].concurrency_to, run[-1].draft_len)]
            series.append(Series("off" if drafter == OFF else clean(drafter), "K", points, step=True, marker=False))
    spans = [Span(flip.lowest, flip.highest) for flip in flips if flip.lowest < flip.highest]
    text = "K to run by load." + (" Grey: the change may lie anywhere there, the two settings cannot be told apart." if spans else "")
    table = [
        [row.concurrency_from, row.concurrency_to, describe_setting(row.setting), row.draft_len, _margin(row), "yes" if row.extrapolated else ""]
        for row in rows
    ]
    columns = ["concurrency from", "to", "setting", "K", "margin over the runner-up %", "extrapolated"]
    drawing = chart(series, LOADS, "K, tokens drafted", log_x=schedule.concurrency_to > 8, spans=spans, whole_y=True, from_zero=True)
    return Figure(f"The chosen staircase{where}", text, drawing, Numbers(columns, table))


def _neighbours(rows: Sequence[ScheduleRow]) -> list[list[ScheduleRow]]:
    """Rows that follow each other without a gap."""
    runs: list[list[ScheduleRow]] = []
    for row in rows:
        if runs and runs[-1][-1].concurrency_to + 1 == row.concurrency_from:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _margin(row: ScheduleRow) -> Interval | None:
    if row.runner_up is None or not row.margin_low <= row.margin <= row.margin_high:
        return None
    return Interval(value=100 * row.margin, low=100 * row.margin_low, high=100 * row.margin_high)


def _speedups(curves: Sequence[LoadCurve], compared: Sequence[Compared], where: str, schedule: Schedule) -> Figure | None:
    """A line for each setting: time per token of off over its own, at the loads where both run."""
    off = next((curve for curve in curves if curve.setting == Setting()), None)
    if off is None or len(curves) < 2:
        return None
    plain = dict(zip(off.concurrency, off.tpot_s, strict=True))
    series = []
    for curve in curves:
        if curve is not off:
            points = [(c, plain[c] / tpot) for c, tpot in zip(curve.concurrency, curve.tpot_s, strict=True) if c in plain]
            series.append(Series(clean(describe_setting(curve.setting)), "predicted speedup by TPOT x", points, marker=len(points) < 12))
    text = "Predicted: time per token of off over the setting's own, one line for each K; 1 is off."
    chosen = {describe_setting(row.setting) for row in schedule.schedule}
    shown = sorted(series, key=lambda one: (one.name not in chosen, one.name.endswith(" idle")))[:MAX_LINES]
    shown = [one for one in series if one in shown]
    if len(series) > len(shown):
        text += f" {len(shown)} of {len(series)} settings are drawn, the chosen ones among them; the table has all."
    table = numbers(series, "concurrency", "setting")
    ends = {
        (describe_setting(pair.estimate.setting), pair.estimate.concurrency): pair.speedup for pair in compared if pair.estimate.setting != Setting()
    }
    if ends:
        columns = [*table.columns, f"predicted speedup by {OBJECTIVES[schedule.objective]} x"]
        table = Numbers(columns, [[*row, ends.get((row[0], row[1]))] for row in table.rows])
    drawing = chart(shown, LOADS, "speedup by time per token", log_x=max(off.concurrency) > 8, rules=[Rule(1.0, "off")])
    return Figure(f"Speedup by concurrency{where}", text, drawing, table)


def _staircase(schedule: Schedule) -> str:
    """The rows of the shortest context in words."""
    rows = [row for row in schedule.schedule if row.context_from == schedule.schedule[0].context_from]
    merged: list[tuple[str, int]] = []
    for row in rows:
        name = describe_setting(row.setting)
        if merged and merged[-1][0] == name:
            merged.pop()
        merged.append((name, row.concurrency_to))
    if len(merged) == 1:
        return f"Run {merged[0][0]} at every load"
    names, last = [], ""
    for row, _ in merged:
        drafter = row.rpartition(" ")[0]
        names.append(row.removeprefix(f"{drafter} ") if drafter == last and drafter else row)
        last = drafter
    if len(merged) > MAX_STEPS:
        return f"Run {names[0]} up to {merged[0][1]} requests at once, and {len(merged) - 1} other settings beyond"
    parts = [f"{name} up to {end}" for name, (_, end) in zip(names[:-1], merged[:-1], strict=True)]
    parts[0] += " requests at once"
    return f"Run {', '.join(parts)}, then {names[-1]}"


# Cells of an engine


def _curves(cells: Sequence[ServedCell], curves: Sequence[LoadCurve], context_len: int) -> Figure:
    """Measured cells on the lines that were fitted through them."""
    settings = list(dict.fromkeys((cell.drafter, cell.draft_len) for cell in cells))
    series = []
    for drafter, draft_len in settings:
        name = clean(describe_setting(Setting(drafter=drafter, draft_len=draft_len)))
        curve = next((c for c in curves if (c.setting.drafter, c.setting.draft_len) == (drafter, draft_len)), None)
        if curve is not None:
            series.append(
                Series(name, "fitted TPOT ms", [(c, 1e3 * tpot) for c, tpot in zip(curve.concurrency, curve.tpot_s, strict=True)], marker=False)
            )
        points = sorted((cell.concurrency, 1e3 * cell.tpot_s) for cell in cells if (cell.drafter, cell.draft_len) == (drafter, draft_len))
        series.append(Series(name, "measured TPOT ms", points, line=False))
    kept = list(dict.fromkeys(one.name for one in series))[:MAX_LINES]
    shown = [one for one in series if one.name in kept]
    text = "Points were measured, lines are the fit through all cells, for settings of the drafters that the schedule uses."
    text += f" {len(kept)} of {len(settings)} settings are drawn; the table has all." if len(settings) > len(kept) else ""
    drawing = chart(shown, LOADS, "ms per token", log_x=max(cell.concurrency for cell in cells) > 8, log_y=_wide(shown), from_zero=True)
    return Figure(f"Time per token by concurrency: context {context_len}", text, drawing, numbers(series, "concurrency", "setting"))


def _positions(cells: Sequence[ServedCell]) -> Figure:
    """Acceptance by place in the round, of each drafter's longest drafts."""
    series = []
    for drafter in dict.fromkeys(cell.drafter for cell in cells if cell.acceptance):
        longest = max((cell for cell in cells if cell.drafter == drafter), key=lambda cell: (len(cell.acceptance), -cell.concurrency))
        series.append(Series(clean(f"{drafter} K={longest.draft_len}"), "measured P(accepted)", list(enumerate(longest.acceptance, 1))))
    text = "Measured: the probability that a drafted token is accepted, those before it having been."
    drawing = chart(series[:MAX_LINES], "place in the round", "P(accepted)", from_zero=True)
    return Figure("Acceptance by place", text, drawing, numbers(series, "place", "drafter"))


# Tunings


def _checked(tuning: Tuning) -> Figure:
    rows, table = [], []
    for one in tuning.checked:
        yours = ", yours" if one.role == "yours" else ""
        name = f"{describe_setting(one.setting)}{yours} at {one.concurrency}"
        predicted = None if one.predicted_tpot_s is None else one.predicted_tpot_s.scaled(1e3)
        measured = one.measured_tpot_s.scaled(1e3)
        rows.append((name, [*([("predicted", predicted, PREDICTED)] if predicted else []), ("measured", measured, MEASURED)]))
        table.append([name, one.concurrency, predicted, measured, one.predicted_output_tokens_per_s, one.measured_output_tokens_per_s])
    columns = ["setting", "concurrency", "predicted TPOT ms", "measured TPOT ms", "predicted tokens/s", "measured tokens/s"]
    text = "Time per token with 90 % intervals, on prompts that were not used to predict it."
    return Figure("Predicted against measured", text, intervals(rows, "ms per token"), Numbers(columns, table))


def _gains(tuning: Tuning) -> Figure:
    gain = Series("the choice", "predicted gain over off %", [(load.concurrency, _percent(load.gain_over_off)) for load in tuning.loads])
    known = [(load.concurrency, _percent(load.gain_over_yours)) for load in tuning.loads if load.gain_over_yours is not None]
    yours = [Series("over yours", "predicted gain over yours %", known)] if known and tuning.yours not in (None, Setting()) else []
    text = f"Predicted, by {OBJECTIVES[tuning.objective]}, with 90 % intervals; 0 is no gain."
    drawing = chart(
        [gain._replace(name="over off"), *yours], LOADS, "gain, %", log_x=max(x for x, _ in gain.points) > 8, rules=[Rule(0.0, "no gain")]
    )
    table = [
        [
            load.concurrency,
            describe_setting(load.setting),
            _percent(load.gain_over_off),
            *([_percent(load.gain_over_yours)] if yours else []),
            load.tpot_s.scaled(1e3),
        ]
        for load in tuning.loads
    ]
    columns = ["concurrency", "setting", "predicted gain over off %", *(["predicted gain over yours %"] if yours else []), "predicted TPOT ms"]
    return Figure("Gain by load", text, drawing, Numbers(columns, table))


def _runs(tuning: Tuning) -> Figure:
    by_setting: dict[str, list[Run]] = {}
    for run in tuning.runs:
        if run.answers and sum(answer.output_tokens - 1 for answer in run.answers) > 0:
            by_setting.setdefault(clean(describe_setting(run.setting)), []).append(run)
    series = [
        Series(name, "measured TPOT ms", sorted((run.concurrency, 1e3 * run.tpot_s) for run in runs), line=False) for name, runs in by_setting.items()
    ]
    table = [
        [name, run.concurrency, {"measure": "", "check": "check"}[run.stage], 1e3 * run.tpot_s, run.output_tokens_per_s]
        for name, runs in by_setting.items()
        for run in runs
    ]
    columns = ["setting", "concurrency", "stage", "measured TPOT ms", "measured tokens/s"]
    most = max((run.concurrency for run in tuning.runs), default=1)
    text = "Every load that was run, means over tokens; several starts of a setting are several points."
    return Figure(
        "What was run",
        text,
        chart(series[:MAX_LINES], LOADS, "ms per token", log_x=most > 8, log_y=_wide(series[:MAX_LINES]), from_zero=True),
        Numbers(columns, table),
    )


# Simulations


def _percentiles(arms: Sequence[Arm], name: str, scale: float, column: str, title: str) -> Figure | None:
    """Mean and percentiles of requests, on a logarithmic scale."""
    series = []
    for arm in arms:
        latency: Latency | None = getattr(arm, name)
        if latency is not None:
            values = [getattr(latency, stat).scaled(scale) for stat in PERCENTILES]
            series.append(Series(clean(arm.name), f"simulated {column}", list(enumerate(values))))
    if not series:
        return None
    columns = ["setting", *(f"simulated {column} {stat}" for stat in PERCENTILES)]
    table = [[one.name, *(value for _, value in one.points)] for one in series]
    text = "Mean, and what half, 90 and 99 % of the requests took at most; bars are 90 % intervals over stretches of the run."
    drawing = chart(series[:MAX_LINES], "of requests", column, log_y=_wide(series), categories=PERCENTILES, from_zero=True)
    return Figure(title, text, drawing, Numbers(columns, table))


def _distribution(arms: Sequence[Arm], name: str, scale: float, column: str, title: str) -> Figure | None:
    """What each share of the requests took at most; None where no setting served any, or the file is from before quantiles were kept."""
    known = [(arm.name, latency.quantiles) for arm in arms if (latency := getattr(arm, name)) is not None and latency.quantiles]
    if not known:
        return None
    series = [
        Series(clean(arm), f"simulated {column}", [(share, scale * value) for share, value in zip(QUANTILES, values, strict=True)], marker=False)
        for arm, values in known
    ]
    text = "Simulated: so many of the requests, the quickest first, took at most the time above; each setting met the same requests."
    drawing = chart(series[:MAX_LINES], "% of requests", column, log_y=_wide(series), from_zero=True)
    return Figure(title, text, drawing, numbers(series, "% of requests", "setting"))


def _over_time(arms: Sequence[Arm]) -> Figure | None:
    series = []
    for arm in arms:
        if shares := arm.kv.series:
            stretch = arm.duration_s / len(shares)
            points = [(stretch * (i + 0.5), 100 * share) for i, share in enumerate(shares)]
            series.append(Series(clean(arm.name), "simulated KV use %", points, marker=False))
    if not series:
        return None
    drawing = chart(series[:MAX_LINES], "seconds since the first arrival", "KV use, % of the pool", from_zero=True)
    text = "Simulated: tokens in the KV pool over its size, means of equal stretches of the run, of all replicas."
    return Figure("KV use over time", text, drawing, numbers(series, "seconds", "setting"))


def _changes(arms: Sequence[Arm]) -> Figure | None:
    if not arms:
        return None
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}
    rows, table = [], []
    for arm in arms:
        found = [
            (label, _percent(change), f"s{i + 1}")
            for i, (name, label) in enumerate(names.items())
            if (change := getattr(arm.against_off, name)) is not None
        ]
        rows.append((arm.name, found))
        table.append([arm.name, *(_percent(getattr(arm.against_off, name)) for name in names)])
    drawing = intervals(rows, "change against off, %", rules=[Rule(0.0, "off")])
    text = "Simulated: means against off's, the same requests at the same moments, 90 % intervals; left of 0 is quicker."
    return Figure("Changed against off", text, drawing, Numbers(["setting", *(f"simulated change of {label} %" for label in names.values())], table))


def _goodput(simulation: Simulation) -> list[Figure]:
    if not simulation.limits:
        return []
    names = [
        " ".join(f"{name} {1e3 * limit:g} ms" for name, limit in (("TPOT", one.tpot_s), ("TTFT", one.ttft_s)) if limit is not None)
        for one in simulation.limits
    ]
    rows = [
        (arm.name, [(name, kept.share.scaled(100), f"s{i % MAX_LINES + 1}") for i, (name, kept) in enumerate(zip(names, arm.goodput, strict=False))])
        for arm in simulation.arms
    ]
    table = [[arm.name, *(kept.share.scaled(100) for kept in arm.goodput)] for arm in simulation.arms]
    text = "Simulated: share of all requests that arrived and were served within the limits, 90 % intervals."
    return [
        Figure(
            "Goodput", text, intervals(rows, "% of requests"), Numbers(["setting", *(f"simulated share within {name} %" for name in names)], table)
        )
    ]


def _wide(series: Sequence[Series]) -> bool:
    """Whether a linear axis would hide the smaller of these."""
    values = [value.value if isinstance(value, Interval) else value for one in series for _, value in one.points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 5


# Words


def _percent(interval: Interval | None) -> Interval | None:
    return None if interval is None else interval.scaled(100)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
