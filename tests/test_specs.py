"""Specs check themselves where they are made and where they are read, and come back from JSON as they were.

Rules between fields hold in Python and in JSON alike; the ranges of single fields (Meta) are msgspec's and hold on reading.
"""

from typing import get_args

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.specs import (
    BYTES_PER_ELEMENT,
    CHUNK_SIZE,
    CHUNKED,
    NO_DRAFTER,
    OBSERVATION,
    PLAIN,
    AdaptiveTree,
    Calibration,
    DeviceSpec,
    DraftConfig,
    DrafterSpec,
    DynamicRope,
    FactorsRope,
    FixedTree,
    FullKV,
    KVPolicy,
    LinearRope,
    Llama3Rope,
    ModelSpec,
    Sampler,
    Selection,
    SparseKV,
    TreeCosts,
    Workload,
    YarnRope,
    describe,
    describe_kv,
    describe_sampler,
)

seeded = settings(derandomize=True, deadline=None)

SELF_SPARSE = DrafterSpec(kind="self_sparse")
NGRAM = DrafterSpec(kind="ngram")

SMOLLM2 = ModelSpec(  # DESIGN.md, section 9; its config.json
    name="SmolLM2-135M-Instruct",
    architecture="llama",
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49_152,
    max_context_len=8192,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
)

CONFIGS = [
    PLAIN,
    DraftConfig(drafter=NGRAM, draft_len=4),
    DraftConfig(drafter=NGRAM, draft_len=4, kv=FullKV()),
    DraftConfig(drafter=SELF_SPARSE, draft_len=1024, kv=SparseKV(budget=64)),
    DraftConfig(drafter=SELF_SPARSE, draft_len=3, kv=SparseKV(budget=513, sink=0, recent=9, selection="chunk")),
    DraftConfig(drafter=SELF_SPARSE, draft_len=3, kv=SparseKV(budget=513, selection="retrieval", refresh=64)),
    DraftConfig(drafter=DrafterSpec(kind="draft_model", path="/models/small/", weights="int4"), draft_len=2),
    DraftConfig(
        drafter=DrafterSpec(kind="draft_model", path="/models/small"), draft_len=2, kv=SparseKV(budget=64, selection="snapkv", storage="evict")
    ),
    DraftConfig(drafter=DrafterSpec(kind="eagle3", path="head"), draft_len=5),
    DraftConfig(drafter=DrafterSpec(kind="dflash", path="block head", weights="int8"), draft_len=7, kv=SparseKV(budget=64, storage="evict")),
]


@st.composite
def sparse_policies(draw) -> SparseKV:
    selection = draw(st.sampled_from(get_args(Selection)))
    sink = draw(st.integers(0, CHUNK_SIZE if selection in CHUNKED else 40))
    recent = draw(st.integers(CHUNK_SIZE if selection in CHUNKED else OBSERVATION if selection == "snapkv" else 1, 80))
    least = max(sink + recent, recent + CHUNK_SIZE if selection in CHUNKED else 1)
    refresh = None if selection == "window" else draw(st.none() | st.integers(1, 100))
    storage = draw(st.sampled_from(["retain", "evict"])) if refresh is None else "retain"
    return SparseKV(budget=least + draw(st.integers(0, 300)), sink=sink, recent=recent, selection=selection, refresh=refresh, storage=storage)


def read(value: object, into: type):
    """`value`, plain dicts and all, as it comes back from JSON."""
    return msgspec.json.decode(msgspec.json.encode(value), type=into)


# ------------------------------------------------------------------ models and devices


def test_smollm2_keeps_23040_bytes_per_token_in_16_bit():
    assert SMOLLM2.kv_bytes_per_token("bfloat16") == SMOLLM2.kv_bytes_per_token("float16") == 23_040
    assert SMOLLM2.kv_bytes_per_token("float32") == 46_080


def test_smollm2_has_134_515_008_parameters():
    assert SMOLLM2.num_parameters == 134_515_008  # as its safetensors file counts them


def test_untied_embeddings_are_counted_twice():
    untied = msgspec.structs.replace(SMOLLM2, tie_embeddings=False)
    assert untied.num_parameters - SMOLLM2.num_parameters == SMOLLM2.vocab_size * SMOLLM2.hidden_size


