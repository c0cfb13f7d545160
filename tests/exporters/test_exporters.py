"""Every exporter on six different plans: what it writes is whole, quoted, passes its engine's rules, and says what it is not."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from made import DRAFT_MODEL, made_profile
from made_plans import CASES, write_plans

import planner
from planner.cli import main
from planner.commands.flags import AskedExport
from planner.engine_rules import DRAFTING, find_drafting
from planner.errors import BadInput
from planner.exporters import EXPORTERS, llamacpp, sglang, trtllm, vllm
from planner.exporters.contract import OwnRuntime
from planner.exporters.own_runtime import generate_words
from planner.exports import EXPORT_FILE, Export
from planner.measurements import save_profile
from planner.plans import load_plan, save_plan
from planner.schedules import load_schedule, save_schedule
from planner.specs import DraftConfig, DrafterSpec, FullKV, Sampler, SparseKV

ENGINES = ["vllm@0.33", "vllm-draft-window", "vllm-ascend", "sglang@0.5.23", "tensorrt-llm@1.4", "tensorrt-llm@1.2", "llama.cpp@b11434",
           "transformers@5.23", "planner"]  # fmt: skip
STATIC = ("llama.cpp", "vllm-ascend")  # engines that want the load declared where a schedule has several lengths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_plans(tmp_path_factory.mktemp("plans"))


def asked_of(engine: str, case) -> AskedExport:
    asked = case.asked
    if engine.startswith("llama.cpp"):
        asked = asked._replace(model="target.gguf", draft_model="drafter.gguf")
    if case.varies and engine.startswith(STATIC):
        asked = asked._replace(max_concurrency=32)
    return asked


def export(made, engine, name, folder, *, profile=True, **changes):
    plans, profiles = made
    case = CASES[name]
    asked = asked_of(engine, case)._replace(**changes)
    return planner.export(plans[case.plan], engine, folder, asked, profile_path=profiles[case.profile] if profile else None)


def fidelity(found: Export) -> dict[str, str]:
    return {knob.knob: knob.fidelity for knob in found.knobs}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_takes_every_plan_or_says_why_not(made, engine, name, tmp_path):
    folder = tmp_path / "out"
    found = export(made, engine, name, folder)
    headless = engine in ("transformers@5.23", "tensorrt-llm@1.2") and CASES[name].varies  # these know no eagle3: planned again, that is off
    assert (found.method is None) == (name == "off" or headless)
    assert bool(found.cost) >= headless
    written = json.loads((folder / EXPORT_FILE).read_text())
    assert msgspec.convert(written, Export) == found
    assert sorted(path.name for path in folder.iterdir()) == sorted([*found.files, EXPORT_FILE])
    for script in ("run", "measure"):
        lines = (folder / script).read_text().splitlines()
        assert len(lines) == 3 and lines[0] == "#!/bin/sh" and (folder / script).stat().st_mode & 0o111
        assert subprocess.run(["sh", "-n", folder / script], check=False).returncode == 0
    assert found.method is None or any(step.draft_len for step in found.steps)
    assert all(knob.reason for knob in found.knobs if knob.fidelity != "exact"), "what is not exact has a reason"
    assert found.steps[0].batch_from == 1
    assert all(b.batch_from == a.batch_to + 1 for a, b in zip(found.steps, found.steps[1:], strict=False))
    if name == "off":
        assert found.method is None and "speculative" not in "".join((folder / file).read_text() for file in found.files if file.endswith(".yaml"))


def test_off_leaves_the_drafter_out_everywhere(made, tmp_path):
    for engine in ENGINES:
        found = export(made, engine, "off", tmp_path / engine)
        assert found.method is None and found.draft_model is None
    assert "spec-type = none" in (tmp_path / "llama.cpp@b11434" / llamacpp.FILE).read_text()
    assert not (tmp_path / "transformers@5.23" / "generation_config.json").exists()


def test_vllm_gets_the_schedule_as_triples_that_end_in_off(made, tmp_path):
    found = export(made, "vllm@0.33", "schedule", tmp_path / "v")
    config = yaml.safe_load((tmp_path / "v" / vllm.FILE).read_text())
    rows = config["speculative-config"]["num_speculative_tokens_per_batch_size"]
    plan = load_schedule(made[0]["schedule"])
    own = next(deployment for deployment in plan.deployments if deployment.drafter == "eagle3").schedule
    assert [row[2] for row in rows] == [row.draft_len for row in own] and rows[0][0] == 1 and rows[-1][1:] == [256, 0]
    assert config["speculative-config"]["num_speculative_tokens"] == max(row[2] for row in rows)
    assert config["max-num-seqs"] == 256 and config["gpu-memory-utilization"] == 0.9
    assert fidelity(found)["schedule"] == "exact"
    at = found.argv.index("--speculative-config")
    assert json.loads(found.argv[at + 1]) == config["speculative-config"]  # the same as flags
    sweep = json.loads((tmp_path / "v" / vllm.SWEEP).read_text())
    assert sweep == {"off": {}, "planned": {"speculative_config": config["speculative-config"]}}


def test_sglang_gets_one_candidate_for_each_slot_and_a_drafted_token_more(made, tmp_path):
    export(made, "sglang@0.5.23", "schedule", tmp_path / "s")
    config = yaml.safe_load((tmp_path / "s" / sglang.FILE).read_text())
    slots = json.loads((tmp_path / "s" / sglang.ADAPTIVE).read_text())
    longest = max(slot["candidate_steps"][0] for slot in slots.values())
    assert (config["speculative-num-steps"], config["speculative-num-draft-tokens"], config["speculative-eagle-topk"]) == (longest, longest + 1, 1)
    assert next(iter(slots)) == "1" and list(slots.values())[-1] == {"candidate_steps": [0]} and config["max-running-requests"] == 256


def test_sglang_takes_a_schedule_for_mtp_and_wants_the_model_beside_the_file(made, tmp_path):
    """Both as its own parser has it: NEXTN is EAGLE to it, and the command asks for a model path before it opens the file."""
    found = export(made, "sglang@0.5.23", "schedule", tmp_path / "s", method="mtp")
    config = yaml.safe_load((tmp_path / "s" / sglang.FILE).read_text())
    assert config["speculative-algorithm"] == "NEXTN" and config["speculative-adaptive"] and fidelity(found)["schedule"] == "exact"
    assert f"sglang serve --model-path {config['model-path']} --config {sglang.FILE}" in found.run


def test_a_schedule_key_of_tensorrt_llm_is_the_last_batch_or_the_first_by_version(made, tmp_path):
    changes = {"method": "draft_model", "draft_model": "org/draft"}
    old = export(made, "tensorrt-llm@1.2", "schedule", tmp_path / "old", **changes)
    export(made, "tensorrt-llm@1.4", "schedule", tmp_path / "new", **changes)
    before, now = (yaml.safe_load((tmp_path / name / trtllm.FILE).read_text())["speculative_config"] for name in ("old", "new"))
    assert list(before["draft_len_schedule"]) == [step.batch_from for step in old.steps]
    assert list(now["draft_len_schedule"]) == [step.batch_to for step in old.steps]
    assert list(before["draft_len_schedule"].values()) == list(now["draft_len_schedule"].values())
    for config in (before, now):
        assert config["draft_len_schedule"][min(config["draft_len_schedule"])] == config["max_draft_len"]
    assert "mirror" in old.checked


def test_a_schedule_is_worth_one_length_where_the_engine_has_no_other_and_its_cost_is_shown(made, tmp_path):
    found = export(made, "llama.cpp@b11434", "schedule", tmp_path / "l", max_concurrency=32)
    plan = load_schedule(made[0]["schedule"])
    own = next(deployment for deployment in plan.deployments if deployment.drafter == "eagle3").schedule
    at_load = next(row for row in own if row.concurrency_from <= 32 <= row.concurrency_to)
    assert [step.draft_len for step in found.steps] == [at_load.draft_len] and found.steps[0].batch_to == 32
    assert fidelity(found)["schedule"] == "dropped"
    assert {row.concurrency for row in found.cost} >= {1, 32}
    assert found.cost[0].loss > 0.02, "one request would be served better by a longer draft"
    assert found.cost[-1].loss == pytest.approx(0, abs=0.006)
    for row in found.cost:
        assert row.loss == pytest.approx(1 - row.exported_speedup.value / row.planned_speedup.value)


def test_without_the_profile_the_cost_is_said_to_be_unknown(made, tmp_path):
    found = export(made, "llama.cpp@b11434", "schedule", tmp_path / "l", profile=False)
    assert found.cost == [] and "--profile" in found.cost_note


def test_a_kv_budget_that_the_engine_lacks_is_planned_around(made, tmp_path):
    plan = load_plan(made[0]["sparse"])
    assert plan.chosen.kv.budget == 256, "the made profile drafts from a window"
    found = export(made, "vllm@0.33", "sparse kv", tmp_path / "v")
    assert fidelity(found)["choice"] == "approximated" and fidelity(found)["kv_budget"] == "dropped" and len(found.cost) == 1
    assert found.cost[0].planned_speedup == plan.speedup and found.cost[0].loss > 0
    assert found.cost[0].exported_speedup.value < plan.speedup.value
    blind = export(made, "vllm@0.33", "sparse kv", tmp_path / "v", profile=False)
    assert fidelity(blind)["kv_budget"] == "dropped" and "--profile" in blind.cost_note
    assert blind.steps[0].draft_len == plan.chosen.draft_len
    own = export(made, "planner", "sparse kv", tmp_path / "p")
    assert fidelity(own)["kv_budget"] == "exact" and "--kv-budget" in own.argv and not own.cost


def test_a_head_for_fewer_tokens_is_kept_by_the_own_runtime_and_lost_aloud_elsewhere(made, tmp_path):
    plans, _ = made
    plan = load_plan(plans["sparse"])
    drafter = msgspec.structs.replace(plan.chosen.drafter, weights="int8", vocab=4096)
    save_plan(msgspec.structs.replace(plan, chosen=msgspec.structs.replace(plan.chosen, drafter=drafter)), tmp_path / "p.json")
    found = planner.export(tmp_path / "p.json", "vllm", tmp_path / "v", AskedExport(draft_model="org/draft"))
    assert fidelity(found)["drafter_vocab"] == fidelity(found)["drafter_weights"] == "dropped"
    own = planner.export(tmp_path / "p.json", "planner", tmp_path / "own", AskedExport(draft_model="org/draft"))
    words = shlex.join(own.argv)
    assert "--draft-model org/draft" in words and "--drafter-weights int8 --drafter-vocab 4096" in words


def test_self_sparse_drafting_is_refused_without_a_profile_and_planned_around_with_one(made, tmp_path):
    plans, profiles = made
    plan = load_plan(plans["sparse"])
    drafter = msgspec.structs.replace(plan.chosen.drafter, kind="self_sparse", path=None)
    other = msgspec.structs.replace(plan.chosen, drafter=drafter, kv=msgspec.structs.replace(plan.chosen.kv, storage="retain"))
    save_plan(msgspec.structs.replace(plan, chosen=other), tmp_path / "p.json")
    with pytest.raises(BadInput, match="--profile"):
        planner.export(tmp_path / "p.json", "vllm", tmp_path / "v")
    found = planner.export(tmp_path / "p.json", "vllm", tmp_path / "v", profile_path=profiles["sparse"])
    assert found.method in (None, "draft_model") and found.cost


@pytest.mark.parametrize(
    ("engine", "method", "words"),
    [
        ("sglang@0.5.23", "eagle", {"speculative-draft-window-size": 252, "speculative-draft-sink-size": 4}),
        ("sglang@0.5.23", "eagle3", {"speculative-draft-window-size": 256}),
        ("vllm-ascend", "eagle3", {"additional-config": {"draft_window_size": 256}}),
        ("vllm-draft-window", "eagle3", {"draft_attention_window": 256}),
        ("sglang@0.5.23", "draft_model", {}),
    ],
)
def test_a_window_reaches_the_engines_that_have_one(made, engine, method, words, tmp_path):
    plans, _ = made
    kv = '{"kind":"sparse","budget":256,"sink":4,"recent":32,"selection":"window","refresh":null,"storage":"retain"}'
    raw = json.loads(plans["schedule"].read_text())
    for deployment in raw["deployments"]:
        for row in deployment["schedule"]:
            if row["draft_len"]:
                row["kv"] = json.loads(kv)
    (tmp_path / "windowed.json").write_text(json.dumps(raw))
    asked = AskedExport(method=method, draft_model="org/head", max_concurrency=8)
    found = planner.export(tmp_path / "windowed.json", engine, tmp_path / "out", asked)
    config = yaml.safe_load(next(path for path in (tmp_path / "out").iterdir() if path.suffix == ".yaml").read_text())
    shown = config | config.get("speculative-config", {})
    assert {key: shown[key] for key in words} == words
    assert words or fidelity(found)["kv_budget"] == "dropped"


def test_names_of_drafters_are_opaque_and_what_is_missing_is_asked_for(made, tmp_path):
    plans, _ = made
    raw = json.loads(plans["schedule"].read_text().replace('"eagle3"', '"our best one"'))
    (tmp_path / "p.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="--method"):
        planner.export(tmp_path / "p.json", "vllm", tmp_path / "v", AskedExport(draft_model="x"))
    with pytest.raises(BadInput, match="--draft-model"):
        planner.export(tmp_path / "p.json", "vllm", tmp_path / "v", AskedExport(method="eagle3"))
    assert planner.export(tmp_path / "p.json", "vllm", tmp_path / "v", AskedExport(method="mtp")).draft_model is None


@pytest.mark.parametrize(
    ("changes", "engine", "name", "words"),
    [
        ({}, "vllm@0.9", "static", "0.32 to 0.33"),
        ({}, "tgi", "static", "one of vllm"),
        ({}, "vllm@x", "static", "written as"),
        ({"drafter": "mtp"}, "vllm", "schedule", "deployments"),
        ({"context_len": None}, "vllm", "several contexts", "--isl"),
        ({"context_len": 9000}, "vllm", "several contexts", "--isl"),
        ({"max_concurrency": 500}, "vllm", "schedule", "1..256"),
        ({"max_concurrency": 4}, "vllm", "static", "1 streams"),
        ({"max_concurrency": None}, "llama.cpp", "schedule", "--max-concurrency N"),
        ({"model": "org/target"}, "llama.cpp", "static", "GGUF"),
        ({"model": "-x"}, "vllm", "static", "dash"),
        ({"model": "smollm2"}, "vllm", "static", "own name"),
        ({"kv_dtype": "q8_0"}, "vllm", "static", "--kv-dtype"),
        ({"draft_kv_dtype": "fp8"}, "sglang", "schedule", "--draft-kv-dtype"),
        ({"kv_dtype": "fp8"}, "llama.cpp", "static", "--kv-dtype"),
        ({"method": "magic"}, "vllm", "schedule", "one of"),
        ({"memory_cap_bytes": 2**40}, "vllm", "schedule", "within the device"),
        ({"max_concurrency": 8}, "transformers", "schedule", "1 request"),
    ],
)
def test_what_cannot_be_is_refused_by_name(made, engine, name, changes, words, tmp_path):
    with pytest.raises(BadInput, match=words.replace(".", r"\.")) as error:
        export(made, engine, name, tmp_path / "out", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_another_profile_than_the_plans_is_refused(made, tmp_path):
    plans, profiles = made
    with pytest.raises(BadInput, match="sha256"):
        planner.export(plans["static"], "vllm", tmp_path / "o", profile_path=profiles["useless"])


HOSTILE = ["a \"b\" 'c' $(touch x) `y`", "a; rm -rf b", "a\nb: c", "{a: [b", "# c", "é\u202e", "- x", "%s\\n", "a: b", "!!python/object:os.system"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hostile_name_comes_out_as_it_went_in_or_is_refused(made, engine, name, tmp_path):
    """Read back by a parser that did not write it: YAML, JSON, the preset's rules, and the shell itself."""
    gguf = name + ".gguf" if engine.startswith("llama.cpp") else name
    try:
        found = export(made, engine, "static", tmp_path / "o", profile=False, model=gguf, draft_model=gguf)
    except BadInput as error:
        assert name.startswith("-") or engine.startswith("llama.cpp") and any(char in name for char in "#;\n")
        assert "\n" not in str(error)
        return
    files = {path.name: path.read_text() for path in (tmp_path / "o").iterdir()}
    match find_drafting(engine)[0].name:
        case "tensorrt-llm":
            assert yaml.safe_load(files[trtllm.FILE])["speculative_config"]["speculative_model"] == name
        case "sglang":
            config = yaml.safe_load(files[sglang.FILE])
            assert config["model-path"] == config["speculative-draft-model-path"] == name
        case "llama.cpp":
            assert llamacpp.parse(files[llamacpp.FILE])["planned"]["spec-draft-model"] == gguf
        case "transformers":
            assert json.loads(files["settings.json"])["assistant"] == name
        case "planner":
            assert found.argv[found.argv.index("--draft-model") + 1] == name
        case _:
            assert yaml.safe_load(files[vllm.FILE])["speculative-config"]["model"] == name
    shown = tmp_path / "shown"
    for script in {"run", "measure", "sweep"} & set(files):
        line = files[script].split("\n", 2)[2].replace("exec ", "set -- ", 1)
        done = subprocess.run(
            ["sh", "-c", f'{line.rstrip()}\nfor word; do printf "%s\\0" "$word"; done', str(shown), "data"],
            capture_output=True,
            check=False,
            cwd=tmp_path,
        )
        words = done.stdout.decode().split("\0")[:-1]
        assert words == [word for word in words if word] and done.returncode == 0, done.stderr
        assert not any(tmp_path.glob("x")) and not any(tmp_path.rglob("touch*"))
        if name in (tmp_path / "o" / script).read_text():
            assert any(name in word for word in words)


