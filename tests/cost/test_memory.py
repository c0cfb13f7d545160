"""Predicted bytes: those of real tensors, sums that add up, and a cap that is held."""

import msgspec
import pytest
import torch
from made import NGRAM, SELF_SPARSE, made_profile
from tiny import NATIVE, tiny_model, tiny_spec

from planner.cost.memory import (
    counted_bytes,
    drafter_weights_bytes,
    full_cache_bytes,
    largest_budget,
    logits_bytes,
    resident_bytes,
    sparse_cache_bytes,
)
from planner.measurements import MemorySample
from planner.runtime.decode import cache_capacity
from planner.runtime.drafters import make_drafter
from planner.runtime.kv_cache import KVCache
from planner.runtime.sampling import probabilities
from planner.specs import PLAIN, DraftConfig, DrafterSpec, FullKV, Sampler, SparseKV, Workload

WORKLOAD = Workload(context_len=2000, output_len=100, sampler=Sampler())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sparse(budget, draft_len=4, **changes):
    return DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=budget, **changes), draft_len=draft_len)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "num_heads": 6, "num_kv_heads": 1, "head_dim": 10}], ids=str)
def test_cache_bytes_are_those_of_a_real_cache(dtype, changes):
    spec = tiny_spec(**changes)
    real = KVCache(spec, batch=3, capacity=77, dtype=DTYPES[dtype], device=torch.device("cpu"))
    assert full_cache_bytes(spec, dtype, capacity=77, batch=3) == real.nbytes


@pytest.mark.parametrize("config", [PLAIN, DraftConfig(drafter=NGRAM, draft_len=3), sparse(64), sparse(64, draft_len=1, selection="chunk")], ids=str)
def test_counted_bytes_are_those_of_what_a_decoding_run_holds(config):
    model = tiny_model()
    profile = made_profile(target=model.spec, weights_bytes=model.nbytes)
    cache = model.new_cache(cache_capacity(WORKLOAD.context_len, WORKLOAD.output_len, config.draft_len))
    rows = torch.zeros(2 * config.draft_len + 1, model.spec.vocab_size)
    logits = probabilities(rows, WORKLOAD.sampler)
    assert counted_bytes(profile, config, WORKLOAD) == model.nbytes + cache.nbytes + make_drafter(config, model).nbytes + logits.nbytes


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("config", [PLAIN, DraftConfig(drafter=NGRAM, draft_len=3), sparse(64), sparse(64, draft_len=1, selection="chunk")], ids=str)
def test_a_batch_holds_the_weights_once_and_the_rest_once_for_each_stream(config, batch):
    model = tiny_model()
    workload = msgspec.structs.replace(WORKLOAD, batch=batch)
    cache = model.new_cache(cache_capacity(WORKLOAD.context_len, WORKLOAD.output_len, config.draft_len), batch=batch)
    logits = probabilities(torch.zeros(batch, 2 * config.draft_len + 1, model.spec.vocab_size), WORKLOAD.sampler)
    counted = counted_bytes(made_profile(target=model.spec, weights_bytes=model.nbytes), config, workload)
    assert counted == model.nbytes + cache.nbytes + make_drafter(config, model, batch=batch).nbytes + logits.nbytes


@pytest.mark.parametrize(("batch", "surplus"), [(1, 200), (2, 500), (4, 500), (8, 900)])
def test_the_surplus_is_that_of_the_batch_or_of_the_next_larger_one(batch, surplus):
    samples = [
        MemorySample(context_len=1000, batch=b, known_bytes=1000, peak_bytes=1000 + s, base_bytes=0) for b, s in ((1, 200), (4, 500), (8, 900))
    ]
    profile, workload = made_profile(memory=samples), msgspec.structs.replace(WORKLOAD, batch=batch)
    assert resident_bytes(profile, PLAIN, workload).value - counted_bytes(profile, PLAIN, workload) == surplus


