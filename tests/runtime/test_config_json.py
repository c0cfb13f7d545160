"""config.json means what transformers takes it for, and what the runtime cannot compute is refused by name."""

import json

import pytest
from checkpoints import edit, load, make_model, refused

from planner.runtime.weights import read_spec
from planner.specs import DynamicRope, LinearRope, Llama3Rope, YarnRope

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


# ---- rope scaling

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("default", {}, None),
        ("linear", {"factor": 2}, LinearRope(factor=2.0)),
        ("dynamic", {"factor": 2.0}, DynamicRope(factor=2.0, original_max_position=256)),
        ("llama3", LLAMA31, Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)),
        ("yarn", {"factor": 1.0}, YarnRope(factor=1.0, original_max_position=256, attention_factor=1.0)),
        ("yarn", {"factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2, "truncate": False},
            YarnRope(factor=4.0, original_max_position=64, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0, truncate=False)),
    ],
    ids=str,
)  # fmt: skip
def test_rope_scaling_is_read_in_both_spellings(folder, key, kind, values, expected):
    edit(folder / "config.json", rope_parameters="absent", rope_theta=5e5, rope_scaling={key: kind, **values})
    assert (read_spec(folder).rope_theta, read_spec(folder).rope_scaling) == (5e5, expected)
    edit(folder / "config.json", rope_scaling="absent", rope_parameters={key: kind, "rope_theta": 2e4, **values})
    assert (read_spec(folder).rope_theta, read_spec(folder).rope_scaling) == (2e4, expected)


def test_yarn_reaches_as_far_as_it_stretches(folder):
    """Qwen's configs keep the original length in max_position_embeddings."""
    edit(folder / "config.json", rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert read_spec(folder).max_context_len == 1024
    edit(folder / "config.json", max_position_embeddings=2048)
    assert read_spec(folder).max_context_len == 2048


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "llama3", **LLAMA31, "high_freq_factor": 1.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
    ],
    ids=str,
)
def test_scaling_without_a_passage_between_its_ends_is_refused(folder, values):
    edit(folder / "config.json", rope_parameters=values)
    with refused("config.json", "above"):
        read_spec(folder)


# ---- how far a text may go


