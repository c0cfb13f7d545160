"""Rounds per token from a made profile: what was put in comes out, what was not profiled is refused with a remedy."""

import math

import numpy as np
import pytest
from made import FIFTH, GREEDY, NGRAM, SELF_SPARSE, WARM, budgets, made_profile

from planner.cost.acceptance import budget_weights, context_weights, fit_acceptance
from planner.cost.renewal import expected_rounds
from planner.errors import BadInput
from planner.measurements import AcceptanceSample, Packed, load_profile, save_profile
from planner.specs import DraftConfig, FullKV, SparseKV, Workload

LOW, HIGH = 2 * FIFTH, 4 * FIFTH


def config(budget=64, draft_len=4, **changes):
    return DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=budget, **changes), draft_len=draft_len)


def workload(context_len=1024, output_len=33, sampler=GREEDY):
    return Workload(context_len=context_len, output_len=output_len, sampler=sampler)


def rounds_per_token(accept, draft_len, tokens=32):
    accept = np.broadcast_to(accept, (tokens, draft_len))
    return expected_rounds(accept[None], np.full((1, tokens), draft_len), draft_len).rounds[0] / tokens


def one_stratum(model, asked, load):
    strata, notes = model.strata(asked, load)
    assert [stratum.weight for stratum in strata] == [1.0]
    return strata[0].rounds, notes


@pytest.mark.parametrize("draft_len", [1, 2, 4])
def test_the_acceptance_that_made_the_profile_comes_back(draft_len):
    rounds, notes = one_stratum(fit_acceptance(made_profile(texts_per_cell=3)), config(draft_len=draft_len), workload())
    assert rounds.by_drafted.shape == (3, draft_len + 1)
    assert rounds.by_drafted.sum(1) == pytest.approx([rounds_per_token(HIGH, draft_len)] * 3)
    assert (rounds.chance > 0).all()
    assert notes == []


def test_each_text_keeps_its_own_rounds():
    accept = {0: 0.0, 1: 1.0, 2: HIGH}
    model = fit_acceptance(made_profile(accept=lambda kv, context_len, number: accept[number], texts_per_cell=3))
    rounds, _ = one_stratum(model, config(), workload())
    assert rounds.texts.tolist() == [0, 1, 2]
    assert rounds.by_drafted.sum(1) == pytest.approx([1.0, 7 / 32, rounds_per_token(HIGH, 4)])
    assert rounds.chance[:2] == pytest.approx([0, 0])


def test_texts_of_another_sampler_or_context_stay_apart():
    def accept(kv, context_len, number):
        return HIGH if context_len == 1024 else LOW

    model = fit_acceptance(made_profile(accept=accept, samplers=(GREEDY, WARM), texts_per_cell=2))
    for sampler, first in ((GREEDY, 0), (WARM, 2)):
        rounds, _ = one_stratum(model, config(), workload(sampler=sampler))
        assert rounds.texts.tolist() == [first, first + 1]
    rounds, _ = one_stratum(model, config(), workload(context_len=4096))
    assert rounds.by_drafted.sum(1) == pytest.approx([rounds_per_token(LOW, 4)] * 2)


# ---- between and beyond what was profiled


def test_between_contexts_both_neighbours_count_by_distance():
    model = fit_acceptance(made_profile(contexts=(1000, 2000, 4000)))
    strata, notes = model.strata(config(), workload(context_len=1250))
    assert {stratum.context_len: stratum.weight for stratum in strata} == {1000: 0.75, 2000: 0.25}
    assert notes == ["context 1250 is interpolated between 1000 and 2000"]


@pytest.mark.parametrize("context_len, nearest", [(900, 1000), (1099, None), (2200, 2000), (1000, 1000)])
def test_a_context_just_outside_is_taken_from_the_nearest(context_len, nearest):
    weights, notes = context_weights([2000, 1000], context_len)
    assert sum(weights.values()) == pytest.approx(1)
    assert nearest is None or weights == {nearest: 1.0}
    assert bool(notes) == (context_len != 1000)


