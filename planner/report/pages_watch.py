"""Answer and figures of what looks at traffic, servers and files: replay, drift, canary, capacity, audit, export."""

from pathlib import Path

from planner.audits import Audit
from planner.canaries import Canary
from planner.capacities import Capacity
from planner.drifts import Drift
from planner.exports import Export
from planner.plans import Interval
from planner.replays import ServedDrafter, ServedReplay, UnitCosts
from planner.report.export import start_line
from planner.report.figures import MAX_LINES, Rule, Series, chart, intervals, numbers
from planner.report.html import Answer, Fact, Figure, Numbers
from planner.report.layout import clean, format_interval, format_percent
from planner.serving import OFF
from planner.specs import SparseKV, describe_drafter, describe_kv

PREDICTED, MEASURED = "s1", "s2"


def of_replay(replay: ServedReplay) -> tuple[Answer, list[Figure]]:
    """The best fixed K of all drafters on the whole log, and what better choices could gain."""
    group = replay.groups[0]
    best = group.drafters[group.best]
    gain = group.plain_cost / best.headroom.fixed.value
    units = isinstance(replay.costs, UnitCosts)
    costs = "plain steps, not seconds" if units else "measured seconds"
    name = f"{_name(best)} K={best.headroom.draft_len}"
    headline = f"{name}: {gain:.2f} times as fast as plain decoding, in {costs}" if best.headroom.draft_len else f"Off: no fixed K pays, in {costs}"
    facts = [
        Fact("Best adaptive rule, %", format_percent(best.headroom.adaptive_over_fixed), "of cost per token against that K"),
        Fact("Clairvoyant oracle, %", format_percent(best.headroom.oracle_over_fixed), "no rule costs less"),
        Fact("Replayed", f"{group.num_texts} lines", f"{group.num_tokens} tokens; {group.impossible} could not have been drawn by this model"),
    ]
    series = [
        Series(_name(one), "replayed tokens per round", [(length.draft_len, length.tokens_per_round) for length in one.lengths])
        for one in group.drafters
    ]
    text = "Tokens per round of each drafter by K on the whole log, 90 % intervals over lines; 1 is plain decoding."
    drawing = chart(series[:MAX_LINES], "K, tokens drafted per round", "tokens per round", rules=[Rule(1.0, "off")])
    figures = [Figure("Tokens per round by K", text, drawing, numbers(series, "K", "drafter"))]
    scale, unit = (1.0, "plain steps") if units else (1e3, "ms")
    rows, table = [], []
    for one in group.drafters:
        kinds = [("best fixed K", one.headroom.fixed, "s1"), ("adaptive rule", one.headroom.adaptive, "s2"), ("oracle", one.headroom.oracle, "s3")]
        rows.append((_name(one), [(what, value.scaled(scale), color) for what, value, color in kinds]))
        table.append([_name(one), one.headroom.draft_len, *(value.scaled(scale) for _, value, _ in kinds)])
    columns = ["drafter", "best fixed K", *(f"replayed {what} {unit} per token" for what in ("best fixed K", "adaptive rule", "oracle"))]
    drawing = intervals(rows, f"{unit} per token", rules=[Rule(scale * group.plain_cost, "off")])
    figures.append(Figure("What better choices of K could gain", "Cost per token, 90 % intervals over lines.", drawing, Numbers(columns, table)))
    return Answer(headline, facts), figures