def test_a_longer_context_needs_a_theta_or_scaling_that_follows_the_length(folder):
    assert read_spec(folder, max_context_len=100).max_context_len == 100
    with refused("256 tokens", "--max-context 257", "--rope-theta"):
        read_spec(folder, max_context_len=257)
    spec = read_spec(folder, max_context_len=1000, rope_theta=4e4)
    assert (spec.max_context_len, spec.rope_theta) == (1000, 4e4)
    edit(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert read_spec(folder, max_context_len=512).max_context_len == 512
    with refused("512 tokens"):
        read_spec(folder, max_context_len=513)
    edit(folder / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert read_spec(folder).max_context_len == 256
    assert read_spec(folder, max_context_len=10_000).max_context_len == 10_000
    with refused("--max-context"):
        read_spec(folder, max_context_len=0)


# ---- architectures


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_the_other_architectures_are_read(tmp_path, architecture):
    make_model(architecture).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert (spec.architecture, spec.head_dim, spec.num_kv_heads) == (architecture, 8, 2)
    assert (spec.qkv_bias, spec.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    edit(tmp_path / "config.json", num_key_value_heads="absent")
    with refused("num_key_value_heads is missing"):
        read_spec(tmp_path)


@pytest.mark.parametrize("window", [255, 256, 4096, None, "absent"])
def test_a_window_is_fine_where_no_text_outgrows_it(folder, window):
    edit(folder / "config.json", model_type="mistral", sliding_window=window)
    if window == 255:
        with refused("sliding windows are not supported", "255", "--max-context 255"):
            read_spec(folder)
        assert read_spec(folder, max_context_len=255).max_context_len == 255
    else:
        assert read_spec(folder).max_context_len == 256
    if window == "absent":  # transformers takes it for 4096
        edit(folder / "config.json", max_position_embeddings=8192)
        with refused("4096"):
            read_spec(folder)


@pytest.mark.parametrize(
    "changes",
    [{"layer_types": 3}, {"max_window_layers": -1}, {"use_sliding_window": 1}, {"use_sliding_window": True, "sliding_window": "x"}],
    ids=str,
)
def test_absurd_windows_are_refused(folder, changes):
    edit(folder / "config.json", model_type="qwen2", max_window_layers=0)
    edit(folder / "config.json", **changes)
    with refused("config.json", list(changes)[-1]):
        read_spec(folder)


@pytest.mark.parametrize(
    ("changes", "slides"),
    [
        ({}, False),
        ({"use_sliding_window": False, "sliding_window": 16}, False),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, False),  # of two layers
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, True),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_uses_its_window_only_where_it_says_so(folder, architecture, changes, slides):
    edit(folder / "config.json", model_type=architecture, **changes)
    if slides:
        with refused("sliding windows are not supported", "16"):
            read_spec(folder)
    else:
        assert read_spec(folder).architecture == architecture


# ---- quantised checkpoints


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "bitsandbytes", None], ids=str)
def test_a_quantised_folder_has_a_shape_but_is_not_run(folder, method):
    before = read_spec(folder)
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    assert read_spec(folder) == before
    with refused("quantization_config.quant_method", str(method), "supported are", "fp8", "GGUF"):
        load(folder)


# ---- published models


def config(architecture: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **others) -> dict:
    return {
        "model_type": architecture, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, **others,
    }  # fmt: skip


LLAMA_3_SCALING = LLAMA31 | {"rope_type": "llama3"}
QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
PUBLISHED = {  # config.json as published, weights as their makers count them, longest context
    "TinyLlama-1.1B": (config("llama", 2048, 5632, 22, 32, 4, 32_000, 2048, rope_scaling=None, pretraining_tp=1), 1_100_048_384, 2048),
    "Llama-2-7b": (config("llama", 4096, 11_008, 32, 32, 32, 32_000, 4096, rope_scaling=None), 6_738_415_616, 4096),
    "Llama-3.1-8B": (config("llama", 4096, 14_336, 32, 32, 8, 128_256, 131_072, rope_theta=5e5, rope_scaling=LLAMA_3_SCALING,
        attention_bias=False, mlp_bias=False), 8_030_261_248, 131_072),
    "Llama-3.2-1B": (config("llama", 2048, 8192, 16, 32, 8, 128_256, 131_072, rope_theta=5e5, head_dim=64, tie_word_embeddings=True,
        rope_scaling=LLAMA_3_SCALING | {"factor": 32.0}), 1_235_814_400, 131_072),
    "Mistral-7B-v0.3": (config("mistral", 4096, 14_336, 32, 32, 8, 32_768, 32_768, rope_theta=1e6, sliding_window=None), 7_248_023_552, 32_768),
    "Qwen2.5-7B": (config("qwen2", 3584, 18_944, 28, 28, 4, 152_064, 131_072, rope_theta=1e6, **QWEN_WINDOW), 7_615_616_512, 131_072),
    "Qwen2.5-7B-Instruct, yarn as its card says": (config("qwen2", 3584, 18_944, 28, 28, 4, 152_064, 32_768, rope_theta=1e6, **QWEN_WINDOW,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32_768, "type": "yarn"}), 7_615_616_512, 131_072),
    "Qwen3-8B": (config("qwen3", 4096, 12_288, 36, 32, 8, 151_936, 40_960, rope_theta=1e6, head_dim=128, attention_bias=False, rope_scaling=None,
        **QWEN_WINDOW | {"sliding_window": None}), 8_190_735_360, 40_960),
}  # fmt: skip


@pytest.mark.parametrize(("values", "num_parameters", "max_context_len"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_as_many_weights_as_their_makers_say(tmp_path, values, num_parameters, max_context_len):
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = read_spec(tmp_path)
    assert (spec.architecture, spec.num_parameters, spec.max_context_len) == (values["model_type"], num_parameters, max_context_len)


def test_mistral_7b_v01_runs_within_its_window(tmp_path):
    values = config("mistral", 4096, 14_336, 32, 32, 8, 32_000, 32_768, sliding_window=4096)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with refused("sliding windows", "--max-context 4096"):
        read_spec(tmp_path)
    assert read_spec(tmp_path, max_context_len=4096).num_parameters == 7_241_732_096