@seeded
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 128), st.sampled_from(sorted(BYTES_PER_ELEMENT)))
def test_kv_bytes_grow_in_proportion_to_each_dimension(num_layers, num_kv_heads, half_dim, dtype):
    shape = {"num_layers": num_layers, "num_heads": num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": 2 * half_dim}

    def kv_bytes(**changes) -> int:
        return msgspec.structs.replace(SMOLLM2, **(shape | changes)).kv_bytes_per_token(dtype)

    assert kv_bytes(num_layers=3 * num_layers) == 3 * kv_bytes()
    assert kv_bytes(num_heads=2 * num_kv_heads, num_kv_heads=2 * num_kv_heads) == 2 * kv_bytes()
    assert kv_bytes(head_dim=4 * half_dim) == 2 * kv_bytes()
    assert kv_bytes(num_heads=5 * num_kv_heads) == kv_bytes()  # query heads keep nothing


def test_biases_and_norms_of_heads_are_counted():
    """Published: Qwen2-0.5B and Qwen3-0.6B; tests/runtime/test_weights.py counts real tensors."""
    qwen2 = replace(
        SMOLLM2, architecture="qwen2", num_layers=24, num_heads=14, num_kv_heads=2, hidden_size=896, intermediate_size=4864, vocab_size=151_936
    )
    qwen3 = replace(
        SMOLLM2, architecture="qwen3", num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, hidden_size=1024, intermediate_size=3072,
        vocab_size=151_936,
    )  # fmt: skip
    assert qwen2.num_parameters == 494_032_768
    assert qwen3.num_parameters == 596_049_920


ROPES = [
    LinearRope(factor=2.0),
    Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
    YarnRope(factor=4.0, original_max_position=32_768, attention_factor=1.1),
    DynamicRope(factor=2.0, original_max_position=4096),
    FactorsRope(factors=(1.0,) * 32),
]


@pytest.mark.parametrize("scaling", ROPES, ids=lambda scaling: type(scaling).__name__)
def test_rope_scaling_comes_back_from_json_and_is_told_apart(scaling):
    spec = replace(SMOLLM2, rope_scaling=scaling)
    assert read(msgspec.to_builtins(spec), ModelSpec) == spec != SMOLLM2
    assert hash(spec) != hash(SMOLLM2)


def test_a_spec_written_before_there_was_scaling_has_none():
    fields = msgspec.to_builtins(SMOLLM2)
    del fields["rope_scaling"]
    assert read(fields, ModelSpec) == SMOLLM2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": FactorsRope(factors=(1.0,) * 31)}, "head_dim / 2 .32. factors, got 31"),
        ({"rope_scaling": DynamicRope(factor=2.0, original_max_position=4096), "head_dim": 2}, "head_dim above 2"),
        ({"rope_scaling": YarnRope(factor=2.0, original_max_position=4096, attention_factor=1.0), "rope_theta": 1.0}, "rope_theta above 1"),
    ],
    ids=str,
)
def test_scaling_that_the_shape_cannot_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMOLLM2, **changes)


def test_heads_that_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 9 and 4"):
        msgspec.structs.replace(SMOLLM2, num_kv_heads=4)
    with pytest.raises(ValueError, match="head_dim must be even .* got 63"):
        msgspec.structs.replace(SMOLLM2, head_dim=63)


# ------------------------------------------------------------------ KV policies


@seeded
@given(st.integers(0, 2**20))
def test_full_kv_keeps_and_reads_everything(context_len):
    assert FullKV().resident(context_len) == FullKV().read(context_len) == context_len


@seeded
@given(sparse_policies(), st.integers(0, 1000))
def test_a_sparse_cache_holds_at_most_the_context_and_the_budget(kv, context_len):
    assert kv.resident(context_len) == min(kv.budget, context_len)
    assert 0 <= kv.read(context_len) <= kv.resident(context_len)


@seeded
@given(sparse_policies(), st.integers(0, 1000), st.integers(0, 1000))
def test_a_longer_context_never_keeps_less(kv, context_len, more):
    assert kv.resident(context_len) <= kv.resident(context_len + more)
    assert kv.num_fixed(context_len) <= kv.resident(context_len)


