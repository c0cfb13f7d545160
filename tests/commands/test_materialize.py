"""What is written of a drafter computes what its own layers compute: in transformers, in our own loader and in llama.cpp."""

import json
import urllib.request
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from checkpoints import make_model, refused, write_gguf
from llama import gguf_file, llama_server
from tiny import prefilled, random_prompt, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import planner
from planner.commands.flags import AskedExport
from planner.commands.materialize import materialize
from planner.commands.session import drafter_models, load_drafters, open_session, weights_bytes
from planner.engines.launch import address, free_port, running
from planner.runtime.gguf_file import read_gguf
from planner.runtime.own_layers import load_own_layers, save_own_layers
from planner.runtime.tokenizer import load_tokenizer
from planner.runtime.weights import expected_shapes, load_checkpoint, read_spec
from planner.specs import DrafterSpec, DynamicRope, FactorsRope, LinearRope, Llama3Rope, YarnRope
from planner.trained import NAMES
from planner.training.multi_view import cut, own_weights

CPU = torch.device("cpu")
LAYERS = [0, 2]
PROMPT = random_prompt(60, vocab_size=256)
ROPES = {
    "plain": None,
    "linear": LinearRope(factor=4.0),
    "dynamic": DynamicRope(factor=2.0, original_max_position=256),
    "llama3": Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
    "yarn": YarnRope(factor=4.0, original_max_position=64, attention_factor=1.1, beta_fast=16.0),
}


def folder_of(path: Path, architecture: str, **changes) -> Path:
    """A target as transformers writes it, with our byte tokenizer and its special tokens."""
    make_model(architecture, num_hidden_layers=3, vocab_size=256, **changes).save_pretrained(path)
    write_model(path / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "tokens" / name).rename(path / name)
    config = {"bos_token": "a", "eos_token": "b", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def own_layers(path: Path, target: Path, layers=LAYERS, bits=8, **changes) -> Path:
    session = open_session(str(target), dtype="float32", device="cpu", execution="eager")
    drafter = cut(session.model, layers)
    import msgspec

    save_own_layers(path, msgspec.structs.replace(drafter.spec, **changes), layers, own_weights(drafter), {}, bits)
    return path


def our_logits(own: Path, target: Path) -> torch.Tensor:  # [256], behind PROMPT
    model = open_session(str(target), dtype="float32", device="cpu", execution="eager").model
    return prefilled(load_own_layers(own, model, torch.float32, model.kernels), [PROMPT], len(PROMPT))[1][0]


@pytest.mark.parametrize(
    ("architecture", "rope", "changes"),
    [
        ("llama", "plain", {}), ("llama", "llama3", {"tie_word_embeddings": True}), ("llama", "linear", {}), ("llama", "dynamic", {}),
        ("mistral", "plain", {}), ("qwen2", "yarn", {"tie_word_embeddings": True}), ("qwen3", "plain", {}),
    ],
)  # fmt: skip
def test_transformers_and_our_own_loader_compute_the_same(architecture, rope, changes, tmp_path):
    target = folder_of(tmp_path / "target", architecture, **changes)
    own = own_layers(tmp_path / "own.safetensors", target, rope_scaling=ROPES[rope])
    files = materialize(str(own), tmp_path / "out", model=str(target), dtype="float32")
    assert {Path(file).name for file in files} >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    ours = our_logits(own, target)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([PROMPT])).logits[0, -1], ours, atol=1e-4, rtol=1e-4)
    assert type(theirs).__name__.lower().startswith(architecture) and theirs.config.eos_token_id in (65, list(load_tokenizer(target).stop_tokens))
    session = open_session(str(target), dtype="float32", device="cpu", execution="eager")
    drafter = DrafterSpec(kind="draft_model", path=str(tmp_path / "out"))
    load_drafters(session, [drafter])
    torch.testing.assert_close(prefilled(session.model.beside[drafter.path, None], [PROMPT], len(PROMPT))[1][0], ours, atol=1e-4, rtol=1e-4)
    assert read_spec(tmp_path / "out").rope_scaling == ROPES[rope]


def test_layers_in_4_bits_are_materialized_as_well(tmp_path):
    target = folder_of(tmp_path / "target", "llama")
    own = own_layers(tmp_path / "own.safetensors", target, bits=4)
    materialize(str(own), tmp_path / "out", model=str(target), dtype="float32")
    session = open_session(str(target), dtype="float32", device="cpu", execution="eager")
    drafter = DrafterSpec(kind="draft_model", path=str(tmp_path / "out"))
    load_drafters(session, [drafter])
    logits = prefilled(session.model.beside[drafter.path, None], [PROMPT], len(PROMPT))[1][0]
    torch.testing.assert_close(logits, our_logits(own, target), atol=1e-4, rtol=1e-4)
    exact = our_logits(own_layers(tmp_path / "own8.safetensors", target), target)
    assert 1e-3 < (logits - exact).abs().max()  # what 4 bits cost: the comparison is one of what they hold


