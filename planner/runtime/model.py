"""A decoder-only transformer of the Llama family. Cache, mask and hidden-state taps are arguments.

B  streams     n  new tokens of one pass     H  heads     G  KV heads     D  head_dim     S  keys in sight
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.runtime.kv_cache import KVCache
from planner.runtime.linear import linear
from planner.runtime.weights import Checkpoint
from planner.specs import ModelSpec

PREFILL_CHUNK = 512  # tokens of one prefill pass: long enough to keep the matrix units busy, short enough for its mask


class Output(NamedTuple):
    hidden: Tensor  # [B, n, hidden_size], after the final norm
    taps: dict[int, Tensor]  # layer -> [B, n, hidden_size], the residual stream after that layer


class Transformer(nn.Module):
    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        spec, weights = checkpoint.spec, checkpoint.tensors
        self.spec = spec
        self.fingerprint = checkpoint.fingerprint
        self.embedding = _frozen(weights["model.embed_tokens.weight"])
        self.head = self.embedding if spec.tie_embeddings else _frozen(weights["lm_head.weight"])
        self.norm = _frozen(weights["model.norm.weight"])
        self.layers = nn.ModuleList(Layer(spec, index, weights) for index in range(spec.num_layers))
        # Inverse frequencies in float32 whatever the weights are: bfloat16 angles are useless beyond 256 tokens.
        exponent = torch.arange(0, spec.head_dim, 2, device=self.norm.device, dtype=torch.float32) / spec.head_dim
        self.inverse_frequency = 1.0 / spec.rope_theta**exponent  # [D/2]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; a tied head counts once."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def forward(
        self,
        tokens: Tensor,  # [B, n]
        positions: Tensor,  # [B, n]
        cache: KVCache,
        mask: Tensor | None = None,  # [1 or B, 1, n, S], added to the scores; None: every key is visible
        taps: Collection[int] = (),
    ) -> Output:
        """Hidden states of the new tokens; writes their keys and values into the cache without committing them."""
        x = F.embedding(tokens, self.embedding)
        angles = positions[:, None, :, None].float() * self.inverse_frequency  # [B, 1, n, D/2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        if mask is not None:  # the heads of a group share keys: they stand below each other as rows of one query
            mask = mask.repeat(1, 1, self.spec.num_heads // self.spec.num_kv_heads, 1)
        tapped = {}
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, mask)
            if index in taps:
                tapped[index] = x
        return Output(rms_norm(x, self.norm, self.spec.rms_norm_eps), tapped)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., vocab_size], in the model's dtype."""
        return linear(hidden, self.head)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty full cache of this model's shape, dtype and device."""
        return KVCache(self.spec, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device)


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec, index: int, weights: dict[str, Tensor]):
        super().__init__()
        part = {name.split(".", 3)[3]: tensor for name, tensor in weights.items() if name.startswith(f"model.layers.{index}.")}
        self.spec, self.index = spec, index
        self.attention_norm = _frozen(part["input_layernorm.weight"])
        self.mlp_norm = _frozen(part["post_attention_layernorm.weight"])
        self.qkv = _frozen(torch.cat([part[f"self_attn.{name}_proj.weight"] for name in "qkv"]))
        self.attention_out = _frozen(part["self_attn.o_proj.weight"])
        self.gate_up = _frozen(torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]]))
        self.mlp_out = _frozen(part["mlp.down_proj.weight"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        spec = self.spec
        B, n, _ = x.shape
        H, G = spec.num_heads, spec.num_kv_heads
        qkv = linear(rms_norm(x, self.attention_norm, spec.rms_norm_eps), self.qkv)
        qk, v = qkv.view(B, n, H + 2 * G, spec.head_dim).transpose(1, 2).split([H + G, G], dim=1)
        q, k = rotate(qk, cos, sin).split([H, G], dim=1)
        keys, values = cache.append(self.index, k, v)
        rows = q.reshape(B, G, H // G * n, spec.head_dim)
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
        x = x + linear(attended.reshape(B, H, n, spec.head_dim).transpose(1, 2).reshape(B, n, -1), self.attention_out)

        gate, up = linear(rms_norm(x, self.mlp_norm, spec.rms_norm_eps), self.gate_up).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, self.mlp_out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv:1910.07467) in float32, back in the dtype of x. F.rms_norm takes five times as long on a CPU.

    x  [..., hidden_size]     weight  [hidden_size]
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return (x * scale * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves not interleaved (arXiv:2104.09864 as Hugging Face lays it out).

    x  [B, heads, n, D]     cos, sin  [B, 1, n, D/2]
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.inference_mode()
def prefill(
    model: Transformer,
    prompts: Tensor,  # [B, L], all of one length
    cache: KVCache,  # one length for all; what it holds comes before the prompts
    chunk: int = PREFILL_CHUNK,
) -> Tensor:  # [B, vocab_size]
    """Process and commit the prompts; the logits of the token that follows each."""
    B, L = prompts.shape
    if L < 1:
        raise ValueError("a prompt needs at least one token")
    for tokens in prompts.split(chunk, dim=1):
        n, start = tokens.shape[1], cache.lengths[0]
        positions = torch.arange(start, start + n, device=prompts.device).expand(B, n)
        hidden = model(tokens, positions, cache, cache.causal_mask(n)).hidden
        cache.commit([n] * B)
    return model.logits(hidden[:, -1])


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
