"""Which tokens stay: sinks by rule, chunks by the last key, and never more than the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.runtime.kv_select import POOLING, chunks_by_last_key, chunks_by_last_query, most_attended, select
from planner.specs import CHUNK_SIZE, OBSERVATION, SparseKV

seeded = settings(derandomize=True, deadline=None, max_examples=60)


def random_keys(context_len, layers=2, heads=3, seed=0):
    return torch.randn(layers, heads, context_len, 8, generator=torch.Generator().manual_seed(seed))


def random_queries(seed=0):
    """Of two query heads per KV head, as select asks for them."""
    return lambda count: torch.randn(2, 3, 2, count, 8, generator=torch.Generator().manual_seed(seed + 100))


def chunks_of(positions: torch.Tensor) -> torch.Tensor:
    """[layers, H, chunks], once the positions are seen to be whole chunks in ascending order."""
    pieces = positions.unflatten(-1, (-1, CHUNK_SIZE))
    assert (pieces % CHUNK_SIZE == torch.arange(CHUNK_SIZE)).all()
    assert (positions.diff(dim=-1) > 0).all()
    return pieces[..., 0] // CHUNK_SIZE


@seeded
@given(st.sampled_from(["chunk", "retrieval"]), st.integers(8, 20), st.integers(0, 60), st.integers(1, 60), st.integers(0, 5))
def test_chunks_fill_the_budget_and_stay_out_of_the_window(selection, recent, more_budget, more_context, seed):
    policy = SparseKV(budget=recent + CHUNK_SIZE + more_budget, sink=0, recent=recent, selection=selection)
    context_len = policy.budget + more_context
    positions = select(policy, random_keys(context_len, seed=seed), random_queries())
    chunks = chunks_of(positions)
    assert chunks.shape[-1] == (policy.budget - recent) // 8
    assert positions.shape[-1] == policy.num_fixed(context_len)
    assert (chunks[..., 0] == 0).all()
    window = policy.budget - positions.shape[-1]  # what rounding left of the budget is the window's
    assert recent <= window < recent + CHUNK_SIZE
    assert positions.max() < context_len - window


@seeded
@given(st.integers(0, 8), st.integers(OBSERVATION, 40), st.integers(0, 60), st.integers(1, 60), st.integers(0, 5))
def test_snapkv_fills_the_budget_keeps_the_sinks_and_stays_out_of_the_window(sink, recent, more_budget, more_context, seed):
    policy = SparseKV(budget=recent + sink + more_budget, sink=sink, recent=recent, selection="snapkv")
    context_len = policy.budget + more_context
    positions = select(policy, random_keys(context_len, seed=seed), random_queries(seed))
    assert positions.shape == (2, 3, policy.num_fixed(context_len)) and positions.shape[-1] == policy.budget - recent
    assert (positions.diff(dim=-1) > 0).all()
    assert (positions[..., :sink] == torch.arange(sink)).all()
    assert positions.numel() == 0 or positions.max() < context_len - recent


@seeded
@given(st.integers(0, 8), st.integers(1, 20), st.integers(0, 30), st.integers(1, 80))
def test_a_window_keeps_the_first_tokens(sink, recent, more, context_len):
    policy = SparseKV(budget=sink + recent + more, sink=sink, recent=recent)
    positions = select(policy, random_keys(context_len), random_queries())
    assert positions.shape == (2, 3, policy.num_fixed(context_len))
    assert (positions == torch.arange(min(sink, context_len))).all()


@pytest.mark.parametrize("context_len", [1, 3, 30, 40])
def test_a_prompt_within_the_budget_is_kept_whole(context_len):
    policy = SparseKV(budget=40, sink=4, recent=16, selection="chunk")
    assert select(policy, random_keys(context_len), random_queries()).tolist() == torch.arange(min(4, context_len)).expand(2, 3, -1).tolist()


def test_chunks_are_ranked_as_the_formula_says():
    keys = random_keys(203)
    positions = chunks_by_last_key(keys, num_chunks=5, recent=20)
    for layer in range(2):
        for head in range(3):
            stream = keys[layer, head]
            scores = [float(stream[c * 8 : c * 8 + 8].mean(0) @ stream[-1]) for c in range((203 - 20) // 8)]
            best = sorted(range(1, len(scores)), key=lambda c: -scores[c])[:4]
            assert chunks_of(positions)[layer, head].tolist() == [0, *sorted(best)]


def test_each_layer_and_head_finds_its_own_planted_chunk():
    keys = random_keys(250) * 0.1
    keys[:, :, -1] = torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    planted = torch.tensor([[3, 9, 17], [20, 1, 12]])
    for layer in range(2):
        for head in range(3):
            start = int(planted[layer, head]) * 8
            keys[layer, head, start : start + 8] += 5 * keys[layer, head, -1]
    chunks = chunks_of(chunks_by_last_key(keys, num_chunks=2, recent=16))
    assert torch.equal(chunks[..., 1], planted)
    assert (chunks[..., 0] == 0).all()


def test_the_first_chunk_is_kept_however_badly_it_scores():
    keys = random_keys(100)
    keys[:, :, :8] = -100 * keys[:, :, -1:]
    assert (chunks_of(chunks_by_last_key(keys, num_chunks=3, recent=16))[..., 0] == 0).all()


@pytest.mark.parametrize("context_len", range(96, 105))
def test_a_chunk_that_reaches_into_the_window_is_no_candidate_however_well_it_scores(context_len):
    keys = random_keys(context_len) * 0.1
    keys[:, :, -1] = 1.0
    keys[:, :, (context_len - 16) // 8 * 8 : -1] = 50.0  # the partial chunk before the window, and the window
    positions = chunks_by_last_key(keys, num_chunks=2, recent=16)
    assert positions.max() < (context_len - 16) // 8 * 8


def test_only_the_last_key_asks():
    keys = random_keys(120)
    before = chunks_by_last_key(keys, num_chunks=4, recent=16)
    keys[:, :, -16:-1] = 7.0
    assert torch.equal(chunks_by_last_key(keys, num_chunks=4, recent=16), before)


def test_one_bfloat16_cache_is_scored_in_float32():
    """Means of eight bfloat16 keys would round; what is chosen equals the choice on the same keys in float32."""
    keys = random_keys(2000).bfloat16()
    assert torch.equal(chunks_by_last_key(keys, 40, 16), chunks_by_last_key(keys.float(), 40, 16))


def test_retrieval_ranks_chunks_by_the_last_query_of_each_group():
    keys, queries = random_keys(203), random_queries()(1)
    chunks = chunks_of(chunks_by_last_query(keys, queries, num_chunks=5, recent=20))
    for layer in range(2):
        for head in range(3):
            asking = queries[layer, head, :, 0].mean(0)
            scores = [float(keys[layer, head, c * 8 : c * 8 + 8].mean(0) @ asking) for c in range((203 - 20) // 8)]
            best = sorted(range(1, len(scores)), key=lambda c: -scores[c])[:4]
            assert chunks[layer, head].tolist() == [0, *sorted(best)]


def test_snapkv_counts_votes_as_the_formula_says():
    context_len, recent, count, sink = 90, 40, 9, 2
    keys, queries = random_keys(context_len), random_queries()(OBSERVATION)
    positions = most_attended(keys, queries, count, recent, sink)
    for layer in range(2):
        for head in range(3):
            votes = torch.zeros(context_len)
            for asking in queries[layer, head]:  # a query head of the group
                for row, query in enumerate(asking):
                    seen = context_len - OBSERVATION + row + 1
                    votes[:seen] += torch.softmax(keys[layer, head, :seen] @ query / 8**0.5, 0)
            votes = votes[: context_len - recent]
            pooled = [float(votes[max(0, i - POOLING // 2) : i + POOLING // 2 + 1].max()) for i in range(len(votes))]
            best = sorted(range(sink, len(pooled)), key=lambda i: -pooled[i])
            assert set(range(sink)) <= set(positions[layer, head].tolist())
            least = pooled[best[count - sink - 1]]  # neighbours of one peak have the same vote
            chosen = [pooled[i] for i in positions[layer, head].tolist()[sink:]]
            assert sorted(chosen, reverse=True) == pytest.approx([pooled[i] for i in best[: count - sink]], rel=1e-4) and min(chosen) >= least * (
                1 - 1e-4
            )


def test_snapkv_finds_what_the_window_looks_at():
    keys = random_keys(300) * 0.1
    needle = torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(1)), dim=-1)
    keys[:, :, 123] = 20 * needle
    queries = needle.expand(2, 3, 2, OBSERVATION, 8)
    positions = most_attended(keys, queries, POOLING, recent=32, sink=0)
    assert (positions == torch.arange(123 - POOLING // 2, 123 + POOLING // 2 + 1)).all()
