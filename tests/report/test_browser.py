"""Pages in a real browser: nothing in its console, nothing asked for, every figure there, the document's own numbers, hostile names as text."""

import json

import pytest
from browser import find_browser, open_tab
from made_documents import renamed, write_documents

from planner.commands.show import gather
from planner.report.show import write_page

pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (apt install chromium)")]

HOSTILE = "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'`" + "模型 مرحبا بالعالم \u202egnp.exe " + "x" * 350
KINDS = (
    "profile",
    "plan",
    "check",
    "sweep",
    "serving profile",
    "schedule",
    "tuning",
    "simulation",
    "replay",
    "drift",
    "canary",
    "capacity",
    "audit",
    "export",
)
NARROW = 400  # CSS pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of every document, and of every document with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "hostile").mkdir()
    for path in write_documents(folder).values():
        for one in (path, renamed(path, folder / "hostile", HOSTILE)):
            write_page(gather(one), one.with_suffix(".html"))
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with open_tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def page_of(folder, kind):
    return folder / f"{kind.replace(' ', '-')}.html"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_quiet_whole_and_asks_for_nothing(kind, folder, tab):
    for dark, width in ((False, 1280), (True, NARROW)):
        tab.emulate(dark=dark, width=width)
        tab.open(page_of(folder, kind))
        assert tab.complaints() == [] and [url for url in tab.requests() if not url.startswith("file:")] == [] and len(tab.requests()) == 1
        assert tab.value("document.documentElement.scrollWidth") <= width, "only tables and drawings scroll sideways"
        sizes = tab.value(
            "[...document.querySelectorAll('figure:not(:has(.folded)) .drawing > *')].map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
        )
        assert len(sizes) == tab.value("document.querySelectorAll('figure:not(:has(.folded))').length")
        assert all(w > 100 and h > 30 for w, h in sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_do_no_harm(kind, folder, tab):
    tab.emulate(width=NARROW)
    tab.open(page_of(folder / "hostile", kind))
    assert tab.complaints() == [] and len(tab.requests()) == 1
    assert tab.value("[document.scripts.length, document.images.length, document.title.length < 200]") == [1, 0, True]
    assert tab.value("document.documentElement.scrollWidth") <= NARROW
    assert kind in ("capacity", "audit") or "<script>alert(1)</script>" in tab.value("document.body.textContent"), "it is there, as text"


def test_the_numbers_in_the_page_are_the_documents(folder, tab):
    tab.emulate()
    tab.open(page_of(folder, "plan"))
    plan = json.loads((folder / "plan.json").read_text())
    copied = tab.value(
        "[...document.querySelectorAll('figure')].find(f => f.querySelector('.tiles')).querySelector('button[data-copy]').dataset.copy"
    )
    header, *rows = [line.split(",") for line in copied.splitlines()]
    named = {str(estimate["config"]): estimate for estimate in [plan["estimate"], *plan["runners_up"], *plan["by_draft_len"]]}
    estimates = [estimate for estimate in named.values() if estimate["config"]["draft_len"]]
    at = header.index("predicted speedup x")
    assert [[float(x) for x in row[at : at + 3]] for row in rows] == [[e["speedup"][name] for name in ("value", "low", "high")] for e in estimates]
    shown = tab.value("[...document.querySelectorAll('.tiles .value')].map(e => e.textContent)")
    assert sorted(shown) == sorted(f"{e['speedup']['value']:.2f}" for e in estimates)
    assert f"{plan['speedup']['value']:.2f}" in tab.value("document.querySelector('#answer').textContent")
    assert plan["command"] in tab.value("document.querySelector('#answer pre').textContent")


def test_the_switch_sets_the_colours_against_what_the_system_prefers(folder, tab):
    ground = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('svg .stroke-s1')).stroke"
    seen = {}
    for dark in (False, True):
        tab.emulate(dark=dark)
        tab.open(page_of(folder, "check"))
        for theme in ("system", "light", "dark"):
            tab.value(f"document.getElementById('theme-{theme}').click()")
            seen[dark, theme] = (tab.value(ground), tab.value(line))
    assert seen[False, "system"] == seen[False, "light"] == seen[True, "light"]
    assert seen[True, "system"] == seen[True, "dark"] == seen[False, "dark"]
    assert all(a != b for a, b in zip(seen[False, "light"], seen[False, "dark"], strict=True))


def test_the_keyboard_reaches_the_answer_and_all_that_can_be_used(folder, tab):
    tab.emulate()
    tab.open(page_of(folder, "check"))
    tab.key("Tab")
    assert tab.value("document.activeElement.textContent") == "Skip to the answer"
    assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid", "where the focus is can be seen"
    tab.key("Enter")
    assert tab.value("location.hash") == "#answer"
    seen = set()
    for _ in range(80):
        tab.key("Tab")
        seen.add(tab.value("document.activeElement.tagName"))
    assert {"INPUT", "SUMMARY", "BUTTON", "DIV"} <= seen


def test_a_table_is_copied_as_csv(folder, tab):
    tab.emulate()
    tab.open(page_of(folder, "check"))
    tab.value(
        "globalThis.copied = null, Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => { globalThis.copied = t; }}}), 0"
    )
    tab.value("document.querySelector('details').open = true, document.querySelector('details button').click()")
    tab.value("new Promise(done => setTimeout(done, 50))")
    assert (
        tab.value("copied").startswith("configuration,predicted TPOT ms,predicted TPOT ms low")
        and tab.value("document.getElementById('status').textContent") == "Copied"
    )


def test_on_paper_it_is_light_and_shows_its_numbers(folder, tab):
    tab.emulate(dark=True, media="print")
    tab.open(page_of(folder, "check"))
    tab.value("dispatchEvent(new Event('beforeprint'))")
    assert tab.value(
        "[...document.querySelectorAll('details')].every(e => e.open) && getComputedStyle(document.querySelector('nav')).display === 'none'"
    )
    red = int(tab.value("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert red > 200
