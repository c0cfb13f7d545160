"""Lossless or not: greedy output equals plain output, sampled output follows the target, wrong rules are caught."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import HEAD, NATIVE, native_kernels, prefilled, random_prompt, tiny_model, with_head

from planner.runtime import decode as decode_module
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.protocol import Draft
from planner.runtime.sampling import probabilities, sample
from planner.runtime.verify import Verdict, verify_chain
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV, YarnRope

NGRAM, SELF_SPARSE = DrafterSpec(kind="ngram"), DrafterSpec(kind="self_sparse")
EAGLE3 = DraftConfig(drafter=HEAD, draft_len=3)
CONFIGS = [
    PLAIN,
    *(DraftConfig(drafter=NGRAM, draft_len=k) for k in (1, 5)),
    *(DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=b, sink=s, recent=r), draft_len=k) for b, s, r, k in ((4, 1, 2, 3), (20, 4, 8, 1), (500, 4, 32, 7))),
    *(DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=b, recent=r, selection="chunk"), draft_len=k) for b, r, k in ((21, 9, 4), (48, 16, 2), (500, 32, 3))),
    EAGLE3,
]  # fmt: skip
YARN = YarnRope(factor=4.0, original_max_position=32, attention_factor=1.14)
GREEDY, WARM = Sampler(temperature=0), Sampler(temperature=0.8, top_p=0.9, top_k=20)


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


def run(model, prompts, config=PLAIN, drafter=None, sampler=GREEDY, seed=0, new_tokens=40, stop_tokens=()):
    cache, logits = prefilled(model, prompts, cache_capacity(max(map(len, prompts)), new_tokens, max(config.draft_len, 4)))
    drafter = drafter or make_drafter(config, model, batch=len(prompts))
    generators = [torch.Generator(device=model.device).manual_seed(seed + b) for b in range(len(prompts))]
    rounds = list(
        decode(model, cache, prompts, logits, drafter, draft_len=config.draft_len or 4, sampler=sampler, generators=generators,
               max_new_tokens=new_tokens, stop_tokens=stop_tokens)
    )  # fmt: skip
    return [[t for r in rounds for t in r.tokens[b]] for b in range(len(prompts))], rounds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_head(tiny_model(sharpness=1.5), tmp_path_factory.mktemp("model") / "head")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [3, 15, 100])
def test_greedy_output_is_plain_greedy_output(model, config, length):
    prompt = random_prompt(length, seed=length)
    (plain,), _ = run(model, [prompt])
    (ours,), rounds = run(model, [prompt], config)
    assert ours == plain
    assert all(a <= d <= config.draft_len for r in rounds for a, d in zip(r.accepted, r.drafted))
    assert sum(len(r.tokens[0]) for r in rounds) == 40


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[3], CONFIGS[-1]], ids=str)
@pytest.mark.parametrize("changes", [{"architecture": "qwen2"}, {"architecture": "qwen3"}, {"rope_scaling": YARN}], ids=["qwen2", "qwen3", "yarn"])
@pytest.mark.parametrize("execution", ["eager", "native"])
def test_greedy_output_of_other_architectures_is_plain_greedy_output(changes, config, execution):
    kernels = None if execution == "eager" else native_kernels(torch.float32)
    model = tiny_model(sharpness=1.5, kernels=kernels, **NATIVE, **changes)
    prompts = [random_prompt(length, seed=length) for length in (90, 33)]
    assert run(model, prompts, config)[0] == run(model, prompts)[0]


def test_greedy_output_survives_an_adversarial_drafter(model):
    prompt = random_prompt(50)
    assert run(model, [prompt], drafter=AdversarialDrafter())[0] == run(model, [prompt])[0]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_streams_of_different_lengths_decode_as_they_do_alone(model, config):
    prompts = [random_prompt(length, seed=length) for length in (90, 33, 61)]
    together, _ = run(model, prompts, config)
    assert together == [run(model, [prompt], config)[0][0] for prompt in prompts]


def test_a_stop_token_ends_the_text_in_the_middle_of_a_round(model):
    prompt = random_prompt(50)
    (plain,), _ = run(model, [prompt])
    stop = plain[10]
    for config in CONFIGS:
        (ours,), _ = run(model, [prompt], config, stop_tokens=(stop,))
        assert ours == plain[: plain.index(stop) + 1]


def test_full_budget_accepts_every_greedy_draft(model):
    _, rounds = run(model, [random_prompt(60)], DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=500), draft_len=3))
    assert all(r.accepted == r.drafted for r in rounds)


def joint_frequencies(model, config, sampler, drafter=None, runs=4000, batch=100, prompt=random_prompt(30, seed=3)):
    """How often each pair (token 2, token 3) was written, given that token 1 is free."""
    one, logits = prefilled(model, [prompt], 60)
    cache = model.new_cache(60, batch=batch)
    cache.take(one, len(prompt))
    counts = np.zeros((61, 61))
    for run_index in range(runs // batch):
        cache.lengths = [len(prompt)] * batch
        rounds = decode(
            model, cache, [prompt] * batch, logits.expand(batch, -1), drafter or make_drafter(config, model, batch=batch),
            draft_len=max(config.draft_len, 2), sampler=sampler, max_new_tokens=4,
            generators=[torch.Generator().manual_seed(run_index * batch + b) for b in range(batch)],
        )  # fmt: skip
        texts = list(zip(*([row for row in r.tokens] for r in rounds)))
        for text in (list(itertools.chain.from_iterable(pieces)) for pieces in texts):
            counts[text[1], text[2]] += 1
    return counts


def exact_pairs(model, sampler, prompt=random_prompt(30, seed=3)):
    """The same by enumeration of the target's distribution."""
    cache, logits = prefilled(model, [prompt], 60)
    first = probabilities(logits, sampler)[0]

    def after(tokens):
        cache.truncate(len(prompt))
        positions = torch.arange(len(prompt), len(prompt) + tokens.shape[1])[None]
        view_cache, _ = prefilled(model, [prompt], 60)
        big = model.new_cache(60, batch=len(tokens))
        big.take(view_cache, len(prompt))
        hidden = model(tokens, positions.expand(len(tokens), -1), big, big.causal_mask(tokens.shape[1])).hidden
        return probabilities(model.logits(hidden[:, -1]), sampler)

    with torch.inference_mode():
        second = after(torch.arange(61)[:, None])  # [x0, x1]
        pair = first[:, None] * second
        grid = torch.cartesian_prod(torch.arange(61), torch.arange(61))
        third = after(grid).view(61, 61, 61)  # [x0, x1, x2]
    return torch.einsum("ab,abc->bc", pair, third).numpy()


