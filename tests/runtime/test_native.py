"""The compiled kernels compute what PyTorch's do, or leave it to them; and they are built once, or refused with a remedy.

m  rows = streams x new tokens     B  streams     n  new tokens     H  heads     G  KV heads     D  head_dim
"""

import ctypes
import mmap
import os
import stat
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import NATIVE, native_kernels, prefilled, random_prompt, tiny_model, tiny_spec

from planner.errors import BadInput
from planner.runtime import native
from planner.runtime.kernels import Kernels
from planner.runtime.kv_cache import Ancestors, KVCache, SparseKVCache
from planner.runtime.linear import Linear, quantized
from planner.runtime.model import prefill
from planner.runtime.native import MAX_QUANTIZED_ROWS, MAX_ROWS
from planner.runtime.rope import Rotation
from planner.specs import SparseKV

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
WEIGHTS = pytest.mark.parametrize("weights", ["full", "int8", "int4"])
ULP = 2**-7  # of bfloat16, relative: two roundings of nearly one number are at most this far apart


@pytest.fixture(scope="module", params=[F32, BF16], ids=["float32", "bfloat16"])
def kernels(request):
    return native_kernels(request.param)


def dtype_of(kernels) -> torch.dtype:
    return kernels._dtype


def randn(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls_of(kernels, monkeypatch) -> list[str]:
    """The names of library functions, as they are called from now on."""
    called = []

    def noting(name, function):
        return lambda *arguments: (called.append(name), function(*arguments))[1]

    monkeypatch.setattr(kernels, "_functions", {name: noting(name, function) for name, function in kernels._functions.items()})
    return called


# ---- matrix products


def exact_product(x, matrix):
    return (x.double() @ matrix.restored(F32).double().T).float()


@WEIGHTS
@pytest.mark.parametrize(("out", "width"), [(48, 32), (1, 64), (37, 96), (64, 224)])
def test_products_are_exact_up_to_rounding_for_any_number_of_rows(kernels, weights, out, width, monkeypatch):
    """In bfloat16 the library is held to its own weights, restored in float32: PyTorch rounds them first and is further off."""
    dtype = dtype_of(kernels)
    matrix = quantized(Linear(randn(out, width, dtype=dtype), kernels), weights)
    called = calls_of(kernels, monkeypatch)
    most = MAX_ROWS if weights == "full" else MAX_QUANTIZED_ROWS
    for m in range(1, MAX_ROWS + 2):
        x = randn(m, width, dtype=dtype, seed=m)
        tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == F32 else {"atol": 1e-3, "rtol": ULP / 2 * 1.01}
        if m > most and dtype == BF16:
            tolerance["atol"] = 0.3 if weights != "full" else 1e-3  # PyTorch's, of rounded weights
        torch.testing.assert_close(matrix(x).float(), exact_product(x, matrix), **tolerance, msg=lambda text, m=m: f"{m} rows: {text}")
    assert Counter(called) == Counter(linear=most, restore=(MAX_ROWS + 1 - most) * (weights != "full"))


def test_a_product_keeps_the_shape_of_its_input(kernels):
    matrix = Linear(randn(40, 64, dtype=dtype_of(kernels)), kernels)
    x = randn(2, 3, 64, dtype=dtype_of(kernels))
    assert matrix(x).shape == (2, 3, 40)
    assert torch.equal(matrix(x).view(6, 40), matrix(x.view(6, 64)))
    assert matrix(x[:, :0]).shape == (2, 0, 40)


@WEIGHTS
def test_what_a_product_is_not_written_for_is_left_to_pytorch(kernels, weights, monkeypatch):
    dtype = dtype_of(kernels)
    matrix = quantized(Linear(randn(40, 64, dtype=dtype), kernels), weights)
    called = calls_of(kernels, monkeypatch)
    wide = randn(5, 128, dtype=dtype)
    other = BF16 if dtype == F32 else F32
    for x in (wide[:, :64], wide.T[:64].T, wide[:, ::2], wide[:, :64].to(other), wide[:, :64].contiguous().requires_grad_()):
        torch.testing.assert_close(matrix(x), matrix.multiply(x))
    assert not called
    matrix(wide[:, :64].contiguous())
    assert called == ["linear"]


def test_odd_widths_are_left_to_pytorch(kernels, monkeypatch):
    matrix = Linear(randn(40, 48, dtype=dtype_of(kernels)), kernels)
    called = calls_of(kernels, monkeypatch)
    x = randn(3, 48, dtype=dtype_of(kernels))
    assert torch.equal(matrix(x), matrix.multiply(x))
    assert not called


@WEIGHTS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("m", [1, 5])
def test_a_product_hides_no_nan_and_no_infinity(kernels, weights, bad, m):
    matrix = quantized(Linear(randn(48, 64, dtype=dtype_of(kernels)), kernels), weights)
    x = randn(m, 64, dtype=dtype_of(kernels))
    clean = matrix(x)
    x[m - 1, 40] = bad
    spoilt = matrix(x)
    assert not spoilt[m - 1].isfinite().any()
    assert torch.equal(spoilt[: m - 1], clean[: m - 1])
    assert torch.equal(spoilt.isnan(), matrix.multiply(x).isnan())


@WEIGHTS
def test_a_row_of_a_product_is_the_same_bits_however_many_rows_the_same_kernel_takes(kernels, weights):
    """Few rows of dense bfloat16 go another way than many where there are matrix units, so few and many are apart."""
    dtype = dtype_of(kernels)
    matrix = quantized(Linear(randn(48, 96, dtype=dtype), kernels), weights)
    x = randn(MAX_ROWS, 96, dtype=dtype)
    most = MAX_ROWS if weights == "full" else MAX_QUANTIZED_ROWS
    for counts in ((1, 2, 3), (4, 5, 7, 16, 17, 33, 63, 64, 65, MAX_ROWS)):
        fitting = [m for m in counts if m <= most]
        for m in fitting:
            assert torch.equal(matrix(x[:m])[: fitting[0]], matrix(x[: fitting[0]]))
            assert torch.equal(matrix(x[-m:])[-1], matrix(x[-fitting[0] :])[-1])


# ---- attention


def rotation_of(lengths, n, D):
    positions = torch.tensor(lengths)[:, None] + torch.arange(n)
    angles = positions[..., None].float() * 1e4 ** (-torch.arange(0, D, 2) / D)
    return Rotation(angles.cos(), angles.sin())


def filled_cache(lengths, G, D, capacity, dtype=F32) -> KVCache:
    cache = KVCache(tiny_spec(num_heads=G, num_kv_heads=G, head_dim=D), batch=len(lengths), capacity=capacity, dtype=dtype, device=CPU)
    cache.keys.copy_(randn(*cache.keys.shape, seed=1))
    cache.values.copy_(randn(*cache.values.shape, seed=2))
    cache.lengths = list(lengths)
    return cache


def as_float(cache: KVCache) -> KVCache:
    copy = object.__new__(KVCache)
    copy.keys, copy.values, copy.lengths = cache.keys.float(), cache.values.float(), list(cache.lengths)
    return copy


def random_trees(B, n, seed=0) -> Ancestors:
    """A tree of n nodes for each stream, a child of an earlier node each."""
    visible = torch.eye(n, dtype=torch.bool).repeat(B, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    for b in range(B):
        for i in range(1, n):
            visible[b, i] |= visible[b, int(torch.randint(i, (1,), generator=generator))]
    return Ancestors(visible)


def attends_like_pytorch(kernels, cache, n, H, layer=1, mask=None):
    """Output and cache are those of PyTorch in float32 on the same numbers."""
    dtype = cache.keys.dtype
    B, G, D = len(cache.lengths), *cache.keys.shape[2::2]
    qkv = randn(B, n, (H + 2 * G) * D, dtype=dtype, seed=3)
    rotation = rotation_of(cache.lengths, n, D)
    reference = as_float(cache)
    expected = Kernels().attend(qkv.float(), rotation, reference, layer, mask)
    result = kernels.attend(qkv, rotation, cache, layer, mask)
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == F32 else {"atol": 0.03, "rtol": ULP}
    torch.testing.assert_close(result.float(), expected, **tolerance)
    torch.testing.assert_close(cache.keys.float(), reference.keys, **(tolerance if dtype == F32 else {"atol": 1e-6, "rtol": ULP}))
    assert torch.equal(cache.values.float(), reference.values)


RAGGED = {
    "empty": [0], "all empty": [0, 0, 0], "one key": [1], "a block less one": [63], "a block": [64], "one long": [300],
    "one empty beside a long one": [0, 150], "ragged": [5, 200, 64, 31],
}  # fmt: skip


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (6, 2), (8, 1)])
def test_attention_is_pytorchs(kernels, lengths, D, H, G, monkeypatch):
    called = calls_of(kernels, monkeypatch)
    counts = (1, 2, 5, 17, 64)
    for n in counts:
        attends_like_pytorch(kernels, filled_cache(lengths, G, D, max(lengths) + n, dtype_of(kernels)), n, H)  # filled to the last slot
        attends_like_pytorch(kernels, filled_cache(lengths, G, D, max(lengths) + n + 9, dtype_of(kernels)), n, H, layer=0)
    assert called == ["attend"] * 2 * len(counts)


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(("D", "H", "G"), [(64, 6, 2), (128, 2, 2), (64, 3, 1)])
def test_attention_of_trees_is_pytorchs(kernels, lengths, D, H, G, monkeypatch):
    called = calls_of(kernels, monkeypatch)
    counts = (1, 2, 9, 33, 65, 100)
    for n in counts:
        attends_like_pytorch(
            kernels, filled_cache(lengths, G, D, max(lengths) + n, dtype_of(kernels)), n, H, mask=random_trees(len(lengths), n, seed=n)
        )
    assert called == ["attend"] * len(counts)