def test_a_folder_of_anothers_is_left_alone_and_an_earlier_export_is_replaced(made, tmp_path):
    folder = tmp_path / "o"
    export(made, "sglang@0.5.23", "schedule", folder)
    (folder / "results.json").write_text("mine")
    export(made, "vllm@0.33", "static", folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {vllm.FILE, vllm.SWEEP, "run", "measure", "sweep", EXPORT_FILE, "results.json"}
    other = tmp_path / "mine"
    other.mkdir()
    (other / "plan.json").write_text('{"kind": "schedule"}')
    with pytest.raises(BadInput, match="earlier export"):
        export(made, "vllm@0.33", "static", other)
    assert [path.name for path in other.iterdir()] == ["plan.json"]
    with pytest.raises(BadInput, match="is a file"):
        export(made, "vllm@0.33", "static", other / "plan.json")
    with pytest.raises(BadInput, match="must exist"):
        export(made, "vllm@0.33", "static", tmp_path / "a" / "b")


def test_the_command_line_says_the_same_as_the_function(made, tmp_path, monkeypatch, capsys):
    plans, profiles = made
    monkeypatch.setattr(sys, "argv", ["planner", "export", str(plans["schedule"]), "--engine", "llama.cpp", "-o", str(tmp_path / "o"), "--model", "t.gguf",
                                      "--draft-model", "d.gguf", "--max-concurrency", "32", "--profile", str(profiles["served"]), "--json"])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "o" / EXPORT_FILE).read_text()) and found["cost"]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1]])
    with pytest.raises(SystemExit):
        main()
    report = capsys.readouterr().out
    assert "loss %" in report and report.rstrip().endswith(str(tmp_path / "o" / "run")) and "dropped" in report
    assert "llama-server --models-preset" in (tmp_path / "o" / "run").read_text()