def of_drift(drift: Drift) -> tuple[Answer, list[Figure]]:
    """Whether the plan still pays, and what moved."""
    facts = [
        Fact("Pays", drift.pays, f"speedup now {format_interval(drift.speedup, decimals=2)}, planned {drift.speedup_planned:.2f}"),
        Fact(
            "Tokens per round",
            format_interval(drift.tokens_per_round.measured, decimals=2),
            f"planned {format_interval(drift.tokens_per_round.predicted, decimals=2)}",
        ),
        Fact("Breaks even at", format_interval(drift.break_even_tokens_per_round, decimals=2), "tokens per round: below it, off is quicker"),
        *(Fact("Do", advice) for advice in drift.advice[:2]),
    ]
    rows = [("tokens per round", drift.tokens_per_round), ("round", drift.round_s), ("time per token", drift.tpot_s)]
    ratios = [(name, [("measured over planned", shift.ratio.scaled(100), MEASURED)]) for name, shift in rows]
    scales = (1.0, 1e3, 1e3)
    columns = ["quantity", "measured", "planned", "measured over planned"]
    units = ("tokens per round", "round ms", "TPOT ms")
    table = [[unit, s.measured.scaled(scale), s.predicted.scaled(scale), s.ratio] for unit, scale, (_, s) in zip(units, scales, rows, strict=True)]
    drawing = intervals(ratios, "% of what was planned", rules=[Rule(100.0, "as planned")])
    figures = [Figure("Measured against planned", "Ratios with 90 % intervals; 100 is as planned.", drawing, Numbers(columns, table))]
    if drift.positions:
        measured = Series("measured", "measured share", [(i, one.measured) for i, one in enumerate(drift.positions, 1)], color=MEASURED)
        planned = Series(
            "planned", "planned share", [(i, one.predicted) for i, one in enumerate(drift.positions, 1) if one.predicted is not None], color=PREDICTED
        )
        table = Numbers(
            ["drafted token", "measured share", "planned share"], [[i, one.measured, one.predicted] for i, one in enumerate(drift.positions, 1)]
        )
        drawing = chart([measured, *([planned] if planned.points else [])], "drafted token", "rounds that accept it", from_zero=True)
        figures.append(
            Figure("Acceptance by place", "Share of rounds in which a drafted token was accepted, by its place in the round.", drawing, table)
        )
    return Answer(drift.verdict, facts, tone="bad" if drift.pays == "no" else ""), figures


def of_canary(canary: Canary) -> tuple[Answer, list[Figure]]:
    """The verdict, and the speedup at each load."""
    by = {"tpot": "time per token", "throughput": "tokens/s"}[canary.measure]
    cells = [(cell, cell.tpot_speedup if canary.measure == "tpot" else cell.throughput_speedup) for cell in canary.cells]
    facts = [
        Fact(
            f"Measured speedup at concurrency {cell.concurrency}",
            format_interval(speedup, decimals=2),
            f"by {by}, {cell.num_prompts} prompts: {cell.verdict}",
        )
        for cell, speedup in cells[:4]
    ]
    rows, table = [], []
    for cell, speedup in cells:
        rows.append((f"{cell.concurrency} at once", [("measured", speedup, MEASURED)]))
        table.append([cell.concurrency, cell.num_prompts, speedup, cell.predicted_speedup, 1e3 * cell.tpot_s, 1e3 * cell.baseline_tpot_s])
    columns = ["concurrency", "prompts", f"measured speedup by {by} x", "predicted speedup by TPOT x", "measured TPOT ms", "measured TPOT ms without"]
    drawing = intervals(rows, f"speedup by {by}", rules=[Rule(canary.min_speedup, "asked for", color="bad"), Rule(1.0, "no gain")])
    text = "The plan's server over the one without, the same prompts in turn, 90 % intervals for all loads together."
    return Answer(canary.verdict, facts, tone="" if canary.passed or not canary.decided else "bad"), [
        Figure("Speedup by load", text, drawing, Numbers(columns, table))
    ]


