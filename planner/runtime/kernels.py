"""The steps between the weights of a layer, in PyTorch: what every device runs, and what `native` replaces on a CPU.

B  streams     n  new tokens of one pass     H  heads     G  KV heads     D  head_dim     C  hidden_size
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.runtime.kv_cache import Ancestors, KVCache, Mask
from planner.runtime.rope import Rotation, rotate


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
        mask: Mask,
        taps: Collection[int],  # layers whose output is wanted
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """All layers and the last norm: hidden states [B, n, C], and the residual stream after each tapped layer."""
        delta, tapped = None, {}  # what is still to be added to x: adding and the norm that follows are one step
        for index, layer in enumerate(layers):
            x, normed = self.add_norm(x, delta, layer.attention_norm, eps)
            qkv = self.finish_heads(layer.qkv(normed), layer, eps)
            delta = layer.attention_out(self.attend(qkv, rotation, cache, index, mask))
            x, normed = self.add_norm(x, delta, layer.mlp_norm, eps)
            delta = layer.mlp_out(self.silu_mul(layer.gate_up(normed)))
            if index in taps:
                tapped[index] = x + delta
        return self.add_norm(x, delta, norm, eps)[1], tapped

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + delta [B, n, C], and its root mean square norm."""
        x = x if delta is None else x + delta
        return x, rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]: silu of the first half times the second."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def finish_heads(self, qkv: Tensor, layer: "Layer", eps: float) -> Tensor:  # noqa: F821  planner.runtime.model
        """[B, n, (H + 2G) * D] with the layer's bias, and the norms of its query and key heads, where it has them."""
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        if layer.q_norm is not None:
            D = len(layer.q_norm)
            H, rows = layer.attention_out.shape[1] // D, qkv.shape[-1] // D
            q, k, v = qkv.unflatten(-1, (rows, D)).split([H, (rows - H) // 2, (rows - H) // 2], dim=-2)
            qkv = torch.cat([rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps), v], dim=-2).flatten(-2)
        return qkv

    def split_heads(
        self,
        qkv: Tensor,  # [B, n, (H + 2G) * D], finished
        rotation: Rotation,
        cache: KVCache,  # whose keys have the shape of heads
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, n, D], [B, G, n, D], [B, G, n, D]
        """Queries, keys and values by head, queries and keys rotated."""
        B, n, width = qkv.shape
        G, D = cache.keys.shape[2], cache.keys.shape[4]
        H = width // D - 2 * G
        cos, sin = (part[:, None].to(qkv.dtype) for part in rotation)
        qk, v = qkv.view(B, n, H + 2 * G, D).transpose(1, 2).split([H + G, G], dim=1)
        return *rotate(qk, cos, sin).split([H, G], dim=1), v

    def attend(
        self,
        qkv: Tensor,  # [B, n, (H + 2G) * D]
        rotation: Rotation,
        cache: KVCache,
        layer: int,
        mask: Mask,
    ) -> Tensor:  # [B, n, H * D]
        """Rotate queries and keys, write keys and values into the cache, attend."""
        q, k, v = self.split_heads(qkv, rotation, cache)
        keys, values = cache.append(layer, k, v)
        if mask is None:
            mask = cache.causal_mask(q.shape[2])
        elif isinstance(mask, Ancestors):
            mask = cache.tree_mask(mask)
        return attention(q, keys, values, mask)


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (arXiv:1910.07467), computed in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # F.rms_norm takes five times as long on a CPU
    scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return (x * scale * weight).to(x.dtype)
