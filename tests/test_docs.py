"""The documentation: made parts are up to date, links lead somewhere, every command parses, and those that need nothing are run."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from made_plans import served_profile

import planner
from planner.cli import main
from planner.cli.reference import DOCS, commands, documents
from planner.documents import VALUES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
NOT_RUN = {  # by how a line begins, and why it is parsed and not run
    "planner profile": "needs a model and minutes",
    "planner check": "needs a model or two servers",
    "planner sweep": "needs a model and an hour",
    "planner generate": "needs a model",
    "planner replay": "needs a model and a log",
    "planner quickstart": "needs a model and minutes",
    "planner train": "needs a model and hours",
    "planner tune": "needs a server",
    "planner drift": "needs a server",
    "planner plan trees.json": "reads a profile that needs a model",
    "planner show": "has tests of its own, in a browser",
    "planner import audit published.csv": "the file is the reader's own",
}
SIZES = {"MODEL": "num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=15", "HEAD": "num_layers=1,num_kv_heads=8,head_dim=128,weights_gib=0.8"}
FOUND_SOMETHING = ("planner import audit",)  # exit code 1 is an answer, too


def lines(page: Path) -> list[str]:
    """Command lines of a page: of fenced blocks, with or without a prompt, and of indented ones; a backslash carries on."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(re.sub(r"^\$ ", "", line.strip()).split("  #")[0].strip())
    return [line for line in found if re.match(r"(planner|make|pip|python|\.venv/bin/\w+)\b", line)]


def planner_lines(page: Path) -> list[str]:
    return [line for line in lines(page) if line.startswith("planner ") and page.name != "cli.md"]


def split(line: str) -> tuple[str, list[str]]:
    """A verb of one or two words, and the rest."""
    _, *words = shlex.split(line)
    two = " ".join(words[:2])
    return (two, words[2:]) if two in commands() else (words[0], words[1:])


@pytest.mark.parametrize("name", [name for name, _ in documents()])
def test_what_is_made_from_the_code_is_up_to_date(name):
    made = dict(documents())[name]
    assert (DOCS / name).read_text() == made, "make docs"


def test_schemas_describe_the_fields_of_their_documents():
    for kind, value in VALUES.items():
        schema = json.loads((DOCS / f"schema/{kind.name.replace(' ', '_')}.json").read_text())
        own = schema["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        assert set(own["properties"]) >= set(value.__struct_fields__) and own["additionalProperties"] is False or kind.tag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page):
    for line in planner_lines(page):
        name, words = split(line)
        if name.startswith("-"):
            continue
        command = commands()[name]
        command.make_context(name, words)  # exits with a usage error for a flag or a value that is none


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:planner|tests|benchmarks|profiles|docs|examples)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_names_of_code_in_the_guide_are_there():
    source = "\n".join(path.read_text() for path in (ROOT / "planner").rglob("*.py"))
    for name in re.findall(r"`([A-Z_]{5,}|[A-Z][a-z]+[A-Za-z]+|\w+_\w+)`", (DOCS / "extending.md").read_text()):
        assert re.search(rf"\b{name}\b", source), name


def test_makefile_targets_are_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for page in PAGES for line in lines(page) if line.startswith("make ")}
    assert named and named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_need_nothing_are_run_in_order(page, tmp_path, monkeypatch, capsys):
    """In one folder, with the reader's own files made up and names of models given as sizes."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    ran = 0
    for line in planner_lines(page):
        if any(line.startswith(begin) for begin in NOT_RUN):
            continue
        words = [re.sub(r"\b(MODEL|HEAD)\b", lambda match: SIZES[match[1]], word) for word in shlex.split(line)]
        if words[1] == "export":
            words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", words)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert code == 0 or code == 1 and line.startswith(FOUND_SOMETHING), f"{line}\n{err}"
        assert out.strip(), line
        ran += 1
    assert ran >= {DOCS / "howto.md": 12, ROOT / "README.md": 4}.get(page, 0)


def write_files(folder: Path) -> None:
    """What the pages take for granted: a profile, a table of runs, a trace."""
    shutil.copy(ROOT / "profiles/intel-xeon-2-cores/smollm2-135m__self_sparse.json", folder / "profile.json")
    columns = "drafter,draft_len,concurrency,context_len,output_len,tpot_s,itl_s,output_tokens_per_s,ttft_s,tokens_per_round"
    rows = [columns + "".join(f",acceptance_{i}" for i in range(1, 6))]
    for cell in served_profile((8000,)).cells:
        shares = [*map(str, cell.acceptance), *[""] * (5 - len(cell.acceptance))]
        values = [cell.draft_len, cell.concurrency, cell.context_len, cell.output_len, cell.tpot_s, cell.itl_s, cell.output_tokens_per_s, cell.ttft_s]
        rows.append(",".join(["" if cell.drafter == "none" else cell.drafter, *map(str, values), str(cell.tokens_per_round), *shares]))
    (folder / "runs.csv").write_text("\n".join(rows) + "\n")
    trace = [{"timestamp": 200 * i, "input_length": 4000, "output_length": 60, "hash_ids": [i]} for i in range(60)]
    (folder / "mooncake.jsonl").write_text("\n".join(msgspec.json.encode(request).decode() for request in trace))


def test_the_citation_and_the_licence_agree_with_the_package():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {planner.__version__}\n" in citation and "license: Apache-2.0" in citation
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
    assert "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
