"""planner simulate on the command line: profiles, schedules and plans in, one document or one report out."""

import gzip
import json
import sys

import msgspec
import numpy as np
import pytest
from made import DRAFT_MODEL, made_profile
from made_plans import served_profile
from msgspec.structs import replace

import planner
from planner.cli import main
from planner.commands.flags import AskedSimulation
from planner.commands.simulate_load import find_requests
from planner.measurements import save_profile
from planner.plans import save_plan
from planner.schedules import save_schedule
from planner.serving import save_serving_profile
from planner.simulations import QUANTILES, Simulation
from planner.specs import FullKV

LOAD = "--rate 8 --lengths 400:60,1500:120 --requests 60"


def timed(profile):
    """With a time to the first token that grows with the prompt: 25 us a token where requests come one by one."""
    cells = [replace(cell, ttft_s=0.01 + 25e-6 * cell.context_len if cell.concurrency == 1 else 2.0) for cell in profile.cells]
    return replace(profile, cells=cells)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulations")
    names = ("served", "contexts", "untimed", "own", "plan", "schedule", "trace", "azure", "csv", "lengths", "words", "empty", "out", "journal")
    paths = {name: folder / f"{name}.json" for name in names}
    save_serving_profile(timed(served_profile()), paths["served"])
    save_serving_profile(timed(served_profile((500, 8000))), paths["contexts"])
    untimed = served_profile()
    save_serving_profile(replace(untimed, cells=[replace(cell, ttft_s=None) for cell in untimed.cells]), paths["untimed"])
    save_profile(made_profile(drafters=[(DRAFT_MODEL, FullKV())]), paths["own"])
    save_plan(planner.plan(paths["own"], context_len=1024), paths["plan"])
    save_schedule(planner.schedule(paths["contexts"]), paths["schedule"])
    rng = np.random.default_rng(0)
    lines = [
        {"timestamp": 400 * i, "input_length": 600 + 512 * int(rng.integers(3)), "output_length": int(rng.integers(1, 90)), "hash_ids": [i % 3]}
        for i in range(40)
    ]
    paths["trace"] = folder / "mooncake.jsonl.gz"
    paths["trace"].write_bytes(gzip.compress("\n".join(json.dumps(line) for line in lines).encode()))
    paths["azure"].write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.99,396,109\n")
    paths["csv"].write_text("arrival_s,input_len,output_len\n0,500,10\n0,600,20\n")
    paths["lengths"].write_text("input_len,output_len\n300,20\n700,50\n")
    paths["words"].write_text("input_len,output_len\n300,many\n")
    paths["empty"].write_text("")
    return paths


@pytest.fixture
def run(files, monkeypatch, capsys):
    def call(line: str):
        monkeypatch.setattr(sys, "argv", ["planner", "simulate", *(word.format_map(files) for word in line.split())])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def answer(run, line) -> Simulation:
    code, out, err = run(f"{line} --json --quiet")
    assert (code, err) == (0, ""), err
    return msgspec.json.decode(out, type=Simulation)


def test_a_profile_is_simulated_off_everywhere_and_by_its_schedule(run):
    found = answer(run, f"{{served}} {LOAD} --also K=3 --goodput tpot:6 ttft:500 --goodput tpot:100")
    assert [arm.name for arm in found.arms] == ["off", "K=3", "by batch"]
    off, fixed, planned = found.arms
    assert (found.load.requests, off.served, off.rejected, off.tokens_per_round) == (60, 60, 0, 1.0)
    assert off.against_off is None and fixed.against_off.e2e.high < 0 and planned.against_off.e2e.high < 0
    assert fixed.against_off.tpot.value == pytest.approx(fixed.tpot_s.mean.value / off.tpot_s.mean.value - 1)
    assert fixed.tokens_per_round == pytest.approx(sum(0.75**i for i in range(4)), rel=0.05)
    assert {step.draft_len for step in fixed.steps} == {3} and len(planned.steps) > 1
    for arm in found.arms:
        strict, loose = arm.goodput
        assert (strict.limits, loose.limits) == tuple(found.limits) and strict.share.value <= loose.share.value == 1.0
        for latency in (arm.ttft_s, arm.tpot_s, arm.e2e_s):
            assert latency.p50.value <= latency.p90.value <= latency.p99.value
            known = dict(zip(QUANTILES, latency.quantiles, strict=True))
            assert (known[50], known[90]) == (latency.p50.value, latency.p90.value) and known[98] <= latency.p99.value == known[99]
        assert arm.output_tokens_per_s.value * arm.duration_s == pytest.approx(60 * found.load.output_len_mean)
        assert 0 < arm.busy.mean <= 1 and 0 <= arm.kv.mean <= arm.kv.max <= 1
    assert off.goodput[0].share.value < fixed.goodput[0].share.value
    assert any("deviation of 0.5" in note for note in found.notes)


