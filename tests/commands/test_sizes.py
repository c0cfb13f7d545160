"""Sizes of models and systems from texts: parameters that published checkpoints have, and damage that is refused in one line."""

import random

import psutil
import pynvml
import pytest
from model_configs import DEEPSEEK, DFLASH, EAGLE, LLAMA, MIXTRAL, PAIRS, QWEN2, QWEN3, QWEN3_MOE, write

from planner.commands.local_system import local_cpu, local_gpu
from planner.commands.sizes import model_size, read_system, sized, system_spec
from planner.errors import BadInput
from planner.serving import ModelSize, SystemSpec
from planner.systems import SYSTEMS
from planner.units import GIB


def write_safetensors(path, size):
    """A file whose tensors take `size` bytes, most of it a hole."""
    header = b'{"__metadata__":{}}     '
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def refused(call, text):
    with pytest.raises(BadInput) as refusal:
        call(text)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 1500
    return message


# parameters as the checkpoints' own index files have them; of the last two, to the rounding of their names, without the MTP layer
@pytest.mark.parametrize(
    "config, parameters, within",
    [(LLAMA, 8_030_261_248, 0), (QWEN3, 1_720_574_976, 0), (QWEN2, 7_615_616_512, 0), (QWEN3_MOE, 30_532_122_624, 0), (MIXTRAL, 46_702_792_704, 0),
     (DEEPSEEK, 671_026_419_200, 1e-3)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_parameters_from_a_config_are_those_of_the_checkpoint(tmp_path, config, parameters, within):
    size = model_size(write(tmp_path / "model", config))
    assert size.weights_bytes == pytest.approx(2 * parameters, rel=within)


def test_keys_and_values_are_counted_as_the_config_says(tmp_path):
    llama = model_size(write(tmp_path / "llama", LLAMA))
    assert (llama.name, llama.kv_bytes_per_token(), llama.vocab_size) == ("llama", 131_072, 128_256)
    deepseek = model_size(write(tmp_path / "deepseek", DEEPSEEK))
    assert deepseek.latent and deepseek.kv_bytes_per_token(8) == 61 * 576 * 2
    assert model_size(write(tmp_path / "old", {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"})).num_kv_heads == 32
    assert model_size(write(tmp_path / "single", LLAMA | {"torch_dtype": "float32"})).kv_bytes_per_element == 4


def test_a_nested_config_is_read_with_what_stands_outside(tmp_path):
    inner = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    outer = {"model_type": "some_vlm", "torch_dtype": "float16", "text_config": inner}
    assert model_size(write(tmp_path / "text", outer)).weights_bytes == 2 * 8_030_261_248
    assert "vision_config" in refused(model_size, write(tmp_path / "vision", outer | {"vision_config": {"depth": 1}}))


def test_an_eagle_head_has_one_layer_and_the_targets_embedding(tmp_path):
    size, notes, kind = sized(write(tmp_path / "head", EAGLE))
    assert kind == "eagle3" and size.num_layers == 1 and size.kv_bytes_per_token() == 4096
    attention = 2 * 4096 * 128 * (32 + 2 * 8) + 32 * 128 * 4096
    assert size.weights_bytes == pytest.approx(2 * (attention + 3 * 4096 * 14336 + 3 * 4096**2 + 32000 * 4096), rel=1e-3)
    assert any("EAGLE-3" in note for note in notes)


def test_a_dflash_head_has_its_layers_and_what_it_reads_and_the_targets_embedding_and_head(tmp_path):
    size, notes, kind = sized(write(tmp_path / "head", DFLASH))
    assert (kind, size.num_layers, size.weights_bytes, size.kv_bytes_per_token()) == ("dflash", 5, 5_111_970_304, 5 * 2 * 8 * 128 * 2)
    assert any("DFlash" in note for note in notes)


def test_matrices_of_a_head_in_fp8_are_counted_in_8_bits_and_its_norms_are_not(tmp_path):
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    norms = (2 * 5 + 2) * 6656 + 2 * 5 * 128
    size, _, kind = sized(write(tmp_path / "dflash", DFLASH | quantized))
    assert (kind, size.weights_bytes, size.kv_bytes_per_element) == ("dflash", 5_111_970_304 // 2 + norms, 2)
    eagle, in_fp8 = (sized(write(tmp_path / name, config)).model.weights_bytes for name, config in (("a", EAGLE), ("b", EAGLE | quantized)))
    assert in_fp8 - 2 * 32000 * 4096 == pytest.approx((eagle - 2 * 32000 * 4096) / 2, rel=1e-3)


def test_weights_come_from_the_index_else_from_the_files_else_from_the_pairs(tmp_path):
    folder = tmp_path / "model"
    write(folder, LLAMA)
    write_safetensors(folder / "model.safetensors", 1000)
    assert model_size(str(folder)).weights_bytes == 1000
    assert model_size(str(folder / "config.json")).weights_bytes == 1000
    write(folder, {"metadata": {"total_size": 12_345}, "weight_map": {}}, "model.safetensors.index.json")
    assert model_size(str(folder)).weights_bytes == 12_345
    assert model_size(f"{folder},weights_gib=2").weights_bytes == 2 * GIB
    assert model_size(f"{folder},weights_gib=2,kv_bytes_per_element=1").kv_bytes_per_token() == 65_536


def test_half_a_download_is_refused(tmp_path):
    folder = tmp_path / "model"
    write(folder, LLAMA)
    write_safetensors(folder / "model-00001-of-00004.safetensors", 1000)
    assert "all of its" in refused(model_size, str(folder))
    (folder / "model-00001-of-00004.safetensors").rename(folder / "model.safetensors")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((10**9).to_bytes(8, "little"))
    assert "header" in refused(model_size, str(folder))


def test_quantised_weights_are_counted_in_their_bits(tmp_path):
    whole = model_size(write(tmp_path / "whole", LLAMA)).weights_bytes
    embeddings = 2 * 2 * 128256 * 4096
    fp8 = model_size(write(tmp_path / "fp8", LLAMA | {"quantization_config": {"quant_method": "fp8"}})).weights_bytes
    assert fp8 == pytest.approx((whole - embeddings) / 2 + embeddings, rel=1e-3)
    awq = model_size(write(tmp_path / "awq", LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})).weights_bytes
    assert awq == pytest.approx(5.73e9, rel=0.01)  # the size of the published file, 5.74 GB
    assert "weights_gib" in refused(model_size, write(tmp_path / "odd", LLAMA | {"quantization_config": {"quant_method": "surprise"}}))


def test_layers_without_keys_of_every_token_are_counted_out_or_said(tmp_path):
    hybrid = QWEN3 | {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 7}
    size, notes, _ = sized(write(tmp_path / "hybrid", hybrid))
    assert size.num_layers == 7 and any("fixed state" in note for note in notes)
    sliding = QWEN3 | {"layer_types": ["sliding_attention", "full_attention"] * 14}
    size, notes, _ = sized(write(tmp_path / "sliding", sliding))
    assert size.num_layers == 28 and any("sliding window" in note for note in notes)
    assert "ssm_cfg" in refused(model_size, write(tmp_path / "mamba", LLAMA | {"ssm_cfg": {}}))


def test_a_model_type_whose_layers_are_not_known_needs_its_weights_said(tmp_path):
    folder = write(tmp_path / "model", LLAMA | {"model_type": "gpt_bigcode"})
    assert "weights_gib" in refused(model_size, folder)
    assert model_size(f"{folder},weights_gib=3").weights_bytes == 3 * GIB


def test_pairs_say_it_all():
    size = model_size(PAIRS + ",kv_bytes_per_element=1,vocab_size=32000", name="mine")
    assert (size.name, size.kv_bytes_per_token(), size.vocab_size, size.weights_bytes) == ("mine", 65_536, 32_000, int(14.96 * GIB))
    assert model_size(PAIRS.replace("gib=14.96", "gb=16")).weights_bytes == 16 * 10**9
    assert system_spec("memory_gib=80,fraction=0.5,bandwidth_gb_s=2000,tflops=300") == SystemSpec(
        name="80 GiB", memory_bytes=80 * GIB, fraction=0.5, bandwidth_bytes_per_s=2e12, flops_per_s=3e14
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_known_system_is_plausible_and_takes_a_fraction(name):
    system, said = read_system(name)
    assert not said and 16 * GIB < system.memory_bytes < 256 * GIB
    assert 50 < system.flops_per_s / system.bandwidth_bytes_per_s < 450
    assert read_system(f"{name},fraction=0.5") == (system_spec(f"{name},fraction=0.5"), True)
    assert system_spec(f"{name},fraction=0.5").fraction == 0.5


@pytest.mark.parametrize("text", ["h100", "", ",", "fraction=0.9", "memory_gib=80,fraction=0", "memory_gib=80,fraction=1.1", "memory_gib=nan",
    "memory_gib=-1", "memory_gib=inf", "memory_gib=1e300", "memory_gib=80,memory_gb=80", "memory_gib=80,memory_gib=80", "memory_gib=80,colour=red",
    "h100_sxm,memory_gib=80", "memory_gib=80,tflops=0", "memory_gib=80,name=" + "x" * 600, "memory_gib=", "memory_gib", "h100_sxm,fraction=", "\0"])  # fmt: skip
def test_a_system_that_says_nonsense_is_refused(text):
    message = refused(system_spec, text)
    assert text != "h100" or ("h100_sxm" in message and "memory_gib=" in message)


@pytest.mark.parametrize("text", ["", "=", ",", "/nowhere", "num_layers=32", PAIRS + ",num_layers=32", PAIRS.replace("32", "0"), PAIRS.replace("32", "-1"),
    PAIRS.replace("32", "1e9"), PAIRS.replace("32", "9" * 30), PAIRS.replace("14.96", "nan"), PAIRS.replace("14.96", "1e30"), PAIRS + ",weights_gb=1",
    PAIRS + ",kv_bytes_per_element=0", PAIRS + ",kv_bytes_per_element=9", PAIRS + ",surprise=1", "config.json\0", "x" * 5000, PAIRS + ",name=" + "n" * 600,
    PAIRS.replace("8,", "٣,")])  # fmt: skip
def test_a_model_that_says_nonsense_is_refused(text):
    refused(model_size, text)


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE, DEEPSEEK, EAGLE], ids=["llama", "moe", "deepseek", "eagle"])
def test_a_damaged_config_is_read_or_refused_in_one_line(tmp_path, config):
    odd = [None, True, 0, -1, 1, 1.5, 2**70, 1e308, "", "x" * 5000, "\n", [], [1], {}, {"quant_method": 3}, {"bits": -1}, ["full_attention"] * 3]
    draw = random.Random(0)
    keys = [*config, "quantization_config", "layer_types", "text_config", "head_dim", "sliding_window", "dtype", "full_attention_interval"]
    read = 0
    for _ in range(300):
        damaged = config | {draw.choice(keys): draw.choice(odd) for _ in range(draw.randint(1, 2))}
        folder = write(tmp_path / "model", damaged)
        try:
            size = model_size(folder)
        except BadInput as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 1500
        else:
            assert isinstance(size, ModelSize) and size.weights_bytes > 0
            read += 1
    assert 0 < read < 300


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '{"num_hidden_layers": NaN}', '"text"'])
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    refused(model_size, str(tmp_path))


@pytest.mark.model
def test_a_gguf_file_says_its_size(tmp_path):
    """SmolLM2-135M: 30 layers, 3 key heads of 64, and tensors that fill the file but for its header."""
    from planner.runtime.weights import default_model_path

    path = default_model_path()
    size = model_size(str(path))
    assert (size.num_layers, size.num_kv_heads, size.head_dim, size.vocab_size, size.max_context_len) == (30, 3, 64, 49152, 8192)
    assert 0.95 * path.stat().st_size < size.weights_bytes < path.stat().st_size
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    assert "broken.gguf" in refused(model_size, str(tmp_path / "broken.gguf"))


def test_the_device_of_this_machine_is_its_gpu_or_its_cpu(monkeypatch):
    memory, failing = 85_899_345_920, []

    class Memory:
        total = memory

    def open_driver():
        if failing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", open_driver)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: Memory)
    assert local_gpu() == SystemSpec(name="NVIDIA H100 80GB HBM3", memory_bytes=memory, fraction=0.9)
    failing.append(True)
    assert local_gpu() is None and local_cpu().memory_bytes == psutil.virtual_memory().total
