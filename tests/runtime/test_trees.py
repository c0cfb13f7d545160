"""Rounds of trees: the rule that accepts, the mask, the cache behind them; and that whatever the tree, the text is the target's."""

import pytest
import torch
from decoding import exact_pairs, joint_frequencies, p_value, run
from tiny import BLOCK_HEAD, HEAD, NATIVE, native_kernels, prefilled, random_prompt, tiny_model, with_block_head, with_head

from planner.profiler.timer import PhaseTimer
from planner.runtime import decode as decode_module
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.protocol import Draft
from planner.runtime.drafters.trees import candidates, draft_tree
from planner.runtime.kv_cache import Ancestors
from planner.runtime.sampling import choose, probabilities
from planner.runtime.verify import TreeVerdict, verify_tree
from planner.specs import AdaptiveTree, DraftConfig, DrafterSpec, FixedTree, FullKV, Sampler, SparseKV, TreeCosts

GREEDY, WARM = Sampler(), Sampler(temperature=1.0, top_k=12)
SELF_SPARSE, OWN = DrafterSpec(kind="self_sparse"), DrafterSpec(kind="draft_model", path="one layer")
WINDOW = SparseKV(budget=20, sink=4, recent=8)
PARENTS = [-1, 0, -1, 1, 0, 2]  # 0 (1 (3), 4), 2 (5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    target = tiny_model(seed=5, sharpness=1.5)
    target.beside["one layer", None] = tiny_model(seed=5, sharpness=1.5, num_layers=1)
    return with_block_head(with_head(target, tmp_path_factory.mktemp("model") / "head"), tmp_path_factory.mktemp("block") / "head")


@pytest.fixture(scope="module")
def soft_model():
    return tiny_model(seed=5, sharpness=0.9)


def adaptive(max_size, rate=None):
    return AdaptiveTree(costs=TreeCosts(draft_s=0.004, verify_s=tuple(0.01 + 0.0004 * n + 0.004 * (n > 3) for n in range(max_size + 1)), rate=rate))


# ---- the rule


