"""What the loop promises whatever the drafter: wrong rules and adversarial drafts are caught, native and quantised kernels are lossless too."""

import pytest
import torch
from decoding import exact_pairs, joint_frequencies, p_value, run
from msgspec.structs import replace
from tiny import BLOCK_HEAD, HEAD, NATIVE, native_kernels, prefilled, random_prompt, tiny_model, with_block_head, with_head

from planner.runtime import decode as decode_module
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.protocol import Draft
from planner.runtime.sampling import sample
from planner.runtime.verify import Verdict, verify_chain
from planner.specs import PLAIN, DraftConfig, DrafterSpec, FixedTree, Sampler, SparseKV, YarnRope

NGRAM, SELF_SPARSE = DrafterSpec(kind="ngram"), DrafterSpec(kind="self_sparse")
EAGLE3, DFLASH = DraftConfig(drafter=HEAD, draft_len=3), DraftConfig(drafter=BLOCK_HEAD, draft_len=4)
CONFIGS = [
    PLAIN,
    *(DraftConfig(drafter=NGRAM, draft_len=k) for k in (1, 5)),
    *(DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=b, sink=s, recent=r), draft_len=k) for b, s, r, k in ((4, 1, 2, 3), (20, 4, 8, 1), (500, 4, 32, 7))),
    *(DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=b, recent=r, selection="chunk"), draft_len=k) for b, r, k in ((21, 9, 4), (48, 16, 2), (500, 32, 3))),
    EAGLE3,
]  # fmt: skip
YARN = YarnRope(factor=4.0, original_max_position=32, attention_factor=1.14)
GREEDY, WARM = Sampler(temperature=0), Sampler(temperature=0.8, top_p=0.9, top_k=20)


def with_both(model, folder):
    return with_block_head(with_head(model, folder / "head"), folder / "block head")


class AdversarialDrafter:
    """Always drafts the same unlikely tokens and claims to be certain of them."""

    nbytes = 0
    taps = ()

    def start(self, target_cache, histories):
        pass

    def propose(self, histories, draft_lens, sampler, generators):
        tokens = torch.full((len(histories), max(draft_lens)), 7)
        return Draft(tokens, torch.zeros(*tokens.shape, 61).scatter_(-1, tokens[..., None], 1.0), draft_lens)

    def commit(self, target_cache, histories, counts):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_head(tiny_model(sharpness=1.5), tmp_path_factory.mktemp("model") / "head")


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[3], EAGLE3, DFLASH], ids=str)
@pytest.mark.parametrize("changes", [{"architecture": "qwen2"}, {"architecture": "qwen3"}, {"rope_scaling": YARN}], ids=["qwen2", "qwen3", "yarn"])
@pytest.mark.parametrize("execution", ["eager", "native"])
def test_greedy_output_of_other_architectures_is_plain_greedy_output(changes, config, execution, tmp_path):
    kernels = None if execution == "eager" else native_kernels(torch.float32)
    model = with_both(tiny_model(sharpness=1.5, kernels=kernels, **NATIVE, **changes), tmp_path)
    prompts = [random_prompt(length, seed=length) for length in (90, 33)]
    assert run(model, prompts, config)[0] == run(model, prompts)[0]


def test_greedy_output_survives_an_adversarial_drafter(model):
    prompt = random_prompt(50)
    assert run(model, [prompt], drafter=AdversarialDrafter())[0] == run(model, [prompt])[0]


def test_full_budget_accepts_every_greedy_draft(model):
    _, rounds = run(model, [random_prompt(60)], DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=500), draft_len=3))
    assert all(r.accepted == r.drafted for r in rounds)


@pytest.fixture(scope="module")
def soft_model(tmp_path_factory):
    return with_head(tiny_model(seed=5, sharpness=0.9), tmp_path_factory.mktemp("soft") / "head")


SAMPLED = [Sampler(temperature=1.0, top_k=12), WARM]


def test_sampled_output_survives_an_adversarial_drafter(soft_model):
    counts = joint_frequencies(soft_model, PLAIN, SAMPLED[0], drafter=AdversarialDrafter())
    assert p_value(counts, exact_pairs(soft_model, SAMPLED[0])) > 1e-3


def accept_likely(draft_tokens, draft_probs, draft_lens, target_probs, uniform):
    """Wrong: keeps a draft whenever the target finds it likelier than the drafter did half of the time."""
    n = verify_chain(draft_tokens, draft_probs * 0.5, draft_lens, target_probs, uniform).num_accepted
    return Verdict(n, verify_chain(draft_tokens, draft_probs, draft_lens, target_probs, uniform).next_tokens)


def no_residual(draft_tokens, draft_probs, draft_lens, target_probs, uniform):
    """Wrong: recovers from the target's own distribution instead of the residual."""
    verdict = verify_chain(draft_tokens, draft_probs, draft_lens, target_probs, uniform)
    return Verdict(verdict.num_accepted, sample(target_probs[torch.arange(len(uniform)), verdict.num_accepted], uniform[:, -1]))


@pytest.mark.parametrize("rule", [accept_likely, no_residual])
def test_a_wrong_accept_rule_is_caught_when_sampling(soft_model, monkeypatch, rule):
    monkeypatch.setattr(decode_module, "verify_chain", rule)
    sharp_drafts = DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=4, sink=1, recent=2), draft_len=3)
    counts = joint_frequencies(soft_model, sharp_drafts, SAMPLED[0], runs=8000)
    assert p_value(counts, exact_pairs(soft_model, SAMPLED[0])) < 1e-6


