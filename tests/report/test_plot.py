"""The map of speedups: a PNG with every figure in it, written whole, and a clear word where matplotlib is missing."""

import subprocess
import sys

import pytest

from planner.errors import MissingExtra
from planner.report.plot import speedup_map
from planner.specs import PLAIN, DraftConfig, DrafterSpec, SparseKV

NGRAM = DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=2)


def sparse(budget: int, draft_len: int, selection: str = "window", sink: int = 4) -> DraftConfig:
    return DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=budget, selection=selection, sink=sink), draft_len=draft_len)


CELLS = [
    (sparse(budget, K, selection), 0.8 + K / 10 + budget / 4000, K == 2)
    for selection in ("window", "chunk")
    for budget in (64, 512)
    for K in (1, 2, 4)
]
CHOSEN = sparse(512, 4)


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[float, float, str]]:
    """Every text that axes were given, with its place."""
    matplotlib = pytest.importorskip("matplotlib.axes")
    texts, write = [], matplotlib.Axes.text

    def spy(self, x, y, text, **options):
        texts.append((self.get_title(), x, round(y, 2), text))
        return write(self, x, y, text, **options)

    monkeypatch.setattr(matplotlib.Axes, "text", spy)
    return texts


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[12:16] == b"IHDR"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_the_map_shows_every_prediction_where_it_belongs(tmp_path, drawn):
    speedup_map(
        tmp_path / "map.png", [*CELLS, (NGRAM, 1.04, False), (PLAIN, 1.0, False)], CHOSEN, "smollm2 on a CPU", [(CHOSEN, 1.234), (PLAIN, 1.0)]
    )
    width, height = size((tmp_path / "map.png").read_bytes())
    assert width > 600 and height > 400
    for config, speedup, tie in CELLS:
        panel, x, y = f"self_sparse, {config.kv.selection} selection", [1, 2, 4].index(config.draft_len), [64, 512].index(config.kv.budget)
        assert (panel, x, y, f"{speedup:.2f}") in drawn
        assert ((panel, x, y + 0.27, "tie") in drawn) == tie
    assert ("ngram", 1, 0, "1.04") in drawn
    assert [text for text in drawn if text[3] == "choice"] == [("self_sparse, window selection", 2, 1.27, "choice")]
    assert [text for text in drawn if text[3].startswith("meas.")] == [("self_sparse, window selection", 2, 0.73, "meas. 1.23")]
    assert list(tmp_path.iterdir()) == [tmp_path / "map.png"]


def test_what_was_measured_but_not_predicted_is_shown_too(tmp_path, drawn):
    speedup_map(tmp_path / "map.png", CELLS, CHOSEN, "", [(sparse(128, 3), 0.97)])
    assert ("self_sparse, window selection", 2, 0.73, "meas. 0.97") in drawn


def test_rows_of_one_budget_are_told_apart(tmp_path, drawn):
    speedup_map(tmp_path / "map.png", [(sparse(64, 1, sink=4), 1.1, False), (sparse(64, 1, sink=8), 1.2, False)], PLAIN, "")
    assert {text[2:] for text in drawn if text[3]} == {(0, "1.10"), (1, "1.20")}


@pytest.mark.parametrize("title", ["$\\frac{x", "模型 🚀 " * 100, "x" * 500, "\x1b[31m", ""])
@pytest.mark.parametrize("cells", [[(NGRAM, 1.0, False)], [(sparse(64, K), 2.0 ** (K - 8), False) for K in range(1, 17)]], ids=["one", "many"])
def test_any_title_and_shape_gives_a_picture(title, cells, tmp_path, recwarn):
    speedup_map(tmp_path / "map.png", cells, PLAIN, title)
    size((tmp_path / "map.png").read_bytes())
    assert not recwarn.list


@pytest.mark.parametrize("cells", [[], [(PLAIN, 1.0, False)], [(NGRAM, 0.0, False)], [(NGRAM, float("nan"), False)]])
def test_nothing_to_draw_is_an_error_and_leaves_no_file(cells, tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        speedup_map(tmp_path / "map.png", cells, PLAIN, "")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"pip install 'specplan\[plot\]'"):
        speedup_map(tmp_path / "map.png", CELLS, CHOSEN, "")
    assert not list(tmp_path.iterdir())


def test_importing_the_reports_loads_neither_matplotlib_nor_scipy():
    code = "import sys, planner.report.plot, planner.report.terminal; sys.exit(any(name in sys.modules for name in ('matplotlib', 'scipy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
