"""A map of predicted speedup over kv budget and draft_len, as PNG. matplotlib is the extra `specplan[plot]`, loaded when asked for."""

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len

from planner.errors import MissingExtra
from planner.files import write_whole
from planner.report.layout import clean
from planner.specs import DraftConfig, SparseKV, describe, describe_drafter

CELL_WIDTH, CELL_HEIGHT = 0.80, 0.62  # inches: three lines of legible text
MAX_WIDE = 10  # values of K up to which panels stand side by side
DPI = 150
COLORS = "RdBu"  # red slower, blue faster than plain decoding: told apart with every common colour blindness
TICKS = (1 / 8, 1 / 4, 1 / 2, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0)
FINE_TICKS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6)  # where all lies between 1/2 and 2


class Panel(NamedTuple):
    title: str
    y_label: str
    rows: list[str]  # from bottom to top
    row_of: dict  # what stands for a row -> its index


def speedup_map(
    path: Path,
    cells: list[tuple[DraftConfig, float, bool]],  # predicted speedup over plain decoding; whether it ties with the choice
    chosen: DraftConfig,
    title: str,
    measured: Sequence[tuple[DraftConfig, float]] = (),  # speedups of a check, shown below the predicted ones
) -> None:
    """Write the map: a panel per drafter and selection. Empty cells are configurations that were not considered.

    MissingExtra without matplotlib; ValueError if no cell speculates or a speedup is not positive.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the map needs matplotlib, which is not installed; pip install 'specplan[plot]'") from None
    cells = [cell for cell in cells if cell[0].draft_len > 0]
    if not cells or not all(speedup > 0 and math.isfinite(speedup) for _, speedup, _ in cells):
        raise ValueError(f"a map needs at least one speculative configuration, each with a positive speedup, got {len(cells)} cells")

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn as a box
        matplotlib.rcdefaults()  # whatever style the user's own plots have
        content = _draw(Figure, cells, chosen, clean(title), [pair for pair in measured if pair[0].draft_len > 0])
    write_whole(path, content)


def _draw(Figure: type, cells: list, chosen: DraftConfig, title: str, measured: list) -> bytes:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shown = [config for config, _, _ in cells] + [config for config, _ in measured]
    panels = _panels(shown)
    draft_lens = sorted({config.draft_len for config in shown})
    keys = list(panels)
    per_line = 2 if len(draft_lens) <= MAX_WIDE and sum(key[1] != "" for key in keys) > 1 else 1
    lines = [keys[i : i + per_line] for i in range(0, len(keys), per_line)]
    heights = [max(len(panels[key].rows) for key in line) for line in lines]
    width = max(5.5, per_line * (CELL_WIDTH * len(draft_lens) + 0.9) + 1.2)
    line_chars = int(width * 8.5 * len(title) / cell_len(title)) if cell_len(title) else 1
    wrapped = "\n".join(textwrap.wrap(title, max(8, line_chars), max_lines=4, placeholder=" ..."))
    height = max(3.5, CELL_HEIGHT * sum(heights) + 0.95 * len(lines) + 0.8 + 0.25 * (1 + wrapped.count("\n")))
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(wrapped, fontsize=11, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(len(lines), per_line, height_ratios=heights)

    # Symmetric in the ratio: 1/2 is as far from 1 as 2. The best is always inside; below 1/2 the colours may end, the figures go on.
    gain, loss = (max([sign * math.log2(speedup) for _, speedup, _ in cells] + [math.log2(1.1)]) for sign in (1, -1))
    extent = 1.1 * max(gain, min(loss, 1.0))
    scale = ScalarMappable(Normalize(-extent, extent), colormaps[COLORS])
    axes = {}
    for i, line in enumerate(lines):
        for j, key in enumerate(line):
            axes[key] = figure.add_subplot(grid[i, j])
            _frame(axes[key], panels[key], draft_lens)
    inks = {}
    for config, speedup, tie in cells:
        key, row, draft_len = place = _place(config)
        x, y = draft_lens.index(draft_len), panels[key].row_of[row]
        inks[place] = _fill(axes[key], x, y, scale.to_rgba(math.log2(speedup)), speedup, config == chosen, tie)
    for config, speedup in measured:
        key, row, draft_len = place = _place(config)
        x, y = draft_lens.index(draft_len), panels[key].row_of[row]
        axes[key].text(x, y - 0.27, f"meas. {speedup:.2f}", ha="center", va="center", fontsize=7, color=inks.get(place, "black"))

    bar = figure.colorbar(scale, ax=list(axes.values()), fraction=0.05, pad=0.02, aspect=30, extend="min" if loss > extent else "neither")
    ticks = [tick for tick in (FINE_TICKS if extent < 1 else TICKS) if abs(math.log2(tick)) <= extent]
    bar.set_ticks([math.log2(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks], fontsize=9)
    bar.set_label("predicted speedup (1 = off)", fontsize=9)
    bar.outline.set_visible(False)
    empty = len({_place(config) for config, _, _ in cells}) < len(draft_lens) * sum(len(panel.rows) for panel in panels.values())
    _legend(figure, chosen, any(tie for _, _, tie in cells), empty, bool(measured))

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _place(config: DraftConfig) -> tuple:
    """Panel, row and column of a configuration."""
    if isinstance(config.kv, SparseKV):
        return (describe_drafter(config.drafter), config.kv.selection), (config.kv.budget, config.kv.sink, config.kv.recent), config.draft_len
    return (describe_drafter(config.drafter), ""), (), config.draft_len


def _panels(configs: list[DraftConfig]) -> dict[tuple, Panel]:
    """By drafter and selection; those with budgets first."""
    rows: dict[tuple, set] = {}
    for config in configs:
        key, row, _ = _place(config)
        rows.setdefault(key, set()).add(row)
    panels = {}
    for key in sorted(rows, key=lambda key: (key[1] == "", key)):
        found = sorted(rows[key])
        budgets = [row[0] for row in found if row]
        # sink and recent stand there only where the budget alone does not tell two rows apart
        names = [f"{row[0]}" if budgets.count(row[0]) == 1 else f"{row[0]}\nsink {row[1]}\nrecent {row[2]}" for row in found if row]
        title = f"{key[0]}, {key[1]} selection" if key[1] else key[0]
        panels[key] = Panel(title, "kv budget (tokens)" if names else "", names or [""], {row: index for index, row in enumerate(found)})
    return panels


def _frame(axes, panel: Panel, draft_lens: list[int]) -> None:
    """Empty axes, grey where nothing will be filled in."""
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.set_xlim(-0.5, len(draft_lens) - 0.5)
    axes.set_ylim(-0.5, len(panel.rows) - 0.5)
    axes.set_facecolor("#e4e4e4")
    axes.set_xticks(np.arange(len(draft_lens)), labels=[str(draft_len) for draft_len in draft_lens], fontsize=9)
    axes.set_yticks(np.arange(len(panel.rows)), labels=panel.rows, fontsize=9)
    axes.set_xlabel("draft_len K (tokens drafted per round)", fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _fill(axes, x: int, y: int, color: tuple, speedup: float, chosen: bool, tie: bool) -> str:
    """One cell, a label above the figure and room below it; the colour of what is written on it."""
    from matplotlib.patches import Rectangle

    red, green, blue = (channel**2.2 for channel in color[:3])
    ink = "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"  # the better contrast, WCAG 2.2
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1))
    if chosen:
        axes.add_patch(Rectangle((x - 0.46, y - 0.45), 0.92, 0.90, fill=False, edgecolor="white", linewidth=5, zorder=3))
        axes.add_patch(Rectangle((x - 0.46, y - 0.45), 0.92, 0.90, fill=False, edgecolor="black", linewidth=2.5, zorder=3))
    elif tie:
        axes.add_patch(Rectangle((x - 0.44, y - 0.42), 0.88, 0.84, fill=False, edgecolor=ink, linewidth=1.4, linestyle=(0, (1, 1.5)), zorder=3))
    label = "choice" if chosen else "tie" if tie else ""
    axes.text(x, y + 0.27, label, ha="center", va="center", fontsize=7, color=ink, fontweight="bold" if chosen else "normal")
    axes.text(x, y, f"{speedup:.2f}", ha="center", va="center", fontsize=10, color=ink, fontweight="bold" if chosen else "normal")
    return ink


def _legend(figure, chosen: DraftConfig, ties: bool, empty: bool, measured: bool) -> None:
    from matplotlib.patches import Patch

    choice = f"choice: {describe(chosen)}" + (", do not speculate" if chosen.draft_len == 0 else "")
    handles = [Patch(fill=False, edgecolor="black", linewidth=0 if chosen.draft_len == 0 else 2, label=choice)]
    if ties:
        handles.append(Patch(fill=False, edgecolor="black", linewidth=1.2, linestyle=(0, (1, 1.5)), label="tie: cannot be told from the choice"))
    if empty:
        handles.append(Patch(facecolor="#e4e4e4", label="not considered"))
    if measured:
        handles.append(Patch(facecolor="none", label="meas.: speedup measured by check"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