@seeded
@given(sparse_policies(), st.integers(1, 1000))
def test_beyond_the_budget_the_fixed_and_the_sliding_part_fill_it(kv, beyond):
    context_len = kv.budget + beyond
    # window: all but the sinks slides; else the recent window, and what does not make a whole chunk
    spare = (kv.budget - kv.recent) % CHUNK_SIZE if kv.selection in CHUNKED else 0
    sliding = kv.budget - kv.sink if kv.selection == "window" else kv.recent + spare
    assert kv.num_fixed(context_len) + sliding == kv.budget == kv.resident(context_len)
    assert sliding >= kv.recent


@seeded
@given(sparse_policies(), st.integers(1, 1000))
def test_there_are_enough_whole_chunks_before_the_sliding_window_to_choose_from(kv, beyond):
    assume(kv.selection in CHUNKED)
    context_len = kv.budget + beyond
    num_chunks, rest = divmod(kv.num_fixed(context_len), CHUNK_SIZE)
    assert rest == 0 and 1 <= num_chunks <= (context_len - kv.budget + kv.num_fixed(context_len)) // CHUNK_SIZE


@seeded
@given(sparse_policies(), st.data())
def test_a_prompt_within_the_budget_fixes_only_its_sinks(kv, data):
    context_len = data.draw(st.integers(0, kv.budget))
    assert kv.num_fixed(context_len) == min(kv.sink, context_len)


@seeded
@given(sparse_policies(), st.integers(1, 500), st.integers(1, 300))
def test_choices_cut_a_text_where_the_set_changes(kv, context_len, more):
    ranges = list(kv.choices(context_len, context_len + more))
    assert [length for lengths in ranges for length in lengths] == list(range(context_len, context_len + more))
    assert all(kv.chosen_at(context_len, length) == lengths[0] for lengths in ranges for length in lengths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 8}, r"kv budget must hold sink \+ recent \(36 tokens\), got 8; raise --kv-budget"),
        ({"budget": 35}, r"\(36 tokens\), got 35"),
        ({"budget": 99, "sink": 20, "recent": 80}, r"\(100 tokens\), got 99"),
        ({"budget": 64, "sink": 0, "recent": 7, "selection": "chunk"}, "chunk selection needs recent >= 8, .* got 7"),
        ({"budget": 64, "sink": 0, "recent": 7, "selection": "retrieval"}, "retrieval selection needs recent >= 8, .* got 7"),
        ({"budget": 64, "recent": 31, "selection": "snapkv"}, r"observation window \(32 tokens\) as recent ones, got recent 31; raise it"),
        ({"budget": 64, "refresh": 16}, "window selection chooses nothing that could be refreshed"),
        ({"budget": 64, "selection": "chunk", "refresh": 16, "storage": "evict"}, "storage evict has dropped them; take storage retain"),
        ({"budget": 39, "sink": 4, "selection": "chunk"}, r"recent \+ one chunk \(40 tokens\), got 39; raise --kv-budget"),
    ],
)
def test_a_budget_too_small_is_refused_with_the_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseKV(**fields)
    with pytest.raises(msgspec.ValidationError, match=message):
        read({"kind": "sparse", **fields}, KVPolicy)


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 36},
        {"budget": 1, "sink": 0, "recent": 1},
        {"budget": 40, "selection": "chunk"},
        {"budget": 16, "sink": 0, "recent": 8, "selection": "chunk"},
    ],
)
def test_the_smallest_budgets_are_accepted(fields):
    assert read(SparseKV(**fields), KVPolicy) == SparseKV(**fields)