def of_capacity(capacity: Capacity) -> tuple[Answer, list[Figure]]:
    """How many requests run, without a drafter and with each."""
    plain = capacity.rows[0]
    headline = f"{plain.running:.0f} requests run at once without a drafter" if plain.running >= 1 else "Not one request fits"
    facts = [Fact("KV pool", f"{capacity.pools[0].tokens:,} tokens", "without a drafter")]
    drafting = [row for row in capacity.rows if row.draft_len]
    for row in drafting[:3]:
        even = "not known" if row.break_even_throughput is None else format_interval(row.break_even_throughput, decimals=2)
        reach = f"of {row.draft_len + 1} at most; {row.running:.0f} requests run; nothing is measured"
        out_of_reach = row.break_even_throughput is not None and row.break_even_throughput.low > row.draft_len + 1
        label = "cannot pay: it breaks even at" if out_of_reach else "pays above"
        facts.append(Fact(f"{_row(row)} {label}", f"{even} tokens per round", reach))
    known = [row for row in drafting if row.break_even_throughput is not None]
    table = [
        [
            _row(row),
            row.running,
            row.fitting,
            row.limited_by,
            row.round_s and row.round_s.scaled(1e3),
            row.break_even_tokens,
            row.break_even_throughput,
        ]
        for row in capacity.rows
    ]
    columns = [
        "setting",
        "requests that run",
        "requests that fit",
        "limited by",
        "roofline round ms",
        "break-even of a request",
        "break-even of all together",
    ]
    if not known:
        return Answer(headline, facts), []
    rows = [
        (
            _row(row),
            [("break-even", row.break_even_throughput, PREDICTED), ("K + 1, the most that a round emits", _exactly(row.draft_len + 1), "muted")],
        )
        for row in known[:12]
    ]
    drawing = intervals(rows, "tokens per round")
    text = "By a roofline, from tuned to plain software: accepted drafts + 1 that a round must emit on average for all requests together to gain; "
    text += "where that lies above K + 1, drafting cannot pay. Nothing is measured."
    return Answer(headline, facts), [Figure("Break-even", text, drawing, Numbers(columns, table))]


def of_audit(audit: Audit) -> tuple[Answer, list[Figure]]:
    """How much of a table contradicts itself."""
    count = len(audit.faults)
    headline = (
        f"{count} contradiction{'s' * (count != 1)} in {audit.num_rows} rows" if count else f"Nothing contradicts itself in {audit.num_rows} rows"
    )
    facts = [Fact("Rows to distrust", str(len(audit.distrust)), f"of {audit.num_rows}")]
    facts += [Fact(fault.kind, f"{len(fault.rows)} rows", fault.what) for fault in audit.faults[:5]]
    return Answer(headline, facts, tone="bad" if count else ""), []


def of_export(export: Export, folder: Path) -> tuple[Answer, list[Figure]]:
    """The command, and what the engine cannot be told."""
    what = f"{export.method} {export.draft_model or ''}".strip() if export.method else "off"
    by = {kind: [knob.knob for knob in export.knobs if knob.fidelity == kind] for kind in ("exact", "approximated", "dropped")}
    facts = [Fact(kind.capitalize(), str(len(knobs)), ", ".join(knobs)) for kind, knobs in by.items()]
    figures = []
    if export.cost:
        rows = [
            (f"{row.concurrency} at once", [("planned", row.planned_speedup, "s1"), ("exported", row.exported_speedup, "s3")])
            for row in export.cost[:12]
        ]
        table = [[row.concurrency, row.context_len, row.planned_speedup, row.exported_speedup, 100 * row.loss] for row in export.cost]
        columns = ["concurrency", "context", "predicted speedup as planned x", "predicted speedup as exported x", "loss %"]
        drawing = intervals(rows, "speedup over off", rules=[Rule(1.0, "off")])
        figures.append(Figure("What the engine's limits cost", "Predicted, with 90 % intervals.", drawing, Numbers(columns, table)))
    return Answer(f"{what} on {export.engine} {export.engine_version}", facts, start_line(folder)), figures


def _name(one: ServedDrafter) -> str:
    name = describe_drafter(one.drafter)
    return clean(f"{name} {describe_kv(one.kv)}" if isinstance(one.kv, SparseKV) else name)


def _exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _row(row) -> str:
    if row.drafter == OFF or not row.draft_len:
        return "no drafter"
    return f"{row.drafter}{'' if row.kv_budget is None else f' kv {row.kv_budget}'} K={row.draft_len}"