def test_the_same_seed_gives_the_same_document_in_however_many_processes_and_another_another(run):
    line = f"{{served}} {LOAD} --also K=3"
    one, same, other = (answer(run, f"{line} {more}") for more in ("--seed 3", "--seed 3 --workers 2", "--seed 4"))
    assert one.arms == same.arms and one.load == same.load
    assert one.arms != other.arms


def test_a_schedule_by_context_is_simulated_by_batch_alone_too(run):
    found = answer(run, "{contexts} --rate 30 --lengths 400:60,7500:120 --requests 100 --replicas 2 --router least_loaded")
    names = [arm.name for arm in found.arms]
    assert names[:2] == ["off", "by batch"] and names[2:] in ([], ["by batch and context"])
    assert (found.server.replicas, found.server.router) == (2, "least_loaded")
    if len(names) == 3:
        assert {step.context_from for step in found.arms[2].steps} > {1}


def test_a_schedule_on_disk_is_simulated_with_what_it_does_not_know_given(run):
    found = answer(run, f"{{schedule}} {LOAD} --kv-tokens 300000 --prefill-rate 40000 --also K=1")
    assert [arm.name for arm in found.arms][:3] == ["off", "K=1", "by batch"] and {arm.kv_tokens for arm in found.arms} == {300_000}
    assert found.arms[1].against_off.tpot.high < 0
    size = "num_layers=32,num_kv_heads=8,head_dim=128,num_heads=32,weights_gib=16"
    sized = answer(run, f"{{schedule}} {LOAD} --model {size} --system h100_sxm")
    assert sized.arms[0].kv_tokens > 100_000
    code, _, err = run(f"{{schedule}} {LOAD}")
    assert code == 2 and "knows neither memory nor what prompts take" in err


def test_a_plan_of_the_own_runtime_is_simulated_at_its_batch(run, files):
    found = answer(run, "{plan} --rate 0.5 --lengths 900:33 --requests 60")
    assert [arm.name for arm in found.arms] == ["off", "the plan's"] and found.server.max_num_seqs == 1
    plan = planner.load_plan(files["plan"])
    assert found.arms[0].tpot_s.mean.value == pytest.approx(plan.baseline.round_s.value, rel=1e-6)  # one stream, and nobody's prompt in between
    assert found.arms[1].tokens_per_round == pytest.approx(plan.estimate.tokens_per_round.value, rel=0.1)
    code, _, err = run("{plan} --rate 0.5 --lengths 900:33 --max-num-seqs 4")
    assert code == 2 and "the plan is for 1 streams, got --max-num-seqs 4" in err


def test_traces_of_every_format_are_read_cut_and_rescaled(run, files):
    found = answer(run, "{served} --trace {trace} --limit 30 --speedup 2")
    assert (found.load.requests, found.load.speedup) == (30, 2.0) and found.load.duration_s == pytest.approx(29 * 0.4 / 2)
    assert found.arms[0].prefix_hits > 0 == answer(run, "{served} --trace {trace} --no-prefix-caching").arms[0].prefix_hits
    loads = {name: find_requests(AskedSimulation(**{key: value.format_map(files) if isinstance(value, str) else value for key, value in own.items()}), 1)[1]
             for name, own in {
        "rate": {"trace": "{trace}", "rate": 10.0}, "azure": {"trace": "{azure}"}, "gamma": {"rate": 3.0, "lengths": "{lengths}", "arrivals": "gamma:2"},
    }.items()}  # fmt: skip
    assert loads["rate"].requests_per_s == pytest.approx(10) and loads["azure"].requests == 2 and loads["gamma"].input_len_max == 700


def test_a_study_tries_configurations_and_goes_on_from_its_storage(run, files):
    line = "{served} --rate 8 --lengths 400:60 --requests 20 --max-num-seqs 4,64 --max-num-batched-tokens 256,2048 --goodput tpot:6 ttft:40"
    first = answer(run, f"{line} --trials 3 --storage {{journal}}")
    more = answer(run, f"{line} --trials 6 --storage {{journal}}")
    assert (first.study.num_candidates, len(first.study.tried), len(more.study.tried)) == (8, 3, 6)
    assert more.study.tried[:3] == first.study.tried
    best = more.study.tried[more.study.best]
    assert best.cost == min(row.cost for row in more.study.tried) and first.study.minimised == "requests outside of the limits, %"
    both = answer(run, f"{line} --trials 8 --workers 2")
    assert len(both.study.tried) == 8
    assert {(r.setting, r.max_num_seqs, r.max_num_batched_tokens): r.cost for r in more.study.tried}.items() <= {
        (r.setting, r.max_num_seqs, r.max_num_batched_tokens): r.cost for r in both.study.tried
    }.items()
    code, _, err = run(f"{line} --trials 6 --seed 5 --storage {{journal}}")
    assert code == 2 and "belongs to another run" in err


