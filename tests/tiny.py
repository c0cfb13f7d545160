"""Small random models for tests: real architecture, seeded weights, milliseconds per pass."""

import pytest
import torch

from planner.errors import BadInput
from planner.runtime.kernels import Kernels
from planner.runtime.model import Transformer, build_model, prefill
from planner.runtime.native import NativeKernels
from planner.runtime.weights import Checkpoint, expected_shapes
from planner.specs import ModelSpec


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


def prefilled(model: Transformer, prompts: list[list[int]], capacity: int):
    """A cache with the prompts committed, stream by stream so that lengths may differ, and the logits behind each."""
    cache = model.new_cache(capacity, batch=len(prompts))
    logits = []
    for b, prompt in enumerate(prompts):
        view = cache.stream(b)
        logits.append(prefill(model, torch.tensor([prompt], device=model.device), view, chunk=16))
        cache.lengths[b] = view.lengths[0]
    return cache, torch.cat(logits)