def logits_saying(*tokens: int) -> torch.Tensor:
    """[1, len(tokens), 10], each row sure of a token."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), 10) * 50.0


@pytest.mark.parametrize(
    ("says", "accepted", "path"),
    [
        ((1, 2, 4, 9, 9, 9, 9), [1, 2, 4, 9], [0, 1, 3]),  # down the longest branch, and on
        ((1, 5, 9, 9, 9, 9, 9), [1, 5, 9], [0, 4]),
        ((3, 9, 9, 6, 9, 9, 7), [3, 6, 7], [2, 5]),
        ((3, 9, 9, 2, 9, 9, 9), [3, 2], [2]),  # a token that stands elsewhere in the tree
        ((8, 9, 9, 9, 9, 9, 9), [8], []),
    ],
)
@pytest.mark.parametrize("sampler", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_path_is_what_the_target_chooses_from_node_to_node(says, accepted, path, sampler):
    tokens, parents = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([PARENTS])
    uniform = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    verdict = verify_tree(tokens, parents, torch.tensor([6]), logits_saying(*says), sampler, uniform)
    n = int(verdict.num_accepted)
    assert verdict.path[0, :n].tolist() == path
    assert verdict.tokens[0, : n + 1].tolist() == accepted


def test_columns_behind_a_streams_nodes_are_no_nodes():
    tokens, parents = torch.tensor([[1, 2, 3, 4, 5, 6]] * 3), torch.tensor([PARENTS] * 3)
    logits = logits_saying(1, 2, 4, 9, 9, 9, 9).expand(3, -1, -1)
    verdict = verify_tree(tokens, parents, torch.tensor([6, 2, 0]), logits, GREEDY, torch.zeros(3, 4, dtype=torch.float64))
    assert verdict.num_accepted.tolist() == [3, 2, 0]
    assert [row[: n + 1] for n, row in zip([3, 2, 0], verdict.tokens.tolist(), strict=True)] == [[1, 2, 4, 9], [1, 2, 4], [1]]


@pytest.mark.parametrize("sampler", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_tree_of_no_nodes_is_plain_decoding(sampler):
    logits, uniform = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.3, 0.1], [0.9, 0.2]], dtype=torch.float64)
    none = torch.zeros(2, 0, dtype=torch.long)
    verdict = verify_tree(none, none, torch.tensor([0, 0]), logits, sampler, uniform)
    assert verdict.num_accepted.tolist() == [0, 0]
    assert torch.equal(verdict.tokens[:, 0], choose(logits[:, 0], sampler, uniform[:, 0]))


# ---- the mask and the cache


def test_a_node_sees_its_ancestors_and_itself():
    parents = torch.tensor([PARENTS, [-1, 0, 1, 2, 3, 4], [-1] * 6])
    mask = Ancestors.of(parents, 6)
    for b, row in enumerate(parents.tolist()):
        for node in range(-1, 6):
            line, at = {node}, node
            while at != -1:
                at = row[at]
                line.add(at)
            assert {j - 1 for j in range(7) if mask.visible[b, node + 1, j]} == line
    assert mask.depths.tolist() == [[0, 1, 2, 1, 3, 2, 2], [0, 1, 2, 3, 4, 5, 6], [0] + [1] * 6]


@pytest.mark.parametrize("execution", ["eager", "native"])
@torch.inference_mode()
def test_every_path_of_a_tree_pass_is_the_pass_over_it_alone(execution):
    """Hidden states at the nodes; and, once a path was compacted, those of the tokens that follow it."""
    model = tiny_model(seed=5, kernels=native_kernels(torch.float32) if execution == "native" else None, **NATIVE)
    prompts = [random_prompt(length, seed=length) for length in (9, 40)]
    tokens = torch.tensor([[50, 1, 2, 3, 4, 5, 6], [51, 7, 8, 9, 10, 11, 12]])
    mask = Ancestors.of(torch.tensor([PARENTS, [-1, -1, 1, 1, 3, -1]]), 4)
    paths = [[[0, 1, 3], [0, 4], [2, 5], []], [[1, 3, 4], [1, 2], [5], []]]
    for first, second in zip(*paths, strict=True):
        cache, _ = prefilled(model, prompts, 60)
        lengths = torch.tensor(cache.lengths)[:, None]
        hidden = model(tokens, lengths + mask.depths, cache, mask).hidden
        cache.compact([first, second])
        cache.commit([len(first) + 1, len(second) + 1])
        next_hidden = model(torch.tensor([[20], [21]]), torch.tensor(cache.lengths)[:, None], cache).hidden[:, 0]
        for b, path in enumerate((first, second)):
            alone, _ = prefilled(model, prompts[b : b + 1], 60)
            places = [0, *(node + 1 for node in path)]
            line = torch.cat([tokens[b, places], torch.tensor([20 + b])])
            expected = model(line[None], torch.arange(len(line))[None] + alone.lengths[0], alone).hidden[0]
            torch.testing.assert_close(hidden[b, places], expected[:-1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(next_hidden[b], expected[-1], atol=1e-4, rtol=1e-4)
            end = alone.lengths[0] + len(line) - 1
            torch.testing.assert_close(cache.keys[:, b, :, :end], alone.keys[:, 0, :, :end], atol=1e-4, rtol=1e-4)


def test_hidden_states_are_compacted_with_the_keys(model):
    cache, _ = prefilled(model, [random_prompt(9), random_prompt(5)], 30)
    cache.features.copy_(torch.arange(cache.features.numel()).view(cache.features.shape))
    before = cache.features.clone()
    cache.compact([[1, 4], [0, 3, 5]])
    for b, places in enumerate(([10, 12, 15], [6, 7, 10, 12])):  # the length is 9, or 5: the root lies there, node i behind it
        slots = [[9, 11, 14], [5, 6, 9, 11]][b]
        assert places[0] == slots[0] + 1
        assert torch.equal(cache.features[b, slots[0] : slots[0] + len(slots)], before[b, slots])
        assert torch.equal(cache.features[b, : slots[0]], before[b, : slots[0]])


# ---- shaping


@pytest.mark.parametrize("shape", [(64 * 20,), (2, 3, 64 * 20), (2, 61), (2, 64 * 20 + 1)], ids=str)
@pytest.mark.parametrize("count", [1, 7, 19, 30, 100])
def test_candidates_are_the_likeliest_tokens(shape, count):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    for sampler, temperature in ((GREEDY, 1.0), (Sampler(temperature=0.6, top_p=0.5, top_k=3), 0.6)):
        tokens, probs = candidates(logits, sampler, count)
        expected = (logits / temperature).softmax(-1).topk(min(count, shape[-1]))
        assert torch.equal(tokens, expected.indices)
        torch.testing.assert_close(probs, expected.values)


def test_streams_have_trees_of_their_own_sizes():
    probs = torch.tensor([[[0.9, 0.05], [0.9, 0.05]], [[0.4, 0.3], [0.4, 0.3]], [[0.9, 0.05], [0.9, 0.05]]])
    tokens = torch.arange(12).view(3, 2, 2)
    draft = draft_tree(tokens, probs, [2, 2, 0], FixedTree(size=3), "chain")
    assert (draft.lens, draft.probs) == ([3, 3, 0], None)
    assert draft.tokens[:2].tolist() == [[0, 2, 1], [4, 5, 6]]
    assert draft.parents[:2].tolist() == [[-1, 0, -1], [-1, -1, 0]]
    chosen = draft_tree(tokens, probs, [2, 1, 0], AdaptiveTree(costs=TreeCosts(draft_s=0.0, verify_s=(1.0, 1.3, 1.6, 1.9))), "chain")
    assert chosen.lens == [2, 1, 0]
    assert draft_tree(tokens, probs, [0, 0, 0], FixedTree(size=3), "all").tokens.shape == (3, 0)


# ---- whole texts


SIZES = [*range(1, 10), 13, 16, 17, 25, 32, 33, 48, 63, 64]


@pytest.mark.parametrize("execution", ["eager", "native"])
@pytest.mark.parametrize(
    ("drafter", "kv"),
    [(SELF_SPARSE, SparseKV(budget=6, sink=1, recent=2)), (OWN, WINDOW), (HEAD, FullKV()), (BLOCK_HEAD, FullKV())],
    ids=["self_sparse", "draft_model", "eagle3", "dflash"],
)
def test_greedy_output_is_plain_greedy_output_for_every_size(drafter, kv, execution, model, tmp_path):
    """A size in turn for one text each; ragged batches and the other policies are among the contracts of test_drafters.py."""
    if execution == "native":
        model = tiny_model(seed=5, sharpness=1.5, kernels=native_kernels(torch.float32), **NATIVE)
        model.beside["one layer", None] = tiny_model(seed=5, sharpness=1.5, num_layers=1, **NATIVE)
        model = with_block_head(with_head(model, tmp_path / "head"), tmp_path / "block head", model_type="llama")  # all of it compiled
    prompt = random_prompt(33, seed=2)
    plain = run(model, [prompt], new_tokens=24)[0]
    for size in SIZES:
        for tree in (FixedTree(size=size), adaptive(size)) if size in (1, 9, 64) else (FixedTree(size=size),):
            texts, rounds = run(model, [prompt], DraftConfig(drafter=drafter, kv=kv, draft_len=5, tree=tree), new_tokens=24)
            assert texts == plain, tree
            assert sum(sum(r.accepted) for r in rounds) > 0, tree
            if isinstance(tree, FixedTree):
                assert max(max(r.drafted) for r in rounds) == size


TREE = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=4, sink=1, recent=2), draft_len=3, tree=FixedTree(size=10))


class AdversarialTrees:
    """Always the same tree of unlikely tokens."""

    nbytes = 0
    taps = ()

    def start(self, target_cache, histories):
        pass

    def propose(self, histories, draft_lens, sampler, generators):
        B = len(histories)
        return Draft(torch.arange(6).repeat(B, 1), None, [6 * (n > 2) for n in draft_lens], torch.tensor([PARENTS] * B))

    def commit(self, target_cache, histories, counts):
        pass


@pytest.mark.parametrize("tree", [TREE.tree, adaptive(12)], ids=["fixed", "adaptive"])
def test_sampled_output_follows_the_target(soft_model, tree):
    config = DraftConfig(drafter=SELF_SPARSE, kv=TREE.kv, draft_len=3, tree=tree)
    assert p_value(joint_frequencies(soft_model, config, WARM, runs=2000), exact_pairs(soft_model, WARM)) > 1e-4


def test_output_survives_adversarial_trees(model, soft_model):
    prompt = random_prompt(50)
    assert run(model, [prompt], drafter=AdversarialTrees())[0] == run(model, [prompt])[0]


def take_the_sibling(draft_tokens, parents, sizes, target_logits, sampler, uniform):
    """Wrong: at the root, where the choice is no child, the first child is taken for it."""
    verdict = verify_tree(draft_tokens, parents, sizes, target_logits, sampler, uniform)
    wrong = (verdict.num_accepted == 0) & (sizes > 0)
    tokens, path = verdict.tokens.clone(), verdict.path.clone()
    behind = choose(target_logits[:, 1], sampler, uniform[:, 1])
    tokens[:, 0], tokens[:, 1] = torch.where(wrong, draft_tokens[:, 0], tokens[:, 0]), torch.where(wrong, behind, tokens[:, 1])
    return TreeVerdict(torch.where(wrong, 1, verdict.num_accepted), tokens, torch.where(wrong[:, None], 0, path))


def choose_among_children(draft_tokens, parents, sizes, target_logits, sampler, uniform):
    """Wrong: the target's distribution at the root is cut to what the tree has."""
    p = probabilities(target_logits[:, 0], sampler)
    at_root = (parents == -1) & (torch.arange(parents.shape[1]) < sizes[:, None])
    inside = torch.zeros_like(p).scatter_add_(1, draft_tokens, at_root.float())
    logits = target_logits.clone()
    logits[:, 0] = torch.where((inside > 0) & (p > 0), target_logits[:, 0] + 1.0, target_logits[:, 0])
    return verify_tree(draft_tokens, parents, sizes, logits, sampler, uniform)


