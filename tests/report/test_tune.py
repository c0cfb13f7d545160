"""What is shown of a tuning: what to set and to paste whole, measured apart from predicted, names from outside as text."""

import pytest
from made_reports import OFF, about, made_tuning

from planner.plans import Interval
from planner.report.tune import show_tuning


def shown(capsys, monkeypatch, tuning, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    show_tuning(tuning, "out")
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_setting_the_gain_and_the_words_to_paste(capsys, monkeypatch, columns):
    said = shown(capsys, monkeypatch, made_tuning(), columns)
    flat = " ".join(said.split())
    assert "K=3 for 1 to 8, idle for 9 to 16 requests that decode at once" in flat
    assert "+13.2 [+11.9, +14.5] % over your eagle3 K=5" in flat and "measured over your setting: +11.0" in flat
    assert said.rstrip().splitlines()[-1] == "--speculative-config '" + "x" * 200 + "'", "whole, to be copied"
    assert "10.0 [9.0, 11.0]" in flat and "12.3 [11.1, 13.5]" in flat and "not measured" in flat
    assert "known as issue 7" in flat and "--cap-minutes 1 was reached" in flat and "812 requests" in flat


def test_off_is_said_and_nothing_is_pasted(capsys, monkeypatch):
    said = " ".join(shown(capsys, monkeypatch, made_tuning(chosen=[], paste="", yours=OFF, predicted_gain=about(0.0))).split())
    assert "off: do not draft" in said and "your command does not draft, and that is best" in said and "Add to your command" not in said


def test_a_doubtful_gain_is_called_so(capsys, monkeypatch):
    said = " ".join(shown(capsys, monkeypatch, made_tuning(predicted_gain=Interval(value=0.1, low=-0.2, high=0.4))).split())
    assert "it may not pay" in said


def test_names_from_outside_are_text(capsys, monkeypatch):
    said = shown(capsys, monkeypatch, made_tuning(model="[red]M\x1b[31m\n[/]", notes=["a\x07b"]))
    assert "\x1b" not in said and "\x07" not in said and "[red]M" in said
