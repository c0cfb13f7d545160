"""Each script of examples/ runs. Where it needs a GPU or a server, the measuring is replaced by an answer, and the rest is real."""

import importlib.util
from pathlib import Path

import pytest
from made import WARM, made_profile
from made_plans import served_profile
from made_reports import made_tuning
from msgspec.structs import replace

import planner
from planner.measurements import save_profile
from planner.serving import save_serving_profile

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run an example's main in an empty folder; what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *words: str, **changes) -> str:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(*words, **changes)
        return capsys.readouterr().out

    return call


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert all(f'run("{path.stem}"' in here for path in FOLDER.glob("*.py"))


def test_a_plan_under_less_and_less_memory(run, tmp_path):
    save_profile(made_profile(samplers=[WARM]), tmp_path / "profile.json")
    lines = run("plan_under_cap", "profile.json", "1024").splitlines()
    assert "self_sparse" in lines[0] and "plain decoding alone" in lines[-1] and len(lines) >= 2


def test_the_profile_of_a_gpu_leads_to_plans(run, monkeypatch):
    asked = {}

    def measured(model, dataset, **options):
        asked.update(options, model=model, dataset=dataset)
        return made_profile(contexts=(1024, 2048), samplers=[planner.Sampler(), WARM], warnings=["the machine was busy"])

    monkeypatch.setattr(planner, "profile", measured, raising=False)
    lines = run("profile_gpu", "folder", "texts.txt", "gpu.json", contexts=[1024]).splitlines()
    assert asked["device"] == "cuda" and asked["settings"].contexts == [1024] and len(asked["settings"].policies) == 4
    assert len(lines) == 4 and lines[0].startswith("1024 tokens, temperature 0: self_sparse")
    assert planner.load_profile("gpu.json").contexts == [1024, 2048]


def test_a_server_is_tuned(run, monkeypatch):
    asked = {}

    def tuned(dataset, folder, words, **options):
        asked.update(options, words=words)
        return made_tuning()

    monkeypatch.setattr(planner, "tune", tuned, raising=False)
    out = run("tune_server", "vllm serve M", "eagle3", "HEAD", "chats.jsonl", "tuned", cap_minutes=1.0)
    assert (asked["words"].launch, asked["words"].draft_model, asked["words"].cap_minutes) == ("vllm serve M", "HEAD", 1.0)
    assert out.splitlines()[0] == "4 at once: K=3, +90 % over off" and "--speculative-config" in out


def test_a_drafter_is_trained_and_written(run, tmp_path):
    pytest.importorskip("torch")
    from tiny import write_model

    write_model(tmp_path / "model", num_layers=3, max_context_len=512)
    (tmp_path / "text.txt").write_text(" ".join(f"the {n} of the sea is {n * n}" for n in range(40)))
    (tmp_path / "held.txt").write_text(" ".join(f"a {n} on the sand was {n + n}" for n in range(80)))
    out = run("train_drafter", "model", "text.txt", "held.txt", "out", steps=2, length=240, continuation=32, budgets=[(48, 1.0)])
    lines = out.splitlines()
    assert lines[0].endswith("texts of 240 tokens") and lines[2].startswith("step 2: loss ") and "0/full" in lines[2]
    assert "out/drafter/model.safetensors" in lines and (tmp_path / "out/drafter/tokenizer.json").is_file()


def test_two_gpus_are_compared(run, tmp_path):
    served = served_profile()
    faster = [replace(cell, tpot_s=cell.tpot_s / 2, itl_s=cell.itl_s / 2, output_tokens_per_s=2 * cell.output_tokens_per_s) for cell in served.cells]
    save_serving_profile(served, tmp_path / "a.json")
    save_serving_profile(replace(served, cells=faster), tmp_path / "b.json")
    out = run("compare_gpus", "a.json", "b.json")
    assert "TPOT, off, all loads that both ran: 0.50" in out and "concurrency 1: eagle3 K=5 on the one, eagle3 K=5 on the other" in out


def test_a_table_becomes_an_engine_s_configuration(run, tmp_path):
    out = run("export_schedule")
    assert "planned for Qwen2.5-1.5B-Instruct on RTX 4060 Laptop" in out and "vllm serve" in out.splitlines()[-1]
    assert (tmp_path / "demo/serve/plan.json").is_file()


def test_a_trace_meets_a_schedule(run, tmp_path):
    save_serving_profile(served_profile(), tmp_path / "served.json")
    (tmp_path / "trace.csv").write_text("arrival_s,input_len,output_len\n" + "".join(f"{0.05 * i},400,40\n" for i in range(40)))
    lines = run("simulate_trace", "served.json", "trace.csv").splitlines()
    assert lines[0].startswith("off: TPOT p50 ") and len(lines) >= 3 and all("end to end against off" in line for line in lines[1:])
