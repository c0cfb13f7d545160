"""What is shown of a difference: what was set otherwise, then ratios of what was measured or predicted, then what either leads to."""

from collections.abc import Sequence

from planner.diffs import Changed, Difference, Ratio, Side, Unit
from planner.plans import Interval
from planner.report.layout import Column, clean, format_interval, format_number, open_console, put_lines, put_title, show_table
from planner.report.terminal import HASH_CHARS, MAX_ROWS
from planner.units import format_bytes

SHOWN: dict[Unit, tuple[float, str]] = {  # factor and name of what is shown
    "s": (1e3, "ms"), "tokens": (1.0, ""), "tokens/s": (1.0, "tokens/s"), "bytes": (2.0**-30, "GiB"), "share": (1.0, ""), "x": (1.0, "x"),
}  # fmt: skip


def show_difference(found: Difference) -> None:
    console = open_console()
    put_title(console, f"From one {found.kind} to another")
    put_lines(console, [("Before", _side(found.before)), ("After", _side(found.after))])
    if found.before.sha256 == found.after.sha256:
        put_lines(console, [("Same", "the two files are one and the same")])
        return
    if found.changed:
        put_title(console, "Set otherwise")
        columns = [
            Column("before", lambda one: _value(one, one.before), right=False),
            Column("after", lambda one: _value(one, one.after), right=False),
        ]
        show_table(console, [Column("what", lambda one: clean(one.what), right=False)], [columns], found.changed)
    else:
        put_lines(console, [("Settings", "the same")])
    for quantity in dict.fromkeys(ratio.quantity for ratio in found.ratios):
        _show_ratios(console, quantity, [ratio for ratio in found.ratios if ratio.quantity == quantity])
    if found.choices:
        put_title(console, "What either leads to; carried over: what the earlier choice would lose, by the later file")
        columns = [
            [Column("before", lambda one: clean(one.before), right=False), Column("after", lambda one: clean(one.after), right=False)],
            [
                Column("TPOT, after /\nbefore x", lambda one: "" if one.ratio is None else format_interval(one.ratio, decimals=2)),
                Column("carried over\n%", lambda one: "" if one.carried_loss is None else f"{100 * one.carried_loss:+.1f}"),
            ],
        ]
        rows = found.choices
        show_table(
            console, [Column("at", lambda one: clean(one.at), right=False)], columns, rows, lambda one: "bold" if one.before != one.after else ""
        )
    marks = [("*", "the interval of the ratio leaves out 1")] if any(ratio.differs for ratio in found.ratios) else []
    put_lines(
        console,
        [*marks, *_only("Before only", found.only_before), *_only("After only", found.only_after), *(("Note", clean(note)) for note in found.notes)],
    )  # fmt: skip


def _show_ratios(console, quantity: str, ratios: list[Ratio]) -> None:
    factor, unit = SHOWN[ratios[0].unit]
    put_title(console, f"{clean(quantity)}{f', {unit}' if unit and unit not in quantity else ''}")
    keys = [Column("of", lambda ratio: clean(ratio.of), right=False), Column("at", lambda ratio: clean(ratio.at), right=False)]
    groups = [
        [
            Column(f"before\n{unit}", lambda ratio: _bounds(ratio.before, factor, ratio)),
            Column(f"after\n{unit}", lambda ratio: _bounds(ratio.after, factor, ratio)),
        ],
        [
            Column("after /\nbefore x", lambda ratio: format_interval(ratio.ratio, decimals=3) + (" *" if ratio.differs else "  ")),
            *([Column("pairs", lambda ratio: str(ratio.pairs or ""))] if any(ratio.pairs for ratio in ratios) else []),
        ],
    ]
    show_table(console, keys, groups, ratios, lambda ratio: "bold" if ratio.differs else "")


def _bounds(interval: Interval, factor: float, ratio: Ratio) -> str:
    """Of loads that differ, only a middle: how they scatter says nothing."""
    return format_number(factor * interval.value) if ratio.pairs else format_interval(interval, factor)


def _side(side: Side) -> str:
    date = f", {clean(side.date)}" if side.date else ""
    return f"{clean(side.path)}: {clean(side.about)}{date}, sha256 {side.sha256[:HASH_CHARS]}"


def _value(changed: Changed, value: str | float | bool | None) -> str:
    if value is None or value == "":
        return "none"
    if changed.what.endswith("_bytes") and not isinstance(value, str | bool):
        return format_bytes(value)
    if "sha256" in changed.what or "fingerprint" in changed.what:
        return clean(value)[:HASH_CHARS]
    return clean(f"{value:g}" if isinstance(value, float) else value)


def _only(label: str, sentences: Sequence[str]) -> list[tuple[str, str]]:
    more = len(sentences) - MAX_ROWS
    return [(label, clean(sentence)) for sentence in sentences[:MAX_ROWS]] + ([(label, f"and {more} more")] if more > 0 else [])
