"""Matrix products as the device likes them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
) -> Tensor:  # [..., out]
    """x @ weight.T. One row is a matrix-vector product, which a CPU does about a quarter faster as such."""
    if x.device.type == "cpu" and x.numel() == x.shape[-1]:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return F.linear(x, weight)
