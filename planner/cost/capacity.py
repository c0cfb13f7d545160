"""How many requests fit: the KV pool that an engine makes at its start, and what one request takes of it. Nothing is measured.

All bytes are those of one device (one rank under tensor parallel). The pool is what the engine's fraction leaves after:

weights         as stored, split over the ranks; KV heads that do not divide are held twice, rotary tables whole
sampler peak    logits of max_num_seqs rows: 16 bit, float32, probabilities and the noise they are divided by, 14 bytes an entry.
                vLLM's profile run allocates them (1.97 GiB logged for 1,024 rows of about 150,000); or the MLP's activations, if more
features        hidden states of max_num_batched_tokens
outside torch   0.2 GiB: cuBLAS and kernels (vLLM logs 0.07 to 0.39 GiB; the context itself is there before the first snapshot)
graphs          5 MiB for each captured size (logs of vLLM 0.19: 1 to 10 MiB with a current driver, 28 with one of 2023).
                Until 0.17 they lay outside the fraction; 0.18 to 0.20 profile them inside the measured window, what the driver keeps
                of that counts; from 0.21 they are subtracted
Other engines: see engine_rules.py. Checked against four logged runs of vLLM 0.19 in tests/cost/test_capacity.py.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from planner.engine_rules import EngineRules, draft_slots, find_engine
from planner.serving import ModelSize, SystemSpec
from planner.units import GIB, format_bytes

MIB = 2**20
LOGIT_BYTES = 14  # 2 + 4 + 4 + 4
OUTSIDE_TORCH_BYTES = 0.2 * GIB
GRAPH_BYTES = 5 * MIB
CONTEXT_BYTES = 0.5 * GIB  # a CUDA context with its libraries; for engines that ask what is free
LLAMA_CPP_MARGIN = 1024 * MIB  # --fit-target
LLAMA_CPP_UBATCH = 512
USUAL_VOCAB = 128_256
POOL_ERROR = 0.02  # as a share; of the logged runs
NEUTRAL = find_engine("vllm")


class Settings(NamedTuple):
    """How the engine is started. None: its own default."""

    engine: EngineRules = NEUTRAL
    tensor_parallel: int = 1
    fraction: float | None = None
    memory_cap_bytes: int | None = None  # of one device, in place of its size where that is more
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


class Part(NamedTuple):
    name: str
    bytes: float


class KVPool(NamedTuple):
    """What an engine sets aside for keys and values on each device."""

    tokens: int  # of which each takes the target's bytes and the drafter's
    bytes: float
    parts: tuple[Part, ...]  # what took the rest of the device's memory
    fraction: float | None  # that was in force
    max_num_seqs: int
    assumed: tuple[str, ...]


def kv_pool(model: ModelSize, drafter: ModelSize | None, system: SystemSpec, settings: Settings, method: str = "draft_model") -> KVPool:
    """The pool at the engine's start. It does not depend on the load."""
    engine, ranks = settings.engine, settings.tensor_parallel
    assumed = []
    memory = system.memory_bytes if settings.memory_cap_bytes is None else min(system.memory_bytes, settings.memory_cap_bytes)
    rows, batched = _batch_defaults(system, settings)
    if model.vocab_size is None:
        assumed.append(f"a vocabulary of {USUAL_VOCAB:,} tokens: the model's is not known")
    weights = [Part("weights of the target", weights_bytes(model, ranks))]
    if drafter is not None:
        weights.append(Part(f"weights of {drafter.name}", weights_bytes(drafter, ranks)))
    held = sum(part.bytes for part in weights)

    fraction = settings.fraction if settings.fraction is not None else engine.fraction
    match engine.fraction_of:
        case "total":
            parts = [*weights, *_profiled(model, settings, rows, batched)]
            room = fraction * memory - sum(part.bytes for part in parts)
            assumed.append(f"{engine.fraction_flag} {fraction:g} of {format_bytes(memory)}")
            assumed.append(f"at most {rows:,} requests and {batched:,} tokens in a step: sampler, activations and graphs are sized for them")
        case "static":
            if fraction is None:
                fraction = sglang_fraction(memory, ranks, drafter is not None, method)
            parts = [*weights, Part("context", CONTEXT_BYTES)]
            room = fraction * (memory - CONTEXT_BYTES) - held
            assumed.append(f"{engine.fraction_flag} {fraction:g} of what is free at the start; activations and graphs fit into the rest")
        case "free":
            parts = [*weights, Part("context", CONTEXT_BYTES), *_profiled(model, settings, rows, batched)]
            room = fraction * (memory - sum(part.bytes for part in parts))
            assumed.append(f"{engine.fraction_flag} {fraction:g} of what is free after weights and activations")
        case "margin":
            logits = Part("compute buffer", LLAMA_CPP_UBATCH * (model.vocab_size or USUAL_VOCAB) * 4)
            parts = [*weights, Part("context", CONTEXT_BYTES), logits, Part("margin", LLAMA_CPP_MARGIN)]
            room = memory - sum(part.bytes for part in parts)
            assumed.append(f"{engine.fraction_flag} {LLAMA_CPP_MARGIN // MIB} MiB stay free, and every layer lies on the device")
    room = max(0.0, room)
    per_token = bytes_per_token(model, drafter, ranks)
    tokens = int(room / (per_token * engine.block_tokens)) * engine.block_tokens
    unused = memory - room - sum(part.bytes for part in parts)
    if unused > 0:
        parts.append(Part("outside the fraction", unused))
    return KVPool(tokens, room, tuple(parts), fraction, rows, tuple(assumed))


