"""FP8 heads: what is written is within a step of e4m3 of what it was written of, and what does not fit is refused by name."""

import json

import pytest
import torch
from checkpoints import edit, refused
from safetensors.torch import load_file, save_file
from tiny import block_head_files, head_files, tiny_model, write_head

from planner.runtime import dflash_head, eagle_head, fp8

SHAPES = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 320}  # some in whole blocks of 128, some not
MATRICES = {"dflash": "layers.0.mlp.down_proj.weight", "eagle3": "midlayer.mlp.down_proj.weight"}  # 2 blocks down, 1 across
KINDS = {"dflash": (block_head_files, dflash_head.load_head), "eagle3": (head_files, eagle_head.load_head)}


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=5, num_layers=4, **SHAPES)


def written(folder, target, kind):
    """A head in bfloat16, and the same in FP8."""
    config, tensors = KINDS[kind][0](target, ids=(1, 3))
    rounded = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    quantized = fp8.quantized(rounded)
    return write_head(folder / "plain", config, rounded), write_head(folder / "fp8", config | {"quantization_config": fp8.QUANTIZATION}, quantized)


def respoil(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize("shape", [(128, 256), (192, 320), (60, 130), (1, 1)], ids=str)
def test_a_matrix_is_off_by_half_a_step_of_e4m3_and_the_largest_of_a_block_by_nothing(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0])[:, None]
    weight = weight.bfloat16().float()
    found = fp8.quantized({"w": weight, "norm": weight[0]})
    assert found.keys() == {"w", "w_scale_inv", "norm"} and torch.equal(found["norm"], weight[0])
    blocks = tuple(-(-size // 128) for size in shape)
    assert found["w"].dtype == torch.float8_e4m3fn and found["w_scale_inv"].dtype == torch.float32 and found["w_scale_inv"].shape == blocks
    restored = fp8.restored(found["w"], found["w_scale_inv"], fp8.BLOCK)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            ours, theirs = (tensor[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] for tensor in (restored, weight))
            most = theirs.abs().max()
            error = (ours - theirs).abs()
            assert (error <= torch.maximum(theirs.abs() * 2**-4, most / 448 * 2**-10) * (1 + 1e-5)).all()  # or half a step of the smallest codes
            assert (ours.bfloat16() == theirs)[theirs.abs() == most].all()
    assert shape == (1, 1) or not torch.equal(restored, weight)


def test_a_block_of_zeros_stays_one():
    found = fp8.quantized({"w": torch.zeros(130, 4)})
    assert torch.equal(fp8.restored(found["w"], found["w_scale_inv"], fp8.BLOCK), torch.zeros(130, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_in_fp8_is_the_one_in_bfloat16_within_a_step(target, tmp_path, kind):
    plain, quantized = written(tmp_path, target, kind)
    load = KINDS[kind][1]
    ours, theirs = (load(folder, target, torch.float32).state_dict() for folder in (quantized, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.dim() != 2 or tensor.dtype != torch.float32 or name == "embedding":
            assert torch.equal(ours[name], tensor), name
        else:
            assert ((ours[name] - tensor).abs() <= torch.maximum(tensor.abs() * 2**-4, tensor.abs().max() / 448 * 2**-10) * (1 + 1e-5)).all(), name
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (quantized, plain))
    assert small < 0.6 * large
    respoil(quantized, lambda t: {name: tensor.reshape(-1)[:1] if name.endswith("_inv") else tensor for name, tensor in t.items()})
    assert load(quantized, target, torch.bfloat16).dtype == torch.bfloat16  # a scale for the whole tensor


def test_renamed_tensors_bring_their_scales(target, tmp_path):
    _, folder = written(tmp_path, target, "dflash")
    expected = dflash_head.load_head(folder, target, torch.float32).fc.weights
    respoil(folder, lambda t: {name.replace("fc.", "encoder.fc.") if name.startswith("fc.") else name: tensor for name, tensor in t.items()})
    assert (folder / "model.safetensors").read_bytes().count(b"encoder.fc.weight_scale_inv") == 1
    assert torch.equal(dflash_head.load_head(folder, target, torch.float32).fc.weights, expected)


def test_what_a_config_says_of_its_target_does_not_matter_to_a_head_in_floats(target, tmp_path):
    folder, _ = written(tmp_path, target, "dflash")
    edit(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    assert dflash_head.load_head(folder, target, torch.float32)


CONFIG = fp8.QUANTIZATION
REFUSALS = {
    "needs a scale": (lambda t, name: {key: tensor for key, tensor in t.items() if key != name + "_scale_inv"}, CONFIG),
    "must have shape [2, 1] or one element, got [1, 2]": (lambda t, name: t | {name + "_scale_inv": torch.ones(1, 2)}, CONFIG),
    "must have shape [2, 1] or one element, got [2]": (lambda t, name: t | {name + "_scale_inv": torch.ones(2)}, CONFIG),
    "must be one of F32, F16, BF16, got I32": (lambda t, name: t | {name + "_scale_inv": torch.ones(2, 1, dtype=torch.int32)}, CONFIG),
    "holds values that are not finite": (lambda t, name: t | {name + "_scale_inv": torch.full((2, 1), torch.inf)}, CONFIG),
    "is not part of": (lambda t, name: t | {name.replace("weight", "input_scale"): torch.ones(1)}, CONFIG),
    "must be one of F32, F16, BF16, got F8_E4M3": (lambda t, name: t, None),
    "fmt must be": (lambda t, name: t, CONFIG | {"fmt": "e5m2"}),
    "quant_method": (lambda t, name: t, CONFIG | {"quant_method": "gptq"}),
    "activation_scheme": (lambda t, name: t, CONFIG | {"activation_scheme": "static"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", REFUSALS)
def test_a_head_whose_scales_do_not_fit_is_refused(target, tmp_path, kind, message):
    _, folder = written(tmp_path, target, kind)
    change, config = REFUSALS[message]
    respoil(folder, lambda t: change(t, MATRICES[kind]))
    edit(folder / "config.json", quantization_config=config)
    with refused(message, str(folder), within_s=9):
        KINDS[kind][1](folder, target, torch.float32)


def test_ids_are_never_in_fp8(target, tmp_path):
    _, folder = written(tmp_path, target, "eagle3")
    respoil(folder, lambda t: t | {"d2t": t["d2t"].to(torch.float8_e4m3fn), "d2t_scale": torch.ones(1)})
    with refused("d2t", "I64", within_s=9):
        eagle_head.load_head(folder, target, torch.float32)


def test_the_config_is_that_of_published_checkpoints():
    assert json.loads(json.dumps(fp8.QUANTIZATION)) == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
