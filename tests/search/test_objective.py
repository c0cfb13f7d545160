"""Estimates: what a made profile implies, with intervals that contain it."""

import math

import msgspec
import numpy as np
import pytest
from made import DRAFT_MODEL, FIFTH, GREEDY, NGRAM, SELF_SPARSE, WARM, budgets, linear_round_s, made_profile
from msgspec.structs import replace

from planner.cost.renewal import expected_rounds
from planner.errors import BadInput
from planner.measurements import MemorySample, Packed
from planner.search import objective
from planner.search.objective import difference, fit_models, objective_s, predict, refusal, with_speedup
from planner.specs import PLAIN, DraftConfig, FullKV, SparseKV, Workload

OUTPUT = 33


def workload(context_len=1024, output_len=OUTPUT, sampler=GREEDY, batch=1):
    return Workload(context_len=context_len, output_len=output_len, sampler=sampler, batch=batch)


def sparse(draft_len, budget=64):
    return DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=budget), draft_len=draft_len)


def rounds_per_token(accept: float, draft_len: int, output_len: int = OUTPUT) -> float:
    """By dynamic programming over the tokens still to write: drafts never reach beyond the last token but one."""
    rounds = [0.0]
    for left in range(1, output_len):
        room = min(draft_len, left - 1)
        ends = [accept**n * (1 - accept) for n in range(room)] + [accept**room]
        rounds.append(1 + sum(p * rounds[left - n - 1] for n, p in enumerate(ends)))
    return rounds[-1] / (output_len - 1)


@pytest.fixture(scope="module")
def models():
    return fit_models(made_profile())


@pytest.mark.parametrize("draft_len", [1, 2, 3, 4])
def test_tokens_per_round_are_those_of_a_constant_acceptance(models, draft_len):
    found = predict(models, sparse(draft_len), workload()).estimate
    assert found.tokens_per_round.value == pytest.approx(1 / rounds_per_token(4 * FIFTH, draft_len), rel=1e-9)


def test_time_per_token_is_rounds_times_their_seconds(models):
    found = predict(models, sparse(1), workload()).estimate
    assert found.tpot_s.value == pytest.approx(found.round_s.value / found.tokens_per_round.value)
    assert found.e2e_s.value == pytest.approx(found.ttft_s.value + (OUTPUT - 1) * found.tpot_s.value)
    full = sum(linear_round_s(SparseKV(budget=64), 1, 1024))
    assert found.round_s.value == pytest.approx(full, rel=0.03)  # the last round drafts nothing


def heavier(kv, draft_len, context_len):
    """A batch at which the target's tokens cost twice as much."""
    draft_s, verify_s, commit_s = linear_round_s(kv, draft_len, context_len)
    return draft_s, 2 * verify_s, commit_s


@pytest.fixture(scope="module")
def batched():
    """A drafter that drafts three tokens in half of its rounds, and one that always does; timed at batches 1 and 8."""
    profile = made_profile(batches={1: linear_round_s, 8: heavier}, drafters=[*budgets(64), (NGRAM, FullKV())], contexts=(1024,))
    sparing = np.tile([3, 0], OUTPUT)[: OUTPUT - 1]
    acceptance = [msgspec.structs.replace(s, drafted=Packed.pack(sparing)) if s.drafter == NGRAM else s for s in profile.acceptance]
    return fit_models(msgspec.structs.replace(profile, acceptance=acceptance))


def test_time_per_token_in_a_batch_is_rounds_times_the_seconds_of_the_batch(batched):
    alone, found = (predict(batched, sparse(2), workload(batch=batch)).estimate for batch in (1, 8))
    assert found.tokens_per_round == alone.tokens_per_round
    assert found.round_s.value == pytest.approx(sum(heavier(SparseKV(budget=64), 2, 1024)), rel=0.03)  # the last round drafts less
    assert found.tpot_s.value == pytest.approx(found.round_s.value / found.tokens_per_round.value)
    assert found.ttft_s == alone.ttft_s
    assert found.memory_bytes.value > alone.memory_bytes.value
    plain = predict(batched, PLAIN, workload(batch=8)).estimate
    assert plain.tpot_s.value == pytest.approx(sum(heavier(FullKV(), 0, 1024)), rel=0.01)


def test_an_estimate_says_that_its_batch_was_interpolated(batched):
    assert any("batch 4 is interpolated between 1 and 8" in note for note in predict(batched, sparse(2), workload(batch=4)).estimate.notes)
    assert predict(batched, sparse(2), workload(batch=8)).estimate.notes == []


