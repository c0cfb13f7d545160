"""What `planner export` prints."""

import shlex
from pathlib import Path

from rich.text import Text

from planner.exports import CostRow, Export, Knob
from planner.report.layout import Column, clean, format_interval, open_console, put_lines, put_title, show_table
from planner.specs import OBJECTIVES


def show_export(export: Export, folder: str | Path) -> None:
    """What became of each knob, what the engine's limits cost, and the command."""
    console = open_console()
    what = f"{clean(export.method)} {clean(export.draft_model or '')}".strip() if export.method else "off"
    put_title(console, f"{clean(export.model)} on {clean(export.engine)} {clean(export.engine_version)}: {what}")
    groups = [
        [
            Column("planned", lambda knob: clean(knob.planned), right=False),
            Column("exported", lambda knob: clean(knob.exported), right=False),
            Column("how", lambda knob: knob.fidelity, right=False),
        ]
    ]
    show_table(console, [Column("knob", lambda knob: clean(knob.knob), right=False)], groups, export.knobs, _style)
    put_lines(console, [(knob.knob, clean(knob.reason)) for knob in export.knobs if knob.reason])
    if export.cost:
        put_title(console, f"What the engine's limits cost, by {OBJECTIVES[export.objective]}")
        keys = [Column("concurrency", lambda row: str(row.concurrency)), Column("context", lambda row: str(row.context_len))]
        columns = [
            [
                Column("planned", lambda row: clean(row.planned), right=False),
                Column("speedup x", lambda row: format_interval(row.planned_speedup, decimals=2)),
            ],
            [
                Column("exported", lambda row: clean(row.exported), right=False),
                Column("speedup x", lambda row: format_interval(row.exported_speedup, decimals=2)),
            ],
            [Column("loss %", _loss)],
        ]
        show_table(console, keys, columns, export.cost)
    lines = [
        ("Cost", clean(export.cost_note)),
        ("Versions", f"{clean(export.engine)} {clean(export.engine_versions)}"),
        ("Checked", clean(export.checked)),
    ]
    lines += [("Note", clean(note)) for note in export.notes]
    lines += [("Files", f"{clean(folder)}: {', '.join([*map(clean, export.files), 'plan.json'])}")]
    put_lines(console, lines)
    console.print(Text(start_line(folder), style="bold"), soft_wrap=True)  # unbroken, to be pasted


def start_line(folder: str | Path) -> str:
    """What starts the engine from where the reader is: the line inside of `run` looks for its files beside itself."""
    return shlex.quote(clean(Path(folder) / "run"))


def _style(knob: Knob) -> str:
    return "" if knob.fidelity == "exact" else "bold"


def _loss(row: CostRow) -> str:
    return f"{100 * row.loss:.1f}"
