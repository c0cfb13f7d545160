"""One self-contained page: the answer, figures with their numbers, the report, what was assumed, where it is from.

Everything from a document passes `element`, which escapes it; nothing else makes markup. The page loads nothing: its style and
its script stand in it, named by their hashes in a Content-Security-Policy that forbids all else. Numbers of figures are copied
as CSV in full precision, an interval as three columns.
"""

import base64
import csv
import hashlib
import html
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

from planner.plans import Interval
from planner.report.layout import Grid, Heading, Lines, Pasted, clean, format_interval, format_number

Number = float | int | Interval | None
VOID = ("meta", "input")
ASSUMED = ("Note", "Assumed", "Unchecked", "Cut", "Warning")  # labels of a report's lines that say what is not known
MAX_TITLE = 120  # characters of a browser's tab
LONG_WORD = 24  # characters of a word from which it may break anywhere, so that no name widens a table
FORMULA = ("=", "+", "-", "@")  # a spreadsheet would compute a text that begins so
SIGNED = re.compile(r"[+-][\d.,]+( \[[-+\d., ]+\])?")  # unless it is a number, with its interval


class Markup(str):
    """Text that is HTML already."""


class Numbers(NamedTuple):
    """A table of what a figure shows."""

    columns: list[str]  # with the unit
    rows: list[list[str | Number]]


class Figure(NamedTuple):
    """A drawing or a map, in a sentence for those who do not see it, and its numbers."""

    title: str
    text: str  # what it shows, and what to see in it
    drawing: Markup  # svg of figures.py, or a table of cells
    numbers: Numbers
    wide: bool = False
    folded: bool = False  # shown when asked for


class Fact(NamedTuple):
    label: str
    value: str
    text: str = ""


class Answer(NamedTuple):
    """What a reader wants to know first."""

    headline: str
    facts: list[Fact]
    paste: str = ""  # a line to copy
    tone: str = ""  # good, bad or none


class Page(NamedTuple):
    kind: str
    title: str
    answer: Answer
    figures: list[Figure]
    blocks: list[Heading | Lines | Grid | Pasted]  # the terminal's report
    assumed: list[str]
    source: list[tuple[str, str]]  # environment, hash, file


# Elements