def test_a_batch_is_as_wide_as_its_widest_stream(batched):
    """Each of 8 streams drafts in half of its rounds: nearly all rounds of the batch are wide."""
    by_drafted = batched.acceptance.strata(DraftConfig(drafter=NGRAM, draft_len=3), workload())[0][0].rounds.by_drafted
    rounds = by_drafted.sum(1)
    narrow = by_drafted[0, 0] / rounds[0]
    assert 0.2 < narrow < 0.8
    for batch in (1, 2, 8):
        widths = objective._by_width(by_drafted, batch)
        assert widths.sum(1) == pytest.approx(rounds)
        assert widths[0, 0] / rounds[0] == pytest.approx(narrow**batch)
    assert objective._by_width(by_drafted, 1) == pytest.approx(by_drafted)
    drawn = np.random.default_rng(0).choice(4, size=(200_000, 3), p=by_drafted[0] / rounds[0]).max(1)
    assert objective._by_width(by_drafted, 3)[0] / rounds[0] == pytest.approx(np.bincount(drawn, minlength=4) / len(drawn), abs=0.01)
    found = predict(batched, DraftConfig(drafter=NGRAM, draft_len=3), workload(batch=8)).estimate
    assert found.round_s.value == pytest.approx(sum(heavier(FullKV(), 3, 1024)), rel=0.05)


def test_plain_decoding_writes_one_token_per_round(models):
    found = predict(models, PLAIN, workload()).estimate
    assert found.tokens_per_round.value == found.tokens_per_round.low == found.tokens_per_round.high == 1
    assert found.tpot_s.value == pytest.approx(sum(linear_round_s(FullKV(), 0, 1024)), rel=0.01)
    assert found.speedup.value == 1 and found.num_texts == 0


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("config", [PLAIN, sparse(2)], ids=str)
def test_a_price_is_that_of_the_device_seconds_of_a_request_over_its_tokens(batched, config, batch):
    """A prefill for each request, one after the other; rounds for all of the batch at once."""
    found = predict(batched, config, workload(batch=batch), 7.2).estimate
    requests_s = batch * found.ttft_s.value + (OUTPUT - 1) * found.tpot_s.value
    assert found.price_per_million_tokens.value == pytest.approx(7.2 / 3600 * requests_s / (batch * OUTPUT) * 1e6)
    e2e, price = found.e2e_s, found.price_per_million_tokens
    if batch == 1:
        assert [price.low / price.value, price.high / price.value] == pytest.approx([e2e.low / e2e.value, e2e.high / e2e.value])
    assert price.low < price.value < price.high or config == PLAIN  # timed without noise, at this very place
    twice = predict(batched, config, workload(batch=batch), 14.4).estimate.price_per_million_tokens
    for bound in ("low", "value", "high"):
        assert getattr(twice, bound) == pytest.approx(2 * getattr(found.price_per_million_tokens, bound))
    assert predict(batched, config, workload(batch=batch)).estimate == msgspec.structs.replace(found, price_per_million_tokens=None)


def test_the_price_of_decoding_is_shared_by_the_batch():
    """The same rounds at both batches, and a prefill that costs nothing to speak of: a fourth of the price."""
    profile = made_profile(batches={1: linear_round_s, 4: linear_round_s}, contexts=(1024,))
    free = [msgspec.structs.replace(sample, seconds=[1e-9]) for sample in profile.prefill]
    rounds = [msgspec.structs.replace(sample, start_s=[0.0] * len(sample.start_s)) for sample in profile.rounds]
    found = fit_models(msgspec.structs.replace(profile, prefill=free, rounds=rounds))
    alone, shared = (predict(found, PLAIN, workload(batch=batch), 2.0).estimate.price_per_million_tokens.value for batch in (1, 4))
    assert alone / shared == pytest.approx(4, rel=1e-6)


def test_with_one_stream_price_and_end_to_end_time_compare_alike_and_in_a_batch_they_do_not(batched):
    for batch in (1, 8):
        a, b = (predict(batched, config, workload(batch=batch)) for config in (sparse(2), PLAIN))
        price, e2e = (difference(a, b, goal) for goal in ("price", "e2e"))
        alike = [pytest.approx(getattr(e2e, bound), rel=1e-9) == getattr(price, bound) for bound in ("low", "value", "high")]
        assert alike == [batch == 1] * 3


def test_speedup_is_the_ratio_to_plain_decoding(models):
    baseline = predict(models, PLAIN, workload())
    for goal in ("tpot", "e2e", "price"):
        found = with_speedup(predict(models, sparse(2), workload()), baseline, goal)
        expected = objective_s(baseline, goal) / objective_s(found, goal)
        assert found.estimate.speedup.value == pytest.approx(expected)
    tpot, e2e = (with_speedup(predict(models, sparse(2), workload()), baseline, o).estimate.speedup.value for o in ("tpot", "e2e"))
    assert tpot > e2e > 1  # prefill is the same for both and dilutes the gain


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_every_interval_contains_its_value(noise):
    models = fit_models(made_profile(noise=noise, accept=lambda kv, context, number: (number % 5) * FIFTH))
    baseline = predict(models, PLAIN, workload())
    for config in (PLAIN, sparse(1), sparse(4), sparse(2, 128)):
        found = with_speedup(predict(models, config, workload(2000)), baseline, "tpot").estimate
        for name in ("tokens_per_round", "round_s", "tpot_s", "ttft_s", "e2e_s", "memory_bytes", "speedup"):
            interval = getattr(found, name)
            assert interval.value in interval, name
            assert 0 < interval.low and math.isfinite(interval.high), name
    assert "interpolated" in " ".join(found.notes)


