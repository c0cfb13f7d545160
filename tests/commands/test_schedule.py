"""planner plan and estimate by load, on the command line: profiles of engines and of the own runtime, histograms, limits, tables of cells."""

import json
import re
import sys

import numpy as np
import pytest
from made import linear_round_s, made_profile
from made_load import roofline

from planner.cli import main
from planner.measurements import save_profile
from planner.schedules import load_schedule
from planner.serving import ModelSize, ServedCell, ServingProfile, SystemSpec, save_serving_profile

ROW = {"concurrency_from", "concurrency_to", "context_from", "context_to", "drafter", "draft_len", "tree", "kv", "margin"}
CAPACITY = {"none": 300 * 1128, "eagle3": 150 * 1128}


def served_profile(contexts=(1000,), **changes):
    """Four cells of off and twelve of a drafter for each context, with one percent of noise."""
    rng = np.random.default_rng(0)

    def cell(drafter, draft_len, concurrency, context_len):
        law = roofline(drafter, draft_len, np.array([concurrency]), context_len, capacity=CAPACITY, gain={"none": 0, "eagle3": 0.75})
        tpot_s, running = (float(value[0]) for value in law)
        tpot_s *= float(np.exp(0.01 * rng.standard_normal()))
        tokens = sum(0.75**i for i in range(draft_len + 1))
        return ServedCell(
            drafter=drafter, draft_len=draft_len, concurrency=concurrency, context_len=context_len, output_len=128, tpot_s=tpot_s,
            itl_s=tpot_s * tokens, output_tokens_per_s=running / tpot_s, ttft_s=0.02 * concurrency, tokens_per_round=tokens,
            acceptance=[0.75] * draft_len,
        )  # fmt: skip

    drafting = [(1, 1), (3, 1), (5, 1), (1, 16), (3, 16), (5, 16), (1, 64), (3, 64), (1, 256), (3, 256), (0, 1), (0, 256)]
    cells = [cell("none", 0, concurrency, context_len) for context_len in contexts for concurrency in (1, 16, 64, 256)]
    cells += [cell("eagle3", draft_len, concurrency, context_len) for context_len in contexts for draft_len, concurrency in drafting]
    size = ModelSize(name="made", num_layers=32, num_kv_heads=8, head_dim=128, weights_bytes=16 * 2**30)
    fields = {
        "source": "made", "date": "2026-01-01", "planner_version": "0.1.0", "model": size, "drafters": {},
        "system": SystemSpec(name="a device", memory_bytes=80 * 2**30, fraction=0.9), "cells": cells,
    }  # fmt: skip
    return ServingProfile(**(fields | changes))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedules")
    paths = {name: folder / f"{name}.json" for name in ("served", "contexts", "batched")}
    save_serving_profile(served_profile(), paths["served"])
    save_serving_profile(served_profile((500, 8000)), paths["contexts"])
    save_profile(made_profile(batches={1: linear_round_s, 4: linear_round_s}), paths["batched"])
    tables = {
        "low": "concurrency,weight\n0,5\n1,90\n2,9\n256,1\n",
        "high": "weight,concurrency\n99,256\n1,1\n",
        "wide": "concurrency,weight\n1,1\n300,1\n",
        "negative": "concurrency,weight\n1,-1\n",
        "nothing": "concurrency,weight\n0,1\n",
        "by_context": "concurrency,weight,context_len\n4,3,700\n4,1,8000\n",
        "long": "concurrency,weight,context_len\n4,3,9000\n",
        "cells": "drafter,draft_len,concurrency,context_len\neagle3,3,16,1000\n,0,16,1000\nnone,0,16,1000\neagle3,4,100,1000\neagle3,0,256,1000\n",
        "unknown": "drafter,draft_len,concurrency,context_len\nmtp,3,16,1000\n",
        "off": "drafter,draft_len,concurrency,context_len\nnone,3,16,1000\n",
        "short": "drafter,draft_len,concurrency,context_len\nnone,3,16\n",
        "words": "drafter,draft_len,concurrency,context_len\nnone,three,16,1000\n",
        "headless": "eagle3,3,16,1000\n",
    }
    for name, text in tables.items():
        paths[name] = folder / f"{name}.csv"
        paths[name].write_text(text)
    return paths


