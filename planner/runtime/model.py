"""A decoder-only transformer: Llama, Mistral, Qwen2, Qwen3. Cache, mask and hidden-state taps are arguments.

B  streams     n  new tokens of one pass     H  heads     G  KV heads     D  head_dim     S  keys in sight
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from planner.runtime.kernels import Kernels, QueryKernels
from planner.runtime.kv_cache import KVCache, Mask, additive_mask
from planner.runtime.linear import Linear, Matrix, cheaper_head, frozen, quantized
from planner.runtime.rope import attention_factor, inverse_frequency, rotation
from planner.runtime.weights import Checkpoint
from planner.specs import ModelSpec, Weights

PREFILL_CHUNK = 512  # tokens of one prefill pass: long enough to keep the matrix units busy, short enough for its mask


class Output(NamedTuple):
    hidden: Tensor  # [B, n, hidden_size], after the final norm
    taps: dict[int, Tensor]  # layer -> [B, n, hidden_size], the residual stream after that layer


class Transformer(nn.Module):
    """Weights of a checkpoint and the kernels that run them, or a drafter's cheaper copy of another one."""

    def __init__(
        self, spec: ModelSpec, fingerprint: str, embedding: Tensor, norm: Tensor, head: nn.Module, layers: list["Layer"], kernels: Kernels,
        special_tokens: tuple[int, ...] = (),
    ):  # fmt: skip
        super().__init__()
        self.spec, self.fingerprint, self.kernels, self.special_tokens = spec, fingerprint, kernels, special_tokens
        self.embedding, self.norm, self.head = frozen(embedding), frozen(norm), head
        self.layers = nn.ModuleList(layers)
        self.inverse_frequency = inverse_frequency(spec, norm.device)  # [D/2]
        self.attention_factor = attention_factor(spec)
        self._cheaper: dict[tuple, Transformer] = {}
        # Drafters with a checkpoint of their own, loaded for this target: (path, dtype), as DrafterSpec has them, and of one that
        # is there as a cheaper copy alone, (path, dtype, weights, vocab).
        self.beside: dict[tuple, nn.Module] = {}

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

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose output caches keep: what the heads beside this model read."""
        return tuple(sorted({layer for model in self.beside.values() if not isinstance(model, Transformer) for layer in model.taps}))

    @property
    def copies_nbytes(self) -> int:
        """Bytes of the cheaper copies made so far."""
        return sum(self.extra_nbytes(copy) for copy in self._cheaper.values())

    def extra_nbytes(self, copy: nn.Module) -> int:
        """Bytes that a cheaper copy or a head takes beyond what it shares with this model."""
        shared = {id(parameter) for parameter in self.parameters()}
        return sum(parameter.nbytes for parameter in copy.parameters() if id(parameter) not in shared)

    def forward(
        self,
        tokens: Tensor,  # [B, n]
        positions: Tensor,  # [B, n]
        cache: KVCache,
        mask: Mask = None,
        taps: Collection[int] = (),
    ) -> Output:
        """Hidden states of the new tokens; writes their keys and values into the cache without committing them, and of
        what was tapped that which the cache keeps."""
        output = Output(*self._run(self.kernels, tokens, positions, cache, mask, taps))
        if taps:
            cache.append_features(output.taps)
        return output

    @torch.inference_mode()
    def queries(
        self,
        tokens: Tensor,  # [n]
        end: int,  # position behind the last of them
        cache: KVCache,  # of one stream, in which they are committed
    ) -> Tensor:  # [layers, G, R, n, D], R query heads for each of G KV heads
        """The rotated queries of committed tokens, in a pass of their own: no pass keeps queries that nobody may ask for."""
        positions = torch.arange(end - len(tokens), end, device=tokens.device)
        visible = torch.arange(end, device=tokens.device) <= positions[:, None]
        recorder = QueryKernels()
        self._run(recorder, tokens[None], positions[None], cache, additive_mask(visible, cache.keys.dtype)[None, None], ())
        return torch.cat(recorder.queries).unflatten(1, (cache.keys.shape[2], -1))

    def _run(
        self, kernels: Kernels, tokens: Tensor, positions: Tensor, cache: KVCache, mask: Mask, taps: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        x = self.kernels.embed(tokens, self.embedding)
        turned = rotation(positions, self.inverse_frequency, self.attention_factor)
        return kernels.run(self.layers, self.norm, self.spec.rms_norm_eps, x, turned, cache, mask, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., vocab_size], in the model's dtype."""
        return self.head(hidden)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty full cache of this model's shape, dtype and device, with room for what heads beside it read."""
        return KVCache(self.spec, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device, taps=self.taps)

    def cheaper(self, weights: Weights, tokens: tuple[int, ...] | None = None) -> "Transformer":
        """This model with quantised matrices and, given tokens, a head that knows only them; made once and kept.

        Embedding and norms are shared, keys and values are interchangeable. Itself where nothing is changed.
        """
        if weights == "full" and tokens is None:
            return self
        if (weights, tokens) not in self._cheaper:
            head = cheaper_head(self.head, weights, tokens, self.spec.vocab_size, self.kernels, self.dtype)
            layers = [layer.quantized(weights) for layer in self.layers]
            same = weights == "full" or self.fingerprint.endswith(f"-{weights}")
            fingerprint = self.fingerprint if same else f"{self.fingerprint}-{weights}"
            self._cheaper[weights, tokens] = Transformer(
                self.spec, fingerprint, self.embedding, self.norm, head, layers, self.kernels, self.special_tokens
            )
        return self._cheaper[weights, tokens]