def test_more_texts_make_narrower_intervals():
    def width(texts):
        profile = made_profile(texts_per_cell=texts, accept=lambda kv, context, number: (1 + number % 4) * FIFTH)
        found = predict(fit_models(profile), sparse(2), workload()).estimate.tpot_s
        return found.high / found.low

    assert width(4) > width(16) > width(64) > 1


def test_a_comparison_on_the_same_texts_cancels_what_they_share():
    """Texts differ much, the two budgets on each of them not at all: the difference is far surer than either."""
    models = fit_models(made_profile(texts_per_cell=8, accept=lambda kv, context, number: (1 + number % 4) * FIFTH))
    a, b = predict(models, sparse(2, 64), workload()), predict(models, sparse(2, 256), workload())
    gap = difference(b, a, "tpot")
    assert gap.value == pytest.approx(b.estimate.tpot_s.value / a.estimate.tpot_s.value - 1)
    assert gap.high - gap.low < 0.1 * (a.estimate.tpot_s.high / a.estimate.tpot_s.low - 1)


def test_a_configuration_does_not_differ_from_itself(models):
    found = predict(models, sparse(2), workload())
    gap = difference(found, found, "e2e")
    assert gap.value == 0 and gap.low <= 0 <= gap.high


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"context_len": 500}, "covers contexts 1024, 4096"),
        ({"context_len": 4600}, "max|context"),
        ({"context_len": 4090, "output_len": 33}, "must fit the model's 4096"),
        ({"sampler": WARM}, "profiled for greedy, not for temperature 1"),
        ({"batch": 2}, "at batch 1, got 2; profile with `planner profile --batches 1,2`"),
    ],
    ids=str,
)
def test_a_workload_that_was_not_profiled_is_refused(models, change, match):
    with pytest.raises(BadInput, match=match):
        predict(models, sparse(2), workload(**change))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (sparse(5), "at most 4|up to draft_len 4"),
        (sparse(2, 40), "covers kv budgets 64, 256, got 40"),
        (sparse(2, 257), "covers kv budgets 64, 256, got 257"),
        (DraftConfig(drafter=NGRAM, draft_len=1), "timed no round|no acceptance"),
        (DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=64, selection="chunk"), draft_len=1), "no acceptance"),
        (DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=64, recent=16), draft_len=1), "no acceptance"),
    ],
    ids=str,
)
def test_a_configuration_that_was_not_profiled_is_refused(models, config, match):
    with pytest.raises(BadInput, match=match):
        predict(models, config, workload())


def test_a_text_that_is_too_long_for_a_drafter_is_refused_for_that_drafter():
    profile = made_profile(drafters=[(DRAFT_MODEL, FullKV()), *budgets(64)])
    short = [msgspec.structs.replace(own, spec=msgspec.structs.replace(own.spec, max_context_len=1040)) for own in profile.drafter_models]
    models = fit_models(msgspec.structs.replace(profile, drafter_models=short))
    own = DraftConfig(drafter=DRAFT_MODEL, draft_len=1)
    predict(models, own, workload(context_len=1024, output_len=16))
    with pytest.raises(BadInput, match=r"must fit the drafter's 1040 tokens, got 1024 \+ 17"):
        predict(models, own, workload(context_len=1024, output_len=17))
    predict(models, sparse(1), workload(context_len=1024, output_len=17))


def test_a_cap_names_the_largest_budget_and_that_budget_fits():
    profile = made_profile(drafters=budgets(64, 256, 1024), memory=[MemorySample(context_len=1024, known_bytes=0, peak_bytes=777, base_bytes=0)])
    models = fit_models(profile)
    fitting = predict(models, sparse(2, 300), workload())
    cap = int(fitting.estimate.memory_bytes.value)
    assert refusal(models, fitting, workload(), cap) is None
    assert refusal(models, predict(models, sparse(2, 301), workload()), workload(), cap).endswith("the largest kv_budget that fits is 300")
    assert refusal(models, predict(models, sparse(2, 1024), workload()), workload(), cap).endswith("the largest kv_budget that fits is 300")
    assert refusal(models, fitting, workload(), None) is None


def test_repetitive_texts_are_marked():
    found = predict(fit_models(made_profile(distinct_4grams=0.4)), sparse(2), workload()).estimate
    assert any("repeat themselves" in note for note in found.notes)


