"""Which committed tokens a sparse cache keeps for good. The recent window is the cache's business.

One function per policy, one source each. The same functions serve decoding and replay.
"""

import torch
from torch import Tensor

from planner.specs import CHUNK_SIZE, SparseKV


def select(
    policy: SparseKV,
    keys: Tensor,  # [layers, H, L, D] of one stream, after rotation
) -> Tensor:  # [layers, H, F] positions, ascending, F = policy.num_fixed(L)
    """The fixed tokens of a prompt of L tokens."""
    layers, heads, context_len, _ = keys.shape
    if policy.selection == "chunk" and context_len > policy.budget:
        return chunks_by_last_key(keys, policy.num_chunks, policy.budget - policy.num_chunks * CHUNK_SIZE)
    sinks = torch.arange(policy.num_fixed(context_len), device=keys.device)
    return sinks.expand(layers, heads, -1)


def chunks_by_last_key(
    keys: Tensor,  # [layers, H, L, D]
    num_chunks: int,
    recent: int,  # tokens at the end that the window holds
) -> Tensor:  # [layers, H, num_chunks * CHUNK_SIZE]
    """BudgetDraft (arXiv:2606.00144): per layer and KV head, the chunks whose mean key has the largest dot product
    with the key of the last token, which stands in for a query; the first chunk always.

    The paper keeps floor(budget / 8) chunks, drops the partial last chunk, and lets new tokens come on top. Here
    chunks that reach into the recent window are no candidates (a token would count twice), the window covers the
    partial last chunk, and window and chunks together are the budget.
    """
    candidates = (keys.shape[2] - recent) // CHUNK_SIZE
    mean_keys = keys[:, :, : candidates * CHUNK_SIZE].float().unflatten(2, (candidates, CHUNK_SIZE)).mean(3)
    scores = torch.einsum("lhcd,lhd->lhc", mean_keys, keys[:, :, -1].float())
    scores[:, :, 0] = torch.inf
    chosen = scores.topk(num_chunks, dim=-1).indices.sort(-1).values
    return (chosen[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE, device=keys.device)).flatten(2)
