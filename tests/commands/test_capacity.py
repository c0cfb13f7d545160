"""planner capacity from end to end: a document, a report, an exit code, and no waiting for anything heavy."""

import json
import subprocess
import sys
import time

import msgspec
import pytest
from model_configs import EAGLE, LLAMA, PAIRS, QWEN3, write

import planner
from planner.capacities import Capacity
from planner.cli import main
from planner.errors import BadInput


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a config.json, by name."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name, config) for name, config in {"llama": LLAMA, "eagle": EAGLE, "qwen": QWEN3}.items()}


@pytest.fixture
def run(models, monkeypatch, capsys):
    """Run a line, names of models in braces; exit code, stdout and stderr."""

    def call(line, columns=120):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["planner", "capacity", *line.format(**models).split()])
        with pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def found(models, **changes):
    asked = {"system": "h100_sxm", "context_len": 8000, "output_len": 500} | changes
    return planner.capacity(models["llama"], **asked)


def test_one_document_holds_the_rows_asked_for(run):
    code, out, _ = run("{llama} --draft-model eagle3={eagle} --system h100_sxm --isl 8000 --osl 500 --draft-lens 2,4 --json")
    assert code == 0
    capacity = msgspec.convert(json.loads(out), Capacity)
    assert [(row.drafter, row.draft_len) for row in capacity.rows] == [("none", 0), ("eagle3", 2), ("eagle3", 4)]
    assert [pool.drafter for pool in capacity.pools] == ["none", "eagle3"]
    assert capacity.engine == "vllm@0.33" and capacity.rows[0].break_even_tokens is None


def test_a_drafter_costs_pool_and_batch_and_has_to_win_them_back(models):
    capacity = found(models, draft_models=[f"eagle3={models['eagle']}"])
    plain, *drafted = capacity.rows
    assert capacity.pools[1].tokens < capacity.pools[0].tokens
    for row in drafted:
        assert row.running < plain.running
        assert row.break_even_throughput.value > row.break_even_tokens.value > 1
        assert row.break_even_throughput.value == pytest.approx(row.break_even_tokens.value * plain.running / row.running)


def test_the_load_caps_the_batch_and_then_both_break_even_lengths_agree(models):
    capacity = found(models, draft_models=[f"eagle3={models['eagle']}"], max_concurrency=4)
    for row in capacity.rows[1:]:
        assert (row.running, row.limited_by) == (4, "concurrency")
        assert row.break_even_throughput.value == pytest.approx(row.break_even_tokens.value)
    assert capacity.warnings == []


def test_a_drafter_that_starves_the_batch_is_named(run):
    big = PAIRS.replace("num_layers=32", "num_layers=40").replace("14.96", "40")
    code, _, err = run(f"{{llama}} --draft-model draft_model={big} --system h100_sxm --isl 32000 --osl 500 --draft-lens 4")
    assert code == 0 and "draft_model starves the batch" in err
    huge = big.replace("weights_gib=40", "weights_gib=70")
    code, out, err = run(f"{{llama}} --draft-model draft_model={huge} --system h100_sxm --isl 32000 --osl 500 --draft-lens 4")
    assert code == 0 and "leaves no room" in err and "nothing fits" in out


def test_a_model_that_does_not_fit_ends_with_1(run):
    code, out, err = run("{llama} --system memory_gib=16 --isl 1000 --osl 100")
    assert code == 1 and "not one request fits" in err and "nothing fits" in out
    code, out, _ = run("{llama} --system h100_sxm --isl 1000 --osl 100 --memory-cap 12GiB --json")
    assert code == 1 and json.loads(out)["rows"][0]["running"] == 0


def test_sglang_caps_a_speculating_server_at_48(models):
    capacity = found(models, engine="sglang", draft_models=[f"eagle3={models['eagle']}"], tensor_parallel=4)
    assert capacity.rows[0].running > 48
    assert {(row.running, row.limited_by) for row in capacity.rows[1:]} == {(48, "engine")}
    freed = found(models, engine="sglang", draft_models=[f"eagle3={models['eagle']}"], tensor_parallel=4, max_num_seqs=512)
    assert all(row.running > 48 for row in freed.rows[1:])


def test_a_kv_budget_is_offered_where_the_engine_has_one_and_refused_aloud_elsewhere(models):
    asked = {"draft_models": [f"eagle3={models['eagle']}"], "kv_budgets": [512], "draft_lens": [3]}
    sglang, vllm = found(models, engine="sglang", **asked), found(models, engine="vllm", **asked)
    assert [row.kv_budget for row in sglang.rows] == [None, None, 512]
    assert sglang.rows[2].round_s.value < sglang.rows[1].round_s.value
    assert [row.kv_budget for row in vllm.rows] == [None, None]
    assert any("cannot give" in line for line in vllm.assumed)