def test_a_90_percent_interval_covers_the_truth_in_100_made_profiles():
    """Eight texts whose acceptance scatters, rounds timed with 3 % noise: the truth is the mean over all texts there could be."""
    config, grid = sparse(2), np.arange(100, 240)  # accept probabilities in 255ths, equally likely

    drafted = np.full((len(grid), OUTPUT - 1), 2)
    walk = expected_rounds(np.broadcast_to(grid[:, None, None] / 255, (len(grid), OUTPUT - 1, 2)), drafted, 2)
    seconds = [sum(linear_round_s(config.kv, k, 1024)) for k in (1, 2)]
    nothing = sum(linear_round_s(FullKV(), 0, 1024))  # a last round that has room for no draft
    truth = float((walk.by_drafted.mean(0) @ [nothing, *seconds]) / (OUTPUT - 1))

    covered, widths = 0, []
    for seed in range(100):
        accept = np.random.default_rng(1000 + seed).choice(grid, 20) / 255
        profile = made_profile(
            accept=lambda kv, context_len, number, accept=accept: accept[number + 8 * (context_len > 1024)],
            contexts=(1024, 2048), drafters=budgets(64),
            texts_per_cell=8, noise=0.03, noise_seed=seed, rounds_per_cell=12, draft_lens=(1, 2, 4),
        )  # fmt: skip
        found = predict(fit_models(profile), config, workload()).estimate.tpot_s
        covered += truth in found
        widths.append((found.high - found.low) / found.value)
    assert covered >= 80
    assert np.median(widths) < 0.5  # not by saying nothing


def without_texts(profile, budget: int, missing: set[int]):
    """The profile, a budget's replays lacking on some texts."""
    kept = [s for s in profile.acceptance if getattr(s.kv, "budget", None) != budget or s.text not in missing]
    return msgspec.structs.replace(profile, acceptance=kept)


def test_a_text_that_one_of_two_configurations_lacks_does_not_cancel_in_their_difference():
    """Both budgets have the same acceptance, which differs from text to text: on the same texts that cancels, on others it does not."""
    profile = made_profile(contexts=(1024,), accept=lambda kv, context_len, number: (number % 4 + 1) * FIFTH, texts_per_cell=8)
    spread, scatter = [], []
    for missing in (set(), {0}, {0, 5}, {0, 1, 2, 3, 4, 5}):
        models = fit_models(without_texts(profile, 64, missing))
        a, b = (predict(models, sparse(2, budget), workload()) for budget in (64, 256))
        spread.append(objective._difference_variance(a, b)[0])
        own, other = a.per_text[0][2], b.per_text[0][2]
        covariance = np.cov(own, other[[i for i in range(8) if i not in missing]])[0, 1]
        scatter.append(np.var(own, ddof=1) / len(own) + np.var(other, ddof=1) / 8 - 2 * covariance / 8)
    assert spread == pytest.approx(scatter)
    assert spread[0] < 0.01 * spread[1] and spread[1] < spread[2] < spread[3]


@pytest.mark.parametrize("batch", [1, 4])
def test_choosing_again_costs_every_token_its_share_of_a_choice(batch):
    """A prompt's choice takes 50 ms here, so with a refresh every 25 tokens each pays 2 ms more, and waits for its neighbours' too."""
    once, again = (SparseKV(budget=64, selection="retrieval", refresh=refresh) for refresh in (None, 25))
    profile = made_profile(drafters=[(SELF_SPARSE, once), (SELF_SPARSE, again)], batches={1: linear_round_s, 4: linear_round_s})
    rounds = [
        replace(sample, start_s=[0.05 + (0.001 if sample.draft_len else -0.049)] * len(sample.start_s))
        for sample in profile.rounds if getattr(sample.kv, "refresh", None) is None
    ]  # fmt: skip
    models = fit_models(replace(profile, rounds=rounds))
    chosen_once, chosen_again = (
        predict(models, DraftConfig(drafter=SELF_SPARSE, kv=kv, draft_len=2), workload(batch=batch)).estimate for kv in (once, again)
    )
    assert chosen_again.tpot_s.value - chosen_once.tpot_s.value == pytest.approx(batch * 0.05 / 25)
    assert chosen_again.tokens_per_round == chosen_once.tokens_per_round


def test_a_draft_model_that_chooses_again_says_what_its_times_leave_out():
    kv = SparseKV(budget=64, selection="chunk", refresh=16)
    models = fit_models(made_profile(drafters=[(DRAFT_MODEL, kv)]))
    estimate = predict(models, DraftConfig(drafter=DRAFT_MODEL, kv=kv, draft_len=2), workload()).estimate
    assert any("a choice every 16 tokens is not in these times" in note for note in estimate.notes)
