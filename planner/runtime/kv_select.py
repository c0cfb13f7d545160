"""Which committed tokens a sparse cache keeps for good. The recent window is the cache's business.

One function per policy, one source each. The same functions serve decoding and replay.

L  committed tokens     G  KV heads     R  query heads per KV head     D  head_dim     F  tokens kept
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from planner.specs import CHUNK_SIZE, OBSERVATION, SparseKV

POOLING = 7  # as the paper of SnapKV has it, with an observation window of 32

Queries = Callable[[int], Tensor]  # count -> [layers, G, R, count, D]: of the last committed tokens, rotated as keys are


def select(
    policy: SparseKV,
    keys: Tensor,  # [layers, G, L, D] of one stream, after rotation
    queries: Queries,
) -> Tensor:  # [layers, G, F] positions, ascending, F = policy.num_fixed(L)
    """The fixed tokens of a context of L tokens."""
    layers, heads, context_len, _ = keys.shape
    num_fixed = policy.num_fixed(context_len)
    if context_len > policy.budget:
        match policy.selection:
            case "chunk":
                return chunks_by_last_key(keys, num_fixed // CHUNK_SIZE, policy.budget - num_fixed)
            case "retrieval":
                return chunks_by_last_query(keys, queries(1), num_fixed // CHUNK_SIZE, policy.budget - num_fixed)
            case "snapkv":
                return most_attended(keys, queries(OBSERVATION), num_fixed, policy.recent, policy.sink)
    return torch.arange(num_fixed, device=keys.device).expand(layers, heads, -1)


def chunks_by_last_key(
    keys: Tensor,  # [layers, G, L, D]
    num_chunks: int,
    recent: int,  # tokens at the end that the window holds
) -> Tensor:  # [layers, G, num_chunks * CHUNK_SIZE]
    """BudgetDraft (arXiv:2606.00144): per layer and KV head, the chunks whose mean key has the largest dot product
    with the key of the last token, which stands in for a query; the first chunk always.

    The paper keeps floor(budget / 8) chunks, drops the partial last chunk, and lets new tokens come on top. Here
    chunks that reach into the recent window are no candidates (a token would count twice), the window covers the
    partial last chunk, and window and chunks together are the budget.
    """
    return _best_chunks(keys, keys[:, :, -1], num_chunks, recent)


def chunks_by_last_query(
    keys: Tensor,  # [layers, G, L, D]
    queries: Tensor,  # [layers, G, R, 1, D] of the last token
    num_chunks: int,
    recent: int,
) -> Tensor:  # [layers, G, num_chunks * CHUNK_SIZE]
    """TriForce (arXiv:2404.11912): the chunks whose mean key has the largest dot product with the query of the last token.

    The paper has a query per KV head. Where several share one, their mean asks. The window and the first chunk are kept
    as in chunks_by_last_key.
    """
    return _best_chunks(keys, queries[:, :, :, 0].float().mean(2), num_chunks, recent)


def most_attended(
    keys: Tensor,  # [layers, G, L, D]
    queries: Tensor,  # [layers, G, R, W, D] of the last W tokens
    count: int,
    recent: int,  # tokens at the end that the window holds, W of them the observation window
    sink: int,
) -> Tensor:  # [layers, G, count]
    """SnapKV (arXiv:2404.14469): the tokens before the window to which the last W give most attention in all, a vote being
    the largest within POOLING neighbours. One set per KV head, by the votes of all its queries.

    The paper has a query per KV head, and takes no token for granted; here the first `sink` are always kept.
    """
    L, W = keys.shape[2], queries.shape[3]
    candidates = L - recent
    visible = torch.arange(L, device=keys.device) <= torch.arange(L - W, L, device=keys.device)[:, None]  # [W, L]
    chosen = []
    for layer_keys, layer_queries in zip(keys, queries, strict=True):  # one layer at a time: the scores of all would not fit
        scores = torch.einsum("grwd,gld->grwl", layer_queries.float(), layer_keys.float()) / keys.shape[3] ** 0.5
        votes = scores.masked_fill(~visible, -torch.inf).softmax(-1)[..., :candidates].sum((1, 2))  # [G, candidates]
        votes = functional.max_pool1d(votes[:, None], POOLING, stride=1, padding=POOLING // 2)[:, 0]
        votes[:, :sink] = torch.inf
        chosen.append(votes.topk(count, dim=-1).indices.sort(-1).values)
    return torch.stack(chosen)


def _best_chunks(keys: Tensor, asking: Tensor, num_chunks: int, recent: int) -> Tensor:
    """asking  [layers, G, D]"""
    candidates = (keys.shape[2] - recent) // CHUNK_SIZE
    mean_keys = keys[:, :, : candidates * CHUNK_SIZE].float().unflatten(2, (candidates, CHUNK_SIZE)).mean(3)
    scores = torch.einsum("lgcd,lgd->lgc", mean_keys, asking.float())
    scores[:, :, 0] = torch.inf
    chosen = scores.topk(num_chunks, dim=-1).indices.sort(-1).values
    return (chosen[..., None] * CHUNK_SIZE + torch.arange(CHUNK_SIZE, device=keys.device)).flatten(2)