# ------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drafter": NO_DRAFTER, "draft_len": 4}, "draft_len must be 0 without a drafter and at least 1 with one, got 4 with none; set --draft-len"),
        ({"drafter": NGRAM, "draft_len": 0}, "got 0 with ngram"),
        ({"drafter": NGRAM}, "got 0 with ngram"),
        ({"drafter": SELF_SPARSE, "kv": SparseKV(budget=64)}, "got 0 with self_sparse"),
        ({"drafter": SELF_SPARSE, "draft_len": 4}, "a kv budget goes with drafter self_sparse, .* got drafter self_sparse with full kv"),
        ({"drafter": NGRAM, "draft_len": 4, "kv": SparseKV(budget=64)}, "got drafter ngram with window 64"),
        ({"drafter": NO_DRAFTER, "kv": SparseKV(budget=64, selection="chunk")}, "got drafter none with chunk 64"),
        ({"drafter": SELF_SPARSE, "draft_len": 4, "kv": SparseKV(budget=64, storage="evict")}, "got self_sparse, which reads the target's"),
        ({"drafter": DrafterSpec(kind="eagle3", path="head"), "draft_len": 4, "kv": SparseKV(budget=64)}, "got drafter eagle3 with window 64"),
        ({"drafter": NGRAM, "draft_len": 4, "tree": FixedTree(size=8)}, "a tree is made of a drafter's probabilities, ngram has none; take another"),
        ({"drafter": NO_DRAFTER, "tree": FixedTree(size=8)}, "a tree is made of a drafter's probabilities, none has none"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DraftConfig(**fields)
    with pytest.raises(msgspec.ValidationError, match=message):
        read(fields, DraftConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_a_configuration_comes_back_from_json_as_it_was(config):
    again = read(config, DraftConfig)
    assert again == config
    assert type(again.kv) is type(config.kv)
    assert hash(again) == hash(config)


@seeded
@given(sparse_policies(), st.integers(1, 1024))
def test_any_sparse_configuration_comes_back_from_json(kv, draft_len):
    config = DraftConfig(drafter=DrafterSpec(kind="draft_model", path="small"), kv=kv, draft_len=draft_len)
    assert read(config, DraftConfig) == config


def test_the_policy_is_named_in_json():
    assert msgspec.to_builtins(CONFIGS[1])["kv"] == {"kind": "full"}
    assert msgspec.to_builtins(CONFIGS[3])["kv"]["kind"] == "sparse"


EAGLE = DrafterSpec(kind="eagle3", path="some/head")
COSTS = TreeCosts(draft_s=0.002, verify_s=(0.01, 0.011, 0.0115), rate=120.0, calibration=Calibration(reported=(0.0, 1.0), observed=(0.0, 0.8)))
TREES = [
    DraftConfig(drafter=EAGLE, draft_len=5, tree=FixedTree(size=16)),
    DraftConfig(drafter=EAGLE, draft_len=5, tree=AdaptiveTree(costs=COSTS)),
    DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=64), draft_len=5, tree=AdaptiveTree(costs=replace(COSTS, rate=None, calibration=None))),
]


def test_a_tree_says_how_large_it_gets():
    assert [config.tree.max_size for config in TREES] == [16, 2, 2]
    assert [describe(config) for config in TREES] == [
        "eagle3 head K=5 tree 16",
        "eagle3 head K=5 adaptive tree up to 2",
        "self_sparse window 64 K=5 adaptive tree up to 2 by round",
    ]


@pytest.mark.parametrize("config", TREES, ids=describe)
def test_a_tree_comes_back_from_json_as_it_was(config):
    assert read(config, DraftConfig) == config
    assert hash(read(config, DraftConfig)) == hash(config)


def test_a_chain_that_was_written_before_there_were_trees_is_read():
    assert read({"drafter": {"kind": "ngram"}, "kv": {"kind": "full"}, "draft_len": 4, "tree": None}, DraftConfig).tree is None
    assert read({"drafter": {"kind": "ngram"}, "draft_len": 4}, DraftConfig).tree is None


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (TreeCosts, {"draft_s": 0.0, "verify_s": (0.01,)}, "a time for 0 to max_size nodes, max_size from 1 to 1024, got 1 times"),
        (TreeCosts, {"draft_s": 0.0, "verify_s": (0.01,) * 1026}, "got 1026 times"),
        (Calibration, {"reported": (), "observed": ()}, "at least one, got 0 and 0"),
        (Calibration, {"reported": (0.0, 1.0), "observed": (0.0,)}, "got 1 and 2"),
        (Calibration, {"reported": (0.5, 0.5), "observed": (0.0, 1.0)}, "rising in what was reported"),
        (Calibration, {"reported": (0.1, 0.5), "observed": (0.4, 0.3)}, "never fall in what was observed"),
    ],
)
def test_costs_that_no_tree_can_be_sized_with_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
    with pytest.raises(msgspec.ValidationError, match=message):
        read(fields, kind)


