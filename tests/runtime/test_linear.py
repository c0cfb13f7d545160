"""Quantised weights: how far they are from what they replace, and what a cheaper copy of a model shares with it."""

import pytest
import torch
from msgspec.structs import replace
from tiny import BLOCK_HEAD, NATIVE, prefilled, tiny_checkpoint, tiny_model, with_block_head

from planner.errors import BadInput
from planner.runtime.drafters import drafting_model, frequent_tokens, make_drafter
from planner.runtime.kernels import Kernels
from planner.runtime.linear import GROUP, Int4Linear, Int8Linear, Linear, ReducedHead, quantized
from planner.runtime.model import build_model
from planner.runtime.own_layers import on_target
from planner.runtime.weights import Checkpoint
from planner.specs import DraftConfig, DrafterSpec, SparseKV

F32, BF16 = torch.float32, torch.bfloat16


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_after(model, prompt):
    return prefilled(model, [prompt], len(prompt))[1]


# ---- what is restored


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_int8_is_off_by_half_a_step_of_its_row_at_most(size):
    weight = size * randn(40, 70) * torch.logspace(-2, 2, 40)[:, None]
    error = (Int8Linear(weight, Kernels()).restored(F32) - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0  # a comparison of something


@pytest.mark.parametrize("offset", [0.0, 3.0, -50.0])
def test_int4_is_off_by_half_a_step_of_its_group_and_the_rounding_of_scale_and_minimum(offset):
    weight = (randn(40, 96) + offset) * torch.logspace(-2, 2, 40)[:, None]
    error = (Int4Linear(weight, Kernels()).restored(F32) - weight).abs().unflatten(1, (-1, GROUP))
    least, most = weight.unflatten(1, (-1, GROUP)).aminmax(dim=-1, keepdim=True)
    rounding = (least.abs() + (most - least)) * 2**-8
    assert (error <= 0.51 * (most - least) / 15 + rounding).all()


def test_more_bits_are_closer():
    weight = randn(64, 128)
    errors = [(kind(weight, Kernels()).restored(F32) - weight).square().mean() for kind in (Int8Linear, Int4Linear)]
    assert 0 < 20 * errors[0] < errors[1]


def test_int4_holds_what_it_can_express_and_nearly_what_q4_1_can():
    """Q4_1 of GGUF has the same groups with a scale and a minimum in float16, which bfloat16 keeps to one part in 512."""
    codes = torch.randint(16, (30, 5, GROUP), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 3], codes[..., 20] = 0, 15  # as the largest and the smallest weight of a group are
    scale, least = 0.01 + randn(30, 5, 1, seed=1).abs(), randn(30, 5, 1, seed=2)
    own = (codes * scale.bfloat16().float() + least.bfloat16().float()).flatten(1)
    torch.testing.assert_close(Int4Linear(own, Kernels()).restored(F32), own, atol=0, rtol=0)
    q4_1 = codes * scale.half().float() + least.half().float()
    error = (Int4Linear(q4_1.flatten(1), Kernels()).restored(F32).view_as(q4_1) - q4_1).abs()
    assert (error <= (least.abs() + 15 * scale) * 2**-8).all()


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_quantising_what_was_restored_changes_nothing_more(kind):
    once = kind(randn(40, 96), Kernels()).restored(F32)
    torch.testing.assert_close(kind(once, Kernels()).restored(F32), once, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("value", [0.0, 0.75, -0.3, 1e-9])
def test_rows_of_one_value_are_restored(kind, value):
    weight = randn(4, 64)
    weight[1], weight[2, :32] = value, value
    restored = kind(weight, Kernels()).restored(F32)
    assert restored.isfinite().all()
    torch.testing.assert_close(restored[1], weight[1], atol=0 if value == 0 else 1e-30, rtol=2**-8)
    if kind is Int4Linear:
        torch.testing.assert_close(restored[2, :32], weight[2, :32], atol=0, rtol=2**-8)


def test_int4_refuses_widths_that_are_no_whole_groups():
    with pytest.raises(BadInput, match="multiples of 32, got 48; take 8 bits"):
        Int4Linear(randn(10, 48), Kernels())
    with pytest.raises(BadInput, match="multiples of 32"):
        tiny_model().cheaper("int4")  # its intermediate_size is 48
    assert tiny_model().cheaper("int8")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_product_is_that_of_the_restored_weights(weights, rows, dtype):
    matrix = quantized(Linear(randn(50, 64).to(dtype), Kernels()), weights)
    x = randn(rows, 64, seed=1).to(dtype)
    expected = x.double() @ matrix.restored(F32).double().T
    y = matrix(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=1e-4 if dtype == F32 else 0.3, rtol=1e-5 if dtype == F32 else 0.02)


@pytest.mark.parametrize("rows", [3, 20])
def test_strided_inputs_are_multiplied_too(rows):
    matrix = Int8Linear(randn(50, 64), Kernels())
    x = randn(rows, 128, seed=1)[:, ::2]
    torch.testing.assert_close(matrix(x), matrix(x.contiguous()))
    torch.testing.assert_close(matrix(x.view(rows, 1, 64)), matrix(x.contiguous())[:, None])


@pytest.mark.parametrize(("weights", "bytes_per_weight", "bytes_per_row"), [("full", 2, 0), ("int8", 1, 4), ("int4", 5 / 8, 0)])
def test_bytes_are_those_of_the_bits(weights, bytes_per_weight, bytes_per_row):
    matrix = quantized(Linear(randn(50, 64).to(BF16), Kernels()), weights)
    assert sum(parameter.nbytes for parameter in matrix.parameters()) == 50 * 64 * bytes_per_weight + 50 * bytes_per_row


# ---- a head that knows some tokens


def test_a_reduced_head_gives_the_logits_it_knows_and_no_chance_to_others():
    head, tokens = Linear(randn(61, 32), Kernels()), torch.tensor([0, 5, 60])
    x = randn(2, 3, 32, seed=1)
    logits = ReducedHead(Linear(head.weights[tokens], Kernels()), tokens, 61)(x)
    torch.testing.assert_close(logits[..., tokens], head(x)[..., tokens])
    others = [token for token in range(61) if token not in (0, 5, 60)]
    assert (logits[..., others] == -torch.inf).all()


def test_frequent_tokens_are_the_special_ones_and_the_smallest():
    model = tiny_model()
    model.special_tokens = (60, 2, 61)  # 61 is beyond the vocabulary: a tokenizer may know more than the model
    assert frequent_tokens(model, 5) == (0, 1, 2, 3, 60)
    assert frequent_tokens(model, 60) == (*range(59), 60)
    for count in (1, 2, 61, 100):
        with pytest.raises(BadInput, match=f"more than the 2 special tokens and fewer than all 61, got {count}"):
            frequent_tokens(model, count)


# ---- cheaper copies of a model


@pytest.fixture
def model():
    return tiny_model(**NATIVE)


def test_a_cheaper_copy_is_made_once_per_kind_and_is_the_model_where_nothing_changes(model):
    assert model.cheaper("full") is model
    copies = [model.cheaper(weights, tokens) for tokens in (None, (1, 2, 3)) for weights in ("full", "int8", "int4")]
    assert len({id(copy) for copy in copies}) == 6
    assert [model.cheaper(weights, tokens) for tokens in (None, (1, 2, 3)) for weights in ("full", "int8", "int4")] == copies


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_cheaper_copy_shares_embedding_and_norms(model, weights):
    copy = model.cheaper(weights)
    assert copy.embedding is model.embedding and copy.norm is model.norm
    for ours, theirs in zip(copy.layers, model.layers, strict=True):
        assert ours.attention_norm is theirs.attention_norm and ours.mlp_norm is theirs.mlp_norm
        assert ours.qkv is not theirs.qkv


def test_a_copy_with_another_head_only_shares_the_layers(model):
    copy = model.cheaper("full", (1, 2, 3))
    shared = {id(parameter) for parameter in model.parameters()}
    own = [parameter for parameter in copy.parameters() if id(parameter) not in shared]
    assert sum(parameter.nbytes for parameter in own) == 3 * model.spec.hidden_size * 4 + 3 * 8  # rows of the head, and which they are


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_cheaper_copy_computes_almost_the_same(model, weights):
    logits, cheaper = (logits_after(each, [7]) for each in (model, model.cheaper(weights)))
    error = (cheaper - logits).norm() / logits.norm()
    assert 1e-4 < error < {"int8": 0.05, "int4": 0.5}[weights]


@pytest.mark.parametrize("vocab", [None, 20])
@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_drafters_bytes_are_its_own_weights_and_its_cache(tied, weights, vocab):
    model = tiny_model(tie_embeddings=tied, **NATIVE) if tied else untied()
    drafter = make_drafter(
        DraftConfig(drafter=DrafterSpec(kind="self_sparse", weights=weights, vocab=vocab), kv=SparseKV(budget=40), draft_len=3), model, batch=2
    )
    cache_bytes = 2 * (40 + 3 + 1) * model.spec.kv_bytes_per_token("float32")
    assert drafter.nbytes == cache_bytes + (weights != "full") * layers_bytes(model.spec, weights) + head_bytes(model.spec, weights, vocab)


@pytest.mark.parametrize("vocab", [None, 20])
@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
@pytest.mark.parametrize("kind", ["draft_model", "dflash"])
def test_a_cheaper_copy_of_the_targets_head_is_the_drafters(kind, weights, vocab, tmp_path):
    model = untied()
    if kind == "dflash":
        own = with_block_head(model, tmp_path / "head").beside.pop((BLOCK_HEAD.path, None))
    else:
        tensors = {name: tensor for name, tensor in tiny_checkpoint(seed=1, num_layers=1, **NATIVE).tensors.items() if "embed" not in name}
        own = on_target(model, replace(model.spec, num_layers=1), tensors, F32, "1" * 16)
    assert own.head is model.head
    model.beside["own", None] = own
    drafter = drafting_model(DrafterSpec(kind=kind, path="own", weights=weights, vocab=vocab), model)
    norms = sum(parameter.nbytes for parameter in own.parameters() if parameter.dim() == 1)
    fc = matrix_bytes(*own.fc.shape, weights) if kind == "dflash" else 0
    assert model.extra_nbytes(drafter) == norms + fc + layers_bytes(own.spec, weights) + head_bytes(model.spec, weights, vocab)


def matrix_bytes(out, width, weights):
    return {"full": 4 * out * width, "int8": out * width + 4 * out, "int4": out * width * 5 // 8}[weights]


def layers_bytes(spec, weights):
    C, F, q, kv = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return spec.num_layers * sum(matrix_bytes(*shape, weights) for shape in ((q + 2 * kv, C), (C, q), (2 * F, C), (C, F)))


def head_bytes(spec, weights, vocab):
    """Of a copy; the head itself is the target's."""
    if vocab is None:
        return 0 if weights == "full" else matrix_bytes(spec.vocab_size, spec.hidden_size, weights)
    return matrix_bytes(vocab, spec.hidden_size, weights) + 8 * vocab


def untied():
    tied = tiny_checkpoint(tie_embeddings=False, **NATIVE)
    return build_model(Checkpoint(spec=tied.spec, tensors=tied.tensors | {"lm_head.weight": randn(61, 64)}, fingerprint="0" * 16))


# ---- a quantised target is its own truth


def test_each_kind_of_weights_has_a_fingerprint_of_its_own(model):
    prints = [model.cheaper(weights).fingerprint for weights in ("full", "int8", "int4")]
    assert len(set(prints)) == 3 and prints[0] == model.fingerprint
    assert model.cheaper("int8").cheaper("int4").fingerprint not in prints


def test_an_int8_drafter_of_an_int8_target_shares_every_matrix(model):
    target = model.cheaper("int8")
    drafter = drafting_model(DrafterSpec(kind="self_sparse", weights="int8"), target)
    assert {id(parameter) for parameter in drafter.parameters()} == {id(parameter) for parameter in target.parameters()}
    config = DraftConfig(drafter=DrafterSpec(kind="self_sparse", weights="int8"), kv=SparseKV(budget=40), draft_len=3)
    made = make_drafter(config, target)
    assert made.nbytes == made.cache.nbytes


def test_an_int4_drafter_of_an_int8_target_is_quantised_from_the_target(model):
    target = model.cheaper("int8")
    drafter = target.cheaper("int4")
    assert all(isinstance(layer.mlp_out, Int4Linear) for layer in drafter.layers)
    expected = Int4Linear(target.layers[0].mlp_out.restored(F32), Kernels())
    assert torch.equal(drafter.layers[0].mlp_out.weights, expected.weights)
    logits, cheaper = (logits_after(each, [7]) for each in (target, drafter))
    assert 1e-4 < (cheaper - logits).norm() / logits.norm() < 0.5


def test_a_full_drafter_of_an_int8_target_is_the_target(model):
    target = model.cheaper("int8")
    assert drafting_model(DrafterSpec(kind="self_sparse"), target) is target


def test_nbytes_counts_what_is_shared_once(model):
    spec = model.spec
    assert model.nbytes == 4 * spec.num_parameters  # the tied head is the embedding
    int8 = model.cheaper("int8")
    rows = sum(matrix.shape[0] for layer in int8.layers for matrix in (layer.qkv, layer.attention_out, layer.gate_up, layer.mlp_out)) + 61
    matrices = spec.num_parameters - (2 * spec.num_layers + 1) * spec.hidden_size  # and 61 x C, which the head has in int8 and the embedding in full
    assert int8.nbytes == matrices + 4 * rows + 4 * 61 * spec.hidden_size + 4 * (2 * spec.num_layers + 1) * spec.hidden_size