def test_every_engine_with_rules_has_an_exporter():
    assert {rules.name for rules in DRAFTING} == set(EXPORTERS)
    assert {find_drafting(engine)[0].name for engine in ENGINES} == set(EXPORTERS)


def test_an_export_needs_no_torch(made, tmp_path):
    code = f"import sys, planner\nplanner.export({str(made[0]['static'])!r}, 'vllm', {str(tmp_path / 'o')!r})\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=Path(planner.__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_the_own_runtimes_command_is_the_plans(made, tmp_path):
    plan = load_plan(made[0]["static"])
    found = export(made, "planner", "static", tmp_path / "p")
    own = [word for word in shlex.split(plan.command) if word not in ("--prompt-file", "PROMPT.txt")]
    assert [word for word in found.argv if word not in ("--execution", "eager")] == [word for word in own if word not in ("--execution", "eager")]


def test_a_budget_too_small_for_the_usual_window_is_spelled_as_it_is():
    """24 tokens with 8 recent ones are a valid cache, though 4 sinks and the usual 32 recent ones do not fit into it."""
    kv = SparseKV(budget=24, sink=0, recent=8)
    config = DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=kv, draft_len=2)
    words = generate_words("m", OwnRuntime(config, "float32", "eager", "full", None, None), Sampler(), 16)
    assert words[words.index("--kv-budget") :][:8] == ["--kv-budget", "24", "--selection", "window", "--sink", "0", "--recent", "8"]
    usual = DraftConfig(drafter=config.drafter, kv=SparseKV(budget=64), draft_len=2)
    usual = generate_words("m", OwnRuntime(usual, "float32", "eager", "full", None, None), Sampler(), 16)
    assert not {"--sink", "--recent"} & set(usual)


