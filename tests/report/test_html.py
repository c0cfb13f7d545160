"""Pages of every document: one file that loads nothing, figures with their numbers, the document's figures, hostile names as text."""

import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from made import made_profile
from made_documents import DRAFTER, NAME, about, renamed, write_documents
from made_trees import with_trees

from planner.commands.show import gather
from planner.documents import VALUES, load_document
from planner.errors import BadInput
from planner.measurements import encode
from planner.plans import Interval
from planner.report.figures import PALETTE, Rule, Series, chart, intervals
from planner.report.html import Answer, Figure, Numbers, Page, Tile, element, render, tiles, to_csv
from planner.report.show import compose
from planner.simulations import QUANTILES

pytest.importorskip("matplotlib")

EVERY = [kind.name for kind in VALUES]
HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "attribute": "\" onmouseover='alert(3)' x=\"",
    "closing": "</td></title></style></script><!-- &lt; &amp;",
    "long": "x" * 499,
    "other scripts": "模型 ünï 🚀 مرحبا بالعالم \u202egnp.exe",
    "mathematics": "$\\frac{x}$ _under_ ^hat",
    "control": "a\x00\x1b[31m\x9b b\ufffe",
    "formula": "=HYPERLINK(A1)",
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def pages(documents):
    """Pages by kind, each with its text."""
    made = {kind: compose(gather(path)) for kind, path in documents.items()}
    return {kind: (page, render(page).decode()) for kind, page in made.items()}


class Reader(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_harmless(page: str) -> Reader:
    """One style, one script, both ours; nothing that loads or runs."""
    found = Reader(page)
    policy = next(meta["content"] for meta in found.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(found.of(tag)) == len(bodies) == 1 and found.of(tag) == [{}]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(bodies[0].encode()).digest()).decode()}'" in policy
    assert not {tag for tag, _ in found.elements} & {"img", "iframe", "object", "embed", "link", "base", "form", "image", "foreignObject"}
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") or name in ("style", "src", "action") for name in attributes), (tag, attributes)
        assert all(value.startswith("#") for name, value in attributes.items() if name.endswith("href")), (tag, attributes)
    return found


def test_there_is_a_document_of_every_kind(documents):
    assert set(documents) == set(EVERY)
    assert all(type(load_document(documents[kind.name])) is value for kind, value in VALUES.items())


@pytest.mark.parametrize("kind", EVERY)
def test_a_page_is_one_file_with_the_answer_first(kind, pages):
    page, text = pages[kind]
    found = check_harmless(text)
    assert len(found.of("h1")) == 1 and page.answer.headline and page.answer.facts
    assert text.index('class="headline"' if not page.answer.tone else 'class="headline ') < text.index("<h2")
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id names one element"
    assert {a["href"] for a in found.of("a")} <= {f"#{place}" for place in ids}
    assert dict(page.source)["sha256"] in text


@pytest.mark.parametrize("kind", EVERY)
def test_each_figure_has_words_and_numbers(kind, pages):
    page, text = pages[kind]
    found = Reader(text)
    assert len(found.of("figure")) == len(page.figures) and bool(page.figures) == (kind not in ("audit", "export")), kind
    drawn = [attributes for attributes in found.of("div") if attributes.get("role") == "img"]
    assert len(drawn) == len(found.of("svg")) and all(attributes["aria-label"] for attributes in drawn)
    assert not any(color in text for color in PALETTE.values()), "every colour is the page's own"
    for figure in page.figures:
        assert figure.text and figure.numbers.rows
        for column in figure.numbers.columns:
            assert not ("measured" in column and "predicted" in column and "over" not in column), "measured and predicted never share a column"


def test_measured_and_predicted_rest_in_columns_of_their_own(pages):
    for kind, (page, _) in pages.items():
        for figure in page.figures:
            drawn = re.search("[Mm]easured.*(fit|predicted)|([Ff]it|[Pp]redicted).*measured", figure.title)
            if drawn:
                names = " ".join(figure.numbers.columns)
                assert "measured" in names and re.search("predicted|fitted|planned", names), (kind, figure.title)


