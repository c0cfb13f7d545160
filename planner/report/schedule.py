"""What is shown of a schedule, and of estimates at a load. Times are in ms, throughput is of all requests together."""

from collections.abc import Sequence
from pathlib import Path

from planner.report.layout import (
    Column,
    clean,
    format_interval,
    format_number,
    format_percent,
    open_console,
    put_lines,
    put_title,
    saved_lines,
    show_table,
)  # fmt: skip
from planner.report.terminal import HASH_CHARS, MAX_ROWS
from planner.schedules import Compared, Deployment, Flip, Limits, Schedule, ScheduleRow, describe_setting
from planner.serving import OFF
from planner.specs import OBJECTIVES, Objective

CUT = 900.0  # a relative margin beyond it stands for infinity: what else could run breaks a limit that this keeps


def show_schedule(schedule: Schedule, path: str | Path | None) -> None:
    """The setting by load beside off, where it changes, what one server can do of it, and what is not certain."""
    console = open_console()
    devices = f"{schedule.tensor_parallel} x " * (schedule.tensor_parallel > 1)
    put_title(
        console,
        f"Schedule for {clean(schedule.model)} on {devices}{clean(schedule.system)}, {clean(schedule.source)}: concurrency "
        f"{_span(schedule.concurrency_from, schedule.concurrency_to)}, context {', '.join(map(str, schedule.contexts))}, "
        f"output {schedule.output_len}; objective {OBJECTIVES[schedule.objective]}{_limits(schedule.goodput)}",
    )
    _show_rows(console, schedule)
    one = schedule.concurrency_from == schedule.concurrency_to
    put_title(console, "What one server can run: a drafter that is loaded stays, and is idle where it does not pay")
    show_table(
        console,
        [Column("loaded", lambda deployment: "nothing" if deployment.drafter == OFF else clean(deployment.drafter), right=False)],
        [
            [Column("loss against\na free choice %", lambda deployment: f"{100 * deployment.loss:.1f}"), Column("gain over\noff %", _gain)],
            [Column("its settings" if one else "its settings, up to a concurrency", _settings, right=False)],
        ],
        schedule.deployments,
        lambda deployment: "bold" if deployment.drafter == schedule.deployment else "",
    )
    lines = [("Loading", _loading(schedule))]
    lines += [("Changes", _flip(flip, schedule)) for flip in schedule.flips]
    for row in schedule.schedule:
        for tie in row.ties[:1]:
            more = f"; {len(row.ties) - 1} more tie" * (len(row.ties) > 1)
            lost = f"if it is the better one, at most {100 * tie.cost_of_being_wrong:.1f} % is lost{more}"
            lines.append(("Tie", f"{_at(row, schedule)}: {_name(tie.setting)} is {format_percent(tie.difference)} % worse; {lost}"))
    for apart in schedule.disagreements[:MAX_ROWS]:
        where = f"concurrency {_span(apart.concurrency_from, apart.concurrency_to)}{_context(apart.context_len, schedule)}"
        quick = f"by time per token {_name(apart.by_tpot)}, which loses {100 * apart.throughput_lost:.1f} % of throughput"
        many = f"by throughput {_name(apart.by_throughput)}, which takes {100 * apart.tpot_lost:.1f} % longer per token"
        lines.append(("Disagree", f"{where}: {quick}; {many}"))
    if len(schedule.disagreements) > MAX_ROWS:
        lines.append(("Disagree", f"and {len(schedule.disagreements) - MAX_ROWS} more"))
    lines += [("Note", clean(note)) for note in dict.fromkeys(schedule.notes)]
    lines += [("Profile", f"sha256 {schedule.profile_sha256[:HASH_CHARS]}; {schedule.num_candidates} candidates"), *saved_lines(path)]
    put_lines(console, lines)


def show_estimates(pairs: Sequence[Compared], objective: Objective) -> None:
    """Settings at loads, each beside off."""
    console = open_console()
    keys = [
        Column("setting", lambda pair: _name(pair.estimate.setting), right=False),
        Column("concurrency", lambda pair: str(pair.estimate.concurrency)),
        Column("context", lambda pair: str(pair.estimate.context_len)),
    ]
    groups = [
        *_figures(),
        [Column(f"speedup x\nby {OBJECTIVES[objective]}", lambda pair: format_interval(pair.speedup, decimals=2))],
        [
            Column("tokens/round", lambda pair: format_interval(pair.estimate.tokens_per_round, decimals=2)),
            Column("round ms", lambda pair: format_interval(pair.estimate.round_s, 1e3)),
        ],
        [
            Column("running", lambda pair: format_number(pair.estimate.running_batch)),
            Column("TTFT s", lambda pair: "" if pair.estimate.ttft_s is None else format_number(pair.estimate.ttft_s)),
        ],
    ]
    show_table(console, keys, groups, pairs)
    notes = dict.fromkeys(f"{_name(pair.estimate.setting)}: {clean(note)}" for pair in pairs for note in pair.estimate.notes)
    put_lines(console, [("Note", note) for note in notes])


