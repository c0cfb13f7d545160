"""The command line on made profiles: one JSON document, the right exit code, one line on stderr and never a traceback."""

import json
import os
import re
import subprocess
import sys

import pytest
from made import FIFTH, NGRAM, budgets, linear_round_s, made_profile

from planner.cli import main
from planner.measurements import encode, save_profile
from planner.specs import FullKV, Sampler


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Profiles on disk, by name."""
    folder = tmp_path_factory.mktemp("profiles")
    two = [*budgets(64, 256), (NGRAM, FullKV())]
    made = {
        "good": made_profile(drafters=two, contexts=(1024, 1100)),
        "off": made_profile(accept=lambda kv, context_len, number: 0.0),
        "many": made_profile(contexts=(1024, 2048), samplers=[Sampler(), Sampler(temperature=1.0)]),
        "batched": made_profile(batches={1: linear_round_s, 4: linear_round_s}),
        "metered": made_profile(drafters=two, contexts=(1024, 1100), watts=lambda drafter, draft_len, context_len, batch: 250.0 + draft_len),
        "warm": made_profile(samplers=[Sampler(temperature=1.0, top_p=1 - FIFTH)]),
    }
    paths = {name: folder / f"{name}.json" for name in made}
    for name, profile in made.items():
        save_profile(profile, paths[name])
    text = encode(made["good"]).decode()
    broken = {
        "truncated": text[: len(text) // 2],
        "nan": text.replace('"rope_theta": 10000.0', '"rope_theta": NaN').replace('"rope_theta":10000.0', '"rope_theta":NaN'),
        "future": text.replace('"schema_version": 1', '"schema_version": 2').replace('"schema_version":1', '"schema_version":2'),
        "huge": text.replace('"rope_theta": 10000.0', '"rope_theta": 1e999').replace('"rope_theta":10000.0', '"rope_theta":1e999'),
        "negative": text.replace('"weights_bytes": ', '"weights_bytes": -').replace('"weights_bytes":', '"weights_bytes":-', 1),
        "unknown": text.replace("{", '{"surprise": 1,', 1),
        "list": "[]",
        "empty": "",
        "nested": "[" * 100_000,
        "log": '{"prompt": "a", "output": "bc", "temperature": 1}\n{"prompt": "a", "output": "bc", "temperature": -1}\n',
    }
    for name, content in broken.items():
        assert content != text
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(content)
    paths["binary"] = folder / "binary.json"
    paths["binary"].write_bytes(bytes(range(256)))
    paths["missing"], paths["folder"] = folder / "missing.json", folder
    return paths


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Run a line, names of files in braces; exit code, stdout and stderr."""

    def call(line: str):
        words = [word.format_map(files) for word in line.split()]
        monkeypatch.setattr(sys, "argv", ["planner", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def check_estimate(found: dict):
    for name in ("tpot_s", "e2e_s", "memory_bytes", "tokens_per_round", "ttft_s"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert set(found["config"]) == {"drafter", "kv", "draft_len", "tree"}


def test_a_plan_in_json_is_one_document(run):
    code, out, err = run("plan {good} --isl 1024 --objective tpot --json")
    assert code == 0 and err == ""
    plan = json.loads(out)
    assert set(plan["chosen"]) == {"drafter", "kv", "draft_len", "tree"}
    assert plan["chosen"]["drafter"]["kind"] == "ngram" and plan["objective"] == "tpot"
    check_estimate(plan["estimate"])
    check_estimate(plan["baseline"])
    assert plan["speedup"]["value"] == pytest.approx(plan["baseline"]["tpot_s"]["value"] / plan["estimate"]["tpot_s"]["value"])
    assert isinstance(plan["ties"], list) and plan["rejected"] == []


def test_refusals_stand_in_the_json(run):
    _, out, _ = run("plan {good} --isl 1024 --json")
    sizes = [estimate["memory_bytes"]["value"] for estimate in [json.loads(out)["baseline"], json.loads(out)["estimate"]]]
    code, out, _ = run(f"plan {{good}} --isl 1024 --memory-cap {int(max(sizes)) + 2000}B --json")
    assert code == 0
    rejected = json.loads(out)["rejected"]
    assert rejected and all("kv_budget" in reject["reason"] for reject in rejected if reject["config"]["kv"]["kind"] == "sparse")


def test_an_estimate_in_json_is_one_document(run):
    code, out, err = run("estimate {good} --drafter self_sparse --kv-budget 128 --draft-len 2 --isl 1024 --json")
    assert code == 0 and err == ""
    found = json.loads(out)
    check_estimate(found["estimate"])
    check_estimate(found["baseline"])
    assert found["estimate"]["config"]["kv"]["budget"] == 128
    assert found["estimate"]["speedup"]["value"] == pytest.approx(found["baseline"]["e2e_s"]["value"] / found["estimate"]["e2e_s"]["value"])


def test_a_plan_for_a_loaded_server_says_so(run):
    code, out, err = run("plan {batched} --isl 1024 --max-concurrency 3 --json")
    plan = json.loads(out)
    assert (code, err, plan["workload"]["batch"]) == (0, "", 3)
    assert any("batch 3 is interpolated between 1 and 4" in note for note in plan["estimate"]["notes"])
    out = " ".join(run("plan {batched} --isl 1024 --max-concurrency 4")[1].split())
    assert "greedy, 4 streams side by side;" in out and "interpolated" not in out
    assert "side by side" not in run("plan {batched} --isl 1024")[1]
    found = json.loads(run("estimate {batched} --drafter self_sparse --kv-budget 64 --draft-len 2 --isl 1024 --max-concurrency 4 --json")[1])
    alone = json.loads(run("estimate {batched} --drafter self_sparse --kv-budget 64 --draft-len 2 --isl 1024 --json")[1])
    # The same law at both batches; but the last, short rounds of a stream are as wide as its neighbours' are.
    assert 1 <= found["estimate"]["tpot_s"]["value"] / alone["estimate"]["tpot_s"]["value"] < 1.05
    assert found["baseline"]["tpot_s"]["value"] == pytest.approx(alone["baseline"]["tpot_s"]["value"])
    assert found["estimate"]["memory_bytes"]["value"] > alone["estimate"]["memory_bytes"]["value"]


def test_an_estimate_agrees_with_the_plan(run):
    plan = json.loads(run("plan {good} --isl 1024 --json")[1])
    found = json.loads(run(f"estimate {{good}} --drafter ngram --draft-len {plan['chosen']['draft_len']} --isl 1024 --json")[1])
    assert found["estimate"] == plan["estimate"] and found["baseline"] == plan["baseline"]


def test_a_price_per_hour_prices_plans_and_estimates(run):
    plan = json.loads(run("plan {good} --isl 1024 --objective price --price-per-hour 2.5 --json")[1])
    assert (plan["objective"], plan["price_per_hour"]) == ("price", 2.5)
    for estimate in (plan["estimate"], plan["baseline"], *plan["runners_up"]):
        price = estimate["price_per_million_tokens"]
        assert price["low"] <= price["value"] <= price["high"]
        output_len = plan["workload"]["output_len"]
        assert price["value"] == pytest.approx(estimate["e2e_s"]["value"] * 2.5 / 3600 / output_len * 1e6)  # one stream
        assert estimate["joules_per_token"] is None
    found = json.loads(run(f"estimate {{good}} --drafter ngram --draft-len {plan['chosen']['draft_len']} --isl 1024 --price-per-hour 2.5 --json")[1])
    assert found["estimate"]["price_per_million_tokens"] == plan["estimate"]["price_per_million_tokens"]


def test_prices_and_energy_are_shown_where_they_are_known_and_nowhere_else(run):
    for line in ("plan {{{}}} --isl 1024 {}", "estimate {{{}}} --drafter ngram --draft-len 2 --isl 1024 {}"):
        for profile, option, price, joules in (
            ("good", "", False, False), ("good", "--price-per-hour 2", True, False), ("metered", "", False, True), ("metered", "--price-per-hour 2", True, True),
        ):  # fmt: skip
            code, out, err = run(line.format(profile, option))
            assert (code, err, "price / 1M tokens" in out, "J / token" in out) == (0, "", price, joules)
    assert "times as cheap as plain decoding by price per token" in " ".join(
        run("plan {good} --isl 1024 --objective price --price-per-hour 2")[1].split()
    )


def test_energy_per_token_stands_in_the_json(run):
    plan = json.loads(run("plan {metered} --isl 1024 --json")[1])
    for estimate in (plan["estimate"], plan["baseline"]):
        watts = 250 + estimate["config"]["draft_len"]
        assert estimate["joules_per_token"]["value"] == pytest.approx(watts * estimate["tpot_s"]["value"])
        assert estimate["joules_per_token"]["low"] < estimate["joules_per_token"]["value"] < estimate["joules_per_token"]["high"]
    assert plan["price_per_hour"] is None and plan["estimate"]["price_per_million_tokens"] is None


def test_reports_for_people_go_to_stdout(run):
    for line in ("plan {good} --isl 1024", "estimate {good} --drafter ngram --draft-len 2 --isl 1024", "estimate {good} --drafter none --isl 1024"):
        code, out, err = run(line)
        assert code == 0 and err == "" and "TPOT" in out


def test_choosing_off_is_a_success(run):
    code, out, _ = run("plan {off} --isl 1024 --json")
    plan = json.loads(out)
    assert code == 0 and plan["chosen"]["drafter"]["kind"] == "none" and plan["speedup"]["value"] == 1
    code, out, _ = run("plan {off} --isl 1024")
    assert code == 0 and "--drafter none" in out


def test_a_plan_is_written_whole(run, tmp_path):
    from planner.plans import load_plan

    code, _, _ = run(f"plan {{metered}} --isl 1024 --price-per-hour 1e9 -o {tmp_path}/plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert code == 0 and plan.chosen.draft_len > 0 and plan.price_per_hour == 1e9
    assert plan.estimate.price_per_million_tokens is not None and plan.estimate.joules_per_token is not None
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


BAD = {
    "plan {missing} --isl 1024": "cannot read",
    "plan {folder} --isl 1024": "must be a file",
    "plan {truncated} --isl 1024": "not valid",
    "plan {nan} --isl 1024": "not valid",
    "plan {huge} --isl 1024": "not valid",
    "plan {negative} --isl 1024": "weights_bytes|not valid",
    "plan {unknown} --isl 1024": "surprise",
    "plan {list} --isl 1024": "not valid",
    "plan {empty} --isl 1024": "not valid",
    "plan {binary} --isl 1024": "not valid",
    "plan {nested} --isl 1024": "not valid",
    "plan {future} --isl 1024": "schema_version 2",
    "plan {good}": "several values.*--isl",
    "plan {many} --isl 1024": "several values.*--temperature",
    "plan {good} --isl 5000": "4096|covers",
    "plan {good} --isl 1100 --osl 3000": "4096",
    "plan {good} --isl 0": "context_len|>= 1",
    "plan {good} --isl -5": "context_len|>= 1",
    "plan {good} --isl 1024 --osl 1": "output_len|>= 2",
    "plan {good} --isl 1024 --osl 99999999999999999999999999": "",
    "plan {good} --isl 1024 --temperature nan": "",
    "plan {good} --isl 1024 --temperature -1": "temperature|>= 0",
    "plan {good} --isl 1024 --temperature 0.7": "profiled for greedy",
    "plan {good} --isl 1024 --memory-cap 1KiB": "plain decoding alone",
    "plan {good} --isl 1024 --memory-cap 24": "unit",
    "plan {good} --isl 1024 --memory-cap 24gb": "unit",
    "plan {good} --isl 1024 --memory-cap -1GiB": "unit",
    "plan {good} --isl 1024 --memory-cap 1e400GiB": "positive",
    "plan {good} --isl 1024 --objective speed": "one of e2e .end-to-end time., tpot .*, got 'speed'",
    "plan {good} --isl 1024 --objective price": "price of a device-hour, got none; give --price-per-hour",
    "plan {good} --isl 1024 --price-per-hour 0": "positive and at most 1e.09, got 0",
    "plan {good} --isl 1024 --price-per-hour -2.5": "positive",
    "plan {good} --isl 1024 --price-per-hour nan": "positive",
    "plan {good} --isl 1024 --price-per-hour inf": "positive",
    "plan {good} --isl 1024 --price-per-hour 1e300": "positive and at most",
    "estimate {good} --isl 1024 --drafter ngram --draft-len 1 --objective price": "--price-per-hour",
    "estimate {good} --isl 1024 --drafter ngram --draft-len 1 --price-per-hour 0": "positive",
    "plan {good} --isl 1024 --max-concurrency 4": "batch 1, got 4; profile with `planner profile --batches 1,4`",
    "plan {batched} --isl 1024 --max-concurrency 5": "batch 1, 4, got 5; profile with `planner profile --batches 1,4,5`",
    "plan {good} --isl 1024 --max-concurrency 0": "whole number from 1 up, .* got '0'",
    "plan {good} --isl 1024 --max-concurrency 4..2": "1..256, got '4..2'",
    "plan {good} --isl 1024 --max-concurrency many": "got 'many'",
    "plan {good} --isl 1024 --max-concurrency 1..2": "batch 1, got 2; profile with `planner profile --batches 1,2`",
    "plan {batched} --isl 1024 --max-concurrency 1..5": "batch 1, 4, got 5",
    "plan {good} --isl 1024,1100": "--isl with several contexts is for schedules",
    "plan {good} --isl 1024 --goodput tpot:50": "--goodput is for schedules",
    "plan {good} --isl 1024 --objective goodput": "goodput depends on the load",
    "plan {good} --isl 1024 --load {list}": "--load is for schedules",
    "plan {good} --isl 1024 --tp 2": "--tp is for schedules",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --tp 2": "--tp is for a profile of a serving engine",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --goodput e2e:50": "tpot and ttft, got 'e2e:50'",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --goodput tpot:50 tpot:60": "one limit of each kind",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --goodput tpot:-1": "tpot and ttft, got 'tpot:-1'",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --goodput tpot:50 --objective tpot": "objective goodput goes with limits",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --objective goodput": "give for example --goodput",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --memory-cap 1KiB": "plain decoding alone",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --load {missing}": "cannot read the histogram of load",
    "plan {batched} --isl 1024 --max-concurrency 1..4 --load {list}": "needs a header of concurrency, weight",
    "estimate {good} --isl 1024 --drafter none --max-concurrency 1..2": "an estimate is for one load",
    "estimate {good} --cells {list}": "needs a header of drafter",
    "estimate {good} --cells {list} --isl 1024": "--cells names drafters",
    "estimate {good} --isl 1024 --drafter none --tp 2": "--tp is for a profile of a serving engine",
    "estimate {good} --isl 1024 --drafter none --max-concurrency 2": "batch 1, got 2; profile with",
    "plan {good} --isl 1024 -o /nowhere/at/all/plan.json": "folder",
    "estimate {good} --isl 1024 --drafter self_sparse --draft-len 2": "--kv-budget",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 20 --draft-len 2": "sink \\+ recent \\(36 tokens\\), got 20",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 64": "draft_len",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 64 --draft-len 9": "up to draft_len 4",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 64 --draft-len -1": "",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 64 --draft-len 99999999999999999999": "",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 4096 --draft-len 1": "covers kv budgets",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 99999999999999999999999 --draft-len 1": "",
    "estimate {good} --isl 1024 --drafter self_sparse --kv-budget 64 --draft-len 1 --selection best": "window, chunk, snapkv or retrieval",
    "estimate {good} --isl 1024 --drafter eagle --draft-len 1": "a drafter is",
    "estimate {good} --isl 1024 --drafter ngram --draft-len 1 --kv-budget 64": "self_sparse",
    "generate --drafter none": "--prompt",
    "replay --log {missing}": "cannot read the log",
    "replay --log {list}": "list.json:1: .*object",
    "replay --log {nested}": "nested.json:1: ",
    "replay --log {binary}": "binary.json:1: ",
    "replay --log {empty}": "holds none",
    "replay --log {log}": "log.json:2: temperature must be",
    "replay --log {log} --temperature nan": "temperature",
    "replay --log {log} --temperature 0.001": "temperature must be 0",
    "replay --log {log} --top-p 0.5": "--temperature",
    "replay --log {log} --profile {good} --draft-cost 0.2": "drop one",
    "replay --log {log} --drafters ''": "drafter",
    "replay --log {log} --max-draft-len 0": "draft_len",
    "replay --log {log} --kv-budgets 8": "sink",
    "replay --log {log} -o /nowhere/at/all/r.json": "folder",
    "sweep --dataset x.txt -o /nowhere/at/all/s.json": "folder",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, line):
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(BAD[line], err), err


def test_an_estimate_refuses_an_unknown_objective(run):
    code, _, err = run("estimate {good} --isl 1024 --drafter ngram --draft-len 1 --objective speed")
    assert code == 2 and "objective" in err


@pytest.mark.parametrize("line", ["plan", "plan {good} --no-such-flag", "plan {good} --isl many", "nonsense", "estimate {good}"])
def test_wrong_usage_is_exit_code_2(run, line):
    code, out, err = run(line)
    assert code == 2 and out == "" and err and "Traceback" not in err


def test_the_only_sampler_is_the_default(run):
    code, out, _ = run("plan {warm} --isl 1024 --json")
    assert code == 0 and json.loads(out)["workload"]["sampler"]["temperature"] == 1.0


def test_a_process_of_its_own_ends_the_same_way(files):
    words = [sys.executable, "-m", "planner.cli", "plan", str(files["truncated"])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