def test_a_smaller_kv_dtype_runs_more_requests(models):
    assert found(models, kv_dtype="fp8").pools[0].tokens == pytest.approx(2 * found(models).pools[0].tokens, rel=1e-3)


def test_ngrams_load_nothing(models):
    capacity = found(models, draft_models=["ngram"], draft_lens=[4])
    assert capacity.pools[0].tokens == capacity.pools[1].tokens
    assert capacity.rows[1].break_even_tokens.value > 1


def test_without_bandwidth_there_are_no_times(models):
    capacity = found(models, system="memory_gib=80", draft_models=["ngram"])
    assert all(row.round_s is None and row.break_even_tokens is None for row in capacity.rows)
    assert any("no times" in line for line in capacity.assumed)


def test_a_head_is_known_without_a_name_and_a_draft_model_of_another_vocabulary_is_said(models):
    capacity = found(models, draft_models=[models["eagle"], models["qwen"]], draft_lens=[1])
    assert [row.method for row in capacity.rows] == ["none", "eagle3", "draft_model"]
    assert any(line.startswith("qwen: its vocabulary") for line in capacity.assumed)


def test_the_share_said_with_the_system_is_in_force_and_the_flag_is_stronger(models):
    assert found(models, system="h100_sxm,fraction=0.5").system.fraction == 0.5
    assert found(models, system="h100_sxm,fraction=0.5", fraction=0.7).system.fraction == 0.7
    assert found(models).system.fraction == 0.92
    assert found(models, engine="vllm@0.19").system.fraction == 0.9


@pytest.mark.parametrize("columns", [80, 120])
def test_the_report_keeps_to_the_width_and_says_what_was_assumed(run, columns):
    code, out, _ = run("{llama} --draft-model eagle3={eagle} --system rtx4090 --isl 1000 --osl 500 --engine vllm@0.19", columns)
    assert code == 0 and max(map(len, out.splitlines())) <= columns
    words = " ".join(out.split())
    for wanted in ("KV pool", "requests", "break-even", "Assumed", "--gpu-memory-utilization 0.9", "nothing measured", "weights of eagle3"):
        assert wanted in words


@pytest.mark.parametrize(
    "line, named",
    [
        ("{llama} --system h100", "h100_sxm"),
        ("{llama} --system h100_sxm --engine vllm@0.5", "0.10"),
        ("{llama} --system h100_sxm --engine tgi", "sglang"),
        ("{llama} --system h100_sxm --tp 0", "--tp"),
        ("{llama} --system h100_sxm --fraction 1.5", "fraction"),
        ("{llama} --system h100_sxm --fraction nan", "fraction"),
        ("{llama} --system h100_sxm --engine llama.cpp --fraction 0.5", "--memory-cap"),
        ("{llama} --system h100_sxm --kv-dtype tiny", "fp8"),
        ("{llama} --system h100_sxm --draft-lens 0", "draft lengths"),
        ("{llama} --system h100_sxm --draft-lens 4,x", "--draft-lens"),
        ("{llama} --system h100_sxm --kv-budgets 0", "kv budgets"),
        ("{llama} --system h100_sxm --memory-cap 24", "24GiB"),
        ("{llama} --system h100_sxm --max-concurrency 0", "--max-concurrency"),
        ("{llama} --system h100_sxm --max-num-seqs -1", "--max-num-seqs"),
        ("{llama} --system h100_sxm --draft-model /nowhere", "/nowhere"),
        ("{llama} --system h100_sxm --draft-model none={eagle}", "NAME=SPEC"),
        ("{llama} --system h100_sxm --draft-model a={eagle} --draft-model a={eagle}", "NAME=SPEC"),
        ("/nowhere --system h100_sxm", "/nowhere"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(run, line, named):
    code, out, err = run(line + " --isl 1000 --osl 100")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_lengths_that_mean_nothing_are_refused(models):
    for changes in ({"context_len": 0}, {"output_len": -1}, {"context_len": 2**40}, {"draft_lens": []}, {"kv_budgets": range(1, 400)}):
        with pytest.raises(BadInput):
            found(models, **changes)


def test_it_takes_no_time_and_loads_nothing_heavy(models):
    def seconds():
        start = time.perf_counter()
        found(models, draft_models=[f"eagle3={models['eagle']}"])
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.1
    code = (
        "import sys, planner, planner.report.capacity\n"
        f"planner.capacity({models['llama']!r}, system='h100_sxm', context_len=1000, output_len=100)\n"
        "print([name for name in ('torch', 'scipy', 'optuna', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=planner.__path__[0] + "/..")
    assert done.stdout.strip() == "[]"
