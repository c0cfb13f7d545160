"""Trees along a written text are those that decoding builds: round by round when greedy, in law when sampling.

sizes[s, d] is the smallest tree of a round behind token s that holds the text's next d + 1 tokens.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from decoding import written
from tiny import BLOCK_HEAD, HEAD, NATIVE, native_kernels, random_prompt, tiny_model, with_block_head, with_head

from planner.draft_trees import choose_size
from planner.profiler.acceptance import replay_trees as stored_replay
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import dflash, draft_model, eagle3, make_drafter, self_sparse
from planner.runtime.drafters.trees import membership
from planner.runtime.model import prefill
from planner.specs import AdaptiveTree, DraftConfig, DrafterSpec, FixedTree, FullKV, Sampler, SparseKV, TreeCosts

T, MAX_SIZE = 24, 20
GREEDY, WARM = Sampler(), Sampler(temperature=0.8, top_p=0.9, top_k=20)
SELF_SPARSE, OWN = DrafterSpec(kind="self_sparse"), DrafterSpec(kind="draft_model", path="one layer")
DRAFTERS = [
    (SELF_SPARSE, SparseKV(budget=4, sink=1, recent=2)),
    (SELF_SPARSE, SparseKV(budget=21, recent=9, selection="chunk", refresh=3)),
    (OWN, FullKV()),
    (OWN, SparseKV(budget=3, sink=2, recent=1, storage="evict")),
    (OWN, SparseKV(budget=20, sink=4, recent=8)),
    (OWN, SparseKV(budget=21, recent=9, selection="retrieval", refresh=3)),
    (OWN, SparseKV(budget=21, recent=9, selection="chunk", refresh=1)),
    (DrafterSpec(kind="draft_model", path="one layer", vocab=12), FullKV()),  # fewer tokens than the largest tree has nodes
    (DrafterSpec(kind="dflash", path=BLOCK_HEAD.path, weights="int8", vocab=12), FullKV()),
    (BLOCK_HEAD, FullKV()),
    (BLOCK_HEAD, SparseKV(budget=20, sink=4, recent=8, storage="evict")),
    (HEAD, FullKV()),
]
each = pytest.mark.parametrize(("drafter", "kv"), DRAFTERS, ids=str)
STEPPED = TreeCosts(draft_s=0.004, verify_s=tuple(0.01 + 0.0005 * n + 0.004 * (n > 3) + 0.004 * (n > 11) for n in range(MAX_SIZE + 1)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    target = tiny_model(seed=5, sharpness=1.1)
    target.beside["one layer", None] = tiny_model(seed=5, sharpness=1.1, num_layers=1)  # the target's first: it agrees now and then
    return with_block_head(with_head(target, tmp_path_factory.mktemp("model") / "head"), tmp_path_factory.mktemp("block") / "head")


def rounds_of(model, prompt, config, sampler, count=1, output_len=T, seed=0):
    """Text and tokens and nodes of each round, by stream."""
    cache = model.new_cache(cache_capacity(len(prompt), output_len, config.verified), batch=count)
    logits = prefill(model, torch.tensor([prompt] * count), cache, chunk=16)
    rounds = list(
        decode(
            model, cache, [prompt] * count, logits, make_drafter(config, model, batch=count), draft_len=config.draft_len, sampler=sampler,
            generators=[torch.Generator().manual_seed(seed + b) for b in range(count)], max_new_tokens=output_len,
        )
    )  # fmt: skip
    texts = [[token for round_ in rounds for token in round_.tokens[b]] for b in range(count)]
    tokens = [[len(round_.tokens[b]) for round_ in rounds[1:] if round_.tokens[b]] for b in range(count)]
    return texts, tokens, [[round_.drafted[b] for round_ in rounds[1:] if round_.tokens[b]] for b in range(count)]


def walked(replayed, tree):
    """The same from a replay: tokens and nodes of each round of a text."""
    tokens, nodes, s = [], [], 0
    while s < len(replayed.sizes):
        probs = replayed.probs[s][: tree.max_size]
        n = np.count_nonzero(probs) if isinstance(tree, FixedTree) else choose_size(probs[probs > 0], tree.costs)
        tokens.append(1 + int(((replayed.sizes[s] > 0) & (replayed.sizes[s] <= n)).sum()))
        nodes.append(n)
        s += tokens[-1]
    return tokens, nodes


TREES = [FixedTree(size=4), FixedTree(size=20), AdaptiveTree(costs=STEPPED)]


@each
def test_greedy_rounds_are_those_of_the_decode_loop_one_by_one(model, drafter, kv):
    prompt = random_prompt(45, seed=45)
    (text,) = written(model, prompt, GREEDY)
    draft_lens = (1, 5)
    config = DraftConfig(drafter=drafter, kv=kv, draft_len=max(draft_lens))
    for draft_len, replayed in zip(draft_lens, make_drafter(config, model).replay_trees(text, draft_lens, MAX_SIZE), strict=True):
        assert replayed.sizes.shape == (T - 1, draft_len) and replayed.probs.shape == (T - 1, MAX_SIZE)
        for tree in TREES:
            texts, tokens, nodes = rounds_of(model, prompt, DraftConfig(drafter=drafter, kv=kv, draft_len=draft_len, tree=tree), GREEDY)
            assert texts == [text.tokens]
            assert walked(replayed, tree) == (tokens[0], nodes[0])


def test_the_comparison_sees_a_replay_that_looks_one_token_too_far(model):
    """A window one token wider."""
    prompt = random_prompt(45, seed=45)
    (text,) = written(model, prompt, GREEDY)
    tree, (drafter, kv) = FixedTree(size=4), DRAFTERS[0]
    other = DraftConfig(drafter=drafter, kv=SparseKV(budget=5, sink=1, recent=2), draft_len=6)
    (replayed,) = make_drafter(other, model).replay_trees(text, [6], MAX_SIZE)
    _, tokens, nodes = rounds_of(model, prompt, DraftConfig(drafter=drafter, kv=kv, draft_len=6, tree=tree), GREEDY)
    assert walked(replayed, tree) != (tokens[0], nodes[0])


def test_native_rounds_are_replayed(tmp_path):
    model = with_head(tiny_model(seed=5, sharpness=1.1, kernels=native_kernels(torch.float32), **NATIVE), tmp_path / "head")
    prompt = random_prompt(75, seed=2)
    (text,) = written(model, prompt, GREEDY)
    for drafter, kv in (DRAFTERS[1], DRAFTERS[-1]):
        (replayed,) = make_drafter(DraftConfig(drafter=drafter, kv=kv, draft_len=4), model).replay_trees(text, [4], MAX_SIZE)
        for tree in TREES:
            texts, tokens, nodes = rounds_of(model, prompt, DraftConfig(drafter=drafter, kv=kv, draft_len=4, tree=tree), GREEDY)
            assert texts == [text.tokens]
            assert walked(replayed, tree) == (tokens[0], nodes[0])


TEXTS = 60


@pytest.mark.parametrize(("drafter", "kv"), [DRAFTERS[0], *DRAFTERS[-2:]], ids=str)
def test_sampled_rounds_are_those_of_the_decode_loop_on_average(model, drafter, kv):
    prompt, tree = random_prompt(60, seed=4), AdaptiveTree(costs=STEPPED)
    texts = written(model, prompt, WARM, count=TEXTS, output_len=20, seed=10_000)
    config = DraftConfig(drafter=drafter, kv=kv, draft_len=4, tree=tree)
    _, tokens, nodes = rounds_of(model, prompt, config, WARM, count=TEXTS, output_len=20)
    walks = [walked(make_drafter(config, model).replay_trees(text, [4], MAX_SIZE)[0], tree) for text in texts]
    for ours, theirs in (([len(own) for own, _ in walks], map(len, tokens)), ([sum(own) for _, own in walks], map(sum, nodes))):
        ours, theirs = np.array(list(ours)), np.array(list(theirs))
        error = (ours.var(ddof=1) / TEXTS + theirs.var(ddof=1) / TEXTS) ** 0.5
        assert abs(ours.mean() - theirs.mean()) < 3.5 * error


@each
def test_replaying_in_smaller_passes_or_fewer_levels_changes_nothing(model, drafter, kv, monkeypatch):
    (text,) = written(model, random_prompt(60), WARM)
    config = DraftConfig(drafter=drafter, kv=kv, draft_len=5)
    whole = make_drafter(config, model).replay_trees(text, [2, 5], MAX_SIZE)
    for module in (self_sparse, eagle3, dflash):
        monkeypatch.setattr(module, "STARTS_PER_PASS", 7)
    monkeypatch.setattr(draft_model, "TOKENS_PER_PASS", 7)
    for (levels, expected), result in zip(
        zip((2, 5), whole, strict=True), make_drafter(config, model).replay_trees(text, [2, 5], MAX_SIZE), strict=True
    ):
        np.testing.assert_allclose(result.probs, expected.probs, atol=2e-4)
        assert (result.sizes == expected.sizes).mean() > 0.98  # a near-tie may fall either way
        (alone,) = make_drafter(config, model).replay_trees(text, [levels], MAX_SIZE)
        assert (alone.sizes == result.sizes).all()


def test_sizes_rise_along_the_text_until_they_end(model):
    (text,) = written(model, random_prompt(75), WARM)
    for drafter, kv in DRAFTERS:
        (replayed,) = make_drafter(DraftConfig(drafter=drafter, kv=kv, draft_len=5), model).replay_trees(text, [5], MAX_SIZE)
        assert (np.diff(replayed.probs, axis=1) <= 0).all()
        for row in replayed.sizes.tolist():
            inside = row[: row.index(0)] if 0 in row else row
            assert all(a < b for a, b in pairwise([0, *inside])) and not any(row[len(inside) :])
        assert 0 < np.count_nonzero(replayed.sizes) < replayed.sizes.size


def test_membership_by_hand():
    """Three starts, two levels, two candidates: 0.6 and 0.4 behind any."""
    tokens = np.array([[[1, 2], [3, 4]]] * 3)
    probs = np.full((3, 2, 2), [0.6, 0.4])
    text = [9, 2, 3, 4]  # behind 9 comes the second candidate, behind which a chain drafter did not look
    whole, chain = membership(tokens, probs, text, 6, "all"), membership(tokens, probs, text, 6, "chain")
    np.testing.assert_allclose(whole.probs[0], [0.6, 0.4, 0.36, 0.24, 0.24, 0.16])
    np.testing.assert_allclose(chain.probs[0], [0.6, 0.4, 0.36, 0.24, 0, 0])
    assert whole.sizes[0, 0] == chain.sizes[0, 0] == 2
    assert whole.sizes[0, 1] in (4, 5) and chain.sizes[0, 1] == 0
    assert whole.sizes[1].tolist() == [0, 0]  # 3 is no first candidate
    assert whole.sizes[2].tolist() == [0, 0] and not whole.probs[2].any()  # the last start leaves room for the target's token only
    np.testing.assert_allclose(whole.probs[1], [0.6, 0.4, 0, 0, 0, 0])


def test_what_is_stored_is_the_replay(model):
    (text,) = written(model, random_prompt(75), WARM)
    for drafter, kv in (DRAFTERS[0], DRAFTERS[-1]):
        config = DraftConfig(drafter=drafter, kv=kv, draft_len=4)
        samples = stored_replay(model, text, config, [2, 4], MAX_SIZE, 3)
        for sample, result in zip(samples, make_drafter(config, model).replay_trees(text, [2, 4], MAX_SIZE), strict=True):
            assert (sample.text, sample.drafter, sample.kv, sample.max_size) == (3, drafter, kv, MAX_SIZE)
            assert (sample.sizes.unpack() == result.sizes).all()
            np.testing.assert_allclose(sample.node_probs(), result.probs, rtol=0.03, atol=1e-4)
