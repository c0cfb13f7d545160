"""The mirrors of engines' rules catch what the engines would refuse late, ignore, or take for something else."""

import json

import pytest
import yaml
from engine_files import SGLANG, SGLANG_WRONG, SLOTS, VLLM, VLLM_WRONG, changed

from planner.engine_rules import find_drafting
from planner.errors import BadInput
from planner.exporters import llamacpp, sglang, transformers, trtllm, vllm


@pytest.mark.parametrize("wrong", VLLM_WRONG, ids=lambda wrong: f"{wrong.path}={wrong.value}")
def test_vllm(wrong):
    rules, _ = find_drafting("vllm@0.33")
    vllm.check(yaml.safe_dump(VLLM), rules)
    with pytest.raises(BadInput):
        vllm.check(changed(VLLM, wrong.path, wrong.value), rules)


def test_the_branch_with_a_window_is_another_engine():
    vllm.check(changed(VLLM, "speculative-config/draft_attention_window", 128), find_drafting("vllm-draft-window")[0])


@pytest.mark.parametrize("wrong", SGLANG_WRONG, ids=lambda wrong: f"{wrong.path}={wrong.value}")
def test_sglang(wrong):
    rules, _ = find_drafting("sglang")
    sglang.check(yaml.safe_dump(SGLANG), SLOTS, rules)
    with pytest.raises(BadInput):
        sglang.check(changed(SGLANG, wrong.path, wrong.value), SLOTS, rules)


@pytest.mark.parametrize(("path", "value"), [("speculative-algorithm", "NEXTN"), ("kv-cache-dtype", "bfloat16"), ("dtype", "half")])
def test_sglang_takes_what_its_own_parser_takes(path, value):
    sglang.check(changed(SGLANG, path, value), SLOTS, find_drafting("sglang")[0])


@pytest.mark.parametrize("slots", ['{"1": {"candidate_steps": [4]}}', '{"2": {"candidate_steps": [5]}}', '{"x": {"candidate_steps": [5]}}', "{}",
                                   '{"1": {"candidate_steps": [5]}, "9": {"candidate_steps": [-1]}}'])  # fmt: skip
def test_sglangs_slots(slots):
    with pytest.raises(BadInput):
        sglang.check(yaml.safe_dump(SGLANG), slots, find_drafting("sglang")[0])


def test_a_window_of_dflash_holds_a_block():
    config = {
        "model-path": "m", "speculative-algorithm": "DFLASH", "speculative-draft-model-path": "d", "speculative-num-draft-tokens": 16,
        "speculative-draft-window-size": 16,
    }  # fmt: skip
    rules, _ = find_drafting("sglang")
    sglang.check(yaml.safe_dump(config), None, rules)
    with pytest.raises(BadInput, match="block"):
        sglang.check(changed(config, "speculative-draft-window-size", 15), None, rules)


TRTLLM = {"max_batch_size": 64, "max_seq_len": 100, "speculative_config": {"decoding_type": "Eagle3", "speculative_model": "d", "max_draft_len": 5}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("speculative_config/draft_len_schedule", {4: 4, 8: 2}),  # the first is not max_draft_len
        ("speculative_config/draft_len_schedule", {4: 5, 8: 6}),
        ("speculative_config/draft_len_schedule", {0: 5}),
        ("speculative_config/draft_len_schedule", {}),
        ("speculative_config/max_draft_len", 0),
        ("speculative_config/speculative_model", None),
        ("speculative_config/decoding_type", "EAGLE3"),
        ("speculative_config/draft_kv_budget", 3),
        ("kv_cache_config", {"free_gpu_memory_fraction": 1.5}),
        ("max_batch_size", "64"),
    ],
)
def test_tensorrt_llm(path, value):
    rules, _ = find_drafting("tensorrt-llm@1.4")
    trtllm.check(yaml.safe_dump(TRTLLM), rules)
    text = changed(TRTLLM, path, value)
    with pytest.raises(BadInput):
        trtllm.check(text, rules)


def test_by_first_batches_a_schedule_begins_at_one():
    config = {"speculative_config": {"decoding_type": "NGram", "max_draft_len": 5, "draft_len_schedule": {8: 5, 64: 0}}}
    trtllm.check(yaml.safe_dump(config), find_drafting("tensorrt-llm@1.4")[0])
    with pytest.raises(BadInput, match="begins at 1"):
        trtllm.check(yaml.safe_dump(config), find_drafting("tensorrt-llm@1.2")[0])


PRESET = "[planned]\nmodel = m.gguf\nspec-type = draft-simple\nspec-draft-model = d.gguf\nspec-draft-n-max = 5\n"


@pytest.mark.parametrize(
    "text",
    [
        PRESET.replace("spec-draft-n-max", "draft-max"),  # removed
        PRESET.replace("draft-simple", "draft-tree"),
        PRESET.replace("spec-draft-model = d.gguf\n", ""),
        PRESET + "cache-type-k = fp8\n",
        PRESET.replace("= 5", "= five"),
        PRESET + "ctx-size-draft = 64\n",
    ],
)
def test_llama_cpp(text):
    llamacpp.check(PRESET)
    with pytest.raises(BadInput):
        llamacpp.check(text)


ASSISTANT = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}


@pytest.mark.parametrize(
    "changes", [{"num_assistant_tokens": -1}, {"num_assistant_tokens_schedule": "bogus"}, {"assistant_confidence_threshold": 0.4}, {"unknown": 1}]
)
def test_transformers(changes):
    transformers.check(json.dumps(ASSISTANT))
    with pytest.raises(BadInput):
        transformers.check(json.dumps(ASSISTANT | changes))
