"""What a cache holds after commits, rollbacks and slides: exactly the target's keys at exactly the right positions."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_prompt, tiny_model, tiny_spec

from planner.cost.memory import full_cache_bytes, sparse_cache_bytes
from planner.runtime.kv_cache import KVCache, SparseKVCache
from planner.runtime.weights import dtype_name
from planner.specs import CHUNK_SIZE, SparseKV

CPU = torch.device("cpu")
SPEC = tiny_spec(head_dim=4)
seeded = settings(derandomize=True, deadline=None, max_examples=80)


def numbered_cache(lengths, capacity, seed=0) -> KVCache:
    """A target's cache of random keys, whose values say (position, layer, stream, head)."""
    cache = KVCache(SPEC, batch=len(lengths), capacity=capacity, dtype=torch.float32, device=CPU)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=torch.Generator().manual_seed(seed)))
    layers, batch, heads, slots, _ = cache.values.shape
    axes = torch.meshgrid(*map(torch.arange, (layers, batch, heads, slots)), indexing="ij")
    cache.values.copy_(torch.stack([axes[3], axes[0], axes[1], axes[2]], -1).float())
    cache.lengths = list(lengths)
    return cache


def held(cache: SparseKVCache, target: KVCache, stream: int) -> torch.Tensor:
    """Positions [layers, H, visible] that a sparse cache shows of a stream, once keys and values are seen to be the target's there."""
    n = cache.lengths[stream]
    values = cache.values[:, stream, :, :n]
    positions = values[..., 0].long()
    layers, heads = values.shape[:2]
    assert (values[..., 1] == torch.arange(layers)[:, None, None]).all()
    assert (values[..., 2] == stream).all()
    assert (values[..., 3] == torch.arange(heads)[:, None]).all()
    keys = target.keys[:, stream].gather(2, positions[..., None].expand(-1, -1, -1, SPEC.head_dim))
    assert torch.equal(cache.keys[:, stream, :, :n], keys)
    return positions.sort(-1).values


def check_held(positions: torch.Tensor, policy: SparseKV, prompt_len: int, committed: int) -> torch.Tensor:
    """The visible positions are the fixed ones and the last of what was committed; the fixed ones."""
    F = policy.num_fixed(prompt_len)
    window = min(policy.budget - F, committed - F)
    assert positions.shape[-1] == F + window <= policy.budget
    assert (positions[..., F:] == torch.arange(committed - window, committed)).all()
    return positions[..., :F]


@st.composite
def policies(draw):
    if draw(st.booleans()):
        sink, recent = draw(st.integers(0, 5)), draw(st.integers(1, 12))
        return SparseKV(budget=sink + recent + draw(st.integers(0, 20)), sink=sink, recent=recent)
    sink, recent = draw(st.integers(0, CHUNK_SIZE)), draw(st.integers(CHUNK_SIZE, 14))
    return SparseKV(budget=max(recent + CHUNK_SIZE, sink + recent) + draw(st.integers(0, 20)), sink=sink, recent=recent, selection="chunk")


@st.composite
def histories(draw):
    """A policy, prompts shorter than, as long as and longer than its budget, and commits of 0..5 and sometimes of 60 tokens."""
    policy = draw(policies())
    lengths = draw(
        st.lists(st.one_of(st.just(policy.budget), st.just(policy.budget + 1), st.integers(1, policy.budget + 50)), min_size=1, max_size=3)
    )
    count = st.one_of(st.integers(0, 5), st.integers(0, 5), st.integers(0, 60))
    commits = draw(st.lists(st.tuples(*[count] * len(lengths)), max_size=12))
    return policy, lengths, commits, draw(st.integers(1, 6))


def no_queries(count):
    raise AssertionError("nobody asks")


def choose(cache, target):
    """Select for every stream, from all that is committed."""
    for b, length in enumerate(target.lengths):
        cache.select(target.stream(b), b, length, no_queries)


@seeded
@given(histories())
def test_a_sparse_cache_holds_the_fixed_tokens_and_the_last_committed_ones(history):
    policy, lengths, commits, draft_len = history
    capacity = max(lengths) + sum(max(counts) for counts in commits)
    target = numbered_cache(lengths, capacity)
    cache = SparseKVCache(SPEC, policy, draft_len=draft_len, batch=len(lengths), dtype=torch.float32, device=CPU)
    choose(cache, target)
    fixed = [check_held(held(cache, target, b), policy, length, length) for b, length in enumerate(lengths)]
    for b, length in enumerate(lengths):
        if policy.selection == "window" or length <= policy.budget:
            assert (fixed[b] == torch.arange(min(policy.sink, length))).all()
        else:
            assert (fixed[b].unflatten(-1, (-1, CHUNK_SIZE)) % CHUNK_SIZE == torch.arange(CHUNK_SIZE)).all()
    garbage = torch.full((len(lengths), SPEC.num_kv_heads, 1, SPEC.head_dim), torch.nan)
    for counts in commits:
        committed = cache.lengths
        for _ in range(draft_len):  # a round of drafts, written and then forgotten
            for layer in range(SPEC.num_layers):
                cache.append(layer, garbage, garbage)
            cache.commit([1] * len(lengths))
        cache.lengths = committed
        target.commit(list(counts))
        for b, count in enumerate(counts):
            cache.slide(target.stream(b), b, count)
        for b, length in enumerate(lengths):
            assert torch.equal(check_held(held(cache, target, b), policy, length, target.lengths[b]), fixed[b])