@pytest.mark.parametrize("lengths", [[0], [63], [300], [5, 200, 64, 31]], ids=str)
@pytest.mark.parametrize("n", [1, 2, 33, 65])
def test_a_tree_that_is_a_chain_is_attended_to_the_bit_as_a_causal_pass(kernels, lengths, n):
    H, G, D, B = 6, 2, 64, len(lengths)
    qkv, rotation = randn(B, n, (H + 2 * G) * D, dtype=dtype_of(kernels), seed=3), rotation_of(lengths, n, D)
    chain = Ancestors(torch.ones(n, n, dtype=torch.bool).tril().repeat(B, 1, 1))
    results = [kernels.attend(qkv, rotation, filled_cache(lengths, G, D, max(lengths) + n, dtype_of(kernels)), 0, mask) for mask in (None, chain)]
    assert torch.equal(*results)


def test_a_tree_mask_that_the_library_cannot_read_is_refused(kernels):
    qkv, rotation = randn(2, 3, 10 * 64, dtype=dtype_of(kernels)), rotation_of([9, 20], 3, 64)
    whole = random_trees(2, 3).visible
    for wrong in (whole[:1], whole[:, :2], whole.int(), whole.transpose(1, 2)):
        with pytest.raises(ValueError, match="a tree's mask must be bool of shape"):
            kernels.attend(qkv, rotation, filled_cache([9, 20], 2, 64, 30, dtype_of(kernels)), 0, Ancestors(wrong))