def test_plain_decoding_is_the_default_of_every_knob():
    assert DraftConfig(drafter=NO_DRAFTER) == PLAIN
    assert (PLAIN.kv, PLAIN.draft_len, PLAIN.tree) == (FullKV(), 0, None)


def test_configurations_are_told_apart():
    assert len({*CONFIGS}) == len(CONFIGS) - 1  # the second and the third are one
    assert len({describe(config) for config in {*CONFIGS}}) == len(CONFIGS) - 1


def test_a_spec_cannot_be_changed():
    with pytest.raises((AttributeError, TypeError)):
        PLAIN.draft_len = 3


# ------------------------------------------------------------------ what is read is checked

DEVICE = DeviceSpec(kind="cpu", name="a laptop", memory_bytes=16 * 2**30, num_cores=2)
WORKLOAD = Workload(context_len=4096, output_len=256, sampler=Sampler(temperature=0.8, top_p=0.95, top_k=50))


@pytest.mark.parametrize(
    "spec", [SMOLLM2, DEVICE, FullKV(), SparseKV(budget=64), NGRAM, PLAIN, Sampler(), WORKLOAD], ids=lambda spec: type(spec).__name__
)
def test_every_spec_comes_back_from_json_and_refuses_unknown_fields(spec):
    assert read(spec, type(spec)) == spec
    with pytest.raises(msgspec.ValidationError, match="unknown field `kv_budgets`"):
        read(msgspec.to_builtins(spec) | {"kv_budgets": 64}, type(spec))


def test_an_unknown_field_inside_a_configuration_is_refused():
    fields = msgspec.to_builtins(CONFIGS[3])
    fields["kv"]["budgets"] = [64]
    with pytest.raises(msgspec.ValidationError, match=r"unknown field `budgets`"):
        read(fields, DraftConfig)


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        (SMOLLM2, "num_layers", 0),
        (SMOLLM2, "num_layers", 30.5),
        (SMOLLM2, "num_kv_heads", 0),
        (SMOLLM2, "rope_theta", 0),
        (SMOLLM2, "architecture", "gpt2"),
        (SMOLLM2, "tie_embeddings", 1),
        (DEVICE, "kind", "tpu"),
        (DEVICE, "memory_bytes", -1),
        (DEVICE, "memory_bytes", "16GiB"),
        (SparseKV(budget=64), "budget", 0),
        (SparseKV(budget=64), "budget", None),
        (SparseKV(budget=64), "budget", True),
        (SparseKV(budget=64), "sink", -1),
        (SparseKV(budget=64), "recent", 0),
        (SparseKV(budget=64), "selection", "h2o"),
        (SparseKV(budget=64), "refresh", 0),
        (SparseKV(budget=64), "storage", "drop"),
        (NGRAM, "kind", "medusa"),
        (CONFIGS[1], "draft_len", 1025),
        (CONFIGS[1], "draft_len", -1),
        (CONFIGS[1], "kv", None),
        (CONFIGS[1], "kv", {"kind": "none"}),
        (CONFIGS[1], "tree", {}),
        (Sampler(), "temperature", -0.1),
        (Sampler(), "top_p", 0),
        (Sampler(), "top_p", 1.01),
        (Sampler(), "top_k", -1),
        (WORKLOAD, "context_len", 0),
        (WORKLOAD, "output_len", 1),
    ],
)
def test_a_value_out_of_range_is_refused_on_reading(spec, field, value):
    with pytest.raises(msgspec.ValidationError, match=rf"\$\.{field}"):
        read(msgspec.to_builtins(spec) | {field: value}, type(spec))


@pytest.mark.parametrize("spec", [SMOLLM2, DEVICE, SparseKV(budget=64), NGRAM, PLAIN, WORKLOAD], ids=lambda spec: type(spec).__name__)
def test_a_missing_field_is_refused(spec):
    fields = msgspec.to_builtins(spec)
    required = next(field.name for field in msgspec.structs.fields(spec) if field.required)
    del fields[required]
    with pytest.raises(msgspec.ValidationError, match=f"missing required field `{required}`"):
        read(fields, type(spec))


