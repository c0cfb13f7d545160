"""planner import audit, as a user calls it."""

import json
import sys
from pathlib import Path

import pytest
from benches import HEADER, table

from planner.cli import main

BUDGETDRAFT = str(Path(__file__).parents[1] / "published/budgetdraft.csv")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def call(*words: str):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["planner", "import", "audit", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), captured.err

    return call


def test_faults_exit_with_1_and_name_the_lines(run):
    code, out, err = run(BUDGETDRAFT)
    assert code == 1 and err == ""
    assert "3 contradictions, 14 rows to distrust" in out and "Distrust lines 23-34, 46, 82" in out and "16384 tokens of context, not 8192" in out


def test_json_has_every_row(run):
    code, out, _ = run(BUDGETDRAFT, "--json")
    found = json.loads(out)
    assert code == 1 and len(found["distrust"]) == 14 and {fault["kind"] for fault in found["faults"]} == {"acceptance", "baseline", "speedup"}


def test_a_bench_table_is_audited_by_its_own_columns(run, tmp_path):
    (tmp_path / "good.csv").write_text(table())
    code, out, _ = run("good.csv")
    assert code == 0 and "5 rows: nothing contradicts itself" in out
    rows = [
        ",0,1,1024,256,0.012,0.012,82,0.1,,,,,1",
        "eagle3,2,1,1024,256,0.008,0.0136,120,0.1,1.7,,,,1",
        "eagle3,4,1,1024,256,0.0045,0.0128,210,0.1,2.84,,,,1",
    ]
    (tmp_path / "bad.csv").write_text("\n".join([HEADER, *rows]))
    code, out, _ = run("bad.csv")
    assert code == 1 and "the acceptance rises with K in bad.csv:4 (46.00% at K = 4, 35.00% at K = 2 in bad.csv:3" in out


def test_flags_that_do_not_belong_to_a_table_are_refused(run):
    code, out, err = run(BUDGETDRAFT, "--isl", "1000")
    assert code == 2 and out == "" and "--isl is for benchmark files" in err
    code, _, err = run("nothing.csv")
    assert code == 2 and "nothing.csv" in err
