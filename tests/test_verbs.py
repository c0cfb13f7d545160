"""Every verb as scripts and terminals meet it: JSON and nothing else, quiet, in a pipe of 40 columns, without colour, completed by Tab.

Verbs that need a model or a server are given an answer in place of the run: what is tested is what the command line makes of it.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from fake_engine import FakeEngine, made_schedule
from made_plans import write_plans
from made_reports import a_check, a_plan, a_profile, a_replay, a_sweep, made_tuning

import planner
from planner.cli import main
from planner.cli.app import app
from planner.commands import quickstart
from planner.commands.generate import Piece
from planner.commands.training_run import Met
from planner.schedules import save_schedule

ROOT = Path(__file__).parents[1]
MODEL = "num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=15"
VERBS = {  # words behind planner; {out} is a file or folder that is not there
    "profile": "profile --dataset x.txt -o {out}",
    "plan": "plan own.json --isl 1024",
    "plan by load": "plan served.json --objective throughput",
    "estimate": "estimate served.json --drafter eagle3 --draft-len 3 --max-concurrency 16",
    "capacity": f"capacity {MODEL} --system h100_sxm --isl 4000 --osl 256 --draft-model eagle3=num_layers=1,num_kv_heads=8,head_dim=128,weights_gib=0.8",
    "check": "check own.json --dataset x.txt",
    "tune": "tune --launch server --dataset x.txt -o {out}",
    "export": "export static.plan.json --engine transformers@5.23 -o {out}",
    "drift": "drift drift.json --once before.txt after.txt",
    "sweep": "sweep --dataset x.txt -o {out}",
    "simulate": "simulate served.json --rate 4 --lengths 300:40 --requests 20",
    "replay": "replay --log log.jsonl",
    "generate": "generate --prompt x",
    "import bench": f"import bench bench.csv --model {MODEL} --system h100_sxm -o {{out}}",
    "import audit": "import audit bench.csv",
    "show": "show static.plan.json",
    "diff": "diff served.json served.json",
    "quickstart": "quickstart -o {out}",
    "demo": "demo -o {out}",
    "doctor": "doctor",
    "train texts": "train texts --dataset x.txt -o {out}",
    "train multi-view": "train multi-view texts -o {out}",
    "train block-diffusion": "train block-diffusion texts -o {out}",
    "train materialize": "train materialize drafter.safetensors -o {out}",
}
PASTED = re.compile(r"^(planner |--|.*/run$)")  # lines that are to be copied stay whole
BENCH = "drafter,draft_len,concurrency,context_len,output_len,tpot_s\n,0,1,1000,128,0.02\neagle3,3,1,1000,128,0.01\n"


def verbs() -> dict[str, "typer.core.TyperCommand"]:
    """Every command by its words."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": own for sub, own in inner.items()} if inner else {name: command}
    return found


def command_of(name: str):
    return verbs()[name.removesuffix(" by load")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verbs")
    write_plans(folder)
    save_schedule(made_schedule(), folder / "drift.json")
    engine = FakeEngine(draft_len=5, concurrency=4)
    (folder / "before.txt").write_text(engine.metrics())
    engine.serve(3600)
    (folder / "after.txt").write_text(engine.metrics())
    (folder / "bench.csv").write_text(BENCH)
    return folder


@pytest.fixture
def prepare(files, tmp_path, monkeypatch):
    """Put a verb's words on the command line, in the folder of its files, with answers in place of what needs a model or a server."""

    def answers(answer):
        def run(*_, progress=None, **__):
            if progress is not None:
                progress.stage("a stage", 2)
                progress.advance()
            return answer

        return run

    def call(name: str, *more: str):
        monkeypatch.chdir(files)
        runs = {"profile": a_profile(), "check": a_check(), "sweep": a_sweep(), "replay": a_replay(), "tune": made_tuning()}
        for verb, answer in runs.items():
            monkeypatch.setattr(planner, verb, answers(answer), raising=False)
        written = quickstart.Quickstart(a_profile(), a_plan(), a_check(), [tmp_path / f"{i}.json" for i in range(4)], 3.0)
        monkeypatch.setattr(quickstart, "quickstart", answers(written))
        pieces = [Piece("one", [1], 0, 0), Piece(" two", [2, 3], 2, 1), Piece("", [], 0, 0)]
        met = [Met(step=100, loss=2.5, minutes=1.5, acceptance={"1/64": 0.61, "1/all": 0.64}, tokens={"1/all": 2.5})]
        for module, function, answer in (
            ("train_texts", "train_texts", 12), ("train_multi_view", "train_multi_view", met), ("train_block_diffusion", "train_block_diffusion", met),
            ("materialize", "materialize", ["drafter/config.json", "drafter/model.safetensors"]),
        ):  # fmt: skip
            monkeypatch.setattr(f"planner.commands.{module}.{function}", answers(answer))
        monkeypatch.setattr(planner, "generate", lambda *_, **__: iter(pieces), raising=False)
        monkeypatch.setattr(sys, "argv", ["planner", *VERBS[name].format(out=tmp_path / "out").split(), *more])

    return call


def finish() -> int:
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_no_verb_is_left_out():
    named = {name.removesuffix(" by load") for name in VERBS}
    assert named <= set(verbs()) and set(verbs()) <= named


@pytest.mark.parametrize("name", VERBS)
def test_json_is_one_document_and_nothing_else(name, prepare, capsys):
    flags = {flag for parameter in command_of(name).params for flag in parameter.opts}
    assert "--json" in flags
    prepare(name, "--json", *(["--quiet"] if "--quiet" in flags else []))
    assert finish() == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert out.isascii() and all(line.startswith("warning: ") for line in err.splitlines())  # --quiet: no progress; without the flag there is none


@pytest.mark.parametrize("name", VERBS)
def test_a_pipe_of_40_columns_gets_plain_text_that_fits(name, prepare, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    prepare(name)
    assert finish() == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and out.strip()
    long = [line for line in out.splitlines() if len(line) > 40 and not PASTED.match(line)]
    assert long == []


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", VERBS)
def test_no_color_is_kept_to(name, prepare, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    prepare(name)
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert finish() == 0
    codes = {int(code or 0) for codes in re.findall(r"\x1b\[([\d;]*)m", out.getvalue() + err.getvalue()) for code in codes.split(";")}
    assert codes <= {0, 1, 2, 3, 4, 7, 22, 23, 24, 27}  # bold and the like; 30 and up are colours


@pytest.mark.parametrize("name", [name for name in VERBS if name not in ("plan by load",)])
def test_help_says_what_it_is_in_any_width(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "argv", ["planner", *name.split(), "--help"])
    assert finish() == 0
    out = capsys.readouterr().out
    assert "Usage: planner" in out and max(map(len, out.splitlines())) <= 40
    described = [parameter for parameter in command_of(name).params if parameter.name != "help"]
    assert command_of(name).help and all(getattr(parameter, "help", None) for parameter in described)


@pytest.mark.parametrize(("typed", "offered"), [("planner qu", "quickstart"), ("planner import a", "audit"), ("planner plan --obj", "--objective")])
def test_the_shell_completes_verbs_and_flags(typed, offered):
    environment = os.environ | {"_PLANNER_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    code = "import sys; sys.argv = ['planner']; from planner.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert offered in done.stdout.split(), done.stderr