def test_rope_factors_that_config_json_has_no_words_for_are_refused(tmp_path):
    target = folder_of(tmp_path / "target", "llama")
    own = own_layers(tmp_path / "own.safetensors", target, rope_scaling=FactorsRope(factors=(1.0, 1.0, 2.0, 8.0)))
    with refused("rope factors", "Hugging Face folder", within_s=9):
        materialize(str(own), tmp_path / "out", model=str(target))
    assert not (tmp_path / "out").exists()


def gguf_target(path: Path, architecture: str) -> Path:
    tokenizer = json.loads((write_model(path.parent / "tokens") / "tokenizer.json").read_text())
    tokens = [*tokenizer["model"]["vocab"], "ab"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] + [1] * 256,
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 0, "tokenizer.chat_template": "{{ bos_token }}",
        "general.name": "target", "general.size_label": "1B",
    }  # fmt: skip
    return write_gguf(path, make_model(architecture, num_hidden_layers=3, vocab_size=257), **metadata)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_holds_the_targets_tensors_and_metadata_as_they_are_and_the_drafters_layers(architecture, tmp_path):
    target = gguf_target(tmp_path / "target.gguf", architecture)
    own = own_layers(tmp_path / "own.safetensors", target)
    files = materialize(str(own), tmp_path / "out", model=str(target), gguf=tmp_path / "drafter.gguf", dtype="float32")
    assert files[-1] == str(tmp_path / "drafter.gguf")
    before, after = read_gguf(target), read_gguf(tmp_path / "drafter.gguf")
    changed = {"general.name", "general.file_type", "general.size_label", f"{architecture}.block_count"}
    same = before.metadata.keys() - changed
    assert {name: after.metadata[name] for name in same} == {name: before.metadata[name] for name in same}
    assert after.metadata[f"{architecture}.block_count"] == 2 and after.metadata.keys() - same <= changed | {"general.architecture"}
    for name in ("token_embd.weight", "output.weight"):
        here, there = (file.read_bytes()[part.offset : part.offset + part.num_bytes] for file, part in (
            (target, before.tensors[name]), (tmp_path / "drafter.gguf", after.tensors[name])))  # fmt: skip
        assert here == there and before.tensors[name].kind == after.tensors[name].kind
    whole, ours = (load_checkpoint(path, torch.float32, CPU) for path in (tmp_path / "out", tmp_path / "drafter.gguf"))
    for name, _ in expected_shapes(ours.spec):
        step = whole.tensors[name].abs().max() / 127 if "proj" in name else 0
        assert (ours.tensors[name] - whole.tensors[name]).abs().max() <= step, name
        if "proj.weight" in name:
            assert after.tensors[gguf_name(name)].kind.name == "Q8_0"
    assert load_tokenizer(tmp_path / "drafter.gguf").vocabulary == load_tokenizer(target).vocabulary == load_tokenizer(tmp_path / "out").vocabulary


def gguf_name(name: str) -> str:
    from planner.runtime.gguf_model import gguf_name

    return gguf_name(name)


def test_a_gguf_file_of_a_folder_is_refused_with_the_way_to_one(tmp_path):
    target = folder_of(tmp_path / "target", "llama")
    own = own_layers(tmp_path / "own.safetensors", target)
    with refused("convert_hf_to_gguf.py", str(tmp_path / "out"), within_s=9):
        materialize(str(own), tmp_path / "out", model=str(target), gguf=tmp_path / "drafter.gguf")
    assert not (tmp_path / "out").exists()


def test_a_gguf_target_whose_metadata_are_not_the_drafters_is_refused(tmp_path):
    target = gguf_target(tmp_path / "target.gguf", "llama")
    own = own_layers(tmp_path / "own.safetensors", target, rope_theta=5e5)
    with refused("rope_theta 500000.0", "leave --gguf out", within_s=9):
        materialize(str(own), tmp_path / "out", model=str(target), gguf=tmp_path / "drafter.gguf")


def test_a_folder_with_anything_else_in_it_stays_as_it_is_and_an_earlier_drafter_is_replaced(tmp_path):
    target = folder_of(tmp_path / "target", "llama")
    (target / "chat_template.jinja").write_text("{{ messages }}")
    first, second = (own_layers(tmp_path / f"{layer}.safetensors", target, [layer]) for layer in (0, 1))
    (tmp_path / "file").write_text("")
    for other in (target, tmp_path / "file"):
        before = sorted(tmp_path.rglob("*"))
        with refused(str(other), "--out", within_s=9):
            materialize(str(first), other, model=str(target))
        assert sorted(tmp_path.rglob("*")) == before
    out = tmp_path / "out"
    written = materialize(str(first), out, model=str(target))
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}" and str(out / "chat_template.jinja") in written
    content = (out / "model.safetensors").read_bytes()
    (target / "chat_template.jinja").unlink()
    materialize(str(second), out, model=str(target))
    assert (out / "model.safetensors").read_bytes() != content and not (out / "chat_template.jinja").exists()


