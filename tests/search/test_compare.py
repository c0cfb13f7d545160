"""Paired comparisons of trials on the same texts: closed forms, and decisions that are right."""

import math

import msgspec
import numpy as np
import pytest
from made import SELF_SPARSE
from scipy import stats

from planner.plans import Trial
from planner.search.compare import best_of, expected_tokens_per_round, mean_interval, objective_by_text, paired_ratio, regret, tied_within
from planner.specs import PLAIN, DraftConfig, SparseKV

A, B, C = (DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=64), draft_len=k) for k in (1, 2, 3))


def trial(config, text, *, decode_s, prefill_s=1.0, start_s=0.5, output_len=11):
    return Trial(
        config=config, text=text, output_len=output_len, prefill_s=prefill_s, start_s=start_s, decode_s=decode_s, drafted=[0] * 10, accepted=[0] * 10,
        round_s=[decode_s / 10] * 10, cache_bytes=0, peak_bytes=0,
    )  # fmt: skip


def table(num_texts, noise=0.01, seed=0, **factors):
    """Seconds of A, B, C on texts that differ by far more than the configurations do."""
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(size=num_texts))
    arms = {"A": A, "B": B, "C": C}
    return {
        arms[name]: {f"t{i}": float(base[i] * factor * math.exp(noise * rng.normal())) for i in range(num_texts)} for name, factor in factors.items()
    }


def test_a_ratio_of_two_texts_has_a_closed_form():
    found = paired_ratio({"x": 1.1, "y": 1.3}, {"x": 1.0, "y": 1.0})
    mean, sd = (math.log(1.1) + math.log(1.3)) / 2, abs(math.log(1.3) - math.log(1.1)) / math.sqrt(2)
    half = stats.t.ppf(0.95, 1) * sd / math.sqrt(2)
    assert found.value == pytest.approx(math.sqrt(1.1 * 1.3) - 1)
    assert [found.low, found.high] == pytest.approx([math.exp(mean - half) - 1, math.exp(mean + half) - 1])


def test_a_constant_ratio_is_certain_however_much_texts_differ():
    base = {"x": 1.0, "y": 30.0, "z": 0.01}
    found = paired_ratio({text: 1.2 * seconds for text, seconds in base.items()}, base)
    assert [found.low, found.value, found.high] == pytest.approx([0.2, 0.2, 0.2])


def test_swapping_the_sides_inverts_a_ratio():
    a, b = table(8, A=1.0, B=1.3).values()
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert (1 + there.value) * (1 + back.value) == pytest.approx(1)
    assert (1 + there.low) * (1 + back.high) == pytest.approx(1)


def test_a_configuration_compared_with_itself_is_the_same():
    a = table(5, A=1.0)[A]
    found = paired_ratio(a, a)
    assert (found.low, found.value, found.high) == (0, 0, 0)


def test_one_text_says_nothing_but_its_value():
    found = paired_ratio({"x": 1.2}, {"x": 1.0})
    assert found.value == pytest.approx(0.2)
    assert found.low == -1 and found.high >= 1e9


def test_only_texts_that_both_ran_count():
    assert paired_ratio({"x": 2.0, "y": 2.0, "w": 99.0}, {"x": 1.0, "y": 1.0, "v": 0.01}).value == pytest.approx(1.0)


def test_no_shared_text_is_not_a_certain_tie():
    try:
        found = paired_ratio({"x": 1.0}, {"y": 2.0})
    except ValueError:
        return
    assert found.high > 1


def test_a_higher_confidence_is_a_wider_interval():
    a, b = table(6, A=1.0, B=1.1).values()
    wide, narrow = paired_ratio(a, b, 0.99), paired_ratio(a, b, 0.5)
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high


def test_the_interval_of_a_ratio_covers_the_truth():
    """400 synthetic comparisons at 90 %: within four standard errors of it."""
    hits = sum(0.1 in paired_ratio(*table(6, noise=0.05, seed=seed, A=1.1, B=1.0).values()) for seed in range(400))
    assert abs(hits / 400 - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 400)


def test_the_mean_interval_is_students():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - 2 == pytest.approx(stats.t.ppf(0.95, 2) / math.sqrt(3))
    assert 2 - found.low == pytest.approx(found.high - 2)
    assert mean_interval([5.0]).low == mean_interval([5.0]).high == 5.0


def test_the_regret_of_the_best_is_zero_and_of_the_others_what_they_cost():
    numbers = table(6, noise=0.0, A=1.0, B=1.2, C=1.5)
    assert best_of(numbers) == A
    assert (regret(numbers, A).low, regret(numbers, A).value, regret(numbers, A).high) == (0, 0, 0)
    assert regret(numbers, B).value == pytest.approx(0.2)
    assert regret(numbers, C).value == pytest.approx(0.5)


def test_the_best_is_judged_on_shared_texts_alone():
    numbers = {A: {"x": 1.0, "y": 100.0}, B: {"x": 1.1}}
    assert best_of(numbers) == A


