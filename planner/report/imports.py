"""What `planner import bench` shows: what the files held, what they lack and what that costs, and the next command."""

from pathlib import Path

from rich.text import Text

from planner.report.layout import Column, clean, open_console, put_lines, put_title, saved_lines, show_table
from planner.report.terminal import show_warnings
from planner.serving import OFF, DrafterSummary, Summary
from planner.units import format_bytes


def show_import(summary: Summary, path: str | Path) -> None:
    """The report on stdout, the profile's warnings on stderr."""
    console = open_console()
    show_warnings(summary.warnings)
    model, system = summary.model, summary.system
    put_title(
        console,
        f"{summary.cells} cells of {clean(model.name)} ({format_bytes(model.weights_bytes)} of weights) on {clean(system.name)} "
        f"({format_bytes(system.memory_bytes)}, {system.fraction:.0%} of it), from {clean(summary.source)}",
    )
    columns = [
        Column("cells", lambda row: str(row.cells)),
        Column("K", lambda row: _numbers(row.draft_len)),
        Column("concurrency", lambda row: _span(row.concurrency)),
        Column("context tokens", lambda row: _span(row.context_len)),
    ]
    show_table(console, [Column("drafter", _name, right=False)], [columns], summary.drafters)
    missing = [("Missing", clean(line)) for line in summary.missing]
    missing += [("Missing", f"of {_name(drafter)}: {clean(line)}") for drafter in summary.drafters for line in drafter.missing]
    put_lines(console, [*missing, *saved_lines(path)])
    console.print(Text(clean(summary.next_command), style="bold"), soft_wrap=True)  # unbroken, to be pasted


def _name(row: DrafterSummary) -> str:
    return "off" if row.drafter == OFF else clean(row.drafter)


def _span(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low} to {high}"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values)) if len(values) <= 8 else f"{values[0]} to {values[-1]} ({len(values)} of them)"