@pytest.mark.parametrize("selection", ["window", "chunk"])
def test_what_is_visible_is_what_the_policy_says_is_read(selection):
    policy = SparseKV(budget=24, sink=2, recent=8, selection=selection)
    for length in (1, 23, 24, 25, 80):
        target = numbered_cache([length], 200)
        cache = SparseKVCache(SPEC, policy, draft_len=3, batch=1, dtype=torch.float32, device=CPU)
        choose(cache, target)
        for count in (0, 1, 4, 30):
            target.commit([count])
            cache.slide(target.stream(0), 0, count)
            assert cache.lengths[0] == policy.read(target.lengths[0]) == policy.resident(target.lengths[0])


def test_choosing_again_is_choosing_from_a_longer_prompt():
    policy = SparseKV(budget=24, sink=2, recent=8, selection="chunk", refresh=30)
    target = numbered_cache([60], 200)
    cache = SparseKVCache(SPEC, policy, draft_len=3, batch=1, dtype=torch.float32, device=CPU)
    choose(cache, target)
    target.commit([35])
    cache.select(target.stream(0), 0, 90, no_queries)
    again = SparseKVCache(SPEC, policy, draft_len=3, batch=1, dtype=torch.float32, device=CPU)
    again.select(numbered_cache([90], 200), 0, 90, no_queries)
    again.slide(target.stream(0), 0, 5)
    assert torch.equal(held(cache, target, 0), held(again, target, 0))


def test_a_cache_that_slides_into_the_wrong_slots_is_caught():
    policy = SparseKV(budget=12, sink=2, recent=8)
    target = numbered_cache([30], 60)
    cache = SparseKVCache(SPEC, policy, draft_len=2, batch=1, dtype=torch.float32, device=CPU)
    choose(cache, target)
    cache._ring_start[0] += 1
    target.commit([3])
    cache.slide(target.stream(0), 0, 3)
    with pytest.raises(AssertionError):
        check_held(held(cache, target, 0), policy, 30, 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["window", "chunk"])
def test_bytes_are_the_predicted_ones(dtype, selection):
    name = dtype_name(dtype)
    full = KVCache(SPEC, batch=2, capacity=31, dtype=dtype, device=CPU)
    assert full.nbytes == full_cache_bytes(SPEC, name, capacity=31, batch=2)
    policy = SparseKV(budget=48, recent=16, selection=selection)
    sparse = SparseKVCache(SPEC, policy, draft_len=5, batch=3, dtype=dtype, device=CPU)
    assert sparse.nbytes == sparse_cache_bytes(SPEC, name, budget=48, draft_len=5, batch=3)
    assert sparse.capacity == 48 + 5 + 1


# ---- full caches


@dataclass
class Pass:
    """Numbered keys for one forward pass over n tokens of each stream."""

    n: int
    base: float

    def into(self, cache: KVCache):
        batch = cache.keys.shape[1]
        keys = self.base + torch.arange(self.n)[None, None, :, None].expand(batch, SPEC.num_kv_heads, self.n, SPEC.head_dim).float()
        return [cache.append(layer, keys, -keys) for layer in range(SPEC.num_layers)]


def test_what_was_not_committed_is_forgotten():
    cache = KVCache(SPEC, batch=1, capacity=10, dtype=torch.float32, device=CPU)
    Pass(4, 100).into(cache)
    cache.commit([2])
    keys, values = Pass(3, 200).into(cache)[1]
    assert keys[0, 0, :, 0].tolist() == [100, 101, 200, 201, 202]
    assert values[0, 0, :, 0].tolist() == [-100, -101, -200, -201, -202]
    assert cache.lengths == [2]


def test_streams_are_written_behind_their_own_lengths():
    cache = KVCache(SPEC, batch=3, capacity=10, dtype=torch.float32, device=CPU)
    Pass(4, 100).into(cache)
    cache.commit([4, 0, 2])
    keys, _ = Pass(2, 200).into(cache)[0]
    assert [keys[b, 1, : n + 2, 0].tolist() for b, n in enumerate(cache.lengths)] == [
        [100, 101, 102, 103, 200, 201],
        [200, 201],
        [100, 101, 200, 201],
    ]


def test_a_model_pass_that_was_not_committed_leaves_no_trace():
    model = tiny_model()
    tokens = torch.tensor([random_prompt(12)])
    cache = model.new_cache(40)
    with torch.inference_mode():
        model(tokens, torch.arange(12)[None], cache, cache.causal_mask(12))
        cache.commit([5])
        model(tokens.flip(1)[:, :6], torch.arange(5, 11)[None], cache, cache.causal_mask(6))  # drafts, all rejected
        again = model(tokens[:, 5:], torch.arange(5, 12)[None], cache, cache.causal_mask(7)).hidden
        fresh = model.new_cache(40)
        whole = model(tokens, torch.arange(12)[None], fresh, fresh.causal_mask(12)).hidden
    torch.testing.assert_close(again, whole[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[8], [8, 3], [3, 8]])