def edited(made, name, change, path):
    """A plan's file with something changed in it."""
    raw = json.loads(made[0][name].read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def test_edges_follow_the_running_batch_where_it_lags_the_concurrency(made, tmp_path):
    def half(raw):
        for pair in raw["estimates"]:
            for side in ("estimate", "baseline"):
                pair[side]["running_batch"] = max(1, pair[side]["concurrency"] / 2)

    plain = export(made, "vllm@0.33", "schedule", tmp_path / "a", profile=False)
    lagging = planner.export(edited(made, "schedule", half, tmp_path / "p.json"), "vllm@0.33", tmp_path / "b", asked_of("vllm", CASES["schedule"]))
    assert [step.draft_len for step in lagging.steps] == [step.draft_len for step in plain.steps]
    for after, before in zip(lagging.steps[1:], plain.steps[1:], strict=True):
        assert abs(after.batch_from - before.batch_from / 2) <= 1
    assert lagging.steps[-1].batch_to == 256 and fidelity(lagging)["load"] == "approximated" and "load" not in fidelity(plain)


def test_rows_behind_the_largest_running_batch_are_left_out_aloud(made, tmp_path):
    def full(raw):
        for pair in raw["estimates"]:
            pair["estimate"]["running_batch"] = min(20.0, pair["estimate"]["concurrency"])

    found = planner.export(edited(made, "schedule", full, tmp_path / "p.json"), "vllm@0.33", tmp_path / "b", asked_of("vllm", CASES["schedule"]))
    assert max(step.batch_from for step in found.steps) <= 20 and found.steps[-1].batch_to == 256
    assert "never come" in next(knob.reason for knob in found.knobs if knob.knob == "load")


def test_tensorrt_llm_drafts_no_more_than_in_its_first_row(made, tmp_path):
    def rising(raw):
        for deployment in raw["deployments"]:
            for i, row in enumerate(deployment["schedule"]):
                if deployment["drafter"] == "eagle3":
                    row["draft_len"] = min(i + 2, 4)

    path = edited(made, "schedule", rising, tmp_path / "p.json")
    asked = asked_of("tensorrt", CASES["schedule"])
    found = planner.export(path, "tensorrt-llm@1.4", tmp_path / "t", asked)
    config = yaml.safe_load((tmp_path / "t" / trtllm.FILE).read_text())["speculative_config"]
    assert config["max_draft_len"] == 2 and "draft_len_schedule" not in config and fidelity(found)["schedule lengths"] == "approximated"


def test_a_schedule_of_the_own_runtime_keeps_its_kv_budget_there_and_loses_it_aloud_elsewhere(tmp_path):
    kvs = [(DRAFT_MODEL, FullKV()), (DRAFT_MODEL, SparseKV(budget=256, storage="evict"))]

    def costly(kv, draft_len, context_len):
        return draft_len * (1e-3 if isinstance(kv, SparseKV) else 4e-3), 10e-3 + 1e-3 * draft_len, 1e-4

    save_profile(made_profile(drafters=kvs, round_s=costly, batches={1: costly, 4: costly}, model="org/target"), tmp_path / "own.json")
    schedule = planner.schedule(tmp_path / "own.json", concurrency=(1, 4), contexts=[1024], objective="throughput")
    save_schedule(schedule, tmp_path / "s.json")
    own = planner.export(tmp_path / "s.json", "planner", tmp_path / "p", AskedExport(), profile_path=tmp_path / "own.json")
    assert "--kv-budget" in own.argv and "folders/a small one" in own.argv and own.cost == []
    asked = AskedExport(draft_model="org/draft")
    found = planner.export(tmp_path / "s.json", "vllm", tmp_path / "v", asked, profile_path=tmp_path / "own.json")
    assert fidelity(found)["kv_budget"] == "dropped" and found.method == "draft_model"
    assert found.cost and all(row.loss > 0 for row in found.cost)
    assert all("window" in row.planned and "window" not in row.exported for row in found.cost)
    with pytest.raises(BadInput, match="--draft-model"):
        planner.export(tmp_path / "s.json", "vllm", tmp_path / "v", profile_path=tmp_path / "own.json")
