"""planner demo: what it shows is what the commands that it names print, and the table that ships agrees with itself."""

import csv
import io
import json
import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest

import planner
from planner.cli import main
from planner.commands import demo as module
from planner.errors import BadInput
from planner.report.demo import show_demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return planner.demo(tmp_path_factory.mktemp("shown") / "demo")


def run(capsys, monkeypatch, command: str):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    return json.loads(capsys.readouterr().out)


def test_half_of_the_table_goes_in_and_the_rest_is_predicted_within_some_percent(found):
    assert (found.num_cells, found.num_seen, len(found.cells)) == (24, 12, 12)
    assert found.mean_error < 0.06 and found.inside >= 0.7
    assert found.rules[0].regret < min(rule.regret for rule in found.rules[1:]) / 3


def test_the_commands_it_names_give_the_same(found, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = str(Path(found.files[0]).parent)
    (tmp_path / "demo").mkdir()
    for name in ("measured.csv", "unseen.csv"):
        (tmp_path / "demo" / name).write_bytes((Path(folder) / name).read_bytes())
    imported, planned, estimated = (run(capsys, monkeypatch, command.replace(folder, "demo") + " --json") for command in found.commands)
    assert imported["cells"] == 12
    assert [(row["concurrency_to"], row["drafter"], row["draft_len"]) for row in planned["schedule"]] == [
        (row.concurrency_to, row.drafter, row.draft_len) for row in found.schedule.schedule
    ]
    values = [estimate["output_tokens_per_s"]["value"] for estimate in estimated["estimates"]]
    assert values == pytest.approx([cell.predicted.value for cell in found.cells])


def test_it_takes_seconds(tmp_path):
    began = time.process_time()  # of this process, whatever else runs
    planner.demo(tmp_path / "demo")
    assert time.process_time() - began < 15


def test_the_table_agrees_with_itself_and_names_its_source():
    folder = files("planner") / "data"
    rows = list(csv.DictReader(io.StringIO((folder / module.TABLE).read_text())))
    for row in rows:
        tpot, itl, throughput = (float(row[name]) for name in ("tpot_s", "itl_s", "output_tokens_per_s"))
        assert itl == pytest.approx(tpot * float(row["tokens_per_round"] or 1), rel=1e-4)
        assert throughput * tpot <= 1.01 * int(row["concurrency"])  # at most as many run as are there
        reached = [float(row[f"acceptance_{i}"]) for i in range(1, int(row["draft_len"]) + 1)]
        product, tokens = 1.0, 1.0
        for share in reached:
            product *= share
            tokens += product
        assert float(row["tokens_per_round"] or 1) == pytest.approx(tokens, abs=2e-4)
    assert module.SOURCE.split(": ")[-1].split(",")[0] in (folder / module.TABLE.replace(".csv", ".txt")).read_text()


def test_it_is_shown_in_a_terminal_of_any_width(found, capsys, monkeypatch):
    for width in ("40", "200"):
        monkeypatch.setenv("COLUMNS", width)
        show_demo(found)
        out = capsys.readouterr().out
        assert "RTX 4060" in out and f"{100 * found.mean_error:.1f} %" in " ".join(out.split())
        tables = [line for line in out.splitlines() if not line.startswith("planner ")]
        assert max(map(len, tables)) <= int(width)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="choose another with --out"):
        planner.demo(tmp_path / "file" / "demo")
    with pytest.raises(BadInput, match="choose another with --out"):
        planner.demo(tmp_path / "file")


def test_no_torch_is_loaded(tmp_path):
    code = f"import sys; sys.argv = ['planner', 'demo', '--json', '--quiet', '-o', {str(tmp_path / 'demo')!r}]\nfrom planner.cli import main\n"
    code += "try: main()\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "" and len(json.loads(done.stdout)["cells"]) == 12
