"""Tensor parallelism: every rank runs the same program on its own heads (Megatron-LM, arXiv:1909.08053).

By rows, so that a rank computes features of its own: queries, keys and values (whole heads, whose cache it holds), gate
and up, embedding and head (a part of the vocabulary). By columns, so that a rank computes a summand: attention out and
mlp out, with an all-reduce behind each. Norms lie on every rank.

DTensor places the checkpoint's tensors and puts together what is needed whole. From there on a rank holds plain tensors:
the fused matrices, their quantised forms and the kernels know no others, and summing a few rows by way of a DTensor takes
two to ten times as long (on a CPU, with Gloo). An all-reduce gives every rank the same bits, as Gloo and NCCL reduce an
element in one place and hand the result round (with NCCL: not tested here), so that equally seeded ranks draw equal
tokens; `agreed` makes anything else an error.
"""

from collections.abc import Callable

import msgspec
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from planner.errors import BadInput, PlannerError
from planner.runtime.kernels import Kernels, Rotation
from planner.runtime.kv_cache import KVCache, Mask
from planner.runtime.linear import Matrix
from planner.runtime.model import Transformer, build_model
from planner.runtime.ranks import Ranks
from planner.runtime.weights import Checkpoint, dtype_name
from planner.specs import ModelSpec

BY_VOCABULARY = ("embed_tokens", "lm_head")
BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", *BY_VOCABULARY)  # weights, and biases should there be any
BY_COLUMNS = ("o_proj", "down_proj")


class ShardedKernels(Kernels):
    """Another's steps on what this rank holds. Never its fused pass, which would leave out the sums."""

    def __init__(self, steps: Kernels, ranks: Ranks):
        self.steps, self.rank, self.num_ranks, self.execution = steps, ranks.rank, ranks.size, steps.execution

    def forget(self) -> None:
        self.steps.forget()

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self.steps.linear(x, matrix)

    def attend(self, qkv: Tensor, rotation: Rotation, cache: KVCache, layer: int, mask: Mask) -> Tensor:
        return self.steps.attend(qkv, rotation, cache, layer, mask)

    def embed(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        row = tokens - self.rank * len(embedding)
        elsewhere = (row < 0) | (row >= len(embedding))
        x = F.embedding(row.masked_fill(elsewhere, 0), embedding).masked_fill_(elsewhere[..., None], 0)
        dist.all_reduce(x)
        return x

    def whole(self, rows: Tensor) -> Tensor:
        mesh = init_device_mesh(rows.device.type, (self.num_ranks,))
        return DTensor.from_local(rows, mesh, [Shard(0)]).full_tensor()

    def agreed(self, drawn: Tensor) -> Tensor:
        both = torch.cat([drawn.flatten(), -drawn.flatten()])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        largest, smallest = both[: drawn.numel()], -both[drawn.numel() :]
        if not torch.equal(largest, smallest):
            raise PlannerError("all ranks must draw the same tokens, theirs differ; run them on devices of one kind, with the same versions")
        return drawn


class _Summed(ShardedKernels):
    """For matrices split by columns."""

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        y = super().linear(x, matrix)
        dist.all_reduce(y)
        return y


class _Gathered(ShardedKernels):
    """For a head of which each rank has as many rows, the last of them padding."""

    def __init__(self, steps: Kernels, ranks: Ranks, vocab_size: int):
        super().__init__(steps, ranks)
        self.vocab_size = vocab_size

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        own = super().linear(x, matrix)
        parts = [torch.empty_like(own) for _ in range(self.num_ranks)]
        dist.all_gather(parts, own)
        return torch.cat(parts, -1)[..., : self.vocab_size]


def load_shard(load: Callable[[], Checkpoint], ranks: Ranks) -> tuple[Checkpoint, ModelSpec]:
    """This rank's part of a checkpoint, on the CPU, and the shape of the whole.

    Rank 0 alone calls `load`, which reads onto the CPU too, and hands out one tensor at a time.
    """
    whole: Checkpoint | None = None

    def read() -> _Header:
        nonlocal whole
        whole = load()
        dtype = dtype_name(next(iter(whole.tensors.values())).dtype)
        return _Header(spec=whole.spec, fingerprint=whole.fingerprint, dtype=dtype, shapes={n: tuple(t.shape) for n, t in whole.tensors.items()})

    header = ranks.first(read, _Header)
    spec, mesh, tensors = header.spec.shard(ranks.size), init_device_mesh("cpu", (ranks.size,)), {}
    for name, shape in header.shapes.items():
        placement = placed(name)
        tensor = torch.empty(shape, dtype=getattr(torch, header.dtype)) if whole is None else whole.tensors.pop(name)
        if name.split(".")[-2] in BY_VOCABULARY:
            tensor = F.pad(tensor, (0, 0, 0, -len(tensor) % ranks.size))
        tensors[name] = distribute_tensor(tensor, mesh, [placement]).to_local()
    return Checkpoint(spec, tensors, header.fingerprint), header.spec


def build_sharded(part: Checkpoint, kernels: Kernels, ranks: Ranks, device: torch.device, special_tokens: tuple[int, ...] = ()) -> Transformer:
    """A model whose spec, weights and caches are this rank's, and whose hidden states and logits are everybody's.

    It is fused on the CPU: the device never holds more than the part.
    """
    model = build_model(part, ShardedKernels(kernels, ranks), special_tokens)
    for layer in model.layers:
        layer.attention_out.kernels = layer.mlp_out.kernels = _Summed(kernels, ranks)
    model.head.kernels = _Gathered(kernels, ranks, part.spec.vocab_size)
    model.inverse_frequency = model.inverse_frequency.to(device)
    return model.to(device)


def placed(name: str) -> Placement:
    """Where the parts of a tensor go, by its Hugging Face name."""
    *_, part, kind = name.split(".")
    if part in BY_ROWS:
        return Shard(0)
    if part in BY_COLUMNS and kind == "weight":
        return Shard(1)
    if "norm" in part:
        return Replicate()
    raise BadInput(f"tensor parallelism knows {', '.join(BY_ROWS + BY_COLUMNS)} (these two without bias) and norms, got {name}; run one process")


class _Header(msgspec.Struct, kw_only=True):
    """What every rank knows of a checkpoint that rank 0 has read."""

    spec: ModelSpec
    fingerprint: str
    dtype: str
    shapes: dict[str, tuple[int, ...]]
