"""planner import bench, from files to a profile and its report."""

import json
import sys

import pytest
from benches import MODEL, SYSTEM, metrics, sglang, table, vllm

import planner
from planner.cli import main
from planner.commands.import_bench import summarise
from planner.errors import BadInput
from planner.serving import load_any_profile

DRAFTER = "eagle3=num_layers=1,num_kv_heads=8,head_dim=128,weights_gib=0.5"


@pytest.fixture
def folder(tmp_path):
    contents = {
        "table.csv": table(), "off.json": json.dumps(vllm(draft_len=0, tpot_ms=12.0)), "eagle.json": json.dumps(vllm()),
        "sglang.jsonl": json.dumps(sglang()), "before.txt": metrics(requests=10, drafts=1000), "after.txt": metrics(),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def call(*words: str):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["planner", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def bench(*words: str) -> list[str]:
    return ["import", "bench", *words, "--model", MODEL, "--system", SYSTEM, "-o", "profile.json"]


def test_a_table_becomes_a_profile_and_the_report_says_what_is_missing(run, folder):
    code, out, err = run(*bench("table.csv", "--draft-model", DRAFTER))
    assert code == 0 and err == ""
    profile = load_any_profile(folder / "profile.json")
    assert len(profile.cells) == 5 and profile.model.num_layers == 32 and profile.drafters["eagle3"].num_layers == 1
    assert profile.system.fraction == 0.9 and profile.warnings == [] and profile.source == "table.csv"
    assert out.rstrip().endswith("planner plan profile.json --max-concurrency 1..64")
    flat = " ".join(out.split())
    assert (
        "a second context_len: what a longer prompt costs is not known" in flat
        and "of eagle3: a second draft_len: the others are extrapolated" in flat
    )


def test_json_prints_the_summary_and_nothing_else(run):
    code, out, err = run(*bench("off.json", "eagle.json", "--drafter", "eagle3", "--json"))
    summary = json.loads(out)
    assert code == 0 and [row["drafter"] for row in summary["drafters"]] == ["none", "eagle3"]
    assert [row["draft_len"] for row in summary["drafters"]] == [[0], [3]] and summary["cells"] == 2
    assert any("its size" in line for line in summary["drafters"][1]["missing"])
    assert err == "" and any("taken as off and not as eagle3 loaded and idle" in warning for warning in summary["warnings"])


def test_profiles_join_runs_that_need_other_flags(run, folder):
    assert run(*bench("off.json"))[0] == 0
    (folder / "profile.json").rename(folder / "off-profile.json")
    code, _, err = run(*bench("off-profile.json", "sglang.jsonl", "--drafter", "big"))
    assert code == 0 and err == ""
    assert [cell.drafter for cell in load_any_profile(folder / "profile.json").cells] == ["none", "big"]
    assert run(*bench("after.txt", "--since", "before.txt", "--drafter", "eagle3", "--max-concurrency", "8"))[0] == 0
    assert "no row is off" in load_any_profile(folder / "profile.json").warnings[0]
    assert run(*bench("profile.json", "off-profile.json"))[0] == 0
    profile = load_any_profile(folder / "profile.json")
    assert profile.warnings == [] and len(profile.cells) == 2  # the doubt is over: off came along


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table.csv", "--draft-model", "eagle=" + MODEL], "must name a drafter of the files (eagle3), got 'eagle'"),
        (["table.csv", "--draft-model", MODEL], "must name a drafter of the files (eagle3), got 'num_layers'"),
        (["off.json", "--draft-model", DRAFTER], "must name a drafter of the files (they have none)"),
        (["table.csv", "--draft-model", "eagle3"], "--draft-model takes NAME=SPEC, got 'eagle3'"),
        (["table.csv", "--draft-model", DRAFTER, "--draft-model", DRAFTER], "must be given once"),
        (["missing.csv"], "cannot read the benchmark missing.csv: No such file"),
        (["table.csv", "off.json", "--since", "before.txt"], "one together with --since, got 2"),
        (["table.csv", "--since", "before.txt"], "--since goes with Prometheus text"),
        (["off.json", "--max-concurrency", "-1"], "the flags: concurrency: expected `int` >= 1, got -1"),
        (["off.json", "eagle.json", "--drafter", "eagle3", "--draft-len", "3"], "off.json has no counters of speculation and other runs have"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_exit_2(run, words, message):
    code, out, err = run(*bench(*words))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_joined_profiles_must_be_of_one_model_and_system(run, folder):
    assert run(*bench("off.json"))[0] == 0
    with pytest.raises(BadInput, match="profile.json has num_layers 32, --model says 30; give what it was imported with"):
        planner.import_bench([folder / "profile.json"], model=MODEL.replace("32", "30"), system=SYSTEM)
    with pytest.raises(BadInput, match="profile.json has fraction 0.9, --system says 0.8"):
        planner.import_bench([folder / "profile.json"], model=MODEL, system=SYSTEM.replace("0.9", "0.8"))


def test_the_summary_says_what_each_gap_costs(folder):
    (folder / "thin.csv").write_text("drafter,draft_len,concurrency,context_len,output_len,tpot_s\nmtp,2,4,512,128,0.01\n,0,4,512,128,0.02\n")
    profile = planner.import_bench([folder / "thin.csv"], model=MODEL, system=SYSTEM)
    summary = summarise(profile, "p.json")
    assert [drafter.drafter for drafter in summary.drafters] == ["none", "mtp"]
    assert {line.split(":")[0] for line in summary.missing} == {
        "output_tokens_per_s in 2 of 2 cells", "itl_s in 2 of 2 cells", "ttft_s in 2 of 2 cells", "a second concurrency", "a second context_len"
    }  # fmt: skip
    assert [line.split(":")[0] for line in summary.drafters[1].missing] == [
        "its size", "draft_len 0 with it loaded", "acceptance and tokens_per_round"
    ]  # fmt: skip


def test_commands_of_the_own_runtime_say_what_a_serving_profile_is(run, folder):
    from planner.commands.replay import _costs

    assert run(*bench("table.csv"))[0] == 0
    code, out, err = run("check", "profile.json", "--dataset", "table.csv")
    assert (code, out) == (2, "") and err.startswith("error: plan profile.json is a serving profile") and err.count("\n") == 1
    with pytest.raises(BadInput, match="is a serving profile"):
        _costs(folder / "profile.json", [], None)  # what `replay --profile` reads first


def test_weights_that_cannot_have_fitted_are_named(run):
    code, _, err = run(*bench("table.csv", "--draft-model", DRAFTER.replace("0.5", "900")))
    assert code == 0
    assert "weights of the target and eagle3 take" in " ".join(err.split())
