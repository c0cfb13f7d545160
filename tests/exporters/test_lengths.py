"""The off-by-ones of every engine, as a table; and a cap on memory as each engine's own number, worked out by hand."""

import pytest

from planner.engine_rules import DRAFTING, METHODS, find_engine
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Memory
from planner.exporters.lengths import LENGTHS, Tree, spell_length
from planner.exporters.memory import spell_memory
from planner.exports import Step
from planner.serving import ModelSize
from planner.units import GIB

K = 15  # of a DFlash block of 16, and of a DSpark block of 15
TABLE = {  # engine -> chain, DFlash, DSpark
    "vllm": ({"num_speculative_tokens": 15}, {"num_speculative_tokens": 15}, {"num_speculative_tokens": 15}),
    "sglang": (
        {"speculative-num-steps": 15, "speculative-eagle-topk": 1, "speculative-num-draft-tokens": 16},
        {"speculative-num-draft-tokens": 16},
        {"speculative-dspark-block-size": 15},
    ),
    "tensorrt-llm": ({"max_draft_len": 15}, {"max_draft_len": 15}, {"max_draft_len": 15}),
    "llama.cpp": ({"spec-draft-n-max": 15}, {"spec-draft-n-max": 15}, {"spec-draft-n-max": 15}),
    "transformers": ({"num_assistant_tokens": 15}, None, None),
    "planner": ({"--draft-len": 15}, None, None),
}


@pytest.mark.parametrize("engine", TABLE)
def test_chains_and_blocks_are_counted_as_the_engine_counts_them(engine):
    for method, words in zip(("draft_model", "dflash", "dspark"), TABLE[engine], strict=True):
        if words is not None:
            assert spell_length(engine, method, K) == words


def test_every_engine_is_in_the_table():
    assert set(TABLE) == set(LENGTHS) == {rules.name for rules in DRAFTING} - {"vllm-ascend", "vllm-draft-window"}
    assert {method for rules in DRAFTING for method in rules.methods} <= {*METHODS, "self_sparse"}


def test_a_tree_counts_its_root_in_sglang_and_not_in_tensorrt_llm():
    tree = Tree(depth=4, width=3, num_nodes=12)
    assert spell_length("sglang", "eagle", tree) == {"speculative-num-steps": 4, "speculative-eagle-topk": 3, "speculative-num-draft-tokens": 13}
    assert spell_length("tensorrt-llm", "eagle", tree) == {
        "max_draft_len": 4, "use_dynamic_tree": True, "dynamic_tree_max_topK": 3, "max_total_draft_tokens": 12,
    }  # fmt: skip


@pytest.mark.parametrize(("engine", "most"), [("sglang", 3 + 3 * 9), ("tensorrt-llm", 12)])
def test_a_tree_larger_than_its_pool_or_smaller_than_its_depth_is_refused(engine, most):
    spell_length(engine, "eagle", Tree(4, 3, most))
    for nodes in (3, most + 1):
        with pytest.raises(BadInput, match="nodes"):
            spell_length(engine, "eagle", Tree(4, 3, nodes))


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "transformers", "planner"])
def test_engines_without_trees_refuse_one(engine):
    with pytest.raises(BadInput, match="no trees"):
        spell_length(engine, "eagle", Tree(2, 2, 4))


def deployed(**changes) -> Deployed:
    fields = {
        "model": "m", "method": "eagle3", "draft_model": "d", "steps": (Step(batch_from=1, batch_to=64, draft_len=3),), "kv": None,
        "context_len": 1000, "output_len": 100, "memory": Memory(80 * GIB, 60 * GIB),
    }  # fmt: skip
    return Deployed(**(fields | changes))


def test_vllm_takes_the_cap_as_a_share_of_the_device():
    assert spell_memory(deployed(), find_engine("vllm@0.33")) == 0.75  # 60 of 80 GiB
    total = int(79.11 * GIB)
    assert spell_memory(deployed(memory=Memory(total, int(0.9 * total))), find_engine("vllm@0.33")) == 0.9  # though 0.9 of it is no whole byte


def test_sglang_keeps_its_reserve_beside_the_share_that_it_is_told():
    # On 60 GiB it reserves 512 + 1.5 x 8192 + 2 x 256 + 128 MiB = 13440 MiB, and 2 GiB for a drafter: 15488 of 61440 MiB, a share of 0.748 for
    # the rest, 45957 MiB, of which half a GiB of context was not free at the start: (45957 - 512) / (81920 - 512) = 0.558.
    assert spell_memory(deployed(), find_engine("sglang@0.5.23")) == pytest.approx(0.558, abs=0.0011)
    alone = spell_memory(deployed(method="none"), find_engine("sglang@0.5.23"))
    assert alone == pytest.approx(0.558 + 2048 / 81408, abs=0.0021)


def test_tensorrt_llm_takes_a_share_of_what_weights_and_activations_leave():
    size = ModelSize(name="m", num_layers=32, num_kv_heads=8, head_dim=128, weights_bytes=16 * GIB, vocab_size=128_000, hidden_size=4096,
                     intermediate_size=14336)  # fmt: skip
    rules = find_engine("tensorrt-llm@1.4")
    share = spell_memory(deployed(memory=Memory(80 * GIB, 60 * GIB, size, None)), rules)
    # weights 16, context 0.5, outside torch 0.2 GiB, features 2 x 8192 x 4096 bytes = 0.06, activations 2 x 8192 x (3 x 14336 + 2 x 4096) bytes
    # = 0.78 GiB: 17.54 GiB are held, and (60 - 17.54) / (80 - 17.54) = 0.679
    assert share == pytest.approx(0.679, abs=0.0015)
    assert spell_memory(deployed(), rules) is None  # sizes unknown


def test_llama_cpp_takes_what_stays_free():
    assert spell_memory(deployed(), find_engine("llama.cpp")) == 20 * 1024


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_a_cap_under_which_nothing_fits_is_refused(engine):
    size = ModelSize(name="m", num_layers=32, num_kv_heads=8, head_dim=128, weights_bytes=16 * GIB)
    with pytest.raises(BadInput, match="--memory-cap"):
        spell_memory(deployed(memory=Memory(80 * GIB, 2 * GIB, size, None)), find_engine(engine))
