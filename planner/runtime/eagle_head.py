"""EAGLE-3 heads (arXiv:2503.01840): one layer that reads hidden states of its target and drafts what follows.

The entry at position t joins the token at t + 1 with g, which is what the target's tapped layers say at t, put through
`fc`, or, where the token is a draft and the target has not seen t, the head's own output at t - 1's entry. Its output h
gives the distribution of the token at t + 2. Keys are rotated by t.

Layout of published folders, as their readers have it: SafeAILab/EAGLE eagle/model/cnets.py (names, forward, positions, d2t)
and issue 308 (taps); vLLM models/llama_eagle3.py (layers.0 for midlayer, no d2t); SGLang models/llama_eagle3.py.

B  streams     n  entries of one pass     C  hidden_size of the head     D  head_dim     V  vocabulary size
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.errors import BadInput
from planner.runtime.fields import MAX_VOCAB, MAX_WIDTH, Fields, one_line, read_json
from planner.runtime.head_files import check_folder, check_taps, listed_layers, read_tensors
from planner.runtime.kernels import Kernels
from planner.runtime.kv_cache import KVCache, Mask
from planner.runtime.linear import Linear, Matrix, ReducedHead, frozen
from planner.runtime.model import Layer, Transformer
from planner.runtime.rope import attention_factor, inverse_frequency, rotation
from planner.runtime.safetensors_folder import stored_tensors
from planner.runtime.weights import read_spec
from planner.specs import ModelSpec

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")  # as published, and as vLLM has it
KIND = "an EAGLE-3 head"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "parallel_drafting")  # heads that compute something else


class EagleHead(nn.Module):
    """Weights of a head, run by its target's kernels."""

    def __init__(
        self, spec: ModelSpec, taps: tuple[int, ...], fingerprint: str, embedding: Tensor, fc: Matrix, input_norm: Tensor, layer: Layer, norm: Tensor,
        head: nn.Module, kernels: Kernels,
    ):  # fmt: skip
        """`layer` has the norm of g as its attention norm, and takes rows of 2 C into attention."""
        super().__init__()
        self.spec, self.taps, self.fingerprint, self.kernels = spec, taps, fingerprint, kernels
        self.embedding, self.input_norm, self.norm = frozen(embedding), frozen(input_norm), frozen(norm)
        self.fc, self.layer, self.head = fc, layer, head
        self.inverse_frequency = inverse_frequency(spec, norm.device)  # [D/2]

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def fuse(self, features: Tensor) -> Tensor:
        """[B, n, len(taps) * the target's hidden_size] -> g [B, n, C]."""
        return self.fc(features.to(self.dtype))

    def forward(
        self,
        tokens: Tensor,  # [B, n], each one place behind its entry's position
        g: Tensor,  # [B, n, C]
        positions: Tensor,  # [B, n]
        cache: KVCache,
        mask: Mask = None,
    ) -> Tensor:  # [B, n, C]
        """h, before the last norm; writes the entries' keys and values into the cache without committing them."""
        kernels, layer, eps = self.kernels, self.layer, self.spec.rms_norm_eps
        embedded = F.embedding(tokens, self.embedding).to(self.dtype)
        embedded, normed = (kernels.add_norm(x, None, norm, eps)[1] for x, norm in ((embedded, self.input_norm), (g, layer.attention_norm)))
        qkv = layer.qkv(torch.cat([embedded, normed], -1))
        attended = kernels.attend(qkv, rotation(positions, self.inverse_frequency, attention_factor(self.spec)), cache, 0, mask)
        x, normed = kernels.add_norm(g, layer.attention_out(attended), layer.mlp_norm, eps)
        return x + layer.mlp_out(kernels.silu_mul(layer.gate_up(normed)))

    def logits(self, hidden: Tensor) -> Tensor:
        """h [.., C] -> [.., V] of the target's vocabulary, -inf for tokens that the head does not know."""
        return self.head(self.kernels.add_norm(hidden, None, self.norm, self.spec.rms_norm_eps)[1])

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for the head's own keys and values."""
        return KVCache(self.spec, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device)


