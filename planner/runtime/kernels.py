"""The steps between the weights of a layer, in PyTorch: what every device runs, and what `native` replaces on a CPU.

B  streams     n  new tokens of one pass     H  heads     G  KV heads     D  head_dim     C  hidden_size
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.runtime.kv_cache import KVCache


class Rotation(NamedTuple):
    """Cosines and sines of the new tokens' positions, float32 whatever the weights are."""

    cos: Tensor  # [B, n, D/2]
    sin: Tensor


class Kernels:
    """Eager PyTorch. Subclasses replace what they do better and leave the rest to this."""

    execution = "eager"
    num_ranks = 1  # processes that share the model, `parallel`

    def forget(self) -> None:
        """Drop what is known of where weights lie: they have been moved or converted."""

    def embed(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """[B, n] -> [B, n, C]."""
        return F.embedding(tokens, embedding)

    def linear(self, x: Tensor, matrix: "Matrix") -> Tensor:  # noqa: F821  planner.runtime.linear
        """[..., in] -> [..., out]."""
        return matrix.multiply(x)

    def whole(self, rows: Tensor) -> Tensor:
        """All rows of a head, of which a rank may hold a part."""
        return rows

    def agreed(self, drawn: Tensor) -> Tensor:
        """What a round drew, once it is known that all ranks drew the same."""
        return drawn

    def run(
        self,
        layers: Sequence["Layer"],  # noqa: F821  planner.runtime.model
        norm: Tensor,  # [C]: the last norm's weight
        eps: float,
        x: Tensor,  # [B, n, C]: embedded tokens; not to be used afterwards
        rotation: Rotation,
        cache: KVCache,
        mask: Tensor | None,  # as attend takes it
        taps: Collection[int],  # layers whose output is wanted
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """All layers and the last norm: hidden states [B, n, C], and the residual stream after each tapped layer."""
        delta, tapped = None, {}  # what is still to be added to x: adding and the norm that follows are one step
        for index, layer in enumerate(layers):
            x, normed = self.add_norm(x, delta, layer.attention_norm, eps)
            delta = layer.attention_out(self.attend(layer.qkv(normed), rotation, cache, index, mask))
            x, normed = self.add_norm(x, delta, layer.mlp_norm, eps)
            delta = layer.mlp_out(self.silu_mul(layer.gate_up(normed)))
            if index in taps:
                tapped[index] = x + delta
        return self.add_norm(x, delta, norm, eps)[1], tapped

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + delta [B, n, C], and its root mean square norm (arXiv:1910.07467), which is computed in float32."""
        x = x if delta is None else x + delta
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # F.rms_norm takes five times as long on a CPU
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        return x, (x * scale * weight).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]: silu of the first half times the second."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(
        self,
        qkv: Tensor,  # [B, n, (H + 2G) * D]
        rotation: Rotation,
        cache: KVCache,
        layer: int,
        mask: Tensor | None,  # [1 or B, 1, n, S], added to the scores; None: causal behind each stream's committed tokens
    ) -> Tensor:  # [B, n, H * D]
        """Rotate queries and keys, write keys and values into the cache, attend."""
        q, k, v = self.split_heads(qkv, rotation, cache)
        keys, values = cache.append(layer, k, v)
        return attention(q, keys, values, cache.causal_mask(q.shape[2]) if mask is None else mask)

    def split_heads(self, qkv: Tensor, rotation: Rotation, cache: KVCache) -> list[Tensor]:  # [B, H or G or G, n, D] each
        """Queries and keys, rotated, and values."""
        B, n, width = qkv.shape
        G, D = cache.keys.shape[2], cache.keys.shape[4]
        H = width // D - 2 * G
        cos, sin = (part[:, None].to(qkv.dtype) for part in rotation)
        qk, v = qkv.view(B, n, H + 2 * G, D).transpose(1, 2).split([H + G, G], dim=1)
        return [*rotate(qk, cos, sin).split([H, G], dim=1), v]


class QueryKernels(Kernels):
    """For tokens whose keys and values are committed: writes nothing, and keeps the queries of every layer."""

    def __init__(self):
        self.queries: list[Tensor] = []  # by layer, [B, H, n, D]

    def attend(self, qkv: Tensor, rotation: Rotation, cache: KVCache, layer: int, mask: Tensor) -> Tensor:
        q, _, _ = self.split_heads(qkv, rotation, cache)
        self.queries.append(q)
        S = mask.shape[-1]
        return attention(q, cache.keys[layer, :, :, :S], cache.values[layer, :, :, :S], mask)


def attention(
    q: Tensor,  # [B, H, n, D]
    keys: Tensor,  # [B, G, S, D]
    values: Tensor,
    mask: Tensor | None,  # [1 or B, 1, n, S]
) -> Tensor:  # [B, n, H * D]
    """Softmax attention in PyTorch; the heads of a group share keys and stand below each other as rows of one query."""
    (B, H, n, D), G = q.shape, keys.shape[1]
    mask = None if mask is None else mask.repeat(1, 1, H // G, 1)
    attended = F.scaled_dot_product_attention(q.reshape(B, G, H // G * n, D), keys, values, attn_mask=mask)
    return attended.reshape(B, H, n, D).transpose(1, 2).reshape(B, n, H * D)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves not interleaved (arXiv:2104.09864 as Hugging Face lays it out).

    x  [B, heads, n, D]     cos, sin  [B, 1, n, D/2]
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