def element(name: str, /, *children: str, **attributes: str | bool) -> Markup:
    """An element with its text escaped; attribute names have no leading underscore, and hyphens for other underscores."""
    spelled = "".join(
        f" {key.strip('_').replace('_', '-')}" + ("" if value is True else f'="{_escaped(str(value))}"')
        for key, value in attributes.items()
        if value is not False and value != ""
    )
    if name in VOID:
        return Markup(f"<{name}{spelled}>")
    return Markup(f"<{name}{spelled}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def _escaped(text: str) -> str:
    """Without what no page may hold: control, direction, surrogate and unassigned characters."""
    return html.escape("".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Cn")))


# The page


def render(page: Page) -> bytes:
    """The page, as UTF-8."""
    style, script = (files("planner.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    title = clean(page.title)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="planner show"),
        element("title", title if len(title) <= MAX_TITLE else f"{title[:MAX_TITLE]}…"),
        element("style", Markup(style)),
    )
    sections = [_answer(page)]
    if page.figures:
        sections.append(_section("figures", "Figures", element("div", *map(_figure, page.figures), class_="figures")))
    sections.append(_section("report", "Report", *_report([block for block in page.blocks if block != Pasted(page.answer.paste)])))
    if page.assumed:
        items = [element("li", text) for text in page.assumed]
        sections.append(_section("assumed", "Assumed and extrapolated", element("ul", *items)))
    sections.append(_section("source", "Where it is from", _definitions(page.source)))
    body = element(
        "body",
        element("a", "Skip to the answer", href="#answer", class_="skip"),
        element("header", element("p", "planner", class_="brand"), _contents(page), _themes()),
        element("main", *sections),
        element("p", role="status", aria_live="polite", id="status"),
        element("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n".encode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _contents(page: Page) -> Markup:
    present = [("answer", "Answer", True), ("figures", "Figures", page.figures), ("report", "Report", True)]
    present += [("assumed", "Assumed", page.assumed), ("source", "Source", True)]
    return element("nav", *(element("a", name, href=f"#{place}") for place, name, there in present if there), aria_label="Sections")


def _themes() -> Markup:
    """A switch without a script: the style looks at which one is checked."""
    radios = [
        element("label", element("input", type="radio", name="theme", id=f"theme-{name}", checked=name == "system"), name.capitalize())
        for name in ("system", "light", "dark")
    ]
    return element("fieldset", element("legend", "Theme"), *radios, class_="themes")


def _section(place: str, title: str, *children: str) -> Markup:
    return element("section", element("h2", title, id=f"{place}-title"), *children, id=place, aria_labelledby=f"{place}-title", tabindex="-1")


def _answer(page: Page) -> Markup:
    answer = page.answer
    facts = [
        element("div", element("dt", fact.label), element("dd", fact.value), *([element("dd", fact.text, class_="small")] if fact.text else []))
        for fact in answer.facts
    ]
    return element(
        "section",
        element("p", page.kind, class_="kind"),
        element("h1", page.title),
        element("p", answer.headline, class_=f"headline {answer.tone}".strip()),
        *([element("dl", *facts, class_="facts")] if facts else []),
        *([_pasted(answer.paste)] if answer.paste else []),
        id="answer",
        tabindex="-1",
    )


def _definitions(lines: Sequence[tuple[str, str]]) -> Markup:
    """Labels and sentences; equal labels in a row share one."""
    rows: list[tuple[str, list[str]]] = []
    for label, text in lines:
        if rows and rows[-1][0] == label:
            rows[-1][1].append(text)
        else:
            rows.append((label, [text]))
    return element("dl", *(element("div", element("dt", label), *(element("dd", text) for text in texts)) for label, texts in rows), class_="lines")


def _pasted(text: str) -> Markup:
    button = element("button", "Copy", type="button", data_copy=text, aria_label="Copy the line")
    return element("div", element("pre", element("code", text), tabindex="0"), button, class_="paste")


# Figures and tables


def _figure(figure: Figure) -> Markup:
    drawn = figure.drawing.startswith("<svg")  # else a map, a table that says it all itself
    about = {"role": "img", "aria_label": f"{figure.title}. {figure.text}"} if drawn else {"role": "group", "aria_label": figure.title}
    inside = [
        element("div", figure.drawing, class_="drawing", tabindex="0", **about),
        element("figcaption", figure.text),
        element("details", element("summary", "Numbers"), _numbers(figure)),
    ]
    if figure.folded:
        return element("figure", element("details", element("summary", element("h3", figure.title)), *inside, class_="folded"), class_="wide")
    return element("figure", element("h3", figure.title), *inside, class_="wide" if figure.wide else "")


def _numbers(figure: Figure) -> Markup:
    columns, rows = figure.numbers
    right = [any(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    cells = [[_shown(value) for value in row] for row in rows]
    return _table(figure.title, columns, cells, right, [False] * len(rows), to_csv(figure.numbers), "numbers")


def _shown(value: str | Number) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case Interval():
            return format_interval(value)
        case int():
            return str(value)
    return format_number(value) if math.isfinite(value) else ""


def to_csv(numbers: Numbers) -> str:
    """In full precision; an interval is three columns."""
    columns, rows = numbers
    spread = [any(isinstance(row[i], Interval) for row in rows) for i in range(len(columns))]
    header = [
        name for column, wide in zip(columns, spread, strict=True) for name in ((column, f"{column} low", f"{column} high") if wide else (column,))
    ]
    lines = [[cell for value, wide in zip(row, spread, strict=True) for cell in _spread(value, wide)] for row in rows]
    return _csv([header, *lines])


def _spread(value: str | Number, wide: bool) -> list:
    bounds = [value.value, value.low, value.high] if isinstance(value, Interval) else [value, *([value, value] if wide else [])]
    return ["" if bound is None else bound for bound in bounds]


def _csv(rows: Iterable[Sequence]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_plain(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _plain(cell: object) -> object:
    """A text that a spreadsheet would take for a formula is marked as text; figures with a sign are figures."""
    if not isinstance(cell, str):
        return cell
    text = clean(cell)
    return f"'{text}" if text.startswith(FORMULA) and not SIGNED.fullmatch(text) else text


def _table(
    caption: str, columns: Sequence[str], rows: list[list[str]], right: list[bool], strong: list[bool], content: str, what: str = ""
) -> Markup:
    head = element(
        "tr", *(element("th", _header(column), scope="col", class_="right" if r else "") for column, r in zip(columns, right, strict=True))
    )
    body = []
    for row, mark in zip(rows, strong, strict=True):
        cells = []
        for i, text in enumerate(row):
            kind = "right" if right[i] else "long" if any(len(word) > LONG_WORD for word in text.split()) else ""
            cells.append(element("td" if i else "th", text, class_=kind, scope="" if i else "row"))
        body.append(element("tr", *cells, class_="strong" if mark else ""))
    button = element("button", "Copy as CSV", type="button", data_copy=content, aria_label=f"Copy the table as CSV: {caption}")
    table = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element(
        "div", element("div", table, class_="scroll", tabindex="0", role="group", aria_label=caption), button, class_=f"table {what}".strip()
    )


def _header(column: str) -> Markup:
    """A header of several lines."""
    return join(part for i, line in enumerate(column.split("\n")) for part in ([Markup("<br>"), line] if i else [line]))


def _report(blocks: Sequence[Heading | Lines | Grid | Pasted]) -> list[Markup]:
    """The terminal's report; what it assumed stands in its own section."""
    found, caption = [], "Report"
    for block in blocks:
        match block:
            case Heading(text=text):
                caption = text
                found.append(element("h3", text))
            case Lines(lines=lines):
                rest = [line for line in lines if line[0] not in ASSUMED and line[0] != "File"]
                found += [_definitions(rest)] if rest else []
            case Grid(headers=headers, right=right, rows=rows, strong=strong) if rows:
                flat = [" ".join(header.split("\n")) for header in headers]
                found.append(_table(caption, headers, rows, right, strong, _csv([flat, *rows])))
            case Grid():
                found.append(element("p", "(none)"))
            case Pasted(text=text):
                found.append(_pasted(text))
    return found


def assumed_in(blocks: Sequence[Heading | Lines | Grid | Pasted]) -> list[str]:
    """What a report says it assumed, extrapolated or could not check, each once."""
    return list(dict.fromkeys(text for block in blocks if isinstance(block, Lines) for label, text in block.lines if label in ASSUMED))


class Tile(NamedTuple):
    """A cell of a map."""

    value: str
    level: int | None  # -5..5, red to blue; None: grey
    mark: str = ""  # choice, tie or best, below the figure
    small: str = ""  # below the figure: an interval, a measurement


def tiles(caption: str, corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Tile | None]]]) -> Markup:
    """A map as a table: read by those who see it and those who do not."""
    head = element("tr", element("th", corner, scope="col"), *(element("th", column, scope="col") for column in columns))
    body = []
    for name, line in rows:
        cells = []
        for tile in line:
            if tile is None:
                cells.append(element("td", "–", class_="none", title="not considered"))
                continue
            level = "none" if tile.level is None else f"level{tile.level}"
            marks = [element("span", tile.mark, class_="mark")] if tile.mark else []
            small = [element("span", tile.small, class_="small")] if tile.small else []
            kind = tile.mark.replace("measured ", "").split()[0] if tile.mark else ""
            cells.append(element("td", *marks, element("span", tile.value, class_="value"), *small, class_=f"{level} {kind}".strip()))
        body.append(element("tr", element("th", name, scope="row"), *cells))
    return element("table", element("caption", caption), element("thead", head), element("tbody", *body), class_="tiles")