def load_head(path: str | Path, target: Transformer, dtype: torch.dtype) -> EagleHead:
    """A head of this target from a folder as it is published, in safetensors. BadInput says what does not fit.

    Without an embedding of its own the head uses the target's. `t2d` is not read, as no engine reads it: it follows
    from d2t.
    """
    folder = Path(path)
    spec = read_spec(folder)  # config.json has the fields of a Llama model of one layer
    check_folder(folder, KIND)
    spec, taps = _checked_config(folder / "config.json", spec, target.spec)
    tensors, fingerprint = _load_tensors(folder, spec, len(taps), target, dtype)
    kernels, kept = target.kernels, tensors.get("d2t")

    def matrix(*names: str) -> Linear:
        return Linear(torch.cat([tensors[f"{name}.weight"] for name in names]), kernels)

    layer = Layer(
        tensors["midlayer.hidden_norm.weight"], tensors["midlayer.post_attention_layernorm.weight"],
        matrix(*(f"midlayer.self_attn.{name}_proj" for name in "qkv")), matrix("midlayer.self_attn.o_proj"),
        matrix("midlayer.mlp.gate_proj", "midlayer.mlp.up_proj"), matrix("midlayer.mlp.down_proj"),
    )  # fmt: skip
    head = matrix("lm_head")
    return EagleHead(
        spec, taps, "-".join([fingerprint, *map(str, taps)]), tensors.get("embed_tokens.weight", target.embedding), matrix("fc"),
        tensors["midlayer.input_layernorm.weight"], layer, tensors["norm.weight"],
        head if kept is None else ReducedHead(head, kept, target.spec.vocab_size), kernels,
    )  # fmt: skip


def _load_tensors(folder: Path, spec: ModelSpec, num_taps: int, target: Transformer, dtype: torch.dtype) -> tuple[dict[str, Tensor], str]:
    """Every tensor of the head by its name with midlayer, and the fingerprint of the files.

    d2t stands for the target's ids that the head knows, and is left out where it knows all.
    """
    stored, names = stored_tensors(folder), {}  # names: as we have them -> as the files do
    for there in stored:
        name = "midlayer." + there.removeprefix("layers.0.") if there.startswith("layers.0.") else there
        if name in names:
            raise BadInput(f"{stored[there].file}: tensor {one_line(there)} is also {one_line(names[name])}; keep one of them")
        names[name] = there
    found = {name: stored[there] for name, there in names.items()}
    own_embedding = "embed_tokens.weight" in found
    if not own_embedding and spec.hidden_size != target.spec.hidden_size:
        raise BadInput(
            f"{folder}: embed_tokens.weight must be there, as the target's embedding is {target.spec.hidden_size} wide and "
            f"the head {spec.hidden_size}, got none; use another head"
        )
    expected = dict(_expected_shapes(spec, target.spec, num_taps, own_embedding))
    if spec.vocab_size < target.spec.vocab_size or "d2t" in found:
        expected["d2t"] = (spec.vocab_size,)
    tensors, fingerprint = read_tensors(folder, KIND, spec, names, found, expected, dtype, target.device, integers=("d2t",), unread=("t2d",))
    if "d2t" in tensors:
        kept = _kept_tokens(found["d2t"].file, tensors.pop("d2t"), target.spec.vocab_size)
        tensors |= {"d2t": kept.to(target.device)} if len(kept) < target.spec.vocab_size else {}
    return tensors, fingerprint


