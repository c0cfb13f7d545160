"""What is shown of a canary: the plan's server beside the one without, load by load."""

from pathlib import Path

from planner.canaries import Canary
from planner.report.layout import Column, clean, format_interval, format_number, open_console, put_lines, put_title, saved_lines, show_table
from planner.report.terminal import HASH_CHARS


def show_canary(canary: Canary, path: str | Path | None) -> None:
    """The verdict first; times are in ms, throughput is of all requests together."""
    console = open_console()
    how = "greedy" if canary.temperature == 0 else f"temperature {canary.temperature:g}"
    put_title(
        console,
        f"Canary of {clean(canary.model)}: {clean(canary.server)} with the plan, {clean(canary.baseline_server)} without; "
        f"{canary.output_len} tokens, {how}, a speedup of {canary.min_speedup:g} is asked for",
    )
    put_lines(console, [("Verdict", clean(canary.verdict))])
    groups = [
        [
            Column("without\nTPOT ms", lambda cell: format_number(1e3 * cell.baseline_tpot_s)),
            Column("TPOT ms", lambda cell: format_number(1e3 * cell.tpot_s)),
            Column("speedup x\nby TPOT", lambda cell: format_interval(cell.tpot_speedup, decimals=2)),
            Column("predicted", lambda cell: "" if cell.predicted_speedup is None else f"{cell.predicted_speedup:.2f}"),
        ],
        [
            Column("without\ntokens/s", lambda cell: format_number(cell.baseline_output_tokens_per_s)),
            Column("tokens/s", lambda cell: format_number(cell.output_tokens_per_s)),
            Column("speedup x\nby tokens/s", lambda cell: format_interval(cell.throughput_speedup, decimals=2)),
        ],
        [Column("verdict", lambda cell: cell.verdict, right=False)],
    ]
    keys = [Column("concurrency", lambda cell: str(cell.concurrency)), Column("prompts", lambda cell: str(cell.num_prompts))]
    show_table(console, keys, groups, canary.cells)
    lines = [("Note", clean(note)) for note in canary.notes]
    put_lines(console, [*lines, ("Plan", f"sha256 {canary.plan_sha256[:HASH_CHARS]}"), *saved_lines(path)])