def test_own_layers_are_a_drafter_that_shares_memory_and_is_recorded(tmp_path):
    target = folder_of(tmp_path / "target", "llama", tie_word_embeddings=True)
    own = str(own_layers(tmp_path / "own.safetensors", target))
    drafters = [DrafterSpec(kind="draft_model", path=own, weights=weights) for weights in ("full", "int8", "int4")]
    session = open_session(str(target), dtype="float32", device="cpu", execution="eager")
    load_drafters(session, drafters)
    full, int8, int4 = drafter_models(session, drafters)
    embedding = 4 * 256 * 32
    assert full.weights_bytes == 4 * full.spec.num_parameters - embedding and full.spec.num_layers == 2
    assert full.weights_bytes > int8.weights_bytes > int4.weights_bytes
    assert weights_bytes(session) == session.model.nbytes + sum(model.weights_bytes for model in (full, int8, int4)) - norms(full.spec) * 2
    assert int8.fingerprint == f"{full.fingerprint}-int8"
    for variant in ({"weights": "int8"}, {"vocab": 100}, {"weights": "int8", "vocab": 100}):
        alone, drafter = (
            open_session(str(target), dtype="float32", device="cpu", execution="eager"),
            DrafterSpec(kind="draft_model", path=own, **variant),
        )
        load_drafters(alone, [drafter])
        [model] = drafter_models(alone, [drafter])
        assert weights_bytes(alone) == alone.model.nbytes + model.weights_bytes
        head = (4 + 32 if "weights" in variant else 4 * 32) * variant.get("vocab", 256) + 8 * variant.get("vocab", 0)
        layers = int8.weights_bytes - (4 + 32) * 256 if "weights" in variant else full.weights_bytes
        assert model.weights_bytes == layers + head


def norms(spec) -> int:
    """Bytes that the cheaper copies of a drafter share with it."""
    return 4 * (2 * spec.num_layers + 1) * spec.hidden_size


def test_an_engine_is_not_told_to_load_own_layers(tmp_path):
    from made import made_profile

    from planner.measurements import save_profile
    from planner.plans import save_plan

    drafter = DrafterSpec(kind="draft_model", path="smollm2-multi-view")
    from planner.specs import SparseKV

    save_profile(made_profile(drafters=[(drafter, SparseKV(budget=64))]), tmp_path / "profile.json")
    save_plan(planner.plan(tmp_path / "profile.json", context_len=1024), tmp_path / "plan.json")
    with refused("whole checkpoints", "planner train materialize", within_s=9):
        planner.export(tmp_path / "plan.json", "llama.cpp", tmp_path / "out", AskedExport(model="model.gguf"))
    found = planner.export(tmp_path / "plan.json", "planner", tmp_path / "own", AskedExport(model="smollm2"))
    assert "smollm2-multi-view" in found.argv
    found = planner.export(tmp_path / "plan.json", "llama.cpp", tmp_path / "there", AskedExport(model="model.gguf", draft_model="drafter.gguf"))
    assert "drafter.gguf" in found.argv


@pytest.mark.model
@pytest.mark.parametrize(("drafter", "accepted"), [("all layers", 0.7), (NAMES[0], 0.1)])
def test_the_llama_cpp_server_drafts_with_it_and_writes_what_it_writes_alone(drafter, accepted, tmp_path):
    """All layers of the target as a drafter, of which whatever is stored wrongly costs acceptance that is nearly whole; and the shipped one."""
    program, target = llama_server(), gguf_file()
    if drafter == "all layers":
        whole, drafter = load_checkpoint(target, torch.float32, CPU), str(tmp_path / "own.safetensors")
        own = {name: tensor for name, tensor in whole.tensors.items() if name != "model.embed_tokens.weight"}
        save_own_layers(drafter, whole.spec, list(range(whole.spec.num_layers)), own, {})
    materialize(drafter, tmp_path / "out", model="smollm2", gguf=tmp_path / "drafter.gguf")
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(target))
    chat = [{"role": "user", "content": "Count: 12 345"}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ours.encode_chat(chat)
    texts, timings = [], []
    for words in ([], ["--spec-type", "draft-simple", "--spec-draft-model", str(tmp_path / "drafter.gguf"), "--spec-draft-n-max", "4"]):
        port = free_port()
        command = [program, "-m", str(target), "--threads", "1", "-c", "256", "--parallel", "1", "--host", "127.0.0.1", "--port", str(port), *words]
        with running(command, log=tmp_path / f"log{len(texts)}", url=address("127.0.0.1", port), ready_s=300):
            body = json.dumps({"prompt": "The sun rises in the", "max_tokens": 24, "temperature": 0}).encode()
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=300) as answer:
                found = json.load(answer)
        texts.append(found["choices"][0]["text"])
        timings.append(found["timings"])
    assert "draft_n" not in timings[0] or not timings[0]["draft_n"]
    assert timings[1]["draft_n_accepted"] > accepted * timings[1]["draft_n"] > 0
    assert texts[0] == texts[1] and texts[0]