def test_long_requests_are_refused_and_that_is_said(run):
    found = answer(run, f"{{served}} {LOAD} --kv-tokens 1600")
    assert found.arms[0].rejected > 0 and found.arms[0].served + found.arms[0].rejected == 60
    assert any(f"off: {found.arms[0].rejected} requests are longer than the 1,600 tokens" in note for note in found.notes)
    nobody = answer(run, "{served} --rate 8 --lengths 4000:60 --requests 9 --kv-tokens 1600 --goodput tpot:50")
    assert nobody.arms[0].ttft_s is None and nobody.arms[0].goodput[0].share.value == 0


def test_overload_is_said(run):
    crowded = answer(run, "{served} --rate 400 --lengths 1000:200 --requests 300 --max-num-seqs 8")
    assert any("requests come faster than they are served" in note for note in crowded.notes)
    calm = answer(run, f"{{served}} {LOAD}")
    assert not any("faster than they are served" in note for note in calm.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{served}", "takes either --trace FILE, or --rate R with --lengths"),
        ("{served} --trace {trace} --lengths 5:5", "takes either --trace FILE"),
        ("{served} --lengths 5:5", "generated requests need a rate"),
        ("{served} --lengths 5:5 --rate 0", "the rate must lie in"),
        ("{served} --lengths 5x5 --rate 1", "--lengths takes IN:OUT pairs"),
        ("{served} --lengths 0:5 --rate 1", "pairs of lengths from 1"),
        ("{served} --lengths {words} --rate 1", "needs the columns input_len and output_len"),
        ("{served} --lengths 5:5 --rate 1 --arrivals weibull", "--arrivals is poisson or gamma:CV"),
        ("{served} --lengths 5:5 --rate 1 --arrivals gamma:x", "as in gamma:2"),
        ("{served} --lengths 5:5 --rate 1 --limit 3", "--limit is for a trace"),
        ("{served} --trace {trace} --arrivals gamma:2", "--arrivals is for generated requests"),
        ("{served} --trace {trace} --rate 1 --speedup 2", "--rate and --speedup both"),
        ("{served} --trace {trace} --speedup 0", "the speed of a trace must be above 0"),
        ("{served} --trace {trace} --limit 0", "at least 1, got 0"),
        ("{served} --trace {csv} --rate 3", "come at once"),
        ("{served} --trace {empty}", "got ''"),
        ("{served} --trace {trace} --also 3", "--also takes one draft length"),
        ("{served} --trace {trace} --also mtp:K=3", "one of the drafters eagle3"),
        ("{served} --trace {trace} --also K=40", "was measured up to K=5"),
        ("{served} --trace {trace} --drafter mtp", "the schedule has deployments"),
        ("{served} --trace {trace} --goodput tps:3", "--goodput takes limits in ms"),
        ("{served} --trace {trace} --replicas 0", "--replicas must lie in"),
        ("{served} --trace {trace} --router random", "--router is round_robin or least_loaded, got 'random'"),
        ("{served} --trace {trace} --max-num-seqs 4,8", "are for a study"),
        ("{served} --trace {trace} --max-num-seqs 0", "--max-num-seqs must lie in"),
        ("{served} --trace {trace} --trials 0", "at least one configuration"),
        ("{served} --trace {trace} --storage x.journal", "--storage holds a study"),
        ("{served} --trace {trace} --workers 0", "--workers must lie in"),
        ("{served} --trace {trace} --kv-tokens 3", "--kv-tokens must lie in"),
        ("{served} --trace {trace} --prefill-rate -1", "--prefill-rate is in tokens per second"),
        ("{served} --trace {trace} --spread 9", "--spread is a standard deviation"),
        ("{served} --trace {trace} --model num_layers=2", "--model says what the file itself does"),
        ("{served} --trace {trace} --tp 3", "--tp 3"),
        ("{untimed} --trace {trace}", "nothing says how long prompts take"),
        ("{own} --trace {trace}", "own.json"),
        ("{trace} --trace {trace}", "mooncake"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(run, line, said):
    code, out, err = run(f"{line} --quiet")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert said in err


def test_the_document_is_written_where_it_was_asked_for(run, files):
    code, out, _ = run(f"{{served}} {LOAD} --quiet -o {{out}}")
    assert code == 0 and "against off %" in out
    written = msgspec.json.decode(files["out"].read_bytes(), type=Simulation)
    assert written.kind == "simulation" and len(written.arms) == 2
