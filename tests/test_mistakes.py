"""Mistakes that people make, and what they are told: one line that a stranger can act on, exit code 2, no traceback.

Each line was run and its answer read; what is held here is the part that says what to do. Needs no torch but where a model is named.
"""

import shlex
import sys

import pytest
from made_plans import write_plans

from planner.cli import main
from planner.units import meant

MODEL = "num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=15"
BENCH = "import bench {table} --model " + MODEL + " --system h100_sxm -o o.json"
MISTAKES = {  # what was typed -> what must be in the answer, all of it
    # a path, or a file of another kind
    "plan profil.json": ["cannot read the profile profil.json: No such file"],
    "plan static.plan.json": ["static.plan.json is a plan (`planner plan`)", "this needs a profile (`planner profile`)"],
    "check own.json --dataset x.txt": ["own.json is a profile (`planner profile`)", "this needs a plan (`planner plan`)"],
    "plan good.csv": ["a table is no JSON", "`planner import bench` makes profiles of tables"],
    "export served.json --engine vllm -o out": ["a serving profile", "planner plan"],
    "diff own.json served.json": ["a profile and a serving profile", "give two profiles"],
    "plan own.json --isl 1024 -o nowhere/plan.json": ["the folder of the output file must exist", "create it or change --out"],
    "export schedule.plan.json --engine vllm -o full": ["full holds 'a'", "change -o"],
    # order, and words in a verb's place
    "own.json plan": ["takes one of profile, plan,", "the verb comes first: planner VERB own.json"],
    "import good.csv --system h100_sxm": ["takes one of bench, audit", "the verb comes first: planner import VERB good.csv"],
    "simulat served.json": ["got 'simulat'; did you mean simulate?"],
    # units
    "plan own.json --isl 1024 --memory-cap 24": ["needs a number and a unit", "24GiB"],
    "plan own.json --isl 1024 --memory-cap 24gb": ["got '24gb'", "24GiB"],
    "plan own.json --isl 4k": ["whole numbers, got '4k'", "write for example 1024,4096"],
    "plan served.json --goodput tpot:50ms": ["limits in ms", "tpot:50 ttft:500"],
    "drift schedule.plan.json --metrics http://localhost:1 --window 600": ["a time above 0 with its unit", "15s"],
    BENCH.format(table="percent.csv"): ["percent.csv, line 3", "got 71", "write a share, not percent"],
    # names
    f"capacity {MODEL} --system h100 --isl 1000 --osl 100": ["did you mean h100_sxm or h100_pcie?"],
    f"capacity {MODEL} --system A100-80GB --isl 1000 --osl 100": ["a100_sxm_80gb"],
    "capacity meta-llama/Llama-3.1-8B --system h100_sxm --isl 1000 --osl 100": ["nothing lies at 'meta-llama/Llama-3.1-8B'", "download it first"],
    "export schedule.plan.json --engine vlm -o out": ["an engine is one of vllm (", "got 'vlm'"],
    "export schedule.plan.json --engine vllm@9.9 -o out": ["0.32 to 0.33, got 9.9"],
    "estimate served.json --drafter eagle --draft-len 3": ["knows drafters none, eagle3, got 'eagle'"],
    "plan served.json --objective latency": ["tpot (time per token)", "got 'latency'"],
    BENCH.format(table="good.csv") + " --draft-model HEAD": ["NAME=SPEC, got 'HEAD'"],
    BENCH.format(table="columns.csv"): ["columns drafter, draft_len, concurrency", "it begins with 'method,K,batch,tpot_ms'"],
    # numbers that do not go together
    "estimate sparse.json --isl 1024 --drafter draft_model --kv-budget 8192 --draft-len 2": ["covers kv budgets 256, got 8192"],
    "plan own.json --isl 32000": ["fit the model's 4096 tokens", "shorten one"],
    "plan own.json --isl 1024 --temperature 0.7": ["profiled for greedy, not for temperature 0.7", "profile it"],
    "plan own.json": ["several values (1024; 4096)", "choose one with --isl"],
    "plan own.json --isl 1024 --max-concurrency 64": ["timed rounds at batch 1, got 64", "--batches 1,64"],
    "plan served.json --max-concurrency 256..1": ["from low to high such as 1..256"],
    "plan served.json --max-concurrency 1-256": ["such as 1..256, got '1-256'"],
    "plan served.json --load hist.csv": ["needs a header of concurrency, weight", "got 'load,count'"],
    "estimate served.json --draft-len 3": ["name one with --drafter"],
    # servers and traces
    "tune --launch 'python server.py' --dataset x.txt -o t": ["vllm serve, sglang serve or llama-server", "--engine NAME"],
    "tune --launch 'vllm serve M' --dataset x.txt -o t": ["give --method"],
    "check schedule.plan.json --dataset x.txt --base-url http://localhost:1": ["give --baseline-url"],
    "drift schedule.plan.json": ["--metrics URL", "--once BEFORE AFTER"],
    "simulate served.json --rate 5": ["--rate R with --lengths IN:OUT"],
    "simulate served.json --trace good.csv": ["arrival_s, input_len, output_len", "without arrival_s"],
}
RUNTIME = {
    "profile --model meta-llama/Llama-3.1-8B --dataset x.txt -o p.json": ["an existing folder or GGUF file", "download it first"],
    "profile --dataset nothing.txt -o p.json": ["nothing.txt does not", "check --dataset"],
    "profile --dataset chats.json -o p.json": ["as JSON in each line", "convert it"],
    "profile --dataset x.txt --device gpu -o p.json": ["take cuda for a GPU"],
    "profile --dataset x.txt --kv-budgets 16 -o p.json": ["sink + recent (36 tokens), got 16"],
    "generate --prompt x --drafter self_sparse": ["needs --kv-budget"],
}
USAGE = {  # the parser's own words
    "plan own.json --memory_cap 24GiB": "--memory-cap",
    "export schedule.plan.json -o out": "Missing option '--engine'",
    "diff own.json": "Missing argument 'AFTER'",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_plans(folder)
    columns = "drafter,draft_len,concurrency,context_len,output_len,tpot_s"
    (folder / "good.csv").write_text(f"{columns}\n,0,1,1000,128,0.02\neagle3,3,1,1000,128,0.01\n")
    (folder / "slow.csv").write_text(f"{columns}\n,0,1,1000,128,20.1\neagle3,3,1,1000,128,10.2\n")
    (folder / "percent.csv").write_text(f"{columns},acceptance_1\n,0,1,1000,128,0.02,\neagle3,3,1,1000,128,0.01,71\n")
    (folder / "columns.csv").write_text("method,K,batch,tpot_ms\neagle3,3,1,10\n")
    (folder / "hist.csv").write_text("load,count\n1,2\n")
    (folder / "chats.json").write_text("[]")
    (folder / "x.txt").write_text("hello " * 100)
    (folder / "full").mkdir()
    (folder / "full/a").write_text("")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def call(line: str):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["planner", *shlex.split(line)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def check(run, line: str, said: list[str]):
    code, out, err = run(line)
    assert (code, out) == (2, "")
    error = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(error) == 1 and "Traceback" not in err
    assert [part for part in said if part not in error[0]] == [], error[0]
    assert len(error[0]) < 700


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(run, line):
    check(run, line, MISTAKES[line])


@pytest.mark.parametrize("line", RUNTIME)
def test_a_mistake_about_a_model_is_answered_with_what_to_do(run, line):
    pytest.importorskip("torch")
    check(run, line, RUNTIME[line])


@pytest.mark.parametrize("line", USAGE)
def test_a_missing_or_misspelt_flag_is_named(run, line):
    code, out, err = run(line)
    assert (code, out) == (2, "") and USAGE[line] in err and "Traceback" not in err


def test_milliseconds_in_place_of_seconds_are_suspected(run):
    code, _, err = run(BENCH.format(table="slow.csv"))
    assert code == 0 and "divide by 1000 if these are milliseconds" in err


def test_a_budget_as_large_as_the_request_is_pointed_out(run):
    drafter = "--draft-model dflash=num_layers=1,num_kv_heads=8,head_dim=128,weights_gib=0.8"
    code, out, _ = run(f"capacity {MODEL} --system h100_sxm --isl 1000 --osl 100 --kv-budgets 4096 {drafter}")
    assert code == 0 and "a kv budget of 4096 holds all 1100 tokens" in " ".join(out.split())


def test_names_are_guessed_by_beginning_and_spelling():
    known = ["h100_sxm", "h100_pcie", "h200_sxm", "l4"]
    assert meant("H100", known) == "; did you mean h100_sxm or h100_pcie?"
    assert meant("h100-sxm5", known).startswith("; did you mean h100_sxm") and meant("nothing like it", known) == ""
    assert meant("", known) == meant("-", known) == ""