def request_tokens(engine: EngineRules, context_len: int, output_len: float, draft_len: int, method: str = "draft_model") -> float:
    """KV slots of one request, averaged over the time it decodes: half of its output, its draft slots, and half a block's waste.

    An engine that does not allocate on demand holds the whole length from the start.
    """
    slots = draft_slots(engine, method, draft_len)
    if not engine.on_demand:
        return math.ceil((context_len + output_len + slots) / engine.block_tokens) * engine.block_tokens
    return context_len + output_len / 2 + slots + (engine.block_tokens - 1) / 2


def requests_that_run(
    pool: KVPool,
    model: ModelSize,
    drafter: ModelSize | None,
    settings: Settings,
    *,
    context_len: int,
    output_len: int,
    draft_len: int,
    method: str = "draft_model",
    kv_budget: int | None = None,
) -> float:
    """Requests that decode side by side in steady state, on average and by memory alone; 0 if not one fits to its end.

    The pool over what a request holds, in whole requests: one that only partly fits waits, which costs half a request where many run.
    kv_budget  tokens that the drafter keeps of a request, where the engine really frees the others; None: all
    """  # fmt: skip
    engine, ranks = settings.engine, settings.tensor_parallel
    target = model.kv_bytes_per_token(ranks)
    own = 0.0 if drafter is None else drafter.kv_bytes_per_token(ranks)

    def request_bytes(tokens: float) -> float:
        kept = tokens if kv_budget is None or method not in engine.window_saves else min(tokens, kv_budget + draft_len)
        return tokens * target + kept * own

    whole = context_len + output_len + draft_slots(engine, method, draft_len)
    if request_bytes(math.ceil(whole / engine.block_tokens) * engine.block_tokens) > pool.bytes:
        return 0.0
    mean = request_bytes(request_tokens(engine, context_len, output_len, draft_len, method))
    requests = pool.bytes / mean
    if not engine.on_demand:
        return float(math.floor(requests))
    spread = math.sqrt(requests / 12) * request_bytes(output_len) / mean  # of what they hold together: each is anywhere in its output
    return max(1.0, _mean_floor(requests, math.hypot(spread, POOL_ERROR * requests)))


def _mean_floor(value: float, sd: float) -> float:
    """Mean of the whole part of a normal variable: a request that only partly fits waits."""
    first = math.floor(value) - 4
    if sd > 1:
        return value - 0.5
    return max(0.0, first + sum(0.5 + 0.5 * math.erf((value - whole) / (sd * math.sqrt(2))) for whole in range(first + 1, first + 9)))