@pytest.fixture
def run(files, monkeypatch, capsys):
    def call(line: str):
        monkeypatch.setattr(sys, "argv", ["planner", *(word.format_map(files) for word in line.split())])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def answer(run, line):
    code, out, err = run(f"{line} --json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


def covered(rows):
    """Every integer once, in order."""
    loads = [concurrency for row in rows for concurrency in range(row["concurrency_from"], row["concurrency_to"] + 1)]
    return loads == list(range(loads[0], loads[-1] + 1)) and (loads[0], loads[-1])


def test_a_serving_profile_gives_a_schedule(run):
    found = answer(run, "plan {served} --max-concurrency 1..256 --objective throughput")
    assert covered(found["schedule"]) == (1, 256)
    for row in found["schedule"]:
        assert set(row) >= ROW and row["margin_low"] <= row["margin"] <= row["margin_high"] and (row["context_from"], row["context_to"]) == (1, 1000)
        assert (row["tree"], row["kv"]) == (None, None)
    assert (found["schedule"][0]["drafter"], found["schedule"][-1]["drafter"]) == ("eagle3", "none")
    assert (found["kind"], found["system"], found["weighted"]) == ("schedule", "a device", False)
    assert {deployment["drafter"] for deployment in found["deployments"]} == {"none", "eagle3"}


def test_the_loads_and_contexts_measured_are_the_default(run):
    found = answer(run, "plan {contexts}")
    assert (found["concurrency_from"], found["concurrency_to"], found["contexts"], found["output_len"]) == (1, 256, [500, 8000], 128)
    by_context = {start: [row for row in found["schedule"] if row["context_from"] == start] for start in (1, 2001)}
    assert all(covered(rows) == (1, 256) for rows in by_context.values()) and len(found["schedule"]) == sum(map(len, by_context.values()))
    assert {row["context_to"] for row in found["schedule"]} == {2000, 8000}
    one = answer(run, "plan {contexts} --isl 3000 --osl 64 --max-concurrency 7")
    assert covered(one["schedule"]) == (7, 7) and one["schedule"][0]["context_to"] == 3000 and one["output_len"] == 64


@pytest.mark.parametrize(
    "words",
    ["--goodput tpot:9.5 ttft:3000", "--goodput tpot:9.5 --goodput ttft:3000", "--goodput tpot:9.5,ttft:3000", "--goodput=tpot:9.5 ttft:3000"],
)
def test_limits_are_written_in_four_ways(run, words):
    for line in (f"plan {{batched}} --max-concurrency 1..4 --isl 1024 {words}", f"plan {words} {{batched}} --max-concurrency 1..4 --isl 1024"):
        found = answer(run, line)
        assert (found["objective"], found["goodput"]) == ("goodput", {"tpot_s": 0.0095, "ttft_s": 3.0})


def test_goodput_of_an_engine_says_where_no_limit_is_kept(run):
    found = answer(run, "plan {served} --goodput tpot:9.5 ttft:3000")
    assert covered(found["schedule"]) == (1, 256)
    kept = [row["violation"] == 0 for row in found["schedule"]]
    assert kept[0] and not kept[-1]


@pytest.mark.parametrize(("load", "drafter"), [("low", "eagle3"), ("high", "none")])
def test_a_histogram_decides_what_is_loaded(run, load, drafter):
    found = answer(run, f"plan {{served}} --max-concurrency 1..256 --objective throughput --load {{{load}}}")
    assert found["deployment"] == drafter and {row["drafter"] for row in found["schedule"]} == {drafter}
    assert sum(row["weight"] for row in found["schedule"]) == pytest.approx(1) and covered(found["schedule"]) == (1, 256)
    out = " ".join(run(f"plan {{served}} --max-concurrency 1..256 --objective throughput --load {{{load}}}")[1].split())
    assert ("eagle3 pays:" in out, "eagle3 does not pay:" in out) == (drafter == "eagle3", drafter == "none")


def test_a_histogram_may_tell_contexts_apart(run):
    found = answer(run, "plan {contexts} --max-concurrency 1..8 --load {by_context}")
    weights = {start: sum(row["weight"] for row in found["schedule"] if row["context_from"] == start) for start in (1, 2001)}
    assert weights == pytest.approx({1: 0.75, 2001: 0.25})


def test_a_schedule_is_written_and_read(run, files, tmp_path):
    code, out, err = run(f"plan {{served}} --max-concurrency 1..9 --price-per-hour 3 --objective price -o {tmp_path}/schedule.json")
    found = load_schedule(tmp_path / "schedule.json")
    assert (code, err, found.price_per_hour, len(found.profile_sha256)) == (0, "", 3.0, 64)
    assert found.estimates[0].estimate.price_per_million_tokens.value == pytest.approx(
        3e6 / 3600 / found.estimates[0].estimate.output_tokens_per_s.value
    )
    assert "price / 1M tokens" in out and "File " in out


def test_an_estimate_at_a_load_stands_beside_off(run):
    found = answer(run, "estimate {served} --drafter eagle3 --draft-len 3 --max-concurrency 16")
    for side in ("estimate", "baseline"):
        for figure in ("tpot_s", "output_tokens_per_s"):
            assert found[side][figure]["low"] <= found[side][figure]["value"] <= found[side][figure]["high"]
    truth = roofline("eagle3", 3, np.array([16]), 1000, capacity=CAPACITY, gain={"none": 0, "eagle3": 0.75})[0][0]
    assert found["estimate"]["tpot_s"]["value"] == pytest.approx(truth, rel=0.05)
    assert (found["estimate"]["setting"]["drafter"], found["baseline"]["setting"]["drafter"]) == ("eagle3", "none")
    assert found["speedup"]["value"] == pytest.approx(
        found["estimate"]["output_tokens_per_s"]["value"] / found["baseline"]["output_tokens_per_s"]["value"]
    )
    assert answer(run, "estimate {served} --drafter none --max-concurrency 16")["estimate"] == found["baseline"]
    code, out, _ = run("estimate {served} --drafter eagle3 --draft-len 3 --max-concurrency 16")
    assert code == 0 and "eagle3 K=3" in out


def test_cells_of_a_table_are_answered_in_their_order(run):
    found = answer(run, "estimate {served} --cells {cells}")["estimates"]
    asked = [(cell["setting"]["drafter"], cell["setting"]["draft_len"], cell["concurrency"]) for cell in found]
    assert asked == [("eagle3", 3, 16), ("none", 0, 16), ("none", 0, 16), ("eagle3", 4, 100), ("eagle3", 0, 256)]
    one = answer(run, "estimate {served} --drafter eagle3 --draft-len 3 --max-concurrency 16")
    for cell, alone in zip(found, (one["estimate"], one["baseline"], one["baseline"]), strict=False):
        assert cell["setting"] == alone["setting"]
        for figure in ("tpot_s", "output_tokens_per_s", "round_s", "tokens_per_round"):
            assert cell[figure] == pytest.approx(alone[figure])
    assert run("estimate {served} --cells {cells}")[0] == 0


def test_a_draft_len_beyond_those_measured_is_answered_and_marked(run):
    found = answer(run, "estimate {served} --drafter eagle3 --draft-len 8 --max-concurrency 16")["estimate"]
    assert any("beyond what was measured" in note for note in found["notes"])


def test_a_profile_of_the_own_runtime_gives_a_schedule_for_its_batches(run):
    found = answer(run, "plan {batched} --isl 1024 --max-concurrency 1..4 --objective throughput")
    assert covered(found["schedule"]) == (1, 4) and found["schedule"][0]["kv"]["kind"] == "sparse"
    assert any("profiled batches 1, 4" in note for note in found["notes"])
    assert covered(answer(run, "plan {batched} --max-concurrency 2..3 --goodput tpot:50 ttft:5000 --isl 1024,3000")["schedule"][:1])


def test_one_number_on_a_profile_of_the_own_runtime_stays_a_plan(run):
    assert "chosen" in answer(run, "plan {batched} --isl 1024 --max-concurrency 4 --objective throughput")


BAD = {
    "plan {served} --max-concurrency 0..4": "1..256, got '0..4'",
    "plan {served} --temperature 1": "--temperature means nothing",
    "plan {served} --top-k 4": "--top-k means nothing",
    "plan {served} --memory-cap 24GiB": "--memory-cap means nothing",
    "plan {served} --tp 2": "tensor parallelism 1",
    "plan {served} --osl 1": "at least 2 tokens",
    "plan {served} --isl 0": "context_len must be >= 1",
    "plan {served} --objective goodput": "goes with limits",
    "plan {served} --objective price": "--price-per-hour",
    "plan {served} --objective speed": "one of e2e",
    "plan {served} --load {wide}": "wide.csv:3: concurrency must lie within 1..256, got 300",
    "plan {served} --load {negative}": "negative.csv:2: weight",
    "plan {served} --load {nothing}": "weight above 0",
    "plan {served} --load {cells}": "header of concurrency, weight",
    "plan {contexts} --load {long}": "long.csv:2: context_len must be at most 8000",
    "plan {served} --max-concurrency 1..99999999": "narrow --max-concurrency",
    "plan {served} --max-concurrency 1..99999999 --load {low}": "narrow --max-concurrency",
    "estimate {served} --drafter eagle3 --draft-len 3 --kv-budget 64": "--kv-budget means nothing",
    "estimate {served} --drafter eagle3 --draft-len 3 --temperature 0": "--temperature means nothing",
    "estimate {served} --drafter mtp --draft-len 3": "drafters none, eagle3, got 'mtp'",
    "estimate {served} --drafter none --draft-len 3": "without a drafter",
    "estimate {served} --drafter eagle3 --draft-len 5000": "draft_len|1024",
    "estimate {contexts} --drafter eagle3 --draft-len 3": "several values .500; 8000.; choose one with --isl",
    "estimate {served} --drafter eagle3 --objective goodput": "an estimate has no goodput",
    "estimate {served} --cells {cells} --drafter eagle3": "--cells names drafters",
    "estimate {served} --cells {cells} --max-concurrency 4": "--cells names drafters",
    "estimate {served} --cells {unknown}": "got 'mtp'",
    "estimate {served} --cells {off}": "without a drafter",
    "estimate {served} --cells {short}": "short.csv:2: a row has 4 fields",
    "estimate {served} --cells {words}": "words.csv:2: draft_len must be a whole number",
    "estimate {served} --cells {headless}": "needs a header of drafter, draft_len",
    "estimate {batched} --cells {cells}": "one at a time",
    "check {served} --dataset x.txt": "",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, line):
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(BAD[line], err), err


def test_a_drafter_that_only_idled_is_not_estimated_as_one_that_drafts(run, files, tmp_path):
    profile = served_profile()
    save_serving_profile(served_profile(cells=[cell for cell in profile.cells if cell.draft_len == 0]), tmp_path / "idle.json")
    code, _, err = run(f"estimate {tmp_path / 'idle.json'} --drafter eagle3 --draft-len 3")
    assert code == 2 and "'eagle3' idle only" in err


def test_a_drafter_that_takes_the_room_of_requests_is_said_to(run, files, tmp_path):
    crowded = answer(run, "plan {served} --objective throughput")  # 150 requests beside the drafter, 300 without
    assert any("beside eagle3" in note for note in crowded["notes"])
    roomy = [cell for cell in served_profile().cells if cell.concurrency <= 64]
    save_serving_profile(served_profile(cells=roomy), tmp_path / "roomy.json")
    assert not any("beside eagle3" in note for note in answer(run, f"plan {tmp_path / 'roomy.json'}")["notes"])


def test_a_margin_over_settings_that_break_the_limits_is_no_number(run):
    code, out, _ = run("plan {served} --max-concurrency 100..102 --goodput tpot:11")
    assert code == 0 and "no other keeps the limits" in " ".join(out.split()) and "99900" not in out
