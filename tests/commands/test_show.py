"""planner show: any document again as its command showed it, and what a page may be made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_documents import write_documents

from planner.cli import main
from planner.commands.show import gather
from planner.documents import VALUES, load_document
from planner.errors import BadInput
from planner.report import terminal

EVERY = [kind.name for kind in VALUES]
BROKEN = {
    "nothing": ("", "known are profile"),
    "a list": ("[]", "known are profile"),
    "another file": ('{"model": "M", "surprise": 1}', "of no known kind.*fields.*model, surprise.*simulation"),
    "another kind": ('{"schema_version": 1, "kind": "<b>recipe"}', "has kind '<b>recipe'.*known are"),
    "a kind that is no word": ('{"schema_version": 1, "kind": 5}', "has kind '5'"),
    "half of one": ('{"schema_version": 1, "kind": "simulation", "seed": 1}', "simulation .* not valid: .*missing required field"),
    "a later one": ('{"schema_version": 2, "kind": "tuning"}', "schema_version 2, this planner reads 1"),
    "nested": ("[" * 100_000, "not valid"),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["planner", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("kind", EVERY)
def test_a_document_is_shown_and_printed(kind, documents, run):
    code, out, _ = run("show", documents[kind])
    assert code == 0 and len(out) > 100
    code, out, err = run("show", documents[kind], "--json")
    assert (code, err) == (0, "") and json.loads(out) == json.loads(documents[kind].read_text())


def test_a_plan_is_shown_as_plan_shows_it(documents, run, capsys):
    terminal.show_plan(load_document(documents["plan"]), documents["plan"])
    expected = capsys.readouterr().out
    assert run("show", documents["plan"])[1] == expected


def test_a_page_is_written_and_named(documents, run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.html"
    code, said, err = run("show", documents["check"], "--html", out)
    assert (code, err) == (0, "") and "out.html" in "".join(said.split())  # a long path is broken
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_document_is_refused_in_one_line(what, run, tmp_path):
    content, expected = BROKEN[what]
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=expected):
        load_document(path)
    code, out, err = run("show", path)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_what_belongs_to_another_document_is_refused(documents, tmp_path):
    other = tmp_path / "profile.json"
    other.write_text(documents["profile"].read_text() + " ")
    with pytest.raises(BadInput, match="was made from the profile with sha256"):
        gather(documents["plan"], profile_path=other)
    changed = tmp_path / "plan.json"
    changed.write_text(documents["plan"].read_text() + " ")
    with pytest.raises(BadInput, match="checked the plan with sha256"):
        gather(changed, measured_path=documents["check"])
    plan = json.loads(documents["plan"].read_text())
    plan["workload"]["output_len"] += 1
    changed.write_text(json.dumps(plan))
    with pytest.raises(BadInput, match="sweep of another workload"):
        gather(changed, measured_path=documents["sweep"])
    with pytest.raises(BadInput, match="takes a check or a sweep, .* is a plan"):
        gather(documents["plan"], measured_path=documents["plan"])
    with pytest.raises(BadInput, match="belong to a plan, got a simulation"):
        gather(documents["simulation"], profile_path=documents["profile"])


def test_flags_of_a_page_need_a_page(documents, run, tmp_path):
    assert run("show", documents["plan"], "--profile", documents["profile"])[0] == 2
    code, _, err = run("show", documents["plan"], "--html", tmp_path / "nowhere" / "out.html")
    assert code == 2 and "folder" in err


def test_a_profile_that_no_plan_follows_from_is_still_shown(documents, tmp_path):
    profile = json.loads(documents["profile"].read_text())
    profile["acceptance"] = profile["acceptance"][:1]  # one text: no interval to be had
    path = tmp_path / "one.json"
    path.write_text(json.dumps(profile))
    shown = gather(path)
    assert shown.acceptance and (shown.plans or shown.refused)


def test_showing_needs_no_torch(documents, tmp_path):
    pytest.importorskip("matplotlib")
    code = "import sys\nfrom planner.commands.show import gather\nfrom planner.report.show import write_page\nwrite_page(gather(sys.argv[1]), sys.argv[2])\nassert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, documents["tuning"], tmp_path / "x.html"], check=False, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "x.html").exists(), done.stderr
