"""Charts as inline SVG that takes its colours from the page: drawn by matplotlib, text as text, no style inside.

A page's policy refuses style attributes, so what matplotlib writes there becomes plain attributes, and each colour of PALETTE a
class that the page's style sheet fills in, light or dark. matplotlib is the extra `specplan[plot]`, loaded when asked for.
"""

import io
import itertools
import math
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from xml.etree import ElementTree

from planner.errors import MissingExtra
from planner.plans import Interval
from planner.report.html import Markup, Numbers, element
from planner.report.layout import clean

WIDTH, HEIGHT = 480, 300  # CSS pixels; text of 12 of them stays legible at two thirds of the size, on a telephone
FONT = 12
LEGEND_CHARS = 70  # of a legend's line
LEGEND_LINE = 17  # its height; a drawing with more than two grows
MAX_NAME = 40  # characters of a name in a drawing; the tables have all of it
MAX_LINES = 8  # colours that are told apart
SERIES = [f"s{i + 1}" for i in range(MAX_LINES)]
PALETTE = {name: f"#{i + 1:06x}" for i, name in enumerate(["ink", "muted", "grid", "card", "bad", *SERIES])}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Series(NamedTuple):
    """A line, points, or both, of one name; with intervals, bars at points and a band around a line."""

    name: str
    column: str  # of its numbers, with the unit: predicted and measured have columns of their own
    points: Sequence[tuple[float, float | Interval]]
    line: bool = True
    marker: bool = True
    step: bool = False  # a value holds from its x to the next
    color: str = ""  # of PALETTE; default: the next one. Series of one name share it
    hollow: bool = False


class Rule(NamedTuple):
    """A line across, with what it means."""

    at: float
    name: str
    upright: bool = False
    color: str = "muted"


class Span(NamedTuple):
    """A stretch of the x axis."""

    low: float
    high: float


