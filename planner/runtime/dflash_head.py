"""DFlash heads (arXiv:2602.06036): a few layers that read hidden states of their target and draft a whole block in one pass.

A block is the last token, which the target has not seen, and masks behind it: block_size entries at that token's position
and the next ones. They see each other, those before and behind, and of every token before the block its context: what
the target's tapped layers say of it, side by side, put through `fc` and `hidden_norm`, becomes keys and values in every
layer by that layer's own matrices, without its attention norm. The output at a mask gives the distribution of the token
at its place. Queries, keys and context keys are rotated by their positions. Embedding and head are the target's.

Layout of published folders, as their readers have it: z-lab/dflash dflash/model.py (names, forward, positions), SGLang
speculative/dflash_utils.py (fields of the config and their usual values), vLLM models/qwen3_dflash.py (variants).

B  streams     n  entries of one pass     C  hidden_size     V  vocabulary size
"""

from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from planner.errors import BadInput
from planner.runtime.fields import Fields, read_json
from planner.runtime.head_files import check_folder, check_taps, listed_layers, read_tensors
from planner.runtime.kv_cache import KVCache, Mask, additive_mask
from planner.runtime.linear import Linear, Matrix, cheaper_head, frozen, quantized
from planner.runtime.model import Layer, Transformer, build_layer, layer_tensors
from planner.runtime.rope import Rotation, attention_factor, inverse_frequency, rotation
from planner.runtime.safetensors_folder import stored_tensors
from planner.runtime.weights import layer_shapes, read_spec
from planner.specs import ModelSpec, Weights

ARCHITECTURE = "DFlashDraftModel"
KIND = "a DFlash head"
NESTED = "dflash_config"
MAX_BLOCK = 256
MAX_LAYERS = 64
BLOCK_SIZE = 16  # of the reference, where a config does not say
RENAMED = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}  # how names begin
PLAIN = {  # what else a config may ask for, at the value that changes nothing
    "is_causal": False, "causal": False, "use_swa": False, "is_neox_style": True, "rope_is_neox_style": True, "attention_sink_bias": False,
    "add_swa_attention_sink_bias": False, "attention_value_scale": 1, "conv_kernel_size": 0, "conv_group_size": 0, "selector_rank": 0,
    "selector_top_k": 0, "output_multiplier": 1, "final_logit_softcapping": 0, "logit_scale": 1, "input_embedding_scale": 1,
    "use_aux_hidden_state": True, "fc_layernorm": False, "sample_from_anchor": False,
}  # fmt: skip
TAKEN = ("target_layer_ids", "mask_token_id", "block_size", "num_target_layers", "mask_token")