# ------------------------------------------------------------------ in a few words


def test_configurations_and_policies_in_a_few_words():
    assert [describe(config) for config in CONFIGS] == [
        "off", "ngram K=4", "ngram K=4", "self_sparse window 64 K=1024", "self_sparse chunk 513 K=3", "self_sparse retrieval 513 refresh 64 K=3",
        "draft_model small int4 K=2", "draft_model small snapkv 64 evict K=2", "eagle3 head K=5",
        "dflash block head int8 window 64 evict K=7",
    ]  # fmt: skip
    assert describe_kv(FullKV()) == "full kv"


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (Sampler(), "greedy"),
        (Sampler(temperature=1.0), "temperature 1"),
        (Sampler(temperature=0.8, top_p=0.95), "temperature 0.8 top_p 0.95"),
        (Sampler(temperature=0.8, top_p=0.95, top_k=50), "temperature 0.8 top_p 0.95 top_k 50"),
    ],
)
def test_samplers_in_a_few_words(sampler, words):
    assert describe_sampler(sampler) == words
    assert sampler.greedy == (words == "greedy")


# ------------------------------------------------------------------ quantised and reduced drafters


@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
@pytest.mark.parametrize("vocab", [None, 1, 4096])
@pytest.mark.parametrize(("kind", "path"), [("self_sparse", None), ("draft_model", "small"), ("dflash", "head")])
def test_a_model_that_drafts_may_be_quantised_and_know_fewer_tokens(weights, vocab, kind, path):
    drafter = DrafterSpec(kind=kind, path=path, weights=weights, vocab=vocab)
    assert read(drafter, DrafterSpec) == drafter


@pytest.mark.parametrize("kind", ["none", "ngram"])
@pytest.mark.parametrize("change", [{"weights": "int8"}, {"weights": "int4"}, {"vocab": 100}, {"weights": "int8", "vocab": 100}], ids=str)
def test_drafters_without_weights_have_none_to_quantise(kind, change):
    with pytest.raises(ValueError, match=f"and with no other, got drafter {kind}"):
        DrafterSpec(kind=kind, **change)
    with pytest.raises(msgspec.ValidationError, match=f"got drafter {kind}"):
        read({"kind": kind, **change}, DrafterSpec)


@pytest.mark.parametrize("change", [{"weights": "int2"}, {"weights": None}, {"vocab": 0}, {"vocab": -5}, {"vocab": 1.5}, {"bits": 4}], ids=str)
def test_drafters_out_of_range_are_refused_on_reading(change):
    with pytest.raises(msgspec.ValidationError):
        read({"kind": "self_sparse", **change}, DrafterSpec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "draft_model"},
            "a path goes with drafters draft_model, eagle3 and dflash and with no other, got drafter draft_model with path None",
        ),
        ({"kind": "eagle3"}, "got drafter eagle3 with path None"),
        ({"kind": "ngram", "path": "small"}, "got drafter ngram with path small"),
        ({"kind": "eagle3", "path": "head", "weights": "int8"}, "weights go with drafters self_sparse, draft_model and dflash"),
        ({"kind": "eagle3", "path": "head", "vocab": 100}, "a vocab goes with drafters self_sparse, draft_model and dflash"),
    ],
)
def test_drafters_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DrafterSpec(**fields)
    with pytest.raises(msgspec.ValidationError, match=message):
        read(fields, DrafterSpec)


def test_drafters_written_before_there_were_bits_mean_full_weights_and_all_tokens():
    assert read({"kind": "self_sparse"}, DrafterSpec) == DrafterSpec(kind="self_sparse", weights="full", vocab=None)


def test_descriptions_tell_drafters_apart():
    drafters = [DrafterSpec(kind="self_sparse", weights=weights, vocab=vocab) for weights in ("full", "int8", "int4") for vocab in (None, 64, 128)]
    described = [describe(DraftConfig(drafter=drafter, kv=SparseKV(budget=64), draft_len=2)) for drafter in drafters]
    assert len(set(described)) == len(drafters)
    assert described[0] == "self_sparse window 64 K=2"
    assert described[-1] == "self_sparse int4 vocab 128 window 64 K=2"