def test_attention_over_a_whole_prefill_chunk_is_pytorchs(kernels):
    attends_like_pytorch(kernels, filled_cache([40], 1, 128, 552, dtype_of(kernels)), 512, 3)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_attention_through_a_view_of_one_stream_touches_that_stream_alone(kernels, stream):
    cache = filled_cache([30, 70, 11], 2, 64, 80, dtype_of(kernels))
    before = cache.keys.clone()
    attends_like_pytorch(kernels, cache.stream(stream), 4, 6)
    others = [b for b in range(3) if b != stream]
    assert torch.equal(cache.keys[:, others], before[:, others])
    assert not torch.equal(cache.keys[:, stream], before[:, stream])


def test_attention_over_a_sparse_cache_is_pytorchs(kernels):
    target = filled_cache([90, 12], 2, 64, 100, dtype_of(kernels))
    spec = tiny_spec(num_heads=2, num_kv_heads=2, head_dim=64)
    cache = SparseKVCache(spec, SparseKV(budget=40, recent=8), draft_len=3, batch=2, dtype=dtype_of(kernels), device=CPU)
    for b, length in enumerate(target.lengths):
        cache.select(target.stream(b), b, length, lambda count: None)
    attends_like_pytorch(kernels, cache, 1, 6)


def test_a_pass_beyond_the_capacity_is_refused_and_changes_nothing(kernels):
    cache = filled_cache([10, 14], 2, 64, 15, dtype_of(kernels))
    before = cache.keys.clone()
    qkv = randn(2, 2, 6 * 64, dtype=dtype_of(kernels))
    with pytest.raises(ValueError, match="holds 15 tokens, 16 are needed"):
        kernels.attend(qkv, rotation_of([10, 14], 2, 64), cache, 0, None)
    assert torch.equal(cache.keys, before)