@pytest.mark.parametrize("context_len", [899, 2201, 1, 10**6])
def test_a_context_far_outside_is_refused(context_len):
    with pytest.raises(BadInput, match=f"covers contexts 1000, 2000 .*got {context_len}; profile with --contexts {context_len}"):
        fit_acceptance(made_profile(contexts=(1000, 2000))).strata(config(), workload(context_len=context_len))


def test_between_budgets_rounds_are_interpolated_on_a_log_scale():
    def accept(kv, context_len, number):
        return {64: LOW, 256: HIGH}[kv.budget]

    rounds, notes = one_stratum(fit_acceptance(made_profile(accept=accept)), config(budget=128), workload())
    expected = (rounds_per_token(LOW, 4) + rounds_per_token(HIGH, 4)) / 2  # 128 is halfway from 64 to 256 in the logarithm
    assert rounds.by_drafted.sum(1) == pytest.approx([expected] * 4)
    assert notes == ["acceptance at kv budget 128 is interpolated between 64 and 256"]


@pytest.mark.parametrize("budget", [65, 100, 200, 255, 300, 1000])
def test_budget_weights_sum_to_one_and_give_the_logarithm_back(budget):
    weights, _ = budget_weights([64, 256, 1024], budget)
    assert sum(weights.values()) == pytest.approx(1)
    assert all(0 < weight < 1 for weight in weights.values())
    assert sum(weight * math.log(b) for b, weight in weights.items()) == pytest.approx(math.log(budget))


@pytest.mark.parametrize("budget", [63, 257])
def test_a_budget_outside_is_refused(budget):
    with pytest.raises(BadInput, match=f"kv budgets 64, 256, got {budget}; profile with --kv-budgets {budget}"):
        fit_acceptance(made_profile()).strata(config(budget=budget), workload())


@pytest.mark.parametrize(
    "asked, load, words",
    [
        (config(), workload(sampler=WARM), "profiled for greedy, not for temperature 1; profile it"),
        (config(draft_len=5), workload(), "at most 4, the longest profiled, got 5; profile with --max-draft-len"),
        (DraftConfig(drafter=NGRAM, draft_len=2), workload(), "holds no acceptance of ngram K=2 at context 1024"),
        (config(selection="chunk"), workload(), "holds no acceptance of self_sparse chunk 64 K=4"),
        (config(sink=2), workload(), "holds no acceptance of self_sparse window 64 K=4"),
    ],
)
def test_what_was_not_profiled_is_refused(asked, load, words):
    with pytest.raises(BadInput, match=words):
        fit_acceptance(made_profile()).strata(asked, load)


# ---- which texts, and how much of them


def thinned(profile, keep):
    """The profile without some acceptance samples."""
    return made_profile(texts=profile.texts, acceptance=[sample for sample in profile.acceptance if keep(sample)])


def test_between_budgets_only_texts_that_both_have_count():
    profile = thinned(made_profile(), lambda sample: (sample.kv.budget, sample.text) not in {(64, 1), (256, 2)})
    model = fit_acceptance(profile)
    assert one_stratum(model, config(budget=64), workload())[0].texts.tolist() == [0, 2, 3]
    rounds, notes = one_stratum(model, config(budget=100), workload())
    assert rounds.texts.tolist() == [0, 3]
    assert len(rounds.by_drafted) == len(rounds.chance) == 2
    assert "was replayed on 2 of 4 texts at context 1024: see the profile's failures" in notes[-1]


@pytest.mark.parametrize("shared", [0, 1])
def test_budgets_without_two_common_texts_are_refused(shared):
    profile = thinned(made_profile(), lambda sample: (sample.text % 2 == 0) == (sample.kv.budget == 64) or sample.text < shared)
    with pytest.raises(BadInput, match=f"replayed on {shared} of 4 texts at context 1024, an interval needs at least 2; see the profile's failures"):
        fit_acceptance(profile).strata(config(budget=128), workload())


