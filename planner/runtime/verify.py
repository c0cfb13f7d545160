"""Decide which drafted tokens to keep. Tensors in, tensors out: no model, no cache, no clock.

B  streams     K  tokens drafted this round     N  nodes of a tree     D  its levels     V  vocabulary size
"""

from typing import NamedTuple

import torch
from torch import Tensor

from planner.runtime.sampling import choose, sample
from planner.specs import Sampler


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


class TreeVerdict(NamedTuple):
    num_accepted: Tensor  # [B], 0..D
    tokens: Tensor  # [B, D+1], the accepted ones and behind them the target's next; further columns hold anything
    path: Tensor  # [B, D], nodes that were accepted, in order; further columns hold anything


def verify_tree(
    draft_tokens: Tensor,  # [B, N]
    parents: Tensor,  # [B, N]      -1: children of the root
    sizes: Tensor,  # [B]         how many of the N columns are nodes of a stream
    target_logits: Tensor,  # [B, N+1, V]  behind the root and behind each node
    sampler: Sampler,
    uniform: Tensor,  # [B, D+1]    float64 in [0, 1): one for each choice
) -> TreeVerdict:
    """The target chooses at the root and at every node that it comes to, until its choice is no child (DDTree, arXiv:2604.12989).

    What it writes is thus its own choice throughout, whatever the tree: plain decoding, at every temperature. Softmax and
    cuts of the sampler are computed for nodes on the path only.
    """
    (B, N), D = draft_tokens.shape, uniform.shape[1] - 1
    stream = torch.arange(B, device=draft_tokens.device)
    drafted = torch.arange(N, device=stream.device) < sizes[:, None]  # [B, N]
    node, on_path = torch.full_like(stream, -1), torch.ones_like(stream, dtype=torch.bool)
    tokens, path, num_accepted = stream.new_zeros(B, D + 1), stream.new_zeros(B, D), torch.zeros_like(stream)
    for level in range(D + 1 if N else 1):
        choice = choose(target_logits[stream, node + 1], sampler, uniform[:, level])
        tokens[:, level] = choice
        if level == D or N == 0:
            break
        child = drafted & (parents == node[:, None]) & (draft_tokens == choice[:, None])  # [B, N], at most one in each row
        on_path = on_path & child.any(1)
        if stream.device.type == "cpu" and not on_path.any():  # elsewhere looking takes longer than going on
            break
        node = torch.where(on_path, child.long().argmax(1), node)
        path[:, level] = node
        num_accepted += on_path
    return TreeVerdict(num_accepted, tokens, path)


def accept_prob_of(
    p: Tensor,  # [N] what the target gives to tokens that it wrote
    q: Tensor,  # [N] what the drafter gives to them
) -> Tensor:  # [N]
    """Given that the text says so, the chance that each was drafted and kept: min(1, q / p)."""
    # p = 0: a top_p or top_k cut that a wide pass puts elsewhere than the narrow one did; the limit of q / p.
    return torch.where(p > 0, q / p, (q > 0).float()).clamp(max=1.0)
