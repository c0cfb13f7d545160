"""Tensors of safetensors files are found where the index says, with the sizes that the files have; damaged files are refused by name."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import edit, load, make_model, refused
from safetensors.torch import load_file, save_file


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
