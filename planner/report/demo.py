"""What is shown of a demo: the schedule as `plan` shows it, then what was predicted beside what was measured, and what choosing lost."""

from pathlib import Path

from rich.text import Text

from planner.demos import Demo
from planner.report.layout import Column, clean, format_interval, format_number, open_console, put_lines, put_title, show_table
from planner.report.schedule import show_schedule
from planner.schedules import Setting, describe_setting


def show_demo(found: Demo) -> None:
    console = open_console()
    put_title(console, f"{found.num_seen} of {found.num_cells} measured cells go in; the others are predicted, and then looked up")
    put_lines(console, [("Measured", clean(found.source))])
    show_schedule(found.schedule, Path(found.files[-1]))

    put_title(console, "Cells that planner did not see: throughput of all requests together")
    columns = [
        Column("predicted\ntokens/s", lambda cell: format_interval(cell.predicted)),
        Column("measured\ntokens/s", lambda cell: format_number(cell.measured)),
        Column("error\n%", lambda cell: f"{100 * cell.error:+.1f}"),
    ]
    keys = [Column("setting", lambda cell: _name(cell.setting), right=False), Column("concurrency", lambda cell: str(cell.concurrency))]
    show_table(console, keys, [columns], found.cells)

    put_title(console, "The choice among the settings that the table holds, by what was measured")
    columns = [
        Column("best", lambda load: _name(load.best), right=False),
        Column("its\ntokens/s", lambda load: format_number(load.best_tokens_per_s)),
        Column("choice", lambda load: _name(load.chosen), right=False),
        Column("lost\n%", lambda load: f"{100 * load.regret:.1f}"),
    ]
    show_table(console, [Column("concurrency", lambda load: str(load.concurrency))], [columns], found.loads)
    columns = [
        Column("regret of throughput\nmean %", lambda rule: f"{100 * rule.regret:.1f}"),
        Column("worst\n%", lambda rule: f"{100 * rule.worst:.1f}"),
    ]
    show_table(console, [Column("rule", lambda rule: clean(rule.rule), right=False)], [columns], found.rules)
    errors = f"{100 * found.mean_error:.1f} % in the mean, {round(found.inside * len(found.cells))} of {len(found.cells)} inside their 90 % interval"
    put_lines(console, [("Unseen", errors), ("Files", "  ".join(map(clean, found.files))), ("Took", f"{found.seconds:.1f} s"), ("By hand", "")])
    for command in found.commands:
        console.print(Text(clean(command), style="bold"), soft_wrap=True)  # unbroken, to be pasted


def _name(setting: Setting) -> str:
    return clean(describe_setting(setting))