def _show_rows(console, schedule: Schedule) -> None:
    """Each row of the schedule with its estimates at its ends."""
    left, lines = list(schedule.estimates), []
    for row in schedule.schedule:
        for i in range(1 if row.concurrency_from == row.concurrency_to else 2):
            lines.append((row, left.pop(0), i == 0))
    keys = [Column("concurrency", lambda line: _span(line[0].concurrency_from, line[0].concurrency_to) if line[2] else "")]
    if len(schedule.contexts) > 1:
        keys.insert(0, Column("context", lambda line: _span(line[0].context_from, line[0].context_to) if line[2] else ""))
    keys += [
        Column("setting", lambda line: _name(line[0].setting) if line[2] else "", right=False),
        Column("at", lambda line: str(line[1].estimate.concurrency)),
    ]
    groups = [[Column(column.header, lambda line, cell=column.cell: cell(line[1])) for column in group] for group in _figures()]
    last = [Column("speedup x", lambda line: format_interval(line[1].speedup, decimals=2)), Column("margin %", _margin)]
    if schedule.weighted:
        last.append(Column("share of\nload %", lambda line: f"{100 * line[0].weight:.1f}" if line[2] else ""))
    if schedule.price_per_hour is not None:
        last.append(Column("price / 1M tokens", lambda line: format_interval(line[1].estimate.price_per_million_tokens)))
    show_table(console, keys, [*groups, last], lines)


def _figures() -> list[list[Column]]:
    """Of a Compared: the setting's own beside off's."""
    return [
        [
            Column("TPOT ms", lambda pair: format_interval(pair.estimate.tpot_s, 1e3)),
            Column("off\nTPOT ms", lambda pair: format_interval(pair.baseline.tpot_s, 1e3)),
        ],
        [
            Column("tokens/s", lambda pair: format_interval(pair.estimate.output_tokens_per_s)),
            Column("off\ntokens/s", lambda pair: format_interval(pair.baseline.output_tokens_per_s)),
        ],
    ]


def _margin(line: tuple[ScheduleRow, Compared, bool]) -> str:
    row, _, first = line
    if not first:
        return ""
    if row.runner_up and row.margin > CUT:
        return "no other keeps the limits"
    return f"{100 * row.margin:+.1f} [{100 * row.margin_low:+.1f}, {100 * row.margin_high:+.1f}]" if row.runner_up else "nothing else"


def _gain(deployment: Deployment) -> str:
    if deployment.drafter == OFF:
        return ""
    return format_percent(deployment.gain_over_off) if deployment.gain_over_off else "off keeps no limit"


def _settings(deployment: Deployment) -> str:
    """Of the shortest context; the rest is in the file."""
    rows = [row for row in deployment.schedule if row.context_from == deployment.schedule[0].context_from]
    more = (
        f"; {len({row.context_from for row in deployment.schedule})} contexts, this is the shortest" if len(rows) < len(deployment.schedule) else ""
    )
    parts = []
    for row in rows:
        name = "off" if row.drafter == OFF else "idle" if row.draft_len == 0 else _name(row.setting).removeprefix(f"{row.drafter} ")
        if parts and parts[-1][0] == name:  # a row of its own where limits break
            parts.pop()
        parts.append((name, row.concurrency_to))
    return ", ".join(f"{name} ..{end}" for name, end in parts) + more


def _loading(schedule: Schedule) -> str:
    """Whether a drafter is worth loading at all."""
    best = next((deployment for deployment in schedule.deployments if deployment.drafter != OFF), None)
    over = "over your load" if schedule.weighted else "over all loads, each counting alike"
    if best is None:
        return "no drafter was measured, or none fits"
    if best.gain_over_off is None:
        return f"{clean(best.drafter)} keeps the limits somewhere, off nowhere"
    pays = "pays" if schedule.deployments.index(best) < [deployment.drafter for deployment in schedule.deployments].index(OFF) else "does not pay"
    unsure = ", which is not certain" if best.gain_over_off.low < 0 < best.gain_over_off.high else ""
    return f"{clean(best.drafter)} {pays}: {format_percent(best.gain_over_off)} % against off by {OBJECTIVES[schedule.objective]}, {over}{unsure}"


def _flip(flip: Flip, schedule: Schedule) -> str:
    between = "" if flip.lowest == flip.highest else f", or anywhere in {_span(flip.lowest, flip.highest)}"
    return f"{_name(flip.before)} to {_name(flip.after)} at concurrency {flip.concurrency}{between}{_context(flip.context_len, schedule)}"


def _at(row: ScheduleRow, schedule: Schedule) -> str:
    context = f", context {_span(row.context_from, row.context_to)}" if len(schedule.contexts) > 1 else ""
    return f"concurrency {_span(row.concurrency_from, row.concurrency_to)}{context}"


def _context(context_len: int, schedule: Schedule) -> str:
    return f", context {context_len}" if len(schedule.contexts) > 1 else ""


def _limits(limits: Limits | None) -> str:
    if limits is None:
        return ""
    known = [f"{name} {1e3 * limit:g} ms" for name, limit in (("TPOT", limits.tpot_s), ("TTFT", limits.ttft_s)) if limit is not None]
    return f" ({', '.join(known)})"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"


def _name(setting) -> str:
    return clean(describe_setting(setting))