def test_weights_are_the_number_of_parameters():
    model = tiny_model()
    assert model.nbytes == 4 * model.spec.num_parameters
    assert tiny_spec(tie_embeddings=False).num_parameters - tiny_spec().num_parameters == 61 * 32  # a head of its own


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_weights_of_every_architecture_are_counted_tensor_by_tensor(architecture, weights):
    """Biases and norms of heads belong to the target, and its cheaper copies share them."""
    model = tiny_model(**NATIVE, architecture=architecture)
    assert model.nbytes == 4 * model.spec.num_parameters
    drafter = DrafterSpec(kind="self_sparse", weights=weights)
    assert drafter_weights_bytes(model.spec, "float32", drafter, "full") == model.extra_nbytes(model.cheaper(weights))


def test_bytes_grow_with_each_knob():
    spec = tiny_spec()
    assert (
        sparse_cache_bytes(spec, "float32", budget=65, draft_len=4) - sparse_cache_bytes(spec, "float32", budget=64, draft_len=4) == 2 * 2 * 2 * 8 * 4
    )
    assert sparse_cache_bytes(spec, "bfloat16", budget=64, draft_len=4) * 2 == sparse_cache_bytes(spec, "float32", budget=64, draft_len=4)
    assert logits_bytes(spec, 2, batch=3) == 3 * 5 * spec.vocab_size * 4


def test_the_interval_spans_the_surplus_that_was_seen():
    samples = [MemorySample(context_len=1000, known_bytes=1000, peak_bytes=peak, base_bytes=500) for peak in (700, 900, 400)]
    profile = made_profile(memory=samples)
    estimate, counted = resident_bytes(profile, PLAIN, WORKLOAD), counted_bytes(profile, PLAIN, WORKLOAD)
    assert [estimate.low - counted, estimate.value - counted, estimate.high - counted] == [0, 200, 400]


def test_without_a_memory_sample_the_count_is_the_estimate():
    profile = made_profile(memory=[])
    estimate = resident_bytes(profile, sparse(64), WORKLOAD)
    assert estimate.low == estimate.value == estimate.high == counted_bytes(profile, sparse(64), WORKLOAD)


@pytest.mark.parametrize("budget", [36, 64, 1000])
def test_the_largest_budget_fits_and_one_more_does_not(budget):
    profile = made_profile()
    cap = int(resident_bytes(profile, sparse(budget), WORKLOAD).value)
    assert largest_budget(profile, sparse(512), WORKLOAD, cap) == budget
    assert largest_budget(profile, sparse(512), WORKLOAD, cap - 1) == (budget - 1 if budget > 36 else None)
    batch = msgspec.structs.replace(WORKLOAD, batch=3)
    cap = int(resident_bytes(profile, sparse(budget), batch).value)
    assert largest_budget(profile, sparse(512), batch, cap) == budget
    assert largest_budget(profile, sparse(512), batch, cap - 1) == (budget - 1 if budget > 36 else None)


def test_no_budget_fits_under_a_tiny_cap():
    assert largest_budget(made_profile(), sparse(64), WORKLOAD, 1000) is None


def test_the_largest_chunk_budget_is_one_that_can_be_asked_for():
    profile = made_profile()
    config = sparse(64, selection="chunk")
    for missing in range(24, 30):
        cap = int(resident_bytes(profile, config, WORKLOAD).value) - missing * profile.target.kv_bytes_per_token("float32")
        budget = largest_budget(profile, config, WORKLOAD, cap)
        assert budget is None or SparseKV(budget=budget, selection="chunk").budget == budget


def test_a_full_cache_policy_costs_no_second_cache():
    profile = made_profile()
    ngram = DraftConfig(drafter=NGRAM, kv=FullKV(), draft_len=4)
    saved = counted_bytes(profile, sparse(64), WORKLOAD) - counted_bytes(profile, ngram, WORKLOAD)
    assert saved == sparse_cache_bytes(profile.target, "float32", budget=64, draft_len=4)


def test_devices_that_share_a_model_share_its_caches():
    alone, shared = (made_profile(memory=[], weights_bytes=1000, tensor_parallel=number) for number in (1, 2))
    for config in (PLAIN, sparse(64)):
        caches = counted_bytes(alone, config, WORKLOAD) - 1000 - logits_bytes(alone.target, config.draft_len)
        assert counted_bytes(shared, config, WORKLOAD) == 1000 + caches // 2 + logits_bytes(shared.target, config.draft_len)
    cap = int(resident_bytes(shared, sparse(64), WORKLOAD).value)
    assert largest_budget(shared, sparse(512), WORKLOAD, cap) == 64
