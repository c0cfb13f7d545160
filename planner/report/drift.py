"""What is shown of a drift: measured beside predicted, what moved, whether the plan pays, what to change."""

from pathlib import Path

from planner.drifts import Choice, Drift, Shift
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
from planner.report.terminal import HASH_CHARS
from planner.schedules import describe_setting

MAX_CHOICES = 6


def show_drift(drift: Drift, path: str | Path | None) -> None:
    """The verdict first."""
    console = open_console()
    watched = "two scrapes" if drift.seconds is None else f"{drift.seconds:.0f} s, {drift.num_scrapes} scrapes"
    put_title(console, f"Drift of {clean(drift.model)} on {clean(drift.engine)}: {watched}, {_load(drift)}")
    put_lines(console, [("Verdict", clean(drift.verdict)), *(("Do", clean(advice)) for advice in drift.advice)])
    rows = [
        ("tokens per round", drift.tokens_per_round, 1.0),
        ("round ms", drift.round_s, 1e3),
        ("TPOT ms", drift.tpot_s, 1e3),
    ]
    show_table(
        console,
        [Column("", lambda row: row[0], right=False)],
        [
            [
                Column("measured", lambda row: format_interval(row[1].measured, row[2])),
                Column("planned", lambda row: format_interval(row[1].predicted, row[2])),
                Column("difference %", lambda row: _ratio(row[1])),
                Column("moved", lambda row: "moved" if row[1].moved else "no", right=False),
            ]
        ],
        rows,
        lambda row: "bold" if row[1].moved else "",
    )
    if drift.positions:
        show_table(
            console,
            [Column("drafted token", lambda row: str(row[0]))],
            [
                [
                    Column("rounds that accept it %", lambda row: f"{100 * row[1].measured:.1f}"),
                    Column("planned %", lambda row: "" if row[1].predicted is None else f"{100 * row[1].predicted:.1f}"),
                ]
            ],
            list(enumerate(drift.positions, 1)),
        )
    show_table(
        console,
        [Column("setting", lambda choice: clean(describe_setting(choice.setting)), right=False)],
        [
            [
                Column("TPOT ms now", lambda choice: format_number(1e3 * choice.tpot_s)),
                Column("over what runs %", lambda choice: "runs" if choice.setting == drift.running else format_percent(choice.gain)),
                Column("", _how, right=False),
            ]
        ],
        drift.choices[:MAX_CHOICES],
        lambda choice: "bold" if choice.setting == drift.running else "",
    )
    lines = [("Cause", clean(cause)) for cause in drift.causes]
    lines.append(("Off", f"{format_interval(drift.off_tpot_s, 1e3)} ms per token, as planned; a round breaks even at {_even(drift)} tokens"))
    lines += [("Note", clean(note)) for note in drift.notes]
    lines += [("Plan", f"sha256 {drift.plan_sha256[:HASH_CHARS]}"), *saved_lines(path)]
    put_lines(console, lines)


def _load(drift: Drift) -> str:
    spread = f" ({drift.concurrency_low:.3g} to {drift.concurrency_high:.3g})" * (drift.concurrency_low < drift.concurrency_high)
    running = "" if drift.running_batch is None else f", {format_number(drift.running_batch)} running"
    context = f", context {drift.context_len}" if drift.context_len else ""
    return f"concurrency {format_number(drift.concurrency)}{spread}{running}{context}; {clean(describe_setting(drift.running))} runs"


def _ratio(shift: Shift) -> str:
    value, low, high = (100 * (bound - 1) for bound in (shift.ratio.value, shift.ratio.low, shift.ratio.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _how(choice: Choice) -> str:
    return ", ".join(["needs a restart"] * choice.restart + ["acceptance guessed"] * choice.extrapolated)


def _even(drift: Drift) -> str:
    return format_interval(drift.break_even_tokens_per_round, decimals=2)
