"""Logits to probabilities to tokens. Everything in float32, cumulative sums in float64; uniforms come from the caller."""

import torch
from torch import Tensor

from planner.specs import Sampler


def probabilities(
    logits: Tensor,  # [..., V], any dtype
    sampler: Sampler,
) -> Tensor:  # [..., V] float32, rows sum to 1
    """The distribution a sampler draws from. Greedy is a point mass, so one accept rule serves every temperature."""
    if sampler.greedy:
        return torch.zeros(logits.shape, dtype=torch.float32, device=logits.device).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.softmax(_cut(logits.float() / sampler.temperature, sampler), dim=-1)


def probability_of(
    logits: Tensor,  # [N, V]
    tokens: Tensor,  # [N]
    sampler: Sampler,
) -> Tensor:  # [N] float32
    """The probability that a sampler gives to one token per row, without building the whole distribution."""
    if sampler.greedy:
        return (logits.argmax(-1) == tokens).float()
    scaled = _cut(logits.float() / sampler.temperature, sampler)
    return (scaled.gather(-1, tokens[:, None]).squeeze(-1) - scaled.logsumexp(-1)).exp()


def sample(
    probs: Tensor,  # [B, V]
    uniform: Tensor,  # [B] float64 in [0, 1)
) -> Tensor:  # [B]
    """One token per row by inverting the cumulative distribution; a token of probability 0 is never drawn."""
    cumulative = probs.double().cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(-1)


def choose(
    logits: Tensor,  # [B, V]
    sampler: Sampler,
    uniform: Tensor,  # [B] float64 in [0, 1)
) -> Tensor:  # [B]
    """What a sampler draws, without a distribution where it is greedy."""
    return logits.argmax(-1) if sampler.greedy else sample(probabilities(logits, sampler), uniform)


def uniforms(generators: list[torch.Generator], count: int) -> Tensor:  # [B, count] float64 in [0, 1)
    """Random numbers, from a generator per stream."""
    rows = [torch.rand(count, generator=g, dtype=torch.float64, device=g.device) for g in generators]
    return torch.stack(rows)


def _cut(logits: Tensor, sampler: Sampler) -> Tensor:
    """Logits with what top_k and then top_p leave out set to -inf, in the order Hugging Face and vLLM apply them."""
    if 0 < sampler.top_k < logits.shape[-1]:
        smallest = logits.topk(sampler.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampler.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.double().softmax(-1).cumsum(-1)
        beyond = torch.cat([torch.zeros_like(mass[..., :1], dtype=torch.bool), mass[..., :-1] >= sampler.top_p], -1)  # the likeliest always stays
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, beyond)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