def at_the_edge(tensor, before=False):
    """A copy whose last (or first) byte lies beside a page that may be neither read nor written: a step too far is a crash."""
    page = mmap.PAGESIZE
    room = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = page if before else page + room - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux to protect pages")
@pytest.mark.parametrize("before", [False, True], ids=["end", "beginning"])
@pytest.mark.parametrize("D", [64, 128])
def test_no_byte_outside_of_a_tensor_is_touched(kernels, D, before):
    dtype, H, G = dtype_of(kernels), 6, 2
    for length, n in ((0, 1), (1, 2), (30, 3), (33, 64), (63, 1), (95, 1), (100, 17)):  # capacity reached exactly, blocks of 32 and 64 cut anywhere
        cache = filled_cache([length, length // 2], G, D, length + n, dtype)
        cache.keys, cache.values = at_the_edge(cache.keys[:1], before), at_the_edge(cache.values[:1], before)
        rotation = Rotation(*(at_the_edge(part, before) for part in rotation_of(cache.lengths, n, D)))
        qkv = at_the_edge(randn(2, n, (H + 2 * G) * D, dtype=dtype), before)
        assert kernels.attend(qkv, rotation, cache, 0, None).isfinite().all()
    for weights in ("full", "int8", "int4"):
        for out, width in ((1, 32), (37, 96), (48, 64)):
            matrix = quantized(Linear(randn(out, width, dtype=dtype), kernels), weights)
            matrix.weights.data = at_the_edge(matrix.weights, before)
            if matrix.scales is not None:
                matrix.scales.data = at_the_edge(matrix.scales, before)
            for m in (1, 3, 4, 5, 16, 17, 64):
                assert matrix(at_the_edge(randn(m, width, dtype=dtype), before)).isfinite().all()


@pytest.mark.parametrize("D", [8, 80, 256])
def test_other_head_dims_are_left_to_pytorch(kernels, D, monkeypatch):
    called = calls_of(kernels, monkeypatch)
    qkv, rotation = randn(2, 3, 8 * D, dtype=dtype_of(kernels)), rotation_of([9, 20], 3, D)
    results = [run.attend(qkv, rotation, filled_cache([9, 20], 2, D, 30, dtype_of(kernels)), 1, None) for run in (kernels, Kernels())]
    assert torch.equal(*results)
    assert not called


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("n", [1, 5])
def test_attention_hides_no_nan_and_no_infinity(kernels, bad, where, n):
    """Spoilt is what reads the bad number and nothing else: one head of one stream, or the heads of one group."""
    H, G, D = 4, 2, 64
    dtype = dtype_of(kernels)
    qkv = randn(2, n, (H + 2 * G) * D, dtype=dtype, seed=3)
    heads = qkv.view(2, n, H + 2 * G, D)
    heads[1, 0, {"query": 2, "key": H + 1, "value": H + G + 1}[where], 7] = bad
    results = []
    for run, kind in ((kernels, dtype), (Kernels(), F32)):
        cache = filled_cache([70, 20], G, D, 100, dtype)
        results.append(run.attend(qkv.to(kind), rotation_of([70, 20], n, D), cache if kind == dtype else as_float(cache), 0, None))
    assert not results[0].isfinite().all()
    assert torch.equal(results[0].isfinite(), results[1].isfinite())


def test_attention_of_a_stream_beside_others_is_its_own_up_to_rounding(kernels):
    """Not to the bit: where the keys are split among threads depends on the longest stream and on how many there are."""
    lengths, n, H, G, D = [150, 40, 9], 3, 6, 2, 64
    qkv = randn(3, n, (H + 2 * G) * D, dtype=dtype_of(kernels), seed=3)
    together = kernels.attend(qkv, rotation_of(lengths, n, D), filled_cache(lengths, G, D, 160, dtype_of(kernels)), 0, None)
    for b in range(3):
        alone = filled_cache(lengths, G, D, 160, dtype_of(kernels)).stream(b)
        result = kernels.attend(qkv[b : b + 1].contiguous(), rotation_of(lengths[b : b + 1], n, D), alone, 0, None)
        torch.testing.assert_close(result, together[b : b + 1], atol=1e-5 if dtype_of(kernels) == F32 else 0.02, rtol=ULP)


# ---- whole passes


@pytest.fixture(scope="module")
def pair(kernels):
    """One model twice: its kernels, and PyTorch's in float32, on the same weights."""
    dtype = dtype_of(kernels)
    ours = tiny_model(seed=3, kernels=kernels, **NATIVE).to(dtype)
    return ours, tiny_model(seed=3, **NATIVE).to(dtype).float()


def pass_over(model, lengths, n, seed=0, capacity=None, taps=(), masked=False, tree=None):
    capacity = capacity or max(lengths) + n
    prompts = [random_prompt(length, seed=length) for length in lengths]
    cache, _ = prefilled(model, prompts, capacity)
    tokens = torch.randint(61, (len(lengths), n), generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor(lengths)[:, None] + torch.arange(n)
    with torch.inference_mode():
        return model(tokens, positions, cache, cache.causal_mask(n) if masked else tree, taps), cache


def close_to(pair, result, expected):
    if pair[0].dtype == F32:
        torch.testing.assert_close(result, expected, atol=5e-4, rtol=1e-4)
    else:  # some thirty roundings of 2**-9 behind each other
        assert (result.float() - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize(
    ("lengths", "n"), [([9], 1), ([9], 5), ([3, 40, 70], 2), ([5] * 8, 8), ([5] * 5, 13), ([20], 65), ([20], 80), ([20], 81)], ids=str
)
def test_a_pass_is_pytorchs_up_to_and_beyond_the_most_rows(pair, lengths, n, monkeypatch):
    expected, reference = pass_over(pair[1], lengths, n)
    called = calls_of(pair[0].kernels, monkeypatch)
    result, cache = pass_over(pair[0], lengths, n)
    close_to(pair, result.hidden, expected.hidden)
    close_to(pair, cache.keys, reference.keys)
    close_to(pair, cache.values, reference.values)
    passes_only = [name for name in called if name != "linear"]  # linear: logits behind each chunk of prefill
    assert passes_only[-1] == ("run" if len(lengths) * n <= MAX_ROWS else "attend")


TREES = {n: random_trees(2, n, seed=n) for n in (1, 9, 17, 33, 65)}


@pytest.mark.parametrize("options", [{"taps": (0, 1)}, {"taps": (1,)}, {"tree": True}, {"tree": True, "taps": (0,)}, {"masked": True}], ids=str)
@pytest.mark.parametrize("n", TREES)
def test_passes_over_trees_and_with_taps_are_pytorchs_in_one_call(pair, options, n, monkeypatch):
    options = options | {"tree": TREES[n] if "tree" in options else None}
    expected, reference = pass_over(pair[1], [8, 30], n, **options)
    called = calls_of(pair[0].kernels, monkeypatch)
    result, cache = pass_over(pair[0], [8, 30], n, **options)
    close_to(pair, result.hidden, expected.hidden)
    close_to(pair, cache.keys, reference.keys)
    assert set(result.taps) == set(options.get("taps", ()))
    for layer, tap in result.taps.items():
        close_to(pair, tap, expected.taps[layer])
    in_one_call = 2 * n <= MAX_ROWS and not options.get("masked")  # a mask of the caller's is left to PyTorch, layer by layer
    assert (called[-1] == "run") == in_one_call


def test_a_pass_that_takes_a_tree_for_a_chain_is_caught(pair):
    expected, result = (pass_over(pair[0], [8, 30], 9, tree=tree)[0].hidden.float() for tree in (TREES[9], None))
    assert (result - expected).norm() > 0.3 * expected.norm()


@pytest.mark.parametrize("chunk", [1, 5, 64, 100])
def test_prefill_in_any_chunks_ends_with_the_same_logits(pair, chunk):
    tokens = torch.tensor([random_prompt(130, seed=s) for s in range(2)])
    expected = prefill(pair[1], tokens, pair[1].new_cache(130, batch=2))
    cache = pair[0].new_cache(130, batch=2)
    tolerance = 2e-3 if pair[0].dtype == F32 else 0.5
    torch.testing.assert_close(prefill(pair[0], tokens, cache, chunk=chunk).float(), expected, atol=tolerance, rtol=0.05)
    assert cache.lengths == [130, 130]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("n", [1, 7, 16, 17])
def test_a_pass_with_quantised_weights_is_that_of_the_restored_ones(kernels, weights, n):
    model = tiny_model(seed=3, kernels=kernels, **NATIVE).to(dtype_of(kernels)).cheaper(weights)
    reference = tiny_model(seed=3, **NATIVE).to(dtype_of(kernels)).cheaper(weights).float()
    result, expected = pass_over(model, [25], n)[0].hidden, pass_over(reference, [25], n)[0].hidden
    close_to((model,), result, expected)


def test_bfloat16_is_no_further_from_float32_than_pytorchs_bfloat16_is():
    kernels = native_kernels(BF16)
    ours, theirs = (tiny_model(seed=3, kernels=k, **NATIVE).to(BF16) for k in (kernels, None))
    exact = pass_over(tiny_model(seed=3, **NATIVE).to(BF16).float(), [60, 9, 33], 6)[0].hidden
    error = [(pass_over(model, [60, 9, 33], 6)[0].hidden.float() - exact).square().mean() for model in (ours, theirs)]
    assert 0 < error[0] < 1.2 * error[1]


@pytest.mark.parametrize("changes", [{"head_dim": 8, "hidden_size": 32}, {"head_dim": 80}, {"hidden_size": 48}, {"intermediate_size": 48}], ids=str)
def test_models_of_other_shapes_run_on_pytorch(kernels, changes, monkeypatch):
    shape = NATIVE | changes
    model, reference = tiny_model(kernels=kernels, **shape).to(dtype_of(kernels)), tiny_model(**shape).to(dtype_of(kernels)).float()
    called = calls_of(kernels, monkeypatch)
    close_to((model,), pass_over(model, [9, 4], 3)[0].hidden, pass_over(reference, [9, 4], 3)[0].hidden)
    assert "run" not in called


def test_gradients_flow_through_pytorch(kernels):
    model = tiny_model(kernels=kernels, num_layers=1, **NATIVE).to(dtype_of(kernels)).requires_grad_(True)
    cache = model.new_cache(8)
    model.logits(model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], cache).hidden).float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_a_model_that_was_converted_is_read_where_its_weights_are_now(kernels, weights):
    """Of the memory that the weights left, the library must remember nothing; converted scales are none that it can read."""
    dtype, other = dtype_of(kernels), BF16 if dtype_of(kernels) == F32 else F32
    model, reference = (tiny_model(seed=3, kernels=k, **NATIVE).to(dtype).cheaper(weights) for k in (kernels, None))
    for kind in (dtype, other, dtype):
        result, expected = pass_over(model.to(kind), [20], 2)[0].hidden, pass_over(reference.to(kind), [20], 2)[0].hidden
        assert (result - expected).norm() < (1e-4 if kind == F32 else 0.06) * expected.norm()


def test_a_matrix_of_another_dtype_than_its_input_is_left_to_pytorch(kernels):
    other = BF16 if dtype_of(kernels) == F32 else F32
    matrix = Linear(randn(48, 64, dtype=other), kernels)
    x = randn(3, 64, dtype=dtype_of(kernels))
    assert torch.equal(matrix(x), matrix.multiply(x))


def test_positions_may_be_laid_out_in_any_way(pair):
    model = pair[0]
    tokens, positions = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 0], [1, 1], [2, 2]]).T
    results = []
    with torch.inference_mode():
        for laid_out in (positions.contiguous(), positions, torch.arange(3)[None], torch.arange(3).expand(2, 3)):
            results.append(model(tokens, laid_out, model.new_cache(3, batch=2)).hidden)
    for result in results[1:]:
        close_to(pair, result, results[0].float())