def p_value(counts, expected):
    """Chi-square over the cells that expect at least 5, the rest pooled."""
    expected = expected / expected.sum() * counts.sum()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    predicted = np.append(expected[large], expected[~large].sum())
    return stats.chisquare(observed, predicted * observed.sum() / predicted.sum()).pvalue


@pytest.fixture(scope="module")
def soft_model(tmp_path_factory):
    return with_head(tiny_model(seed=5, sharpness=0.9), tmp_path_factory.mktemp("soft") / "head")


SAMPLED = [Sampler(temperature=1.0, top_k=12), WARM]


@pytest.mark.parametrize("sampler", SAMPLED, ids=str)
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[3], CONFIGS[6], EAGLE3], ids=str)
def test_sampled_output_follows_the_target(soft_model, config, sampler):
    assert p_value(joint_frequencies(soft_model, config, sampler), exact_pairs(soft_model, sampler)) > 1e-3


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


@pytest.fixture(scope="module")
def native_model(tmp_path_factory):
    return with_head(tiny_model(sharpness=1.5, kernels=native_kernels(torch.float32), **NATIVE), tmp_path_factory.mktemp("native") / "head")


@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_greedy_output_of_native_kernels_is_that_of_pytorch(native_model, weights):
    prompt = random_prompt(60)
    expected, _ = run(tiny_model(sharpness=1.5, **NATIVE).cheaper(weights), [prompt])
    assert run(native_model.cheaper(weights), [prompt])[0] == expected


@pytest.mark.parametrize("config", [PLAIN, CONFIGS[2], CONFIGS[3], EAGLE3, *QUANTIZED], ids=str)
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


def test_a_drafter_of_few_tokens_drafts_no_others(model):
    prompt = random_prompt(60)
    drafter = make_drafter(cheaper_drafts("full", vocab=30), model)
    cache, _ = prefilled(model, [prompt], 80)
    drafter.start(cache, [prompt])
    with torch.inference_mode():
        draft = drafter.propose([[*prompt, 5]], [4], Sampler(temperature=1.0), [torch.Generator().manual_seed(0)])
    assert draft.tokens.max() < 30
    assert (draft.probs[..., 30:] == 0).all()
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(1, 4))


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
