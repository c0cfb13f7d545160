"""What is shown of a tuning: what to set and to paste whole, measured apart from predicted, names from outside as text."""

import pytest

from planner.canaries import Answer
from planner.exports import Step
from planner.plans import Interval
from planner.report.tune import show_tuning
from planner.schedules import Setting
from planner.tunings import CheckedLoad, Defect, Launch, Run, TunedLoad, Tuning

K3, OFF = Setting(drafter="eagle3", draft_len=3), Setting()


def about(value, share=0.1):
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def made_tuning(**changes):
    answer = Answer(ttft_s=0.1, decode_s=1.0, output_tokens=100, prompt_tokens=50, chunks=40, longest_gap_s=0.02)
    load = TunedLoad(concurrency=4, setting=K3, running_batch=4.0, tpot_s=about(0.01), output_tokens_per_s=about(400.0), gain_over_off=about(0.9),
                     gain_over_yours=about(0.13), next_best=OFF, gain_over_next=about(0.9), best=K3)  # fmt: skip
    checked = [
        CheckedLoad(role=role, setting=setting, concurrency=4, num_answers=8, predicted_tpot_s=predicted, predicted_output_tokens_per_s=predicted and about(400.0),
                    measured_tpot_s=about(0.0123), measured_output_tokens_per_s=about(345.0), gain=gain)
        for role, setting, predicted, gain in (("chosen", K3, about(0.01), None), ("off", OFF, about(0.02), about(0.8)), ("yours", K3, None, about(0.11)))
    ]  # fmt: skip
    fields = {
        "planner_version": "0.1.0", "engine": "vllm", "engine_version": "0.33.0", "method": "eagle3", "draft_model": "D", "model": "M", "system": "a device",
        "objective": "tpot", "context_len": 50, "output_len": 100, "temperature": 0.0, "seed": 1, "minutes": 8.3, "requests": 812,
        "launches": [Launch(drafter="eagle3", ready_s=40.0)],
        "runs": [Run(launch=0, setting=K3, concurrency=4, answers=[answer], prompts=[0], wall_s=2.0, sent=1)],
        "profile": "profile.json", "schedule": "schedule.json",
        "chosen": [Step(batch_from=1, batch_to=8, draft_len=3), Step(batch_from=9, batch_to=16, draft_len=0)], "loads": [load],
        "yours": Setting(drafter="eagle3", draft_len=5), "predicted_gain": about(0.132), "paste": "--speculative-config '" + "x" * 200 + "'", "checked": checked,
        "max_draft_len": 8, "defects": [Defect(name="idle drafter", what="idle costs 12 %", known_as="issue 7")], "cut": ["--cap-minutes 1 was reached"],
    }  # fmt: skip
    return Tuning(**(fields | changes))


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
