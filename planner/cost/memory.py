"""Bytes that are resident: weights, caches, logits. Exact where tensors are counted, measured where a process is.

The counts equal the runtime's: a full cache of `capacity` slots per stream, a sparse one of budget + draft_len + 1.
Without an EAGLE-3 head, no head is loaded and the target's cache keeps no hidden states.
"""

import numpy as np

from planner.errors import BadInput
from planner.measurements import DrafterModel, Profile
from planner.plans import Interval
from planner.specs import (
    BYTES_PER_ELEMENT,
    CHUNK_SIZE,
    CHUNKED,
    LOADED,
    DraftConfig,
    DrafterSpec,
    DType,
    KVPolicy,
    ModelSpec,
    SparseKV,
    Weights,
    Workload,
)


def full_cache_bytes(model: ModelSpec, dtype: DType, *, capacity: int, batch: int = 1) -> int:
    """Keys and values of a cache with `capacity` slots for each stream."""
    return batch * capacity * model.kv_bytes_per_token(dtype)


def sparse_cache_bytes(model: ModelSpec, dtype: DType, *, budget: int, draft_len: int, batch: int = 1) -> int:
    """A drafter's copy of what it attends to, with room for the drafts of a round."""
    return full_cache_bytes(model, dtype, capacity=budget + draft_len + 1, batch=batch)


def features_bytes(target: ModelSpec, dtype: DType, taps: int, *, capacity: int, batch: int = 1) -> int:
    """Hidden states of `taps` layers that the target's cache keeps for an EAGLE-3 head."""
    return batch * capacity * taps * target.hidden_size * BYTES_PER_ELEMENT[dtype]


def own_cache_bytes(model: ModelSpec, dtype: DType, kv: KVPolicy, *, capacity: int, draft_len: int, batch: int = 1) -> int:
    """The cache of a drafter that is a model of its own; a policy that retains keeps a full one beside the sparse one."""
    full = full_cache_bytes(model, dtype, capacity=capacity, batch=batch)
    if not isinstance(kv, SparseKV):
        return full
    return sparse_cache_bytes(model, dtype, budget=kv.budget, draft_len=draft_len, batch=batch) + full * (kv.storage == "retain")


def matrix_bytes(out: int, width: int, dtype: DType, weights: Weights) -> int:
    """One matrix [out, width] as runtime.linear stores it: int8 with a float32 scale per row, int4 with 4 bytes per 32 weights."""
    match weights:
        case "full":
            return out * width * BYTES_PER_ELEMENT[dtype]
        case "int8":
            return out * width + 4 * out
        case "int4":
            return out * width // 2 + out * width // 32 * 4


