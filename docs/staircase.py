"""Draws docs/staircase.png from the demo: what each K gains at each load, predicted and measured, and what is chosen where.

    planner demo
    python docs/staircase.py demo docs/staircase.png

Lines and their 90 % intervals are predicted from the cells of demo/measured.csv: the filled points, and off. Hollow ones are the
cells that planner did not see, from the published table. Needs the extra `plot`.
"""

import csv
import sys
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

import planner
from planner.commands.demo import SEEN_LOADS, TABLE
from planner.schedules import describe_setting, load_schedule

LOADS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 28, 32, 36, 40, 44, 48)
COLORS = {1: "#c2570c", 3: "#1a8256", 5: "#6547bd"}
CHOSEN, INK, MUTED, GRID = "#2468b4", "#1d2129", "#5b6270", "#e9e7e3"


def main(demo: str, out: str) -> None:
    schedule = load_schedule(Path(demo) / "schedule.json")
    table = list(csv.DictReader((files("planner") / "data" / TABLE).open()))
    measured = {(int(row["draft_len"]), int(row["concurrency"])): float(row["output_tokens_per_s"]) for row in table}
    context_len = schedule.contexts[0]
    profile = Path(demo) / "profile.json"

    figure = Figure(figsize=(8.4, 4.4), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for draft_len, color in COLORS.items():
        pairs = planner.estimate_served(profile, [("draft_model", draft_len, load, context_len) for load in LOADS], objective=schedule.objective)
        found = [pair.speedup for pair in pairs]
        axes.plot(LOADS, [one.value for one in found], color=color, linewidth=1.8, label=f"K={draft_len}")
        axes.fill_between(LOADS, [one.low for one in found], [one.high for one in found], color=color, alpha=0.12, linewidth=0)
        for load in sorted({c for k, c in measured if k == draft_len}):
            seen = load in SEEN_LOADS[draft_len]
            axes.plot(load, measured[draft_len, load] / measured[0, load], "o", color=color, markersize=7, markerfacecolor=color if seen else "white",
                      markeredgewidth=1.8, zorder=4)  # fmt: skip

    for row in schedule.schedule:
        loads = [load for load in LOADS if row.concurrency_from <= load <= row.concurrency_to]
        rows = [(row.drafter, row.draft_len, load, context_len) for load in loads]
        pairs = planner.estimate_served(profile, rows, objective=schedule.objective)
        speedups = [pair.speedup.value for pair in pairs]
        axes.plot(loads, speedups, color=CHOSEN, linewidth=7, alpha=0.35, solid_capstyle="butt", zorder=2)
        middle = len(loads) // 2
        axes.annotate(f"run {describe_setting(row.setting)}", (loads[middle], speedups[middle]), xytext=(24, 16), textcoords="offset points", color=CHOSEN,
                      ha="center", weight="bold")  # fmt: skip
    for flip in schedule.flips:
        axes.axvspan(flip.lowest, flip.highest, color=MUTED, alpha=0.15, linewidth=0)
        axes.annotate("change may lie\nanywhere here", ((flip.lowest * flip.highest) ** 0.5, 0.52), color=MUTED, ha="center", fontsize=9)
    axes.axhline(1.0, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label="off")
    axes.plot([], [], color=CHOSEN, linewidth=7, alpha=0.35, label="chosen")
    axes.plot([], [], "o", color=INK, markersize=7, label="measured, given to planner")
    axes.plot([], [], "o", color=INK, markersize=7, markerfacecolor="white", markeredgewidth=1.8, label="measured, not seen by planner")
    axes.set_xscale("log", base=2)
    ticks = sorted({load for _, load in measured} | {32})
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_xlabel("concurrency, requests in the system", color=INK)
    axes.set_ylabel("throughput over off", color=INK)
    axes.grid(True, color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    figure.savefig(out, metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