def rows_of(figure: Figure) -> list[dict]:
    return list(csv.DictReader(io.StringIO(to_csv(figure.numbers))))


def figure_of(page: Page, title: str) -> Figure:
    return next(figure for figure in page.figures if figure.title.startswith(title))


def test_the_map_of_a_plan_holds_the_plans_own_figures(documents, pages):
    plan = json.loads(documents["plan"].read_text())
    rows = {row["configuration"]: row for row in rows_of(figure_of(pages["plan"][0], "Speedup by"))}
    named = {str(estimate["config"]): estimate for estimate in [plan["estimate"], *plan["runners_up"], *plan["by_draft_len"]]}
    estimates = [estimate for estimate in named.values() if estimate["config"]["draft_len"]]
    assert len(rows) == len(estimates) >= len(plan["by_draft_len"]) > 1
    for estimate, row in zip(estimates, rows.values(), strict=True):
        assert int(row["K"]) == estimate["config"]["draft_len"]
        assert (
            float(row["predicted speedup x"]) == estimate["speedup"]["value"]
            and float(row["predicted speedup x high"]) == estimate["speedup"]["high"]
        )
    assert sum(row["mark"] == "choice" for row in rows.values()) == (plan["chosen"]["draft_len"] > 0)


def test_a_profile_beside_its_plan_fills_the_map_and_the_front(documents):
    plan = load_document(documents["plan"])
    page = compose(gather(documents["plan"], profile_path=documents["profile"], measured_path=documents["sweep"]))
    rows = rows_of(figure_of(page, "Speedup by"))
    refused = {str(rejected.config) for rejected in plan.rejected}
    assert len(rows) >= plan.num_candidates - 1 and len(rows) + 1 >= plan.num_candidates + len(refused) - len(plan.rejected)
    marks = [row["mark"] for row in rows]
    assert sum("choice" in mark for mark in marks) == 1 and sum("measured best" in mark for mark in marks) == 1
    assert sum("tie" in mark for mark in marks) == sum(tie.config.draft_len > 0 for tie in plan.ties)
    sweep = load_document(documents["sweep"])
    measured = {row["measured speedup x"] for row in rows} - {""}
    assert {cell.speedup.value for cell in sweep.cells if cell.config.draft_len} == set(map(float, measured))
    assert "memory cap" in figure_of(page, "Time per token against memory").drawing
    assert figure_of(page, "Acceptance by kv budget") and figure_of(page, "Round time by tokens drafted")


def test_the_fits_of_a_profile_pass_its_measured_points(documents, pages):
    profile = load_document(documents["profile"])
    rows = rows_of(figure_of(pages["profile"][0], "Round time by tokens drafted"))
    both = [row for row in rows if row["measured round ms"] and row["fitted round ms"]]
    assert len(both) == sum(sample.role == "cell" for sample in profile.rounds)
    assert all(float(row["fitted round ms"]) == pytest.approx(float(row["measured round ms"]), rel=0.1) for row in both)
    acceptance = rows_of(figure_of(pages["profile"][0], "Acceptance by kv budget"))
    assert [int(row["kv budget"]) for row in acceptance] == [64, 256]
    assert all(float(row["measured P(first draft accepted)"]) == pytest.approx(0.9, abs=1 / 255) for row in acceptance)


def test_rounds_with_trees_are_shown_like_chains(tmp_path):
    profile = with_trees(made_profile(contexts=(1024,), noise=0.02), sizes=(1, 8, 32))
    (tmp_path / "trees.json").write_bytes(encode(profile))
    rows = rows_of(figure_of(compose(gather(tmp_path / "trees.json")), "Round time by nodes of the tree"))
    measured = {int(row["nodes"]): float(row["measured round ms"]) for row in rows if row["measured round ms"]}
    timed = {sample.tree_size: 1e3 * float(sample.round_s.mean()) for sample in profile.rounds if sample.tree_size}
    assert measured == pytest.approx(timed) and set(timed) == {1, 8, 32}
    assert [int(row["nodes"]) for row in rows] == list(range(1, 33)) and all(row["fitted round ms"] for row in rows)
    assert {row["drafter"] for row in rows if "4 levels" in row["drafter"]} == {row["drafter"] for row in rows}