def test_more_than_fits_is_refused_before_anything_is_written(lengths):
    cache = KVCache(SPEC, batch=len(lengths), capacity=10, dtype=torch.float32, device=CPU)
    cache.lengths = list(lengths)
    Pass(2, 0).into(cache)
    before = cache.keys.clone()
    with pytest.raises(ValueError, match="holds 10 tokens, 11 are needed"):
        Pass(3, 100).into(cache)
    assert torch.equal(cache.keys, before)


@pytest.mark.parametrize("lengths", [[0], [5], [5, 5], [5, 0, 3], [0, 9]])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_mask_shows_what_is_committed_and_the_pass_up_to_itself(lengths, n):
    cache = KVCache(SPEC, batch=len(lengths), capacity=20, dtype=torch.float32, device=CPU)
    cache.lengths = list(lengths)
    mask = cache.causal_mask(n)
    visible = [[[slot <= length + row for slot in range(max(lengths) + n)] for row in range(n)] for length in lengths]
    if mask is None:
        assert all(all(row) for stream in visible for row in stream)
        return
    assert mask.shape == (1 if len(set(lengths)) == 1 else len(lengths), 1, n, max(lengths) + n)
    assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
    assert (mask == 0).squeeze(1).expand(len(lengths), -1, -1).tolist() == visible


def test_one_stream_of_a_cache_shares_its_memory_but_not_its_length():
    cache = numbered_cache([6, 9], 20)
    view = cache.stream(1)
    view.truncate(4)
    Pass(1, 500).into(view)
    assert (view.lengths, cache.lengths) == ([4], [6, 9])
    assert (cache.keys[:, 1, :, 4] == 500).all()
    assert not (cache.keys[:, 0, :, 4] == 500).any()


def test_truncating_never_lengthens():
    cache = numbered_cache([6, 9], 20)
    cache.truncate(7)
    assert cache.lengths == [6, 7]


# ---- hidden states beside the keys


def cache_with_features(lengths, taps=(0, 1)):
    """The cache's hidden states are 1000 * stream + 100 * tap + position."""
    cache = KVCache(SPEC, batch=len(lengths), capacity=12, dtype=torch.float32, device=CPU, taps=taps)
    stream, position, tap = torch.meshgrid(*(torch.arange(n) for n in (len(lengths), 12, len(taps))), indexing="ij")
    cache.features[:] = (1000 * stream + position + 100 * tap)[..., None]
    cache.lengths = list(lengths)
    return cache


@pytest.mark.parametrize("lengths", [[4], [4, 4], [4, 0, 2]])
def test_hidden_states_are_written_behind_each_stream_as_far_as_they_are_kept(lengths):
    cache = cache_with_features(lengths)
    before = cache.features.clone()
    cache.append_features({1: torch.full((len(lengths), 2, SPEC.hidden_size), -1.0), 7: torch.full((len(lengths), 2, SPEC.hidden_size), -2.0)})
    changed = (cache.features != before).all(-1)
    expected = [[[tap == 1 and length <= slot < length + 2 for tap in range(2)] for slot in range(12)] for length in lengths]
    assert changed.tolist() == expected
    assert (cache.features[changed] == -1).all()


def test_hidden_states_are_found_by_stream_position_and_layer():
    cache = cache_with_features([9, 5], taps=(2, 5))
    found = cache.features_at(torch.tensor([[0, 8, 3], [4, 1, 2]]), (5, 2))
    assert found.shape == (2, 3, 2 * SPEC.hidden_size)
    assert found[:, :, 0].tolist() == [[100, 108, 103], [1104, 1101, 1102]]
    assert found[:, :, SPEC.hidden_size].tolist() == [[0, 8, 3], [1004, 1001, 1002]]


def test_a_stream_shares_its_hidden_states_and_a_copy_has_its_own():
    cache = cache_with_features([6, 9])
    view = cache.stream(1)
    assert view.features.data_ptr() == cache.features[1].data_ptr() and view.taps == cache.taps
    copies = KVCache(SPEC, batch=3, capacity=10, dtype=torch.float32, device=CPU, taps=(0, 1))
    view.keys[:], view.values[:] = 5, 6
    copies.take(view, 7)
    assert copies.lengths == [7, 7, 7]
    for b in range(3):
        assert torch.equal(copies.features[b, :7], view.features[0, :7])
        assert (copies.keys[:, b, :, :7] == 5).all() and (copies.values[:, b, :, :7] == 6).all()
    assert not copies.features[:, 7:].any() and not copies.keys[:, :, :, 7:].any()


def test_a_cache_that_keeps_hidden_states_counts_them():
    plain, kept = (KVCache(SPEC, batch=2, capacity=12, dtype=torch.bfloat16, device=CPU, taps=taps) for taps in ((), (0, 1, 3)))
    assert kept.nbytes - plain.nbytes == 2 * 12 * 3 * SPEC.hidden_size * 2
