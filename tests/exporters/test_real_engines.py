"""Exports run by the engines themselves: transformers, and the llama.cpp server where it is installed."""

import json
import os
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from llama import gguf_file, llama_server
from made import DRAFT_MODEL, made_profile
from made_plans import CASES, write_plans
from tiny import write_model

import planner
from planner.cli import main
from planner.commands.flags import AskedExport
from planner.engines.launch import free_port
from planner.exporters import llamacpp, transformers
from planner.measurements import save_profile
from planner.specs import FullKV

K = 4


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Draft four tokens with a draft model."""
    folder = tmp_path_factory.mktemp("plan")
    save_profile(made_profile(drafters=[(DRAFT_MODEL, FullKV())]), folder / "profile.json")
    found = planner.plan(folder / "profile.json", context_len=1024)
    assert found.chosen.draft_len == K
    planner.save_plan(found, folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.parametrize("assistant", [0, 1], ids=["the model itself", "another model"])
def test_transformers_drafts_as_many_tokens_as_were_planned_and_writes_the_same_text(plan, assistant, tmp_path, monkeypatch, capsys):
    """The exported script, in this process: candidates of every round are counted, and greedy text is that of plain decoding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import candidate_generator

    models = [str(write_model(tmp_path / name, seed=seed)) for name, seed in (("target", 0), ("assistant", assistant))]
    folder = tmp_path / "out"
    planner.export(plan, "transformers@5.23", folder, AskedExport(model=models[0], draft_model=models[1]))
    drafted = []
    usual = candidate_generator.AssistedCandidateGenerator.get_candidates

    def counting(self, input_ids, *args, **kwargs):
        found = usual(self, input_ids, *args, **kwargs)
        drafted.append(found[0].shape[1] - input_ids.shape[1])
        return found

    monkeypatch.setattr(candidate_generator.AssistedCandidateGenerator, "get_candidates", counting)
    (tmp_path / "prompt.txt").write_text("one two three one two three one two")
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "prompt.txt")])
    runpy.run_path(str(folder / transformers.SCRIPT))
    text = capsys.readouterr().out.rstrip("\n")
    cut = 1 if assistant == 0 else K  # rounds at the end of the text, where fewer tokens are left than would be drafted
    assert len(drafted) > cut + 3 and set(drafted[:-cut]) == {K}, drafted

    tokenizer, target = AutoTokenizer.from_pretrained(models[0]), AutoModelForCausalLM.from_pretrained(models[0])
    inputs = tokenizer((tmp_path / "prompt.txt").read_text(), return_tensors="pt", return_token_type_ids=False)
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=33)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(plain, skip_special_tokens=True).rstrip("\n")


def test_the_default_threshold_of_transformers_would_have_stopped_early(plan, tmp_path):
    """Why the file names a threshold: without it, transformers' own ends rounds where the assistant is unsure."""
    from transformers import GenerationConfig

    planner.export(plan, "transformers@5.23", tmp_path / "out", AskedExport(model="m"))
    config = json.loads((tmp_path / "out" / transformers.CONFIG).read_text())
    ours = GenerationConfig()
    assert ours.update(**config) == {}, "transformers knows every key"
    assert (ours.num_assistant_tokens, ours.assistant_confidence_threshold) == (K, 0.0)
    assert GenerationConfig().update(num_asistant_tokens=4) == {"num_asistant_tokens": 4}  # how a misspelt one would be seen


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


PARSED = "srv  llama_server"  # of the line that follows the parsing of flags; the last lines may be lost as the server exits


def said(words: list) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode, "there is no such model"
    return done.stdout + done.stderr


def test_the_llama_cpp_server_takes_the_flags_of_all_six_plans(tmp_path):
    """By its own parser, which comes before the missing model: a flag or a value that it does not know ends it earlier."""
    program, (plans, profiles) = llama_server(), write_plans(tmp_path)
    for i, case in enumerate(CASES.values()):
        asked = case.asked._replace(model="no.gguf", draft_model="no.gguf", max_concurrency=32 if case.varies else None)
        found = planner.export(plans[case.plan], "llama.cpp", tmp_path / str(i), asked, profile_path=profiles[case.profile])
        assert PARSED in said([program, *found.argv[1:]])
    assert PARSED not in said([program, *found.argv[1:], "--spec-type", "draft-tree"])


def test_the_own_runtime_runs_its_own_command(plan, tmp_path, monkeypatch, capsys):
    models = [str(write_model(tmp_path / name, seed=seed)) for name, seed in (("a target", 0), ("its drafter", 1))]
    found = planner.export(plan, "planner", tmp_path / "out", AskedExport(model=models[0], draft_model=models[1]))
    monkeypatch.setattr(sys, "argv", [*found.argv, "--prompt", "one two three one two three", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    answer = json.loads(capsys.readouterr().out)
    assert not stop.value.code and answer["num_tokens"] == 33 and answer["num_rounds"] >= 32 / (K + 1)


@pytest.mark.model
def test_the_llama_cpp_server_loads_the_preset_drafts_and_refuses_an_unknown_key(plan, tmp_path):
    """The exported script with llama-server on its path; the model is its own drafter, under a name with quotes and blanks."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").symlink_to(llama_server())
    model = tmp_path / "a \"b\" 'c' $HOME [d] = %e.gguf"
    model.symlink_to(gguf_file())
    folder = tmp_path / "out"
    planner.export(plan, "llama.cpp@b10434", folder, AskedExport(model=str(model), draft_model=str(model)))
    port = free_port()
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    server = subprocess.Popen(
        [folder / "run", "--host", "127.0.0.1", "--port", str(port), "--threads", "1"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        states = []
        for _ in range(240):
            time.sleep(0.25)
            assert server.poll() is None, "the server refused the preset"
            try:
                states = [own["status"]["value"] for own in ask(port, "/models")["data"] if own["id"] == llamacpp.MODEL_ID]
            except (urllib.error.URLError, ConnectionError):
                continue
            if states == ["loaded"]:
                break
        assert states == ["loaded"]
        body = {"model": llamacpp.MODEL_ID, "prompt": "one two three one two three", "max_tokens": 12, "temperature": 0}
        timings = ask(port, "/v1/completions", body)["timings"]
        assert timings["draft_n"] > 0 and timings["draft_n_accepted"] == timings["draft_n"]  # it drafts for itself
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()

    preset = folder / llamacpp.FILE
    preset.write_text(preset.read_text() + "draft-lenght = 3\n")
    words = [folder / "run", "--host", "127.0.0.1", "--port", str(port)]
    refused = [subprocess.run(words, env=env, capture_output=True, text=True, timeout=30, check=False) for _ in range(3)]
    assert {done.returncode for done in refused} == {1}
    assert any("not recognized in preset" in done.stdout + done.stderr for done in refused), "the last line, which may be lost"