@contextmanager
def _style() -> Iterator[None]:
    """Our own settings, whatever style the user's plots have; and theirs again afterwards."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("figures need matplotlib, which is not installed; pip install 'specplan[plot]'") from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks; the browser has others
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "planner", "text.parse_math": False, "font.size": FONT})
        yield


@_style()
def chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    rules: Sequence[Rule] = (),
    spans: Sequence[Span] = (),
    whole_y: bool = False,
    from_zero: bool = False,
    categories: Sequence[str] = (),  # names of x = 0, 1, ..
) -> Markup:
    """Lines and points over one axis."""
    figure, axes = _axes(x_label, y_label)
    colors: dict[str, tuple[str, str]] = {}
    free = itertools.cycle(zip(SERIES, MARKERS, strict=True))
    for one in series:
        if one.name not in colors:
            color, marker = next(free)
            colors[one.name] = (PALETTE[one.color] if one.color else PALETTE[color], marker)
    for span in spans:
        axes.axvspan(span.low, span.high, facecolor=PALETTE["muted"], alpha=0.16, linewidth=0)
    for one in series:
        _draw(axes, one, *colors[one.name])
    for rule in rules:
        color = PALETTE[rule.color]
        line = axes.axvline if rule.upright else axes.axhline
        line(rule.at, color=color, linewidth=1.4, linestyle=(0, (4, 3)), label=_name(rule.name), zorder=1.5)
    if log_x and len({x for one in series for x, _ in one.points}) > 1:
        _log(axes.xaxis, "x", [x for one in series for x, _ in one.points])
    if log_y:
        _log(axes.yaxis, "y", [_value(y) for one in series for _, y in one.points])
    if whole_y:
        from matplotlib.ticker import MaxNLocator

        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(places := {x for one in series for x, _ in one.points}) == 1 and not categories:
        (only,) = places
        axes.set_xlim(only - 1, only + 1)
        axes.set_xticks([only])
    elif categories:
        axes.set_xticks(range(len(categories)), labels=[_name(name) for name in categories])
    elif not log_x and all(float(x).is_integer() for one in series for x, _ in one.points):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if from_zero and not log_y:
        axes.set_ylim(bottom=0)
    names = {*colors, *(rule.name for rule in rules)}
    if len(names) > 1:
        _legend(figure, axes)
    return _svg(figure)


@_style()
def intervals(
    rows: Sequence[tuple[str, Sequence[tuple[str, Interval, str]]]], x_label: str, rules: Sequence[Rule] = (), left: int = MAX_NAME
) -> Markup:
    """Rows, each with estimates side by side: (what, interval, colour); those named "measured" are filled, others hollow."""
    figure, axes = _axes(x_label, "", height=max(170, 92 + 46 * len(rows)))
    shown = set()
    for y, (_, values) in enumerate(rows):
        for i, (what, value, color) in enumerate(values):
            at = y + 0.22 * (i - (len(values) - 1) / 2)
            hue, full = PALETTE[color], what.startswith("measured") or len(values) == 1
            axes.plot([value.low, value.high], [at, at], color=hue, linewidth=2.2, solid_capstyle="round", zorder=3)
            axes.plot(
                [value.value], [at], "o" if full else "D", color=hue, markerfacecolor=hue if full else PALETTE["card"], markeredgewidth=1.8,
                markersize=7, linestyle="none", label="" if what in shown else _name(what), zorder=4,
            )  # fmt: skip
            shown.add(what)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), labels=[_folded(name, left) for name, _ in rows])
    axes.tick_params(axis="y", colors=PALETTE["ink"])
    axes.grid(False, axis="y")
    for rule in rules:
        axes.axvline(rule.at, color=PALETTE[rule.color], linewidth=1.4, linestyle=(0, (4, 3)), label=_name(rule.name), zorder=1.5)
    if len(shown) + len(rules) > 1:
        _legend(figure, axes)
    return _svg(figure)


def numbers(series: Sequence[Series], x_label: str, name: str = "line") -> Numbers:
    """What a chart shows, a row for each name and x, a column for each column of its series."""
    columns = list(dict.fromkeys(one.column for one in series))
    rows: dict[tuple, list] = {}
    for one in series:
        for x, y in one.points:
            rows.setdefault((one.name, x), [None] * len(columns))[columns.index(one.column)] = y
    return Numbers([name, x_label, *columns], [[label, int(x) if float(x).is_integer() else x, *values] for (label, x), values in rows.items()])


# Drawing


def _axes(x_label: str, y_label: str, height: float = HEIGHT) -> tuple:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_xlabel(x_label, color=PALETTE["muted"])
    axes.set_ylabel(y_label, color=PALETTE["muted"])
    axes.tick_params(length=0, pad=6, colors=PALETTE["muted"])
    axes.grid(True, color=PALETTE["grid"], linewidth=1)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALETTE["muted"])
    return figure, axes


def _draw(axes, one: Series, color: str, marker: str) -> None:
    x = [at for at, _ in one.points]
    y = [_value(value) for _, value in one.points]
    low, high = ([getattr(value, bound) if isinstance(value, Interval) else value for _, value in one.points] for bound in ("low", "high"))
    if low != high and one.line and not one.marker:
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0, step="post" if one.step else None)
    elif low != high:
        axes.vlines(x, low, high, color=color, linewidth=1.4, alpha=0.75, zorder=2.5)
    axes.plot(
        x, y, color=color, linewidth=2, linestyle="-" if one.line else "none", marker=marker if one.marker else None, markersize=6,
        markerfacecolor=PALETTE["card"] if one.hollow else color, markeredgecolor=color, markeredgewidth=1.6, drawstyle="steps-post" if one.step else "default", label=_name(one.name), zorder=3,
    )  # fmt: skip


def _value(value: float | Interval) -> float:
    return value.value if isinstance(value, Interval) else value


def _log(axis, which: str, values: list[float]) -> None:
    """A logarithmic axis with its powers of two, or round figures where it spans less, written out."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values), max(values)
    axis.axes.set_xscale("log", base=2) if which == "x" else axis.axes.set_yscale("log")
    if which == "x":
        ticks = [2.0**i for i in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
        ticks = ticks[:: 1 + len(ticks) // 9]
    else:
        steps = (1, 2, 5) if high / low < 1000 else (1,)
        ticks = [step * 10.0**i for i in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for step in steps]
        ticks = [tick for tick in ticks if 0.7 * low <= tick <= 1.4 * high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def _legend(figure, axes) -> None:
    """Above the drawing, which grows with it; a name that has points and a line shows both."""
    from matplotlib.lines import Line2D

    handles: dict[str, Line2D] = {}
    for one, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if label not in handles:
            handles[label] = Line2D([], [])
            handles[label].update_from(one)
        if one.get_marker() not in (None, "", "None"):
            handles[label].set(
                marker=one.get_marker(), markersize=6, markerfacecolor=one.get_markerfacecolor(), markeredgecolor=one.get_markeredgecolor()
            )
        if one.get_linestyle() not in ("None", ""):
            handles[label].set_linestyle(one.get_linestyle())
    longest = max(map(len, handles)) + 5
    columns = max(1, min(len(handles), 4, LEGEND_CHARS // longest))
    lines = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE / 72 * max(0, lines - 2))
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=columns, frameon=False, labelcolor=PALETTE["ink"], handlelength=1.6,
        columnspacing=1.4, borderpad=0, labelspacing=0.3, handletextpad=0.5,
    )  # fmt: skip


def _name(text: str, most: int = MAX_NAME) -> str:
    """A name in a drawing: one line of what XML may hold, shortened. A leading underscore would hide it from the legend."""
    plain = "".join(char for char in clean(text) if not unicodedata.category(char).startswith("C"))
    plain = plain if len(plain) <= most else f"{plain[: most - 1]}…"
    return f"\u200a{plain}" if plain.startswith("_") else plain


def _folded(text: str, most: int) -> str:
    """On two lines where it is long."""
    name = _name(text, most)
    words = name.split(" ")
    if len(name) <= 16 or len(words) < 2:
        return name
    return "\n".join(min((((" ".join(words[:i])), " ".join(words[i:])) for i in range(1, len(words))), key=lambda pair: max(map(len, pair))))


# Into the page

_NAMES = {color: name for name, color in PALETTE.items()}
_DRAWN = itertools.count()  # ids of clip paths and glyphs must differ between the drawings of a page
_KEPT = (
    "fill",
    "stroke",
    "stroke-width",
    "stroke-dasharray",
    "stroke-dashoffset",
    "fill-opacity",
    "stroke-opacity",
    "opacity",
    "font-size",
    "text-anchor",
    "fill-rule",
)


def _svg(figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    return _element(root, f"d{next(_DRAWN)}-")


def _element(node: ElementTree.Element, prefix: str) -> Markup:
    """A drawing's element as the page writes elements: no names of its own, no style, colours as classes."""
    name = node.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
    for declaration in attributes.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":  # "12px 'DejaVu Sans', sans-serif"
            attributes["font-size"] = next(word for word in value.split() if word.endswith("px"))
        elif key in _KEPT:
            attributes[key] = value
    classes = []
    for key in ("fill", "stroke"):
        if color := _NAMES.get(attributes.get(key, "")):
            classes.append(f"{key}-{color}")
            del attributes[key]
    for key in ("clip-path", "href"):  # ids that are pointed at
        if key in attributes:
            attributes[key] = attributes[key].replace("#", f"#{prefix}")
    if "id" in attributes:
        attributes["id"] = prefix + attributes["id"]
    if name == "svg":
        attributes = {"viewBox": attributes["viewBox"], "aria-hidden": "true", "focusable": "false"}
    inner = [_element(child, prefix) for child in node if isinstance(child.tag, str) and child.tag.rpartition("}")[2] not in ("metadata", "style")]
    text = (node.text or "").strip()
    return element(name, *([text] if text else []), *inner, **attributes, class_=" ".join(classes))