def test_a_cache_of_another_batch_or_dtype_is_refused_as_pytorch_does(pair):
    model = pair[0]
    tokens, positions = torch.ones(2, 3, dtype=torch.long), torch.arange(3).expand(2, 3)
    other = KVCache(model.spec, batch=2, capacity=3, dtype=torch.float64, device=CPU)
    for cache in (model.new_cache(3), model.new_cache(3, batch=3), other):
        with torch.inference_mode(), pytest.raises((RuntimeError, IndexError)):
            model(tokens, positions, cache)


def test_two_threads_of_python_do_not_disturb_each_other(pair):
    """The library keeps its scratch memory per thread; ctypes lets go of the interpreter while it computes."""
    expected = {n: pass_over(pair[0], [30 + n], n)[0].hidden for n in (3, 11)}
    wrong = []

    def repeat(n):
        wrong.extend(i for i in range(30) if not torch.equal(pass_over(pair[0], [30 + n], n)[0].hidden, expected[n]))

    threads = [threading.Thread(target=repeat, args=(n,)) for n in (3, 11, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused_with_the_way_out(dtype):
    with pytest.raises(BadInput, match="bfloat16 or float32, got float(16|64); use --execution eager"):
        native.NativeKernels(dtype)


# ---- building the library

load_library = native.load_library.__wrapped__  # each call anew


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that hands out what the real one made, and notes each time it is asked to."""
    native_kernels(F32)
    built = native.load_library()._name
    script, log = tmp_path / "compiler", tmp_path / "log"
    log.touch()

    def behave(command=f'sleep 0.2; cp "{built}" "$out"'):
        lines = ['[ "$1" = --version ] && { echo "made up 1.0"; exit; }', f'echo compiled >> "{log}"', 'for out in "$@"; do :; done', command]
        script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    behave()
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return SimpleNamespace(behave=behave, folder=tmp_path / "cache" / "specplan", runs=lambda: len(log.read_text().split()))


def test_the_library_is_built_once_and_leaves_nothing_else_behind(compiler):
    for _ in range(3):
        assert load_library().linear_float32
    assert compiler.runs() == 1
    assert [path.suffix for path in compiler.folder.iterdir()] == [".so"]
    assert stat.S_IMODE(os.stat(compiler.folder).st_mode) == 0o700


def test_another_source_is_built_beside_the_first(compiler, tmp_path, monkeypatch):
    load_library()
    changed = tmp_path / "kernels.cpp"
    changed.write_text(native.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    load_library()
    assert compiler.runs() == len(list(compiler.folder.iterdir())) == 2


def test_two_builders_at_once_do_no_harm(compiler):
    """Each compiles into a folder of its own and puts its result in place in one step."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_library())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and compiler.runs() == 2
    assert len(list(compiler.folder.iterdir())) == 1
    load_library()
    assert compiler.runs() == 2


def test_a_compiler_that_fails_is_named_with_its_first_error_and_the_way_out(compiler):
    compiler.behave("echo 'kernels.cpp:7: error: this machine is too old' >&2; exit 1")
    with pytest.raises(BadInput, match="could not be built with .*compiler .*error: this machine is too old.*--execution eager"):
        load_library()
    assert not list(compiler.folder.iterdir())
    compiler.behave()
    assert load_library()  # a failure is not kept


@pytest.mark.parametrize("command", ["true", 'echo nonsense > "$out"'], ids=["no result", "not a library"])
def test_a_compiler_that_lies_is_refused(compiler, command):
    compiler.behave(command)
    with pytest.raises(BadInput, match="native kernels"):
        load_library()


def test_without_a_compiler_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BadInput, match=r"need g\+\+ 12 or newer, none was found; install one, or use --execution eager"):
        load_library()


def test_a_compiler_that_was_asked_for_and_is_not_there_is_not_replaced_in_silence(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInput, match="CXX=no-such-compiler is not there, or use --execution eager"):
        load_library()


def test_without_a_home_the_remedy_is_named(compiler, monkeypatch):
    """As in a container whose user has no entry: Path.home() knows nothing then."""

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", unknown)
    with pytest.raises(BadInput, match="set XDG_CACHE_HOME to a folder"):
        load_library()


def test_a_folder_that_cannot_be_written_is_named(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="cannot be kept in .*file.*set XDG_CACHE_HOME"):
        load_library()