class DFlashHead(nn.Module):
    """Weights of a head, run by its target's kernels."""

    def __init__(
        self, spec: ModelSpec, taps: tuple[int, ...], block_size: int, mask_token: int, fingerprint: str, fc: Matrix, hidden_norm: Tensor,
        layers: list[Layer], norm: Tensor, target: Transformer,
    ):  # fmt: skip
        super().__init__()
        self.spec, self.taps, self.block_size, self.mask_token, self.fingerprint = spec, taps, block_size, mask_token, fingerprint
        self.fc, self.hidden_norm, self.layers, self.norm = fc, frozen(hidden_norm), nn.ModuleList(layers), frozen(norm)
        self.embedding, self.head, self.kernels, self.special_tokens = target.embedding, target.head, target.kernels, target.special_tokens
        self.inverse_frequency = inverse_frequency(spec, norm.device)  # [D/2]
        self._cheaper: dict[tuple, DFlashHead] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def copies_nbytes(self) -> int:
        """Bytes of the cheaper copies made so far, beyond what they share with this head."""
        shared = {id(parameter) for parameter in self.parameters()}
        return sum(parameter.nbytes for copy in self._cheaper.values() for parameter in copy.parameters() if id(parameter) not in shared)

    def inject(
        self,
        features: Tensor,  # [B, n, len(taps) * C] of tokens behind those that the cache holds
        positions: Tensor,  # [B, n]
        cache: KVCache,
    ) -> None:
        """Write the keys and values of tokens' contexts in every layer, without committing them."""
        kernels, eps = self.kernels, self.spec.rms_norm_eps
        context = kernels.add_norm(self.fc(features.to(self.dtype)), None, self.hidden_norm, eps)[1]
        turned = self._rotation(positions)
        for index, layer in enumerate(self.layers):
            qkv = kernels.finish_heads(layer.qkv(context), layer, eps)  # the queries are for nothing, and cheap beside the head
            _, keys, values = kernels.split_heads(qkv, turned, cache)
            cache.append(index, keys, values)

    def blocks(self, last: Tensor) -> Tensor:
        """[..] last tokens -> [.., block_size], each with the masks behind it."""
        masks = torch.full((*last.shape, self.block_size - 1), self.mask_token, dtype=last.dtype, device=last.device)
        return torch.cat([last[..., None], masks], -1)

    def forward(
        self,
        tokens: Tensor,  # [B, n]: one block or several
        positions: Tensor,  # [B, n]
        cache: KVCache,  # contexts committed
        mask: Mask,  # as Transformer.forward takes it; the usual one would be causal
    ) -> Tensor:  # [B, n, C]
        """Hidden states after the last norm; writes the entries' keys and values into the cache without committing them."""
        x = self.kernels.embed(tokens, self.embedding).to(self.dtype)
        return self.kernels.run(self.layers, self.norm, self.spec.rms_norm_eps, x, self._rotation(positions), cache, mask, ())[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., C] -> [.., V]."""
        return self.head(hidden.to(self.embedding.dtype))

    def cheaper(self, weights: Weights, tokens: tuple[int, ...] | None = None) -> "DFlashHead":
        """This head with quantised matrices and, given tokens, logits of them only, as Transformer.cheaper has it.

        What gives the logits is the target's, and the copy has its own: of all that a pass reads, it is the most.
        """
        if weights == "full" and tokens is None:
            return self
        if (weights, tokens) not in self._cheaper:
            layers = [layer.quantized(weights) for layer in self.layers]
            fingerprint = self.fingerprint if weights == "full" else f"{self.fingerprint}-{weights}"
            copy = DFlashHead(
                self.spec, self.taps, self.block_size, self.mask_token, fingerprint, quantized(self.fc, weights), self.hidden_norm, layers,
                self.norm, self,
            )  # fmt: skip
            copy.head = cheaper_head(self.head, weights, tokens, self.spec.vocab_size, self.kernels, self.embedding.dtype)
            self._cheaper[weights, tokens] = copy
        return self._cheaper[weights, tokens]

    def _rotation(self, positions: Tensor) -> Rotation:
        return rotation(positions, self.inverse_frequency, attention_factor(self.spec))


def load_head(path: str | Path, target: Transformer, dtype: torch.dtype) -> DFlashHead:
    """A head of this target from a folder as it is published, in safetensors. BadInput says what does not fit."""
    folder = Path(path)
    check_folder(folder, KIND)
    config = Fields(folder / "config.json", read_json(folder / "config.json"))
    options = _options(config)
    config.integer("num_hidden_layers", MAX_LAYERS)
    for name in ("hidden_size", "vocab_size"):
        if config.get(name) != getattr(target.spec, name):
            raise config.refusal(name, f"must be the target's, {getattr(target.spec, name)}, whose embedding and head it shares")
    spec = read_spec(folder)
    taps = _taps(options, spec.num_layers, target.spec.num_layers)
    block_size = options.integer("block_size", MAX_BLOCK, BLOCK_SIZE, least=2)
    mask_token = options.integer("mask_token_id", target.spec.vocab_size - 1, least=0)

    names = {}  # as we have them -> as the files do
    for there in (stored := stored_tensors(folder)):
        name = next((ours + there.removeprefix(theirs) for theirs, ours in RENAMED.items() if there.startswith(theirs)), there)
        if name in names:
            raise BadInput(f"{stored[there].file}: tensor {there} is also {names[name]}; keep one of them")
        names[name] = there
    found = {name: stored[there] for name, there in names.items()}
    # Published heads of Llama targets have the norms of Qwen3 on queries and keys, whatever model_type they declare.
    normed = spec.architecture == "qwen3" or "layers.0.self_attn.q_norm.weight" in found
    # Engines go by the target's context, as positions are the target's.
    spec = msgspec.structs.replace(spec, architecture="qwen3" if normed else "llama", max_context_len=target.spec.max_context_len)
    C = spec.hidden_size
    expected = {"fc.weight": (C, len(taps) * C), "hidden_norm.weight": (C,), "norm.weight": (C,)}
    for index in range(spec.num_layers):
        expected |= layer_shapes(spec, f"layers.{index}.")
    tensors, fingerprint = read_tensors(folder, KIND, spec, names, found, expected, dtype, target.device)
    decided = "-".join(map(str, [fingerprint, block_size, mask_token, *taps]))
    return build_head(spec, taps, block_size, mask_token, decided, tensors, target)


def build_head(
    spec: ModelSpec, taps: tuple[int, ...], block_size: int, mask_token: int, fingerprint: str, tensors: dict[str, Tensor], target: Transformer
) -> DFlashHead:  # fmt: skip
    """A head from its tensors, by their published names."""
    layers = []
    for index in range(spec.num_layers):
        part = {name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{index}.")}
        layers.append(build_layer(spec, part, target.kernels))
    fc = Linear(tensors["fc.weight"], target.kernels)
    return DFlashHead(spec, taps, block_size, mask_token, fingerprint, fc, tensors["hidden_norm.weight"], layers, tensors["norm.weight"], target)


def blocks_mask(
    sees: Tensor,  # [A, S] bool: which of S contexts each of A blocks sees
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:  # [1, 1, A * block_size, S + A * block_size]
    """The mask of a pass over several blocks side by side: each sees its contexts and itself."""
    own = torch.eye(len(sees), dtype=torch.bool, device=sees.device).repeat_interleave(block_size, 1)
    return additive_mask(torch.cat([sees, own], 1).repeat_interleave(block_size, 0), dtype)[None, None]


def published(head: DFlashHead, num_target_layers: int) -> tuple[dict, dict[str, Tensor]]:
    """config.json and tensors of a head, which load_head reads, in the head's dtype."""
    spec = head.spec
    if spec.rope_scaling is not None or spec.qkv_bias:
        what = "rope scaling" if spec.rope_scaling is not None else "biases of queries and keys"
        raise BadInput(f"a head is written without {what}, {spec.name} has them; take a target without")
    config = {
        "architectures": [ARCHITECTURE], "model_type": "qwen3" if spec.qk_norm else "llama", "attention_bias": False, "block_size": head.block_size,
        NESTED: {"mask_token_id": head.mask_token, "target_layer_ids": list(head.taps)}, "dtype": str(head.dtype).removeprefix("torch."),
        "head_dim": spec.head_dim, "hidden_act": "silu", "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size,
        "layer_types": ["full_attention"] * spec.num_layers, "max_position_embeddings": spec.max_context_len, "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers, "num_key_value_heads": spec.num_kv_heads, "num_target_layers": num_target_layers,
        "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope_theta, "tie_word_embeddings": spec.tie_embeddings, "vocab_size": spec.vocab_size,
    }  # fmt: skip
    tensors = {"fc.weight": head.fc.weights, "hidden_norm.weight": head.hidden_norm, "norm.weight": head.norm}
    for index, layer in enumerate(head.layers):
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer_tensors(spec, layer).items()}
    return config, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def evenly_spread(num_taps: int, num_layers: int) -> list[int]:
    """The layers that the reference taps where a config names none, counted from 0: from the second to the last but two."""
    if num_taps == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (num_taps - 1)) for i in range(num_taps)]


