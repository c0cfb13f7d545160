"""planner diff, as a user calls it: what was changed in what is compared is found, and nothing else."""

import json
import sys

import msgspec
import pytest
from made import FIFTH, linear_round_s, made_profile
from made_plans import served_profile

import planner
from planner.cli import main
from planner.errors import BadInput
from planner.measurements import save_profile
from planner.plans import Interval, Sweep, SweepCell, Trial, save_sweep
from planner.serving import save_serving_profile
from planner.specs import PLAIN, DeviceSpec, DraftConfig, DrafterSpec, Sampler, Workload


def faster(kv, draft_len, context_len):
    draft_s, verify_s, commit_s = linear_round_s(kv, draft_len, context_len)
    return draft_s / 2, 0.8 * verify_s, commit_s


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    gpu = DeviceSpec(kind="cuda", name="H100", memory_bytes=80 * 2**30)
    changes = {"contexts": (1024,), "device": gpu, "accept": lambda kv, context_len, number: (3 + number % 2) * FIFTH}
    save_profile(made_profile(noise=0.02, texts_per_cell=8), folder / "cpu.json")
    save_profile(made_profile(noise=0.02, noise_seed=1, texts_per_cell=8, round_s=faster, **changes), folder / "gpu.json")
    for name in ("cpu", "gpu"):
        planner.save_plan(planner.plan(folder / f"{name}.json", context_len=1024), folder / f"{name}.plan.json")
    served = served_profile()
    slower = [
        msgspec.structs.replace(cell, tpot_s=1.5 * cell.tpot_s, itl_s=1.5 * cell.itl_s, output_tokens_per_s=cell.output_tokens_per_s / 1.5)
        if cell.draft_len
        else cell
        for cell in served.cells
    ]
    save_serving_profile(served, folder / "served.json")
    save_serving_profile(msgspec.structs.replace(served, cells=slower[:-2], source="newer"), folder / "slower.json")
    for name in ("served", "slower"):
        planner.save_schedule(planner.schedule(folder / f"{name}.json", objective="tpot"), folder / f"{name}.plan.json")
    for name, scale in {"sweep": 1.0, "swept": 0.9}.items():
        save_sweep(sweep(scale), folder / f"{name}.json")
    return folder


def sweep(scale: float) -> Sweep:
    """Two configurations on four texts of very different speeds; the second run is `scale` of the first on each."""
    drafting = DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=4)

    def cell(config, tpot_s):
        trials = [
            Trial(
                config=config, text=f"text {i}", output_len=11, prefill_s=1.0, start_s=0.0, decode_s=10 * tpot_s * (i + 1), drafted=[0] * 10,
                accepted=[0] * 10, round_s=[tpot_s] * 10, cache_bytes=1, peak_bytes=1,
            )
            for i in range(4)
        ]  # fmt: skip
        wide = Interval(value=2.5 * tpot_s, low=tpot_s, high=4 * tpot_s)
        return SweepCell(config=config, measured_tpot_s=wide, measured_e2e_s=wide, measured_tokens_per_round=1.0, speedup=wide, trials=trials)

    return Sweep(
        planner_version="0", model="tiny", environment=made_profile().environment, best=drafting, minutes=1.0,
        workload=Workload(context_len=64, output_len=11, sampler=Sampler()), cells=[cell(PLAIN, 0.02 * scale), cell(drafting, 0.01 * scale)],
    )  # fmt: skip


@pytest.fixture
def run(files, monkeypatch, capsys):
    def call(*words: str):
        monkeypatch.chdir(files)
        monkeypatch.setattr(sys, "argv", ["planner", "diff", *words, "--quiet"])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def ratios(found, quantity):
    return {(ratio["of"], ratio["at"]): ratio for ratio in found["ratios"] if ratio["quantity"] == quantity}