def test_a_wrong_accept_rule_is_caught_when_greedy(model, monkeypatch):
    prompt = random_prompt(50)
    (plain,), _ = run(model, [prompt])

    def keep_all(draft_tokens, draft_probs, draft_lens, target_probs, uniform):
        return Verdict(draft_lens.clone(), verify_chain(draft_tokens, draft_probs, draft_lens, target_probs, uniform).next_tokens)

    monkeypatch.setattr(decode_module, "verify_chain", keep_all)
    assert run(model, [prompt], CONFIGS[3])[0] != [plain]


# ---- native kernels, quantised drafters, reduced vocabularies


def cheaper_drafts(weights, vocab=None, draft_len=4, budget=20):
    return DraftConfig(
        drafter=DrafterSpec(kind="self_sparse", weights=weights, vocab=vocab), kv=SparseKV(budget=budget, recent=8), draft_len=draft_len
    )


QUANTIZED = [cheaper_drafts(weights, vocab) for weights in ("full", "int8", "int4") for vocab in (None, 30)]
BESIDE = [
    DraftConfig(drafter=DrafterSpec(kind=kind, path=path, weights=weights, vocab=30), draft_len=4)
    for kind, path in (("draft_model", "one layer"), ("dflash", BLOCK_HEAD.path))
    for weights in ("full", "int8", "int4")
]


def with_all(model, folder):
    model.beside["one layer", None] = tiny_model(sharpness=1.5, num_layers=1, kernels=model.kernels, **NATIVE)
    return with_both(model, folder)


@pytest.fixture(scope="module")
def native_model(tmp_path_factory):
    return with_all(tiny_model(sharpness=1.5, kernels=native_kernels(torch.float32), **NATIVE), tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_greedy_output_of_native_kernels_is_that_of_pytorch(native_model, weights):
    prompt = random_prompt(60)
    expected, _ = run(tiny_model(sharpness=1.5, **NATIVE).cheaper(weights), [prompt])
    assert run(native_model.cheaper(weights), [prompt])[0] == expected


@pytest.mark.parametrize("config", [PLAIN, CONFIGS[2], CONFIGS[3], EAGLE3, DFLASH, *QUANTIZED, *BESIDE], ids=str)
def test_greedy_output_of_native_kernels_is_plain_greedy_output_for_batches_of_1_to_8(native_model, config):
    prompts = [random_prompt(length, seed=length) for length in (3, 61, 15, 100, 33, 90, 7, 48)]
    plain = [run(native_model, [prompt])[0][0] for prompt in prompts]
    for batch in (1, 2, 3, 5, 8):
        together, rounds = run(native_model, prompts[:batch], config)
        assert together == plain[:batch]
    accepted = sum(sum(r.accepted) for r in rounds)
    assert config == PLAIN or 0 < accepted <= sum(sum(r.drafted) for r in rounds)


@pytest.mark.parametrize("target", ["int8", "int4"])
def test_a_quantised_target_has_a_greedy_output_of_its_own_and_drafts_keep_it(native_model, target):
    prompts = [random_prompt(length, seed=length) for length in (61, 15, 90)]
    model = native_model.cheaper(target)
    plain, _ = run(model, prompts)
    assert plain != run(native_model, prompts)[0]
    for config in (CONFIGS[2], *QUANTIZED):
        assert run(model, prompts, config)[0] == plain


@pytest.mark.parametrize("config", [QUANTIZED[1], BESIDE[0], BESIDE[3]], ids=lambda config: config.drafter.kind)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_drafter_of_few_tokens_drafts_no_others(config, temperature, tmp_path):
    model, prompt = with_all(tiny_model(sharpness=1.5, **NATIVE), tmp_path), random_prompt(60)

    def proposed(**changes):
        drafter = make_drafter(replace(config, **changes), model)
        cache, _ = prefilled(model, [prompt], 80)
        drafter.start(cache, [prompt])
        with torch.inference_mode():
            return drafter.propose([[*prompt, 5]], [drafter.draft_len], Sampler(temperature=temperature), [torch.Generator().manual_seed(0)])

    chain = proposed()
    assert chain.tokens.max() < 30
    assert (chain.probs[..., 30:] == 0).all()
    torch.testing.assert_close(chain.probs.sum(-1), torch.ones(1, 4))
    tree = proposed(draft_len=1, tree=FixedTree(size=45))  # more than there are
    assert tree.lens == [30] and sorted(tree.tokens[0].tolist()) == list(range(30))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_sampled_output_follows_the_target_with_a_cheaper_drafter_of_few_tokens(weights):
    """The target often writes tokens that this drafter cannot propose."""
    soft_model = tiny_model(seed=5, sharpness=0.9, intermediate_size=64)
    expected = exact_pairs(soft_model, SAMPLED[0])
    assert expected[30:].sum() > 0.2
    assert p_value(joint_frequencies(soft_model, cheaper_drafts(weights, vocab=30, draft_len=3), SAMPLED[0]), expected) > 1e-3


def test_sampled_output_of_native_kernels_follows_the_target():
    soft_model = tiny_model(seed=5, sharpness=0.9, kernels=native_kernels(torch.float32), **NATIVE)
    counts = joint_frequencies(soft_model, cheaper_drafts("int4", vocab=30, draft_len=3), SAMPLED[0])
    assert p_value(counts, exact_pairs(soft_model, SAMPLED[0])) > 1e-3