def _checked_config(source: Path, spec: ModelSpec, target: ModelSpec) -> tuple[ModelSpec, tuple[int, ...]]:
    """The head's shape with the vocabulary that it drafts from, and the layers of the target that it reads."""
    config = Fields(source, read_json(source))
    if spec.architecture != "llama":
        raise config.refusal("model_type", "must be 'llama', the only one of EAGLE-3 heads that is supported")
    if config.get("architectures") not in [[name] for name in ARCHITECTURES]:
        raise config.refusal("architectures", f"must be one of {', '.join(ARCHITECTURES)}, an EAGLE-3 head")
    if config.get("eagle_config") is not None and not isinstance(config.get("eagle_config"), dict):
        raise config.refusal("eagle_config", "must be an object")
    nested = Fields(source, {f"eagle_config.{name}": value for name, value in (config.get("eagle_config") or {}).items()})
    for name in VARIANTS:
        config.only(name, False)
        nested.only(f"eagle_config.{name}", False)
    nested.only("eagle_config.use_aux_hidden_state", True)
    config.only("tie_word_embeddings", False)
    config.only("num_hidden_layers", 1)
    config.only("logit_scale", 1)
    if spec.vocab_size != target.vocab_size:
        raise config.refusal("vocab_size", f"must be the target's, {target.vocab_size}")
    width = config.integer("target_hidden_size", MAX_WIDTH, spec.hidden_size)
    if width != target.hidden_size:
        name = "hidden_size" if config.get("target_hidden_size") is None else "target_hidden_size"
        raise config.refusal(name, f"must be the hidden_size of the target, {target.hidden_size}")
    known = config.integer("draft_vocab_size", MAX_VOCAB, spec.vocab_size)
    if known > spec.vocab_size:
        raise config.refusal("draft_vocab_size", f"must be at most vocab_size ({spec.vocab_size})")
    taps = _taps(config if config.get(LAYER_IDS) is not None else nested, target.num_layers)
    # Published heads declare 2048 positions beside targets of 128K; engines go by the target (sgl-project/sglang#10787).
    return msgspec.structs.replace(spec, vocab_size=known, max_context_len=target.max_context_len), taps


def _taps(config: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers after which the target is tapped, counted from 0.

    The reference taps what enters layers 2, L // 2 and L - 3 (as vLLM and SGLang do without ids). Ids are published in
    two meanings: entering a layer, or, where the first is 1, leaving it (sgl-project/sglang#25454, by whose rule we go).
    """
    name = next((name for name in (LAYER_IDS, f"eagle_config.{LAYER_IDS}") if config.get(name) is not None), None)
    ids = listed_layers(config, name, [2, num_layers // 2, num_layers - 3])
    taps = tuple(layer if ids[0] == 1 else layer - 1 for layer in ids)
    check_taps(config.source, LAYER_IDS, ids, taps, num_layers)
    return taps


def _expected_shapes(spec: ModelSpec, target: ModelSpec, num_taps: int, own_embedding: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    C, ffn = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    if own_embedding:
        yield "embed_tokens.weight", (target.vocab_size, C)
    yield "fc.weight", (C, num_taps * target.hidden_size)
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        yield f"midlayer.{name}.weight", (C,)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"midlayer.self_attn.{name}_proj.weight", (rows, 2 * C)
    yield "midlayer.self_attn.o_proj.weight", (C, q)
    yield "midlayer.mlp.gate_proj.weight", (ffn, C)
    yield "midlayer.mlp.up_proj.weight", (ffn, C)
    yield "midlayer.mlp.down_proj.weight", (C, ffn)
    yield "norm.weight", (C,)
    yield "lm_head.weight", (spec.vocab_size, C)


def _kept_tokens(source: Path, offsets: Tensor, vocab_size: int) -> Tensor:
    """The target's id of each token that the head knows: d2t holds what is to be added to the head's own ids."""
    kept = offsets.long() + torch.arange(len(offsets))
    if int(kept.min()) < 0 or int(kept.max()) >= vocab_size:
        raise BadInput(
            f"{source}: d2t must lead to ids from 0 to {vocab_size - 1}, got {int(kept.min())} to {int(kept.max())}; use the target's head"
        )
    if len(kept.unique()) < len(kept):
        raise BadInput(f"{source}: d2t must lead to different ids, got {len(kept) - len(kept.unique())} twice; get the file again")
    if len(kept) == vocab_size and offsets.any():
        raise BadInput(
            f"{source}: d2t must be 0 where the head knows all {vocab_size} tokens, engines disagree about what else means; get the file again"
        )
    return kept