def drafter_weights_bytes(model: ModelSpec, dtype: DType, drafter: DrafterSpec, target_weights: Weights, tensor_parallel: int = 1) -> int:
    """What a self_sparse drafter does not share with its target: matrices of other bits, and a head of its own.

    On one of several devices, a part of each matrix; but a head for fewer tokens is there whole.
    """
    vocab_rows, model = -(-model.vocab_size // tensor_parallel), model.shard(tensor_parallel)
    changed = drafter.weights not in ("full", target_weights)
    total = 0
    if changed:
        attention, inner = model.num_heads * model.head_dim, model.intermediate_size
        shapes = [
            (attention + 2 * model.num_kv_heads * model.head_dim, model.hidden_size), (model.hidden_size, attention), (2 * inner, model.hidden_size),
            (model.hidden_size, inner),
        ]  # fmt: skip
        total += model.num_layers * sum(matrix_bytes(out, width, dtype, drafter.weights) for out, width in shapes)
    if drafter.vocab is not None:
        total += matrix_bytes(drafter.vocab, model.hidden_size, dtype, drafter.weights) + 8 * drafter.vocab  # and the ids it stands for
    elif changed:
        total += matrix_bytes(vocab_rows, model.hidden_size, dtype, drafter.weights)
    return total


def logits_bytes(model: ModelSpec, draft_len: int, verified: int | None = None, batch: int = 1) -> int:
    """Distributions of one round in float32: the target's over verified + 1 rows, the drafter's over draft_len.

    verified  nodes of a tree; None: a chain's draft_len
    """
    return batch * ((draft_len if verified is None else verified) + draft_len + 1) * model.vocab_size * 4


def counted_bytes(profile: Profile, config: DraftConfig, workload: Workload) -> int:
    """Weights once, caches and logits of every stream of the batch, tensor by tensor; on one device, should several share the target."""
    model, dtype = profile.target.shard(profile.tensor_parallel), profile.dtype
    capacity = workload.context_len + workload.output_len + config.verified
    batch = workload.batch
    total = profile.weights_bytes + full_cache_bytes(model, dtype, capacity=capacity, batch=batch)
    total += logits_bytes(model, config.draft_len, config.verified, batch)
    if config.drafter.kind == "self_sparse":
        total += sparse_cache_bytes(model, dtype, budget=config.kv.budget, draft_len=config.draft_len, batch=batch)
        total += drafter_weights_bytes(profile.target, dtype, config.drafter, profile.weights, profile.tensor_parallel)
    elif config.drafter.kind in LOADED:
        own = drafter_model(profile, config.drafter)
        total += own.weights_bytes + own_cache_bytes(own.spec, own.dtype, config.kv, capacity=capacity, draft_len=config.draft_len, batch=batch)
        total += features_bytes(model, dtype, len(own.taps), capacity=capacity, batch=batch)
        if isinstance(config.kv, SparseKV) and config.kv.storage == "evict":  # one prompt after the other is held whole until it is chosen from
            total += full_cache_bytes(own.spec, own.dtype, capacity=workload.context_len)
    return total


def drafter_model(profile: Profile, drafter: DrafterSpec) -> DrafterModel:
    """The checkpoint that a profile ran a drafter with."""
    found = next((own for own in profile.drafter_models if own.drafter == drafter), None)
    if found is None:
        known = ", ".join(f"{own.drafter.kind} {own.drafter.path}" for own in profile.drafter_models) or "none"
        raise BadInput(f"the profile must hold the checkpoint of {drafter.kind} {drafter.path}, it holds {known}; profile with this drafter")
    return found


def resident_bytes(profile: Profile, config: DraftConfig, workload: Workload) -> Interval:
    """Peak memory: what is counted, and the activations, buffers and libraries that the profile saw on top of it.

    The interval spans the smallest and the largest surplus seen at the workload's batch, or at the next larger one, since
    activations grow with it; without a memory sample the surplus is taken as 0.
    """
    counted = counted_bytes(profile, config, workload)
    batches = sorted({sample.batch for sample in profile.memory})
    nearest = next((batch for batch in batches if batch >= workload.batch), batches[-1] if batches else 1)
    seen = [sample for sample in profile.memory if sample.batch == nearest]
    surplus = [max(0, sample.base_bytes + sample.peak_bytes - sample.known_bytes) for sample in seen] or [0]
    return Interval(value=counted + float(np.median(surplus)), low=counted + min(surplus), high=counted + max(surplus))


def largest_budget(profile: Profile, config: DraftConfig, workload: Workload, cap_bytes: int) -> int | None:
    """The largest kv budget with which a sparse configuration fits under a cap; None if no budget does."""
    assert isinstance(config.kv, SparseKV)
    spec, dtype = profile.target.shard(profile.tensor_parallel), profile.dtype
    if config.drafter.kind in LOADED:
        spec, dtype = (own := drafter_model(profile, config.drafter)).spec, own.dtype
    per_token = workload.batch * spec.kv_bytes_per_token(dtype)
    without = resident_bytes(profile, config, workload).value - config.kv.budget * per_token
    budget = int((cap_bytes - without) // per_token)
    least = config.kv.recent + (CHUNK_SIZE if config.kv.selection in CHUNKED else config.kv.sink)
    return budget if budget >= least else None