def request_capacity(
    model: ModelSize, drafter: ModelSize | None, system: SystemSpec, *, tensor_parallel: int, context_len: int, output_len: int, draft_len: int
) -> float:
    """Requests that decode side by side in steady state under vLLM's defaults and the system's fraction, whatever max_num_seqs says.

    A residency is the context and half of the output, in blocks taken on demand. 0 if not one request fits.
    """
    pool, settings = _neutral_pool(model, drafter, system, tensor_parallel)
    return requests_that_run(pool, model, drafter, settings, context_len=context_len, output_len=output_len, draft_len=draft_len)


@lru_cache(maxsize=256)
def _neutral_pool(model: ModelSize, drafter: ModelSize | None, system: SystemSpec, tensor_parallel: int) -> tuple[KVPool, Settings]:
    settings = Settings(tensor_parallel=tensor_parallel, fraction=system.fraction)
    return kv_pool(model, drafter, system, settings), settings


def bytes_per_token(model: ModelSize, drafter: ModelSize | None, tensor_parallel: int) -> float:
    """Keys and values of one token, the target's and the drafter's: engines keep both in one pool, slot by slot."""
    return model.kv_bytes_per_token(tensor_parallel) + (0.0 if drafter is None else drafter.kv_bytes_per_token(tensor_parallel))


def weights_bytes(model: ModelSize, tensor_parallel: int) -> float:
    """Weights on one rank: a part of each matrix, whole KV heads, and rotary tables whole."""
    total = model.weights_bytes / tensor_parallel
    if not model.latent and model.hidden_size is not None:
        share = math.ceil(model.num_kv_heads / tensor_parallel) - model.num_kv_heads / tensor_parallel
        total += share * 2 * model.num_layers * model.head_dim * model.hidden_size * 2  # keys and values, 16 bit
    return total + 2 * (model.max_context_len or 0) * (64 if model.latent else model.head_dim)  # 64: rotary part of MLA in every model there is


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that vLLM captures: 1, 2, 4, then by 8 to 256, then by 16, up to twice max_num_seqs and 512."""
    most = min(2 * max_num_seqs, 512)
    return [size for size in [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)] if size <= most]


def _profiled(model: ModelSize, settings: Settings, rows: int, batched: int) -> list[Part]:
    """What the profile run of vLLM finds beside the weights; other engines do much the same."""
    sampler = min(rows, batched) * (model.vocab_size or USUAL_VOCAB) * LOGIT_BYTES
    hidden = model.hidden_size or 0
    # gate, up and their product; layers reuse the same memory
    forward = 2 * batched * (3 * (model.intermediate_size or 0) / settings.tensor_parallel + 2 * hidden)
    parts = [
        Part("sampler peak" if sampler >= forward else "activation peak", max(sampler, forward)),
        Part("features", 2 * batched * hidden),
        Part("outside torch", OUTSIDE_TORCH_BYTES),
    ]
    if settings.engine.graphs != "beside":
        sizes = capture_sizes(rows)
        graphs = len(sizes) + sum(size <= rows for size in sizes)  # piecewise for prefill, whole ones for decoding
        parts.append(Part("graphs", graphs * GRAPH_BYTES))
    return parts


def _batch_defaults(system: SystemSpec, settings: Settings) -> tuple[int, int]:
    """max_num_seqs and max_num_batched_tokens: vLLM's for a server on such a device, which other engines come near to."""
    large = system.memory_bytes >= 70 * GIB and "a100" not in system.name.lower()
    seqs, tokens = (1024, 8192) if large else (256, 2048)
    return settings.max_num_seqs or seqs, settings.max_num_batched_tokens or tokens


def sglang_fraction(memory_bytes: float, ranks: int, speculates: bool, method: str) -> float:
    """SGLang's own choice of mem_fraction_static, in its MiB."""
    memory = memory_bytes / MIB
    chunk, graphs = 2048, (8, 8)
    for above, *values in ((20, 2048, (24, 80)), (35, 4096, (32, 160)), (60, 8192, (256, 512)), (160, 16384, (512, 512))):
        if memory >= above * 1024:
            chunk, graphs = values
    reserved = 512 + 1.5 * max(chunk, 2048) + 2 * graphs[ranks >= 4] + ranks / 8 * 1024
    if memory > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    if speculates and method not in ("ngram", "suffix"):
        reserved += 6 * 1024 if method == "draft_model" else 2 * 1024
    return max(0.0, round((memory - reserved) / memory, 3))
