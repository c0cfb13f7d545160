"""What a drafter is trained to make likely, given what its teacher says of each position.

The head is the target's, tens of thousands of rows of which a position needs few: the loss and its gradient are computed
in one step over candidates, and no matrix of logits outlives it.

N  positions     C  hidden_size     V  vocabulary size     k  tokens the teacher names     A  candidates
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from planner.errors import BadInput

Variant = Literal["greedy", "sampling", "kl"]
VARIANTS = get_args(Variant)
FREQUENT = 4096  # first ids of the vocabulary, which byte-level BPE gives to frequent tokens: always candidates


def check_variant(variant: str, temperature: float) -> None:
    """ValueError for a variant that is not known, or that does not serve this temperature."""
    if variant not in VARIANTS:
        raise ValueError(f"a variant is one of {', '.join(VARIANTS)}, got {variant!r}; change --variant")
    if variant == "greedy" and temperature not in (0, 1):
        raise ValueError(f"variant greedy serves temperature 0, got {temperature:g}; drop --temperature, or take --variant kl")
    if variant != "greedy" and not 0.01 <= temperature <= 100:
        raise ValueError(f"variant {variant} serves temperatures from 0.01 to 100, got {temperature:g}; for 0 take --variant greedy")


class Teacher(NamedTuple):
    """The target's distribution behind each position, its likeliest tokens first."""

    tokens: Tensor  # [N, k] int64
    log_probs: Tensor  # [N, k] float32, at temperature 1, normalised over the whole vocabulary

    def wanted(self, variant: Variant, temperature: float) -> Tensor:  # [N, k] float32
        """The probabilities to reach. Below temperature 1 what lies outside the k tokens counts as nothing."""
        if variant == "greedy":
            return torch.zeros_like(self.log_probs).index_fill_(1, self.tokens.new_zeros(1), 1.0)
        if temperature == 1:
            return self.log_probs.exp()
        return (self.log_probs / temperature).softmax(-1)


class Candidates(NamedTuple):
    """The part of the vocabulary that a step's softmax runs over."""

    tokens: Tensor  # [A] int64, ascending
    log_weights: Tensor | None  # [A] float32: how many tokens of the vocabulary each stands for; None: all are there

    @classmethod
    def draw(cls, vocab_size: int, named: Tensor, num_sampled: int | None, generator: torch.Generator) -> "Candidates":
        """The frequent tokens, those that a teacher names, and of the rest a sample in which each stands for several.

        num_sampled  None: the whole vocabulary
        generator    on the CPU: what is drawn does not depend on the device
        """
        device, named = named.device, named.cpu()
        if num_sampled is None or FREQUENT + num_sampled >= vocab_size:
            return cls(torch.arange(vocab_size, device=device), None)
        sure = torch.zeros(vocab_size, dtype=torch.bool)
        sure[:FREQUENT] = True
        sure[named.flatten()] = True
        others = (~sure).nonzero().flatten()
        drawn = others[torch.randperm(len(others), generator=generator)[:num_sampled]]
        weights = torch.zeros(vocab_size)
        weights[drawn] = math.log(len(others) / max(1, len(drawn)))
        sure[drawn] = True
        tokens = sure.nonzero().flatten()
        return cls(tokens.to(device), weights[tokens].to(device))


def distilled(
    hidden: Tensor,  # [N, C] of the drafter
    head: Tensor,  # [V, C], frozen
    teacher: Teacher,
    candidates: Candidates,
    *,
    variant: Variant,
    temperature: float = 1.0,
    weights: Tensor | None = None,  # [N] of the positions; None: all the same
) -> Tensor:
    """Weighted mean over positions of the loss.

    greedy    -log q(the teacher's argmax), the token that verification accepts at temperature 0
    sampling  1 - sum over tokens of min(p, q), the chance that a draft is rejected at this temperature
    kl        the divergence of q from p at this temperature
    """
    if variant not in VARIANTS:
        raise BadInput(f"a variant is one of {', '.join(VARIANTS)}, got {variant!r}")
    weights = hidden.new_ones(len(hidden)) if weights is None else weights
    return _Distilled.apply(hidden, head, teacher.tokens, teacher.wanted(variant, temperature), candidates, variant, temperature, weights)


class _Distilled(torch.autograd.Function):
    ROWS = 512  # positions at once: bounds the matrix of logits

    @staticmethod
    def forward(context, hidden, head, named, wanted, candidates, variant, temperature, weights):
        rows = head[candidates.tokens] if candidates.log_weights is not None else head  # [A, C]
        place = torch.searchsorted(candidates.tokens, named) if candidates.log_weights is not None else named  # [N, k]
        loss, gradient = 0.0, torch.empty_like(hidden)
        share = weights.float() / weights.sum()
        for part in torch.arange(len(hidden), device=hidden.device).split(_Distilled.ROWS):
            p, at = wanted[part], place[part]
            z = (hidden[part].to(rows.dtype) @ rows.T).float()  # [n, A]
            if temperature != 1 and variant != "greedy":
                z /= temperature
            if candidates.log_weights is not None:
                z += candidates.log_weights
            z -= z.amax(-1, keepdim=True)
            own = z.gather(1, at)
            q = z.exp_()
            total = q.sum(-1, keepdim=True)
            q /= total
            if variant == "sampling":
                q_named = (own - total.log()).exp()
                below = (q_named < p).float() * q_named  # [n, k]: where more of q would be accepted
                losses = 1 - torch.minimum(p, q_named).sum(-1)
                g = q.mul_(below.sum(-1, keepdim=True)).scatter_add_(1, at, -below)
            else:
                log_q = own - total.log()
                losses = (p * (torch.where(p > 0, p, 1.0).log() - log_q)).sum(-1)
                g = q.mul_(p.sum(-1, keepdim=True)).scatter_add_(1, at, -p)
            scale = share[part] / (1.0 if variant == "greedy" else temperature)
            gradient[part] = ((g * scale[:, None]).to(rows.dtype) @ rows).to(hidden.dtype)
            loss += float((losses * share[part]).sum())
        context.save_for_backward(gradient)
        return hidden.new_tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(context, outer):
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None, None, None, None
