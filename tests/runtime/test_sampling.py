"""Distributions after a sampler, and tokens drawn from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from planner.runtime.sampling import probabilities, probability_of, sample, uniforms
from planner.specs import Sampler

V = 40
LARGEST_BELOW_ONE = float(np.nextafter(1.0, 0.0))
SAMPLERS = [
    Sampler(), Sampler(temperature=1), Sampler(temperature=0.3), Sampler(temperature=5),
    Sampler(temperature=1, top_k=7), Sampler(temperature=1, top_k=1),
    Sampler(temperature=1, top_k=1000), Sampler(temperature=1, top_p=0.8),
    Sampler(temperature=0.7, top_p=0.05), Sampler(temperature=0.9, top_p=0.6, top_k=12),
]  # fmt: skip


@pytest.fixture
def logits():
    return 3 * torch.randn(50, V, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_sum_to_one_in_float32(logits, sampler, dtype):
    probs = probabilities(logits.to(dtype), sampler)
    assert probs.dtype == torch.float32
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(50), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_probability_of_a_token_is_its_entry_in_the_distribution(logits, sampler):
    probs = probabilities(logits, sampler)
    for token in range(V):
        tokens = torch.full((50,), token)
        torch.testing.assert_close(probability_of(logits, tokens, sampler), probs[:, token], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_likeliest_token_stays_the_likeliest(logits, sampler):
    assert torch.equal(probabilities(logits, sampler).argmax(-1), logits.argmax(-1))


def test_greedy_is_a_point_mass(logits):
    assert torch.equal(probabilities(logits, Sampler()), torch.nn.functional.one_hot(logits.argmax(-1), V).float())


def test_greedy_takes_one_of_several_equal_logits():
    assert probabilities(torch.zeros(3, V), Sampler()).sum(-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_a_temperature_is_a_power_of_the_distribution(logits, temperature):
    plain = probabilities(logits, Sampler(temperature=1)).double() ** (1 / temperature)
    torch.testing.assert_close(
        probabilities(logits, Sampler(temperature=temperature)).double(), plain / plain.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("k", [1, 2, 17, V - 1, V])
def test_top_k_keeps_exactly_the_k_likeliest(logits, k):
    probs = probabilities(logits, Sampler(temperature=1, top_k=k))
    rank = logits.argsort(-1, descending=True).argsort(-1)
    assert torch.equal(probs > 0, rank < k)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    kept = probabilities(logits, Sampler(temperature=1, top_p=p)) > 0
    plain = probabilities(logits, Sampler(temperature=1)).double()
    for row, mask in zip(plain, kept, strict=True):
        mass, least = row[mask].sum(), row[mask].min()
        assert mass >= p - 1e-6
        assert mass - least < p + 1e-6  # without its least likely token it falls short
        assert row[~mask].numel() == 0 or row[~mask].max() <= least


def test_top_p_counts_the_mass_that_top_k_left():
    """The order of Hugging Face and vLLM: of .4 .3 .2 .1, top_k 2 leaves .571 and .429, and .5 is reached by the first."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert probabilities(logits, Sampler(temperature=1, top_p=0.5, top_k=2)).tolist() == [[1, 0, 0, 0]]
    assert (probabilities(logits, Sampler(temperature=1, top_p=0.5)) > 0).tolist() == [[True, True, False, False]]


def test_both_cuts_agree_with_transformers(logits):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warped = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(15)(None, TemperatureLogitsWarper(0.8)(None, logits)))
    torch.testing.assert_close(probabilities(logits, Sampler(temperature=0.8, top_p=0.7, top_k=15)), warped.softmax(-1))


@pytest.mark.parametrize(
    "sampler",
    [Sampler(temperature=0.01), Sampler(temperature=1, top_p=1e-6), Sampler(temperature=100), Sampler(temperature=1, top_p=1 - 1e-12)]
    + [Sampler(temperature=1, top_p=1e-50)],
    ids=str,
)
def test_extreme_samplers_still_give_distributions(logits, sampler):
    probs = probabilities(logits, sampler)
    torch.testing.assert_close(probs.sum(-1), torch.ones(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(probability_of(logits, logits.argmax(-1), sampler), probs.amax(-1), atol=1e-5, rtol=1e-4)


def test_a_temperature_that_float32_cannot_divide_by_is_refused():
    with pytest.raises(ValueError, match="at least 0.01"):
        Sampler(temperature=1e-40)


# ---- drawing


def test_drawing_follows_the_distribution():
    probs = torch.softmax(torch.randn(V, generator=torch.Generator().manual_seed(3)), -1)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counts = torch.bincount(sample(probs.expand(40_000, -1), uniform), minlength=V).numpy()
    expected = probs.double().numpy() / probs.double().sum().item() * 40_000
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert stats.chisquare(counts, np.roll(expected, 1)).pvalue < 1e-6  # the test would see tokens off by one


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-45, 1e-8, 0.3, 1.0]), min_size=1, max_size=9).filter(any), st.floats(0, 1, exclude_max=True))
def test_drawing_inverts_the_cumulative_distribution(weights, u):
    probs = torch.tensor([weights])
    for uniform in (u, 0.0, LARGEST_BELOW_ONE):
        token = int(sample(probs, torch.tensor([uniform], dtype=torch.float64)))
        cumulative = np.cumsum(probs[0].double().numpy())
        assert probs[0, token] > 0
        below = cumulative[token - 1] if token else 0.0
        assert below <= uniform * cumulative[-1] < cumulative[token]


@pytest.mark.parametrize("uniform", [0.0, LARGEST_BELOW_ONE, 0.5])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    for weights in ([0, 0, 1, 0, 0], [0, 0.25, 0, 0.25, 0], [1e-30, 0, 0, 0, 0], [0, 0, 0, 0, 1]):
        token = int(sample(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64)))
        assert weights[token] > 0


def test_a_stream_draws_the_same_numbers_beside_any_neighbour():
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    alone = uniforms([generator(7)], 5)
    assert torch.equal(uniforms([generator(1), generator(7)], 5)[1:], alone)
    assert alone.dtype == torch.float64
    assert ((alone >= 0) & (alone < 1)).all()