def test_a_drafter_that_cannot_break_even_is_said_not_to_pay(pages):
    (_, *facts), rows = pages["capacity"][0].answer.facts, rows_of(figure_of(pages["capacity"][0], "Break-even"))
    drafting = [row for row in rows if row["setting"] != "no drafter"]
    assert len(facts) == len(drafting) == 3
    for fact, row in zip(facts, drafting, strict=True):
        most = int(row["setting"].rpartition("=")[2]) + 1
        assert ("cannot pay" in fact.label) == (float(row["break-even of all together low"]) > most) and f"of {most} at most" in fact.text


def test_the_line_of_an_export_starts_it_from_anywhere(documents, pages):
    assert pages["export"][0].answer.paste == str(documents["export"].parent / "run")


def test_distributions_of_a_simulation_are_the_documents(documents, pages, tmp_path):
    simulation = json.loads(documents["simulation"].read_text())
    for title, name, scale, column in (
        ("Distribution of the time to the first token", "ttft_s", 1.0, "simulated TTFT s"),
        ("Distribution of the time per later token", "tpot_s", 1e3, "simulated TPOT ms"),
    ):
        rows = rows_of(figure_of(pages["simulation"][0], title))
        for arm in simulation["arms"]:
            own = {int(row["% of requests"]): float(row[column]) for row in rows if row["setting"] == arm["name"]}
            assert own == dict(zip(QUANTILES, (scale * value for value in arm[name]["quantiles"]), strict=True))
    for arm in simulation["arms"]:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            del arm[name]["quantiles"]
    (tmp_path / "earlier.json").write_text(json.dumps(simulation))
    page = compose(gather(tmp_path / "earlier.json"))
    assert [figure.title for figure in page.figures] == [f.title for f in pages["simulation"][0].figures if not f.title.startswith("Distribution")]
    simulation["arms"][0]["ttft_s"]["quantiles"] = [1.0, 2.0]
    (tmp_path / "earlier.json").write_text(json.dumps(simulation))
    with pytest.raises(BadInput, match="quantiles must be 23 seconds"):
        load_document(tmp_path / "earlier.json")


def test_a_schedule_has_its_staircase_and_a_line_for_each_setting(documents, pages):
    schedule, page = load_document(documents["schedule"]), pages["schedule"][0]
    steps = rows_of(figure_of(page, "The chosen staircase"))
    assert [(int(row["concurrency from"]), int(row["to"]), int(row["K"])) for row in steps] == [
        (row.concurrency_from, row.concurrency_to, row.draft_len) for row in schedule.schedule
    ]
    rows = rows_of(figure_of(page, "Speedup by concurrency"))
    off, curve = (next(c for c in schedule.curves if c.setting.draft_len == k and (k > 0 or c.setting.drafter == "none")) for k in (0, 3))
    own = [row for row in rows if row["setting"] == f"{DRAFTER} K=3"]
    assert len(own) == len(curve.concurrency) and len({row["setting"] for row in rows}) == len(schedule.curves) - 1
    assert float(own[0]["predicted speedup by TPOT x"]) == pytest.approx(off.tpot_s[0] / curve.tpot_s[0])


def test_a_simulation_has_its_percentiles_and_its_pool(documents, pages):
    simulation, page = load_document(documents["simulation"]), pages["simulation"][0]
    rows = rows_of(figure_of(page, "Simulated time per later token"))
    assert [float(row["simulated TPOT ms p99"]) for row in rows] == [1e3 * arm.tpot_s.p99.value for arm in simulation.arms]
    pool = [row for row in rows_of(figure_of(page, "KV use over time")) if row["setting"] == "off"]
    assert [float(row["simulated KV use %"]) for row in pool] == [100 * share for share in simulation.arms[0].kv.series]


