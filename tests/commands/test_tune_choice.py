"""From runs to cells: what counters say of draft lengths and acceptance, and how sure a time per token is."""

import numpy as np
import pytest

from planner.canaries import Answer
from planner.commands.tune_choice import pace, served_cells
from planner.schedules import Setting
from planner.tunings import Counted, Run


def made_run(draft_len, counted, *, drafter="eagle3", tpot_s=0.01, spread=0.0, number=16, concurrency=1):
    rng = np.random.default_rng(0)
    answers = [
        Answer(ttft_s=0.1, decode_s=99 * tpot_s * float(np.exp(spread * rng.standard_normal())), output_tokens=100, prompt_tokens=50, chunks=40, longest_gap_s=0.02)
        for _ in range(number)
    ]  # fmt: skip
    setting = Setting(drafter=drafter, draft_len=draft_len) if drafter != "none" else Setting()
    return Run(
        launch=0, setting=setting, concurrency=concurrency, answers=answers, prompts=list(range(number)), wall_s=1.0, sent=number, counted=counted
    )


def test_counters_become_tokens_per_round_and_acceptance_by_position():
    run = made_run(3, Counted(tokens=2440.0, drafts=1000.0, drafted=3000.0, accepted=1440.0, survived=[800.0, 400.0, 240.0]))
    (cell,), doubts = served_cells([run], 1)
    assert not doubts and cell.draft_len == 3
    assert cell.tokens_per_round == pytest.approx(2.44) and cell.acceptance == pytest.approx([0.8, 0.5, 0.6])
    assert cell.itl_s == pytest.approx(cell.tpot_s * 2.44) and (cell.context_len, cell.output_len) == (50, 100)
    assert cell.output_tokens_per_s == pytest.approx(100 / (0.1 + 0.99))


def test_rounds_that_draft_nothing_count_as_rounds():
    """An n-gram drafter drafts where it finds something: 500 of 1000 rounds."""
    run = made_run(4, Counted(tokens=1500.0, drafts=500.0, drafted=2000.0, accepted=500.0, survived=[200.0, 150.0, 100.0, 50.0]), drafter="ngram")
    (cell,), _ = served_cells([run], 1)
    assert cell.tokens_per_round == pytest.approx(1.5) and 1 + np.cumprod(cell.acceptance).sum() == pytest.approx(1.5)


def test_the_length_that_was_drafted_is_believed_and_a_mixture_left_out():
    other = Counted(tokens=3000.0, drafts=1000.0, drafted=5000.0, accepted=2000.0, survived=[800.0, 500.0, 400.0, 200.0, 100.0])
    mixed = Counted(tokens=2000.0, drafts=1000.0, drafted=2500.0, accepted=1000.0, survived=[600.0, 300.0, 100.0])
    stray = Counted(tokens=1500.0, drafts=4.0, drafted=4.0, accepted=2.0, survived=[2.0])
    cells, doubts = served_cells([made_run(1, other), made_run(4, mixed), made_run(0, stray)], 1)
    assert [cell.draft_len for cell in cells] == [5, 0]
    (doubt,) = doubts
    assert "2.50 tokens a round, told 4" in doubt


def test_how_much_texts_differ_is_kept():
    counted = Counted(tokens=2000.0, drafts=1000.0, drafted=3000.0, accepted=1000.0)
    sure, unsure = (served_cells([made_run(3, counted, spread=spread)], 1)[0][0] for spread in (0.0, 0.4))
    assert sure.tokens_sd == pytest.approx(0.0, abs=1e-9) and 0.05 < unsure.tokens_sd < 0.15
    assert served_cells([made_run(0, counted, drafter="none")], 1)[0][0].tokens_sd is None


def test_a_machine_that_changes_its_pace_is_noticed():
    steady = [made_run(0, None, drafter="none", tpot_s=tpot_s) for tpot_s in (0.010, 0.011)]
    assert pace(steady) == pytest.approx(1.1) and pace(steady[:1]) == 1.0
    assert pace([*steady, made_run(0, None, drafter="none", tpot_s=0.03)]) == pytest.approx(3.0)
    assert pace([made_run(3, None, tpot_s=tpot_s) for tpot_s in (0.01, 0.03)]) == 1.0, "texts differ, too"
