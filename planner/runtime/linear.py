"""Weights of matrix products: as the checkpoint has them, or quantised to 8 or 4 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.errors import BadInput
from planner.runtime.kernels import Kernels
from planner.specs import Weights

GROUP = 32  # weights of a row that share a scale and a minimum in 4 bits
FEW_ROWS = 8  # of x: up to here PyTorch's int8 kernel for CPUs beats restoring the weights


class Matrix(nn.Module):
    """x [..., in] -> [..., out]. `weights` are stored in `bits` each, with `scales` where these are few."""

    def __init__(self, shape: tuple[int, int], bits: int, weights: Tensor, scales: Tensor | None, kernels: Kernels):
        super().__init__()
        self.shape, self.bits, self.kernels = shape, bits, kernels  # shape: out, in
        self.weights, self.scales = frozen(weights), None if scales is None else frozen(scales)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self)

    def _apply(self, *arguments):  # what .to() and its like call
        self.kernels.forget()
        return super()._apply(*arguments)

    def multiply(self, x: Tensor) -> Tensor:
        """The product in PyTorch, whose bfloat16 product of a slice takes a hundred times as long on CPUs."""
        return F.linear(x.contiguous(), self.restored(x.dtype))

    def restored(self, dtype: torch.dtype) -> Tensor:
        """[out, in], as floats."""
        return self.weights.to(dtype)


class Linear(Matrix):
    """Weights of the checkpoint's dtype."""

    def __init__(self, weight: Tensor, kernels: Kernels):
        super().__init__(tuple(weight.shape), 8 * weight.element_size(), weight, None, kernels)


class Int8Linear(Matrix):
    """8 bits and a float32 scale per row, as in_8_bits makes them."""

    def __init__(self, weight: Tensor, kernels: Kernels):
        super().__init__(tuple(weight.shape), 8, *in_8_bits(weight), kernels)

    def multiply(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]:
            y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), self.weights, self.scales.to(x.dtype))
            return y.view(*x.shape[:-1], -1)
        return super().multiply(x)

    def restored(self, dtype: torch.dtype) -> Tensor:
        return from_8_bits(self.weights, self.scales).to(dtype)


class Int4Linear(Matrix):
    """4 bits, and a scale and a minimum per GROUP weights of a row, as in_4_bits makes them."""

    def __init__(self, weight: Tensor, kernels: Kernels):
        super().__init__(tuple(weight.shape), 4, *in_4_bits(weight), kernels)

    def restored(self, dtype: torch.dtype) -> Tensor:
        return from_4_bits(self.weights, self.scales).to(dtype)


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in] in int8 and scales [out] in float32, symmetric: the largest weight of a row becomes 127."""
    scales = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def from_8_bits(codes: Tensor, scales: Tensor) -> Tensor:
    """[out, in] in float32."""
    return codes * scales[:, None]


def in_4_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in / 2] in bytes and (scale, minimum) [out, in / GROUP, 2] in bfloat16: 5 bits a weight (as Q4_1 of GGUF).

    Byte j of a group holds weight j in its low half and weight j + GROUP / 2 in its high one.
    """
    check_groups(weight.shape[1])
    groups = weight.float().unflatten(1, (-1, GROUP))
    least, most = groups.aminmax(dim=-1, keepdim=True)
    scales = torch.cat([(most - least) / 15, least], dim=-1).bfloat16()
    scale, least = scales.float().split(1, dim=-1)
    codes = ((groups - least) / scale.clamp(min=1e-12)).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=-1)
    return (low | high << 4).flatten(1), scales


def from_4_bits(codes: Tensor, scales: Tensor) -> Tensor:
    """[out, in] in float32."""
    packed = codes.unflatten(1, (-1, GROUP // 2))
    groups = torch.cat([packed & 15, packed >> 4], dim=-1)  # [out, in / GROUP, GROUP]
    scale, least = scales.float().split(1, dim=-1)
    return (groups * scale + least).flatten(1)


def check_groups(width: int) -> None:
    """BadInput for a matrix that is no whole groups wide."""
    if width % GROUP:
        raise BadInput(f"4-bit weights need widths that are multiples of {GROUP}, got {width}; take 8 bits")


class ReducedHead(nn.Module):
    """A head that knows some tokens only: logits of the others are -inf, so that its distribution covers the whole vocabulary."""

    def __init__(self, head: Matrix, tokens: Tensor, vocab_size: int):
        super().__init__()
        self.head, self.tokens, self.vocab_size = head, frozen(tokens), vocab_size

    def forward(self, x: Tensor) -> Tensor:
        logits = x.new_full((*x.shape[:-1], self.vocab_size), -torch.inf)
        return logits.index_copy_(-1, self.tokens, self.head(x))


def quantized(matrix: Matrix, weights: Weights) -> Matrix:
    """The same product with other bits; itself for "full" and where it has them already."""
    kinds = {"full": type(matrix), "int8": Int8Linear, "int4": Int4Linear}
    if type(matrix) is kinds[weights]:
        return matrix
    return kinds[weights](matrix.restored(torch.float32), matrix.kernels)


def cheaper_head(
    head: Matrix,
    weights: Weights,
    tokens: tuple[int, ...] | None,  # that it is to know; None: all
    vocab_size: int,
    kernels: Kernels,  # of a head for fewer tokens, which every rank has whole
    dtype: torch.dtype,  # of rows that are taken out of a quantised head, with full weights
) -> Matrix | ReducedHead:
    """The same head with other bits or for fewer tokens; itself where neither is changed."""
    if tokens is None:
        return quantized(head, weights)
    kept = torch.tensor(tokens, device=head.weights.device)
    rows = Linear(kernels.whole(head.restored(dtype))[kept], kernels)
    return ReducedHead(quantized(rows, weights), kept, vocab_size)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained; one that is already a parameter stays the same one."""
    return tensor if isinstance(tensor, nn.Parameter) and tensor.is_contiguous() else nn.Parameter(tensor.contiguous(), requires_grad=False)