def _options(config: Fields) -> Fields:
    """What makes the file a DFlash head, by plain names: nested in dflash_config, or else beside it. Refuses heads that compute something else."""
    if config.get("architectures") != [ARCHITECTURE]:
        raise config.refusal("architectures", f"must be ['{ARCHITECTURE}'], {KIND}")
    nested = config.get(NESTED) or {}
    if not isinstance(nested, dict):
        raise config.refusal(NESTED, "must be an object")
    inner = Fields(config.source, {f"{NESTED}.{name}": value for name, value in nested.items()})
    if unknown := sorted(nested.keys() - PLAIN.keys() - {*TAKEN}):
        raise inner.refusal(f"{NESTED}.{unknown[0]}", "is not known, and may ask for something else than is computed here; it must be absent")
    for name, value in PLAIN.items():
        config.only(name, value)
        inner.only(f"{NESTED}.{name}", value)
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise config.refusal("layer_types", "must be full_attention throughout, sliding windows are not supported; give a kv budget instead")
    return Fields(config.source, {name: nested.get(name) if nested.get(name) is not None else config.get(name) for name in TAKEN})


def _taps(options: Fields, num_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """Layers after which the target is tapped, counted from 0."""
    if options.get("num_target_layers") not in (None, num_target_layers):
        raise options.refusal("num_target_layers", f"must be the number of the target's layers, {num_target_layers}")
    name = None if options.get("target_layer_ids") is None else "target_layer_ids"
    ids = listed_layers(options, name, evenly_spread(num_layers, num_target_layers))
    check_taps(options.source, "target_layer_ids", ids, tuple(ids), num_target_layers)
    return tuple(ids)
