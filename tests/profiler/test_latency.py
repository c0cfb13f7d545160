"""Rounds timed in place, alone and side by side. Times are not looked at, only what was timed."""

import pytest
import torch
from made import NGRAM, SELF_SPARSE
from tiny import prefilled, random_prompt, tiny_model

from planner.profiler import latency
from planner.profiler.latency import PASSES, ROUNDS_PER_PASS, WARMUP_ROUNDS, Ground, measure_pass, merge_passes, rounds_room, side_by_side
from planner.specs import PLAIN, DraftConfig, FixedTree, Sampler, SparseKV

WARM = Sampler(temperature=1.0)
WINDOW = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=20, sink=4, recent=8), draft_len=3)
LOOKUP = DraftConfig(drafter=NGRAM, draft_len=3)
CONFIGS = [PLAIN, WINDOW, LOOKUP]


@pytest.fixture(scope="module")
def model():
    return tiny_model(sharpness=1.2)


@pytest.fixture(scope="module")
def grounds(model):
    found = {}
    for context_len in (40, 70):
        prompt = random_prompt(context_len)
        found[context_len] = Ground(prompt, *prefilled(model, [prompt], context_len + rounds_room(3)))
    return found


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_pass_times_a_few_rounds_of_every_cell(model, grounds, batch):
    samples, failures = measure_pass(model, grounds, CONFIGS, WARM, seed=0, batch=batch)
    assert not failures
    assert [(s.context_len, s.drafter, s.draft_len) for s in samples] == [(c, x.drafter, x.draft_len) for c in grounds for x in CONFIGS]
    for sample in samples:
        assert sample.batch == batch
        assert len(sample.draft_s) == len(sample.position) == ROUNDS_PER_PASS and len(sample.warmup_s) == WARMUP_ROUNDS
        assert len(sample.start_s) == 1
        least = sample.context_len + WARMUP_ROUNDS  # what the warm-up has committed at least
        assert least <= sample.position[0] and sample.position == sorted(sample.position)
        assert sample.position[-1] <= sample.context_len + (WARMUP_ROUNDS + ROUNDS_PER_PASS) * (sample.draft_len + 1)
        assert all(d == sample.draft_len for d in sample.drafted) if sample.drafter != NGRAM else max(sample.drafted) <= sample.draft_len


def test_streams_of_a_batch_go_different_ways_and_the_widest_is_reported(model, grounds, monkeypatch):
    seen, real = [], latency.decode

    def spy(*arguments, **named):
        for round_ in real(*arguments, **named):
            seen.append(round_)
            yield round_

    monkeypatch.setattr(latency, "decode", spy)
    [window], _ = measure_pass(model, {40: grounds[40]}, [WINDOW], WARM, seed=0, batch=4)
    assert any(len(set(round_.accepted)) > 1 for round_ in seen[1:])  # ragged
    emitted = [sum(len(tokens) for round_ in seen[1:i] for tokens in round_.tokens) / 4 for i in range(1 + WARMUP_ROUNDS, len(seen))]
    assert window.position == [round(40 + tokens) for tokens in emitted]
    seen.clear()
    [lookup], _ = measure_pass(model, {40: grounds[40]}, [LOOKUP], WARM, seed=0, batch=8)
    assert lookup.drafted == [max(round_.drafted) for round_ in seen[1 + WARMUP_ROUNDS :]]
    assert any(len(set(round_.drafted)) > 1 for round_ in seen)


def test_a_batch_is_made_of_copies_of_one_prompt(model, grounds):
    ground = grounds[40]
    copies = side_by_side(model, ground, 3)
    assert copies.cache.lengths == [40] * 3 and copies.cache.nbytes == 3 * ground.cache.nbytes
    for b in range(3):
        assert torch.equal(copies.cache.keys[:, b, :, :40], ground.cache.keys[:, 0, :, :40])
        assert torch.equal(copies.cache.values[:, b, :, :40], ground.cache.values[:, 0, :, :40])
        assert torch.equal(copies.first_logits[b], ground.first_logits[0])
    assert side_by_side(model, ground, 1) is ground


def test_measuring_a_batch_leaves_the_ground_as_it_was(model, grounds):
    ground = grounds[70]
    ground.cache.truncate(70)
    before = ground.cache.keys.clone()
    measure_pass(model, {70: ground}, CONFIGS, WARM, seed=0, batch=3)
    assert torch.equal(ground.cache.keys, before) and ground.cache.lengths == [70]


def test_one_context_is_copied_at_a_time(model, grounds, monkeypatch):
    """What is held is the largest batch's cache, not the sum over contexts."""
    import gc
    import weakref

    alive, most, real = weakref.WeakSet(), 0, side_by_side

    def spy(model, ground, batch):
        nonlocal most
        copies = real(model, ground, batch)
        alive.add(copies.cache)
        gc.collect()
        most = max(most, len(alive))
        return copies

    monkeypatch.setattr(latency, "side_by_side", spy)
    measure_pass(model, grounds, CONFIGS, WARM, seed=0, batch=2)
    assert most == 1


def test_a_batch_that_does_not_fit_is_reported_cell_by_cell_and_passed_over(model, grounds, monkeypatch):
    def too_large(model, ground, batch):
        if len(ground.prompt) == 70:
            raise torch.OutOfMemoryError("too large")
        return side_by_side(model, ground, batch)

    monkeypatch.setattr(latency, "side_by_side", too_large)
    samples, failures = measure_pass(model, grounds, CONFIGS, WARM, seed=0, batch=4)
    assert {s.context_len for s in samples} == {40}
    assert [failure.cell for failure in failures] == [
        "off at context 70, batch 4", "self_sparse window 20 K=3 at context 70, batch 4", "ngram K=3 at context 70, batch 4",
    ]  # fmt: skip
    again, failures = measure_pass(model, grounds, CONFIGS, WARM, seed=0, batch=4, skip={failure.cell for failure in failures})
    assert len(again) == len(samples) and not failures


def test_passes_are_merged_batch_by_batch(model, grounds):
    passes = [
        [sample for batch in (1, 2) for sample in measure_pass(model, {40: grounds[40]}, [PLAIN, WINDOW], WARM, seed=i, batch=batch)[0]]
        for i in range(PASSES)
    ]
    merged = merge_passes(passes)
    assert [(s.draft_len, s.batch) for s in merged] == [(0, 1), (3, 1), (0, 2), (3, 2)]
    assert all(len(s.draft_s) == PASSES * ROUNDS_PER_PASS and len(s.start_s) == PASSES for s in merged)


def test_trees_of_every_size_are_cells_of_their_own(model):
    prompt = random_prompt(40)
    ground = Ground(prompt, *prefilled(model, [prompt], 40 + rounds_room(3, 20)))
    trees = [DraftConfig(drafter=SELF_SPARSE, kv=WINDOW.kv, draft_len=3, tree=FixedTree(size=size)) for size in (1, 8, 20)]
    merged = merge_passes([measure_pass(model, {40: ground}, [WINDOW, *trees], WARM, seed=i)[0] for i in range(2)])
    assert [(s.draft_len, s.tree_size) for s in merged] == [(3, 0), (3, 1), (3, 8), (3, 20)]
    for sample in merged[1:]:
        assert sample.drafted == [sample.tree_size] * 2 * ROUNDS_PER_PASS
        assert min(sample.draft_s) > 0 and min(sample.verify_s) > 0 and min(sample.commit_s) > 0