def test_two_devices_are_told_apart_by_their_profiles(run):
    code, out, err = run("cpu.json", "gpu.json", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert {"device.name", "device.kind", "device.memory_bytes"} <= {changed["what"] for changed in found["changed"]}
    assert not any("environment" in changed["what"] or "target" in changed["what"] for changed in found["changed"])
    truth = sum(faster(None, 0, 1024)) / sum(linear_round_s(None, 0, 1024))
    off = ratios(found, "round")["off", "context 1024"]["ratio"]
    assert off["low"] < truth < off["high"] < 1
    prefill = ratios(found, "prefill")["target", "context 1024"]["ratio"]
    assert prefill["low"] <= 1 <= prefill["high"]
    accepted = next(iter(ratios(found, "P(first accepted)").values()))["ratio"]
    assert accepted["value"] == pytest.approx(0.7 / 0.8) and accepted["high"] < 1
    assert found["choices"][0]["at"].startswith("context 1024") and found["choices"][0]["ratio"]["high"] < 1
    assert any("context 4096" in only for only in found["only_before"]) and found["only_after"] == []
    shown = " ".join(run("cpu.json", "gpu.json")[1].split())
    assert "device.name made H100" in shown and "8.00 GiB 80.00 GiB" in shown and "Before only" in shown


def test_what_a_choice_of_elsewhere_would_lose_is_told(run, files):
    found = json.loads(run("served.plan.json", "slower.plan.json", "--json")[1])
    differ = [choice for choice in found["choices"] if choice["before"] != choice["after"]]
    assert differ and all(choice["carried_loss"] > 0 for choice in differ)
    assert all(abs(choice["carried_loss"]) < 1e-9 for choice in found["choices"] if choice["before"] == choice["after"])


def test_serving_profiles_are_compared_load_by_load(run):
    found = json.loads(run("served.json", "slower.json", "--json")[1])
    assert [changed["what"] for changed in found["changed"]] == ["source"]
    tpot = {of: ratio for (of, _), ratio in ratios(found, "TPOT").items()}
    assert tpot["off"]["ratio"]["value"] == pytest.approx(1) and tpot["eagle3 K=3"]["ratio"]["value"] == pytest.approx(1.5)
    assert tpot["eagle3 K=3"]["pairs"] == 4
    throughput = {of: ratio for (of, _), ratio in ratios(found, "throughput").items()}
    assert throughput["eagle3 K=1"]["ratio"]["value"] == pytest.approx(1 / 1.5)
    assert [choice["at"] for choice in found["choices"]] == [f"concurrency {2**i}" for i in range(9)]
    assert found["only_before"] == ["eagle3 idle, all loads that both ran"]


def test_plans_of_two_devices(run):
    found = json.loads(run("cpu.plan.json", "gpu.plan.json", "--json")[1])
    assert {changed["what"] for changed in found["changed"]} == {"device", "profile_sha256"}
    off = ratios(found, "TPOT")["off", "context 1024, output 33, greedy"]["ratio"]
    assert off["high"] < 1
    assert {ratio["quantity"] for ratio in found["ratios"]} == {"TPOT", "end-to-end", "TTFT", "tokens per round", "memory", "speedup"}


def test_sweeps_are_paired_text_by_text(run):
    found = json.loads(run("sweep.json", "swept.json", "--json")[1])
    for ratio in found["ratios"]:  # the texts differ fourfold, and the two runs of each by a tenth
        assert ratio["pairs"] == 4 and ratio["ratio"]["low"] == pytest.approx(0.9) == pytest.approx(ratio["ratio"]["high"])
    assert found["changed"] == [] and found["choices"][0]["before"] == found["choices"][0]["after"] == "ngram K=4"


@pytest.mark.parametrize("name", ["cpu", "cpu.plan", "served", "served.plan", "sweep"])
def test_a_file_does_not_differ_from_itself(run, name):
    code, out, _ = run(f"{name}.json", f"{name}.json", "--json")
    found = json.loads(out)
    assert code == 0 and found["changed"] == found["only_before"] == found["only_after"] == []
    assert found["ratios"] and all(ratio["ratio"]["value"] == pytest.approx(1) for ratio in found["ratios"])
    assert all(choice["before"] == choice["after"] for choice in found["choices"])
    assert "the two files are one and the same" in run(f"{name}.json", f"{name}.json")[1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("cpu.json", "cpu.plan.json"), "two files of a kind, got a profile and a plan"),
        (("cpu.json", "served.json"), "got a profile and a serving profile"),
        (("cpu.json", "nothing.json"), "nothing.json"),
        (("cpu.json", "gpu.json", "--objective", "speed"), "an objective is one of"),
        (("cpu.json", "gpu.json", "--objective", "goodput"), "e2e, tpot or throughput, got goodput"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, words, why):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and why in err


def test_profiles_without_a_common_place_say_so(files, tmp_path):
    save_profile(made_profile(contexts=(512,)), tmp_path / "short.json")
    found = planner.diff(files / "gpu.json", tmp_path / "short.json")
    assert found.choices == [] and found.ratios == [] and "share no context" in found.notes[0]
    with pytest.raises(BadInput, match="a price"):
        planner.diff(files / "gpu.json", tmp_path / "short.json", objective="price")