@pytest.mark.parametrize("rule", [take_the_sibling, choose_among_children])
def test_a_wrong_rule_is_caught_when_sampling(soft_model, monkeypatch, rule):
    monkeypatch.setattr(decode_module, "verify_tree", rule)
    assert p_value(joint_frequencies(soft_model, TREE, WARM, runs=2000), exact_pairs(soft_model, WARM)) < 1e-6


@pytest.mark.parametrize("wrong", ["rule", "mask", "positions", "compaction"])
def test_a_wrong_round_is_caught_when_greedy(model, monkeypatch, wrong):
    prompts = [random_prompt(50, seed=seed) for seed in range(4)]
    plain = run(model, prompts)[0]
    assert run(model, prompts, TREE)[0] == plain
    real = Ancestors.of
    match wrong:
        case "rule":
            monkeypatch.setattr(decode_module, "verify_tree", take_the_sibling)
        case "mask":  # siblings see each other
            monkeypatch.setattr(decode_module.Ancestors, "of", lambda parents, depth: Ancestors(torch.ones_like(real(parents, depth).visible).tril()))
        case "positions":
            monkeypatch.setattr(decode_module.Ancestors, "depths", property(lambda self: torch.arange(self.visible.shape[1])[None]))
        case "compaction":
            monkeypatch.setattr("planner.runtime.kv_cache.KVCache.compact", lambda self, paths: None)
    assert run(model, prompts, TREE)[0] != plain


def test_the_phases_of_a_round_of_a_tree_are_those_of_a_chain(model):
    prompt, timer = random_prompt(30), PhaseTimer(torch.device("cpu"))
    cache, logits = prefilled(model, [prompt], cache_capacity(30, 12, TREE.verified))
    list(
        decode(
            model, cache, [prompt], logits, make_drafter(TREE, model), draft_len=3, sampler=GREEDY, generators=[torch.Generator()],
            max_new_tokens=12, mark=timer.mark,
        )
    )  # fmt: skip
    phases = timer.seconds()
    assert set(phases) == {"select", "draft", "verify", "commit"}
    assert len(phases["draft"]) == len(phases["verify"]) == len(phases["commit"]) and min(map(min, phases.values())) > 0
