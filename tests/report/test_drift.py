"""The reports of a drift and of a canary: the verdict first, at any width, and nothing of a name's control characters."""

import pytest
from fake_engine import FakeEngine, made_schedule
from msgspec.structs import replace

from planner.canaries import Answer, Canary, Group
from planner.commands.canary import _cell, _verdict
from planner.commands.drift import judge
from planner.engines.metrics import compare_files
from planner.report.canary import show_canary
from planner.report.drift import show_drift


def watched(engine: FakeEngine):
    before = engine.metrics().encode()
    engine.serve(3600)
    return compare_files((before, "before"), (engine.metrics().encode(), "after"), None)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_drift_is_shown_at_any_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    plan = replace(made_schedule(), model="made\x1b[31m")
    found = judge(plan, "0" * 64, watched(FakeEngine(draft_len=5, concurrency=4, gain=0.3)), drafter=None, context_len=None)
    show_drift(found, "drift.json")
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert max(map(len, out.split("\n"))) <= width and "\x1b" not in out
    assert out.index("Verdict") < out.index("measured") and "acceptance moved: tokens per round" in words and "breaks even at" in words
    assert all(text in words for text in (found.verdict, *found.advice, *found.notes, "rounds that accept it %", "over what runs %", "two scrapes"))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_canary_is_shown_at_any_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))

    def groups(tpot_s):
        answer = {"ttft_s": 0.1, "output_tokens": 11, "prompt_tokens": 5, "chunks": 3, "longest_gap_s": 0.1}
        return [Group(wall_s=1 + 10 * t, answers=[Answer(decode_s=10 * t, **answer)]) for t in tpot_s]

    cells = [_cell(1, groups([0.01, 0.011, 0.012, 0.01]), groups([0.02, 0.02, 0.021, 0.02]), "tpot", ask, 0.9, 1.8) for ask in (1.2, 1.9, 3)]
    assert [cell.verdict for cell in cells] == ["pass", "undecided", "fail"]
    about = {"planner_version": "0", "plan_sha256": "0" * 64, "model": "made\x1b[31m", "server": "http://a:1", "baseline_server": "http://b:1"}
    show_canary(
        Canary(
            **about, measure="tpot", min_speedup=1.9, output_len=11, temperature=0.0, seed=1, cells=cells, passed=False, decided=True,
            verdict=_verdict(cells, "tpot", 1.9), notes=["a note"],
        ),
        None,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= width and "\x1b" not in out
    assert all(word in out for word in ("fails", "undecided", "pass", "a note", "predicted", "1.80"))