class Layer(nn.Module):
    """The weights of one layer; Kernels.run says what is done with them."""

    def __init__(
        self, attention_norm: Tensor, mlp_norm: Tensor, qkv: Matrix, attention_out: Matrix, gate_up: Matrix, mlp_out: Matrix,
        qkv_bias: Tensor | None = None,  # [(H + 2G) * D]
        q_norm: Tensor | None = None,  # [D], the same for every head
        k_norm: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.attention_norm, self.mlp_norm = frozen(attention_norm), frozen(mlp_norm)
        self.qkv, self.attention_out, self.gate_up, self.mlp_out = qkv, attention_out, gate_up, mlp_out
        self.qkv_bias, self.q_norm, self.k_norm = (None if part is None else frozen(part) for part in (qkv_bias, q_norm, k_norm))

    @property
    def finishes_heads(self) -> bool:
        """Whether anything happens to queries, keys and values before they are rotated."""
        return self.qkv_bias is not None or self.q_norm is not None

    def quantized(self, weights: Weights) -> "Layer":
        matrices = (quantized(matrix, weights) for matrix in (self.qkv, self.attention_out, self.gate_up, self.mlp_out))
        return Layer(self.attention_norm, self.mlp_norm, *matrices, self.qkv_bias, self.q_norm, self.k_norm)


def build_layer(spec: ModelSpec, part: dict[str, Tensor], kernels: Kernels) -> Layer:
    """One layer from its tensors, by their names within it."""
    matrices = [
        torch.cat([part[f"self_attn.{name}_proj.weight"] for name in "qkv"]),
        part["self_attn.o_proj.weight"],
        torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]]),
        part["mlp.down_proj.weight"],
    ]
    norms = part["input_layernorm.weight"], part["post_attention_layernorm.weight"]
    bias = torch.cat([part[f"self_attn.{name}_proj.bias"] for name in "qkv"]) if spec.qkv_bias else None
    head_norms = (part["self_attn.q_norm.weight"], part["self_attn.k_norm.weight"]) if spec.qk_norm else (None, None)
    return Layer(*norms, *(Linear(matrix, kernels) for matrix in matrices), bias, *head_norms)


def layer_tensors(spec: ModelSpec, layer: Layer) -> dict[str, Tensor]:
    """The tensors that build_layer was given, of a layer that is not quantised."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    found = {"input_layernorm.weight": layer.attention_norm, "post_attention_layernorm.weight": layer.mlp_norm}
    for name, part in zip("qkv", layer.qkv.weights.split([q, kv, kv]), strict=True):
        found[f"self_attn.{name}_proj.weight"] = part
    if layer.qkv_bias is not None:
        for name, part in zip("qkv", layer.qkv_bias.split([q, kv, kv]), strict=True):
            found[f"self_attn.{name}_proj.bias"] = part
    if layer.q_norm is not None:
        found |= {"self_attn.q_norm.weight": layer.q_norm, "self_attn.k_norm.weight": layer.k_norm}
    found |= {"self_attn.o_proj.weight": layer.attention_out.weights, "mlp.down_proj.weight": layer.mlp_out.weights}
    for name, part in zip(("gate", "up"), layer.gate_up.weights.chunk(2), strict=True):
        found[f"mlp.{name}_proj.weight"] = part
    return found


def build_model(checkpoint: Checkpoint, kernels: Kernels | None = None, special_tokens: tuple[int, ...] = ()) -> Transformer:
    """A checkpoint's tensors, fused to four matrices a layer; eager PyTorch unless other kernels are given.

    special_tokens are those that a reduced vocabulary always keeps.
    """
    spec, weights, kernels = checkpoint.spec, checkpoint.tensors, kernels or Kernels()
    layers = []
    for index in range(spec.num_layers):
        part = {name.split(".", 3)[3]: tensor for name, tensor in weights.items() if name.startswith(f"model.layers.{index}.")}
        layers.append(build_layer(spec, part, kernels))
    embedding = frozen(weights["model.embed_tokens.weight"])
    head = Linear(embedding if spec.tie_embeddings else weights["lm_head.weight"], kernels)
    return Transformer(spec, checkpoint.fingerprint, embedding, weights["model.norm.weight"], head, layers, kernels, special_tokens)


@torch.inference_mode()
def prefill(
    model: Transformer,
    prompts: Tensor,  # [B, L], all of one length
    cache: KVCache,  # one length for all; what it holds comes before the prompts
    chunk: int = PREFILL_CHUNK,
) -> Tensor:  # [B, vocab_size]
    """Process and commit the prompts; the logits of the token that follows each."""
    return model.logits(read_prompts(model, prompts, cache, chunk))


@torch.inference_mode()
def read_prompts(model: Transformer, prompts: Tensor, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:  # [B, hidden_size]
    """The same without a head; the hidden states of the last tokens."""
    B, L = prompts.shape
    if L < 1:
        raise ValueError("a prompt needs at least one token")
    for tokens in prompts.split(chunk, dim=1):
        n, start = tokens.shape[1], cache.lengths[0]
        positions = torch.arange(start, start + n, device=prompts.device).expand(B, n)
        hidden = model(tokens, positions, cache, taps=cache.taps).hidden
        cache.commit([n] * B)
    return hidden[:, -1]