@pytest.mark.parametrize("kind", EVERY)
def test_a_page_says_what_was_assumed(kind, documents, pages):
    document, page = load_document(documents[kind]), pages[kind][0]
    said = [*getattr(document, "notes", []), *getattr(document, "warnings", []), *getattr(document, "assumed", [])]
    assert {" ".join(text.split()) for text in said} <= set(page.assumed)


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("kind", ["serving profile", "tuning", "simulation", "canary"])
def test_hostile_names_are_text(kind, what, documents, tmp_path):
    page = compose(gather(renamed(documents[kind], tmp_path, HOSTILE[what])))
    found = check_harmless(render(page).decode())
    text = " ".join("".join(found.text).split())
    plain = " ".join("".join(c for c in HOSTILE[what] if c.isprintable() or c == " ").split())
    assert plain.split()[0][:60] in text and NAME not in text
    assert not any(ord(char) < 32 and char != "\n" or char in "\x9b\u202e\ufffe" for char in text)


def test_elements_escape_what_they_are_given():
    assert element("p", '<b> & "c"', title="\"><script>'") == '<p title="&quot;&gt;&lt;script&gt;&#x27;">&lt;b&gt; &amp; &quot;c&quot;</p>'
    assert element("p", element("b", "<")) == "<p><b>&lt;</b></p>" and element("input", checked=True, disabled=False) == "<input checked>"
    assert element("p", "a\x00\u202e\ud800b") == "<p>ab</p>"


def test_numbers_are_copied_in_full_precision():
    third = Interval(value=1 / 3, low=0.1, high=0.7)
    text = to_csv(Numbers(["name", "x", "y"], [['a, "b"\nc', third, 1 / 7], ["=1+A1", None, 3], ["-5 [-6, -4]", 2.0, None], ["-1+A1", None, None]]))
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["name", "x", "x low", "x high", "y"]
    assert rows[1] == ['a, "b" c', repr(1 / 3), "0.1", "0.7", repr(1 / 7)]
    assert rows[2] == ["'=1+A1", "", "", "", "3"] and rows[3] == ["-5 [-6, -4]", "2.0", "2.0", "2.0", ""], "a formula is text, a figure is not"
    assert rows[4][0] == "'-1+A1"


def test_a_map_marks_the_choice_and_what_was_not_considered():
    drawn = tiles("a map", "budget", ["K=1", "K=2"], [("<64>", [Tile("1.20", 3, "choice", "[1.1, 1.3]"), None])])
    found = Reader(drawn)
    assert [cell["class"] for cell in found.of("td")] == ["level3 choice", "none"] and "&lt;64&gt;" in drawn and "<caption>a map</caption>" in drawn


def test_drawings_do_not_share_ids():
    one, two = (chart([Series("a", "ms", [(1, about(2.0)), (2, 3.0)])], "x", "y", rules=[Rule(2.5, "cap")]) for _ in range(2))
    ids = [set(re.findall(r' id="([^"]+)"', drawn)) for drawn in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r"url\(#([^)]+)\)", one)) <= ids[0]


def test_a_drawing_shortens_names_and_leaves_mathematics_alone():
    drawn = intervals([("y" * 300, [("predicted", about(1.0), "s1")]), ("$x$ <b>", [("measured", about(1.1), "s2")])], "ms")
    assert "y" * 50 not in drawn and "$x$" in drawn and "&lt;b&gt;" in drawn and "style" not in drawn


def test_users_plots_keep_their_style():
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path"}):
        chart([Series("a", "ms", [(1, 2.0), (2, 3.0)])], "x", "y")
        assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["svg.fonttype"]) == (31, "path")


def test_a_page_without_figures_or_notes_is_whole():
    text = render(Page("audit", "a title", Answer("fine", []), [], [], [], [("sha256", "0")])).decode()
    found = check_harmless(text)
    assert {a["href"] for a in found.of("a")} == {"#answer", "#report", "#source"}
