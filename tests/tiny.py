"""Small random models for tests: real architecture, seeded weights, milliseconds per pass."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from planner.errors import BadInput
from planner.runtime import dflash_head
from planner.runtime.eagle_head import load_head
from planner.runtime.kernels import Kernels
from planner.runtime.model import Transformer, build_model, prefill
from planner.runtime.native import NativeKernels
from planner.runtime.weights import Checkpoint, expected_shapes
from planner.specs import DrafterSpec, ModelSpec


def tiny_spec(**changes) -> ModelSpec:
    shape = {
        "name": "tiny", "architecture": "llama", "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_size": 32,
        "intermediate_size": 48, "vocab_size": 61, "max_context_len": 4096, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_embeddings": True,
    }  # fmt: skip
    return ModelSpec(**(shape | changes))


NATIVE = {"head_dim": 64, "hidden_size": 64, "intermediate_size": 96}  # a shape that the native kernels take


def tiny_model(seed: int = 0, device: str = "cpu", sharpness: float = 1.0, kernels: Kernels | None = None, **changes) -> Transformer:
    """Random Llama, or another architecture; a larger `sharpness` makes its distributions more peaked."""
    return build_model(tiny_checkpoint(seed, device, sharpness, **changes), kernels)


def tiny_checkpoint(seed: int = 0, device: str = "cpu", sharpness: float = 1.0, **changes) -> Checkpoint:
    spec = tiny_spec(**changes)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device)

    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    tensors = {
        "model.embed_tokens.weight": random(spec.vocab_size, spec.hidden_size) * 3 * sharpness,
        "model.norm.weight": torch.ones(spec.hidden_size, device=device),
    }
    for i in range(spec.num_layers):
        layer = {
            "self_attn.q_proj": random(q_size, spec.hidden_size) * 3, "self_attn.k_proj": random(kv_size, spec.hidden_size) * 3,
            "self_attn.v_proj": random(kv_size, spec.hidden_size) * 2, "self_attn.o_proj": random(spec.hidden_size, q_size),
            "mlp.gate_proj": random(spec.intermediate_size, spec.hidden_size), "mlp.up_proj": random(spec.intermediate_size, spec.hidden_size),
            "mlp.down_proj": random(spec.hidden_size, spec.intermediate_size),
            "input_layernorm": torch.ones(spec.hidden_size, device=device), "post_attention_layernorm": torch.ones(spec.hidden_size, device=device),
        }  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    for name, shape in expected_shapes(spec):  # drawn last, so that the rest is the same for all architectures
        if name not in tensors:
            tensors[name] = random(*shape) * 3 if name.endswith(".bias") else 1 + random(*shape) if "norm" in name else random(*shape)
    return Checkpoint(spec=spec, tensors=tensors, fingerprint="0" * 16)


HEAD = DrafterSpec(kind="eagle3", path="head")  # of models that with_head made


def head_files(model: Transformer, seed: int = 0, known: int = 45, ids: tuple[int, ...] = (2, 1), **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors of an EAGLE-3 head as they are published, ids being layers of the target that are read on entering.

    Random, but its attention looks for the token it is at and hands on a part of its embedding, so that some drafts are kept.
    """
    target, generator = model.spec, torch.Generator().manual_seed(seed)
    C, D, ffn = target.hidden_size, target.head_dim, 40
    G = max(1, C // (2 * D))
    H = 2 * G

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": C, "intermediate_size": ffn, "num_hidden_layers": 1,
        "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "vocab_size": target.vocab_size, "draft_vocab_size": known,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(ids), "use_aux_hidden_state": True},
    }  # fmt: skip
    part = torch.linalg.qr(random(C, G * D)).Q.T  # [G * D, C] orthonormal rows: what of an embedding is handed on
    by_head = part.unflatten(0, (G, D)).repeat_interleave(H // G, 0).flatten(0, 1)  # [H * D, C]
    kept = torch.randperm(target.vocab_size, generator=generator)[:known].sort().values
    tensors = {
        "fc.weight": random(C, len(ids) * C) * 0.5, "norm.weight": 1 + 0.1 * random(C),
        "lm_head.weight": model.embedding.detach().cpu().float()[kept] + 0.1 * random(known, C),
        "midlayer.input_layernorm.weight": 1 + 0.1 * random(C), "midlayer.hidden_norm.weight": 1 + 0.1 * random(C),
        "midlayer.post_attention_layernorm.weight": 1 + 0.1 * random(C),
        "midlayer.self_attn.q_proj.weight": torch.cat([by_head * 1.5, random(H * D, C) * 0.5], 1),
        "midlayer.self_attn.k_proj.weight": torch.cat([part * 1.5, random(G * D, C) * 0.5], 1),
        "midlayer.self_attn.v_proj.weight": torch.cat([part, random(G * D, C) * 0.3], 1),
        "midlayer.self_attn.o_proj.weight": by_head.T * (G / H) * 3 + 0.1 * random(C, H * D),
        "midlayer.mlp.gate_proj.weight": random(ffn, C), "midlayer.mlp.up_proj.weight": random(ffn, C), "midlayer.mlp.down_proj.weight": random(C, ffn),
        "d2t": kept - torch.arange(known), "t2d": torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, kept, True),
    }  # fmt: skip
    return config | changes, {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_head(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_head(model: Transformer, folder: Path, **options) -> Transformer:
    """The model with a head beside it, which HEAD names."""
    model.beside[HEAD.path, HEAD.dtype] = load_head(write_head(folder, *head_files(model, **options)), model, model.dtype)
    return model


BLOCK_HEAD = DrafterSpec(kind="dflash", path="block head")  # of models that with_block_head made


def block_head_files(
    model: Transformer, seed: int = 0, ids: tuple[int, ...] = (1, 0), block_size: int = 6, num_layers: int = 2, **changes
) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors of a DFlash head as they are published, ids being layers of the target whose output is read.

    Random, but its attention hands on most of the last token's embedding, some of the contexts and none of the masks, so
    that some drafts are kept. Of model_type llama, without the norms of queries and keys.
    """
    target, generator = model.spec, torch.Generator().manual_seed(seed)
    C, D, ffn = target.hidden_size, target.head_dim, 64
    G = C // D
    H = 2 * G

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    config = {
        "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "attention_bias": False, "block_size": block_size,
        "dflash_config": {"mask_token_id": target.vocab_size - 1, "target_layer_ids": list(ids)}, "head_dim": D, "hidden_act": "silu",
        "hidden_size": C, "intermediate_size": ffn, "layer_types": ["full_attention"] * num_layers, "max_position_embeddings": 64,
        "max_window_layers": num_layers, "model_type": "qwen3", "num_attention_heads": H, "num_hidden_layers": num_layers, "num_key_value_heads": G,
        "num_target_layers": target.num_layers, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": target.vocab_size,
    }  # fmt: skip
    mask = torch.nn.functional.normalize(model.embedding[target.vocab_size - 1].detach().cpu().float(), dim=0)
    tensors = {"fc.weight": random(C, len(ids) * C), "hidden_norm.weight": 0.15 + 0.1 * random(C), "norm.weight": 1 + 0.1 * random(C)}
    for i in range(num_layers):
        part = torch.linalg.qr(random(C, G * D)).Q.T
        part = part - part @ mask[:, None] * mask  # [G * D, C]: what of an embedding is handed on
        layer = {
            "self_attn.q_proj": random(H * D, C) * 2, "self_attn.k_proj": random(G * D, C) * 2, "self_attn.v_proj": part,
            "self_attn.o_proj": part.unflatten(0, (G, D)).repeat_interleave(H // G, 0).flatten(0, 1).T * 12 + 0.1 * random(C, H * D),
            "self_attn.q_norm": 1 + random(D), "self_attn.k_norm": 1 + random(D), "mlp.gate_proj": random(ffn, C), "mlp.up_proj": random(ffn, C),
            "mlp.down_proj": random(C, ffn), "input_layernorm": 1 + 0.1 * random(C), "post_attention_layernorm": 1 + 0.1 * random(C),
        }  # fmt: skip
        tensors |= {f"layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    config |= changes
    if config["model_type"] == "llama":
        tensors = {name: tensor for name, tensor in tensors.items() if "q_norm" not in name and "k_norm" not in name}
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def with_block_head(model: Transformer, folder: Path, **options) -> Transformer:
    """The model with a DFlash head beside it, which BLOCK_HEAD names."""
    files = write_head(folder, *block_head_files(model, **options))
    model.beside[BLOCK_HEAD.path, BLOCK_HEAD.dtype] = dflash_head.load_head(files, model, model.dtype)
    return model


def native_kernels(dtype: torch.dtype) -> NativeKernels:
    """The compiled kernels; without a compiler the test is skipped."""
    try:
        return NativeKernels(dtype)
    except BadInput as error:
        pytest.skip(str(error))


def random_prompt(length: int, seed: int = 0, vocab_size: int = 61) -> list[int]:
    """Random tokens, with a stretch repeated so that an n-gram drafter finds something."""
    tokens = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    half = length // 3
    tokens[-half:] = tokens[:half]
    return tokens


def prefilled(model: Transformer, prompts: list[list[int]], capacity: int, chunk: int = 16):
    """A cache with the prompts committed, stream by stream so that lengths may differ, and the logits behind each."""
    cache = model.new_cache(capacity, batch=len(prompts))
    logits = []
    for b, prompt in enumerate(prompts):
        view = cache.stream(b)
        logits.append(prefill(model, torch.tensor([prompt], device=model.device), view, chunk))
        cache.lengths[b] = view.lengths[0]
    return cache, torch.cat(logits)


def write_model(folder: Path, seed: int = 0, swapped: bool = False, **changes) -> Path:
    """A tiny model as a Hugging Face folder, a token for every byte; swapped: two of them the other way round. `changes` are of its spec."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swapped:
        e, t = alphabet.index("e"), alphabet.index("t")
        alphabet[e], alphabet[t] = "t", "e"
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    checkpoint = tiny_checkpoint(seed, **({"vocab_size": len(alphabet), "max_context_len": 256} | changes))
    save_file(checkpoint.tensors, folder / "model.safetensors")
    spec = checkpoint.spec
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size, "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context_len, "rope_theta": spec.rope_theta, "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