def test_regret_is_never_negative_in_value_beyond_noise():
    for seed in range(20):
        numbers = table(6, noise=0.02, seed=seed, A=1.0, B=1.01, C=1.02)
        assert regret(numbers, B).high >= 0


def test_objectives_read_their_own_seconds():
    trials = [trial(PLAIN, "x", decode_s=2.0), trial(A, "x", decode_s=1.0), trial(A, "y", decode_s=3.0)]
    assert objective_by_text(trials, "tpot") == {PLAIN: {"x": pytest.approx(0.2)}, A: {"x": pytest.approx(0.1), "y": pytest.approx(0.3)}}
    assert objective_by_text(trials, "e2e") == {PLAIN: {"x": 3.5}, A: {"x": 2.5, "y": 4.5}}


def test_price_is_the_device_time_of_a_token_rounds_shared_by_the_batch():
    alone = trial(A, "x", decode_s=2.0)
    in_four = msgspec.structs.replace(alone, batch=4)
    assert objective_by_text([alone], "price") == {A: {"x": pytest.approx(3.5 / 11)}}
    assert objective_by_text([in_four], "price") == {A: {"x": pytest.approx((1.5 + 2.0 / 4) / 11)}}


def test_regret_in_price_is_regret_in_end_to_end_time_for_one_stream():
    rng = np.random.default_rng(0)
    trials = [trial(config, f"t{i}", decode_s=cost * rng.uniform(1, 1.1)) for config, cost in ((A, 1.0), (B, 1.1), (C, 0.9)) for i in range(6)]
    price, e2e = (regret(objective_by_text(trials, goal), A) for goal in ("price", "e2e"))
    assert [price.low, price.value, price.high] == pytest.approx([e2e.low, e2e.value, e2e.high])


def test_the_best_choice_is_shown_to_be_within_epsilon_with_enough_texts():
    racing, shown = tied_within(table(16, A=1.0, B=1.2, C=1.5), A, 0.03, looks=10)
    assert shown is True and racing == set()


def test_a_choice_that_is_a_fifth_worse_is_shown_to_be():
    racing, shown = tied_within(table(16, A=1.2, B=1.0, C=1.5), A, 0.03, looks=10)
    assert shown is False and racing == {B}


def test_too_few_texts_show_nothing():
    racing, shown = tied_within(table(2, noise=0.05, A=1.0, B=1.0), A, 0.03, looks=10)
    assert shown is None and racing == {B}


def test_one_text_shows_nothing():
    assert tied_within(table(1, A=1.0, B=2.0), A, 0.03, looks=1)[1] is None


def test_equal_configurations_are_within_epsilon_and_stay_in_the_race():
    racing, shown = tied_within(table(30, noise=0.01, A=1.0, B=1.0), A, 0.05, looks=3)
    assert shown is True and racing in (set(), {B})


def test_a_choice_without_rivals_is_the_best():
    assert tied_within(table(4, A=1.0), A, 0.03, looks=1) == (set(), True)


def test_wrong_decisions_are_rarer_than_five_percent():
    """The choice is exactly epsilon worse: saying either True or False at any of several looks is right at most at the edge."""
    epsilon, looks, wrong = 0.05, 4, 0
    for seed in range(200):
        numbers = table(16, noise=0.05, seed=seed, A=1 + 1.2 * epsilon, B=1.0)
        for n in (4, 8, 12, 16):
            part = {config: {f"t{i}": by_text[f"t{i}"] for i in range(n)} for config, by_text in numbers.items()}
            shown = tied_within(part, A, epsilon, looks)[1]
            if shown is not None:
                wrong += shown is True
                break
    assert wrong / 200 <= 0.05


def test_the_prediction_of_tokens_per_round_narrows_with_texts():
    few, many = expected_tokens_per_round(0.5, 0.05, 16, 2), expected_tokens_per_round(0.5, 0.05, 16, 32)
    more_profiled = expected_tokens_per_round(0.5, 0.05, 64, 2)
    assert few.value == many.value == 2.0
    assert few.low < many.low < 2 < many.high < few.high
    assert more_profiled.high - more_profiled.low < few.high - few.low


def test_the_prediction_of_tokens_per_round_covers_new_texts():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        profiled, new = rng.normal(0.5, 0.05, 8), rng.normal(0.5, 0.05, 4)
        hits += 1 / new.mean() in expected_tokens_per_round(profiled.mean(), profiled.std(ddof=1), 8, 4)
    assert abs(hits / 400 - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 400)


def test_without_scatter_the_prediction_is_a_point():
    found = expected_tokens_per_round(1.0, 0.0, 0, 8)
    assert (found.low, found.value, found.high) == (1, 1, 1)


def test_a_wild_scatter_leaves_the_prediction_positive_and_ordered():
    found = expected_tokens_per_round(0.5, 10.0, 4, 1)
    assert 0 < found.low <= found.value <= found.high
