"""What a step and a round should take on a device nobody has measured: bytes over bandwidth, FLOPs over peak, launches, all-reduces.

    step      layers x (launch + 2 all-reduces, if there are several ranks) + matrices + attention
    matrices  the larger of weights / bandwidth and 2 x parameters x tokens / peak
    attention keys and values read / bandwidth, and 4 x heads x head_dim FLOPs for each pair of a query and a key
    round     passes x drafter's step + draft_len x glue + the target's step over draft_len + 1 tokens + glue

The interval is what three software stacks, from tuned to plain, make of it at three shares of the bandwidth. These do not go together:
drafting pays least where kernels are good and everything around them is slow.

bandwidth   0.92 / 0.75 / 0.6 of the data sheet. Decode attention of over 200 MB in aiconfigurator's public tables: A100 0.63 to 0.77,
            H100 0.74 to 0.89 between the quartiles, the best twentieth above 0.81 and 0.9; matrices with up to 16 tokens: 0.64 to 0.7
            and 0.74 to 0.8
peak        0.85 / 0.75 / 0.6 of the data sheet for matrices (the same tables, from 2,048 tokens up: 0.75 to 0.92)
attention   0.6 / 0.4 / 0.3 of it for the products of attention: few queries a request leave most rows of a tile empty
verify      each drafted token makes the target's attention 0 / 4 / 10 % longer than over one query
launches    12 / 25 / 50 us a layer, and 10 / 20 / 40 us an all-reduce: from one-shot kernels in a CUDA graph to NCCL and compiled code.
            The plain set is what MagicDec's own frontier shows at batch 0: 4.3 ms for 32 layers on 8 devices
glue        0.1 / 0.25 / 0.5 ms a draft step and 0.3 / 0.7 / 1.5 ms a round (vLLM, Qwen3-32B with 1.7B on one H100: 0.23 and 0.7)

MagicDec's tables (arXiv:2408.11049) are replayed in tests/cost/test_roofline.py.
"""

from typing import NamedTuple

from planner.serving import ModelSize, SystemSpec

PREFILL_ATTENTION = (
    0.6  # of the peak, for attention of a prompt, whose tiles are full: 0.56 on A100, 0.72 on H100 (aiconfigurator, 16,384 tokens, 32/8 heads)
)


class Efficiency(NamedTuple):
    """How near software comes to the device."""

    bandwidth: float  # shares of the data sheet's
    peak: float
    attention: float
    verify: float  # longer attention for each query beyond the first, as a share
    launch_s: float  # of a layer
    all_reduce_s: float
    draft_glue_s: float
    round_glue_s: float


TUNED = Efficiency(0.92, 0.85, 0.6, 0.0, 12e-6, 10e-6, 0.1e-3, 0.3e-3)
LIKELY = Efficiency(0.75, 0.75, 0.4, 0.04, 25e-6, 20e-6, 0.25e-3, 0.7e-3)
PLAIN = Efficiency(0.6, 0.6, 0.3, 0.1, 50e-6, 40e-6, 0.5e-3, 1.5e-3)
STACKS = tuple(stack._replace(bandwidth=share) for stack in (TUNED, LIKELY, PLAIN) for share in (0.92, 0.75, 0.6))


class Load(NamedTuple):
    """What runs at once."""

    batch: float
    context_len: float  # tokens that each request has, prompt and output so far
    tensor_parallel: int = 1


def step_s(model: ModelSize, system: SystemSpec, load: Load, stack: Efficiency, *, new_tokens: int = 1, kv_len: float | None = None) -> float:
    """One forward pass of the model over new_tokens of every request. The system's bandwidth and peak must be known.

    kv_len  tokens it attends to, under a kv budget; None: all
    """
    ranks, tokens = load.tensor_parallel, load.batch * new_tokens
    bandwidth = system.bandwidth_bytes_per_s * stack.bandwidth
    # 2 FLOPs for a parameter of 2 bytes: stored smaller, parameters are more than this, and the peak for them higher as well
    matrices = max(model.weights_bytes / bandwidth, model.weights_bytes * tokens / (system.flops_per_s * stack.peak)) / ranks
    attended = load.context_len if kv_len is None else min(kv_len, load.context_len)
    read = load.batch * attended * model.kv_bytes_per_token(ranks)
    heads = model.num_heads or model.num_kv_heads
    products = 4 * tokens * attended * model.num_layers * heads * model.head_dim / ranks
    attention = read / bandwidth * (1 + stack.verify * (new_tokens - 1)) + products / (system.flops_per_s * stack.attention)
    layer = stack.launch_s + (2 * stack.all_reduce_s if ranks > 1 else 0.0)
    return model.num_layers * layer + matrices + attention


def round_s(
    model: ModelSize,
    drafter: ModelSize | None,
    system: SystemSpec,
    load: Load,
    stack: Efficiency,
    *,
    draft_len: int,
    kv_budget: float | None = None,
    passes: int | None = None,
) -> float:
    """One round: the drafter's passes, then one of the target over draft_len + 1 tokens. Without drafting, a plain step.

    drafter    None: the target itself drafts (self-speculation)
    kv_budget  tokens the drafter attends to; None: all
    passes     of the drafter; None: one for each token. A block drafter takes one, n-grams none
    """  # fmt: skip
    if draft_len == 0:
        return step_s(model, system, load, stack)
    drafting = step_s(drafter or model, system, load, stack, kv_len=kv_budget) * (draft_len if passes is None else passes)
    verifying = step_s(model, system, load, stack, new_tokens=draft_len + 1)
    return drafting + draft_len * stack.draft_glue_s + verifying + stack.round_glue_s


def prefill_s(model: ModelSize, system: SystemSpec, tensor_parallel: int, stack: Efficiency) -> tuple[float, float]:
    """Seconds of a prompt's token, and of a pair of a query and a key, where there are enough of them to be bound by arithmetic."""
    flops = system.flops_per_s * tensor_parallel
    heads = model.num_heads or model.num_kv_heads
    return model.weights_bytes / (flops * stack.peak), 4 * model.num_layers * heads * model.head_dim / (flops * PREFILL_ATTENTION)
