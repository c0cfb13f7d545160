"""Decide which drafted tokens to keep. Tensors in, tensors out: no model, no cache, no clock.

B  streams     K  tokens drafted this round     V  vocabulary size
"""

from typing import NamedTuple

import torch
from torch import Tensor

from planner.runtime.sampling import sample


class Verdict(NamedTuple):
    num_accepted: Tensor  # [B], 0..draft_lens
    next_tokens: Tensor  # [B], the recovered token after a rejection, else the bonus token


def verify_chain(
    draft_tokens: Tensor,  # [B, K]     drawn from draft_probs, row by row
    draft_probs: Tensor,  # [B, K, V]
    draft_lens: Tensor,  # [B]        how many of the K columns a stream really drafted
    target_probs: Tensor,  # [B, K+1, V]  row i: the target's distribution for draft token i
    uniform: Tensor,  # [B, K+1]   float64 in [0, 1): K decisions, then the next token
) -> Verdict:
    """Rejection sampling (arXiv:2211.17192, algorithm 1): the output follows the target exactly."""
    B, K = draft_tokens.shape
    stream = torch.arange(B, device=draft_tokens.device)
    p = target_probs[:, :K].gather(-1, draft_tokens[..., None]).squeeze(-1)  # [B, K]
    q = draft_probs.gather(-1, draft_tokens[..., None]).squeeze(-1)
    # Not u < p / q, where q may underflow; u in float64, so that u * q stays below q.
    accepted = (uniform[:, :K] * q < p) & (torch.arange(K, device=p.device) < draft_lens[:, None])
    n = accepted.long().cumprod(-1).sum(-1)  # [B]

    weights = target_probs[stream, n]  # [B, V]
    if K > 0:
        rejected_probs = draft_probs[stream, n.clamp(max=K - 1)]
        residual = (weights - rejected_probs).clamp_(min=0)
        use_residual = (n < draft_lens) & residual.any(-1)  # p == q up to rounding leaves nothing
        weights = torch.where(use_residual[:, None], residual, weights)
    return Verdict(n, sample(weights, uniform[:, K]))


def accept_prob_of(
    p: Tensor,  # [N] what the target gives to tokens that it wrote
    q: Tensor,  # [N] what the drafter gives to them
) -> Tensor:  # [N]
    """Given that the text says so, the chance that each was drafted and kept: min(1, q / p)."""
    # p = 0: a top_p or top_k cut that a wide pass puts elsewhere than the narrow one did; the limit of q / p.
    return torch.where(p > 0, q / p, (q > 0).float()).clamp(max=1.0)
