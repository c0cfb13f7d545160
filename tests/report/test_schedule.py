"""The report of a schedule: every load with its setting, what changes, what one server can do, at any width."""

from functools import partial

import numpy as np
import pytest
from made_load import LawLoads, roofline

from planner.report.schedule import show_estimates, show_schedule
from planner.schedules import Limits
from planner.search.grid import Question
from planner.search.loads import compare_with_off
from planner.search.schedule import make_schedule

ABOUT = {"profile_sha256": "0" * 64, "model": "made\x1b[31m", "system": "a device", "source": "an engine"}
LOADS = LawLoads(
    partial(roofline, capacity={"none": 200 * 1128, "eagle3": 120 * 1128}, gain={"none": 0, "eagle3": 0.8}), {"eagle3": 3}, sd=0.015, shared=0.5,
    measured=(1, 128), ttft_s=lambda concurrency, running: 0.01 * concurrency,
)  # fmt: skip


def shown(capsys, monkeypatch, width, question, **about):
    monkeypatch.setenv("COLUMNS", str(width))
    found = make_schedule(LOADS, question, **ABOUT, **about)
    show_schedule(found, "schedule.json")
    return found, capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_rows_changes_servers_and_disagreements_are_shown(capsys, monkeypatch, width):
    found, out = shown(capsys, monkeypatch, width, Question(1, 256, [1000], "throughput"))
    assert max(map(len, out.split("\n"))) <= width and "\x1b" not in out
    words = " ".join(out.split())
    for row in found.schedule:
        assert f"{row.concurrency_from}..{row.concurrency_to}" in out
    for flip in found.flips:
        assert f"at concurrency {flip.concurrency}, or anywhere in {flip.lowest}..{flip.highest}" in words
    assert "eagle3 pays: +" in words and "idle ..256" in words and "by time per token eagle3 K=1, which loses" in words
    assert "margin %" in out and "tokens/s" in out and "speedup x" in out and "beyond what was measured" in words


def test_contexts_limits_weights_and_prices_are_shown_where_there_are_any(capsys, monkeypatch):
    _, plain = shown(capsys, monkeypatch, 120, Question(1, 64, [1000], "tpot"))
    for word in ("context ", "share of", "price", "TPOT 12 ms"):
        assert word not in "\n".join(plain.split("\n")[3:]), word
    question = Question(1, 256, [500, 4000], "goodput", Limits(tpot_s=0.012, ttft_s=2.0), np.full((2, 256), 1 / 512), 3 / 3600)
    found, out = shown(capsys, monkeypatch, 120, question, price_per_hour=3.0)
    words = " ".join(out.split())
    assert "(TPOT 12 ms, TTFT 2000 ms)" in words and "share of" in out and "price / 1M tokens" in out
    assert f"{found.schedule[0].context_from}..{found.schedule[0].context_to}" in out and "nothing keeps the limits" in words
    assert "your load" in words


def test_without_a_drafter_there_is_nothing_to_load(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    show_schedule(make_schedule(LawLoads(roofline, {}), Question(4, 4, [1000], "e2e"), **ABOUT), None)
    out = " ".join(capsys.readouterr().out.split())
    assert "no drafter was measured" in out and "nothing else" in out and "4..4" not in out


@pytest.mark.parametrize("width", [80, 120])
def test_estimates_are_shown_beside_off(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    show_estimates(compare_with_off(LOADS, np.array([0, 1, 3]), np.array([8, 8, 200]), np.array([1000, 1000, 1000]), "tpot"), "tpot")
    out = capsys.readouterr().out
    assert all(name in out for name in ("off", "eagle3 idle", "eagle3 K=2")) and max(map(len, out.split("\n"))) <= width
    assert "eagle3 K=2: beyond what was measured" in out