@pytest.mark.parametrize("output_len", [2, 5, 32])
def test_a_shorter_output_counts_the_beginning_of_a_text(output_len):
    by_start = np.linspace(0, 1, 32)[:, None].repeat(4, 1)
    model = fit_acceptance(made_profile(accept=lambda *_: by_start))
    rounds, notes = one_stratum(model, config(), workload(output_len=output_len))
    stored = (by_start * 255).round() / 255
    expected = expected_rounds(stored[None, : output_len - 1], np.full((1, output_len - 1), 4), 4)
    assert rounds.by_drafted[0] == pytest.approx(expected.by_drafted[0] / (output_len - 1))
    assert rounds.chance[0] == pytest.approx(expected.variance[0] / (output_len - 1) ** 2)
    assert notes == []


def test_a_longer_output_is_taken_to_go_on_as_it_began():
    model = fit_acceptance(made_profile())
    rounds, notes = one_stratum(model, config(), workload(output_len=500))
    assert rounds.by_drafted.tolist() == one_stratum(model, config(), workload())[0].by_drafted.tolist()
    assert notes == ["acceptance beyond the first 33 tokens of an output is assumed to stay the same"]


def test_texts_that_ended_early_count_per_token_of_their_own():
    """A text of 9 tokens beside one of 33: the same rounds per token when nothing is accepted, whatever the length."""
    profile = made_profile(accept=lambda *_: 0.0)
    texts = [
        text if i % 2 else type(text)(**{f: getattr(text, f) for f in text.__struct_fields__} | {"output_len": 9})
        for i, text in enumerate(profile.texts)
    ]
    acceptance = []
    for sample in profile.acceptance:
        starts = texts[sample.text].output_len - 1
        acceptance.append(
            AcceptanceSample(
                text=sample.text, drafter=sample.drafter, kv=sample.kv, accept_prob=Packed.pack(sample.accept_prob.unpack()[:starts]),
                drafted=Packed.pack(sample.drafted.unpack()[:starts]),
            )
        )  # fmt: skip
    rounds, _ = one_stratum(fit_acceptance(made_profile(texts=texts, acceptance=acceptance)), config(), workload())
    assert rounds.texts.tolist() == [0, 1, 2, 3]
    assert rounds.by_drafted.sum(1) == pytest.approx([1, 1, 1, 1])


def test_repetition_is_noted_once_however_many_parts_an_estimate_has():
    repeating = made_profile(contexts=(1000, 2000), distinct_4grams=0.5)
    _, notes = fit_acceptance(repeating).strata(config(budget=128), workload(context_len=1500))
    assert [note for note in notes if "repeat themselves" in note] == [
        f"4 of 4 texts at context {c} repeat themselves (distinct 4-grams below 0.6): acceptance is inflated" for c in (1000, 2000)
    ]
    assert not any("repeat" in note for note in fit_acceptance(made_profile(distinct_4grams=0.6)).strata(config(), workload())[1])


def test_drafters_and_policies_are_listed_in_the_order_of_the_profile():
    drafters = [(NGRAM, FullKV()), *budgets(256, 64)]
    model = fit_acceptance(made_profile(drafters=drafters))
    assert model.drafters == [NGRAM, SELF_SPARSE]
    assert model.policies(SELF_SPARSE) == [SparseKV(budget=256), SparseKV(budget=64)]
    rounds, _ = one_stratum(model, DraftConfig(drafter=NGRAM, draft_len=3), workload())
    assert rounds.by_drafted.sum(1) == pytest.approx([rounds_per_token(HIGH, 3)] * 4)


def test_a_text_without_a_start_is_refused_on_reading(tmp_path):
    save_profile(made_profile(output_len=1), tmp_path / "p.json")
    with pytest.raises(BadInput, match="output_len"):
        load_profile(tmp_path / "p.json")
