"""The latency fit: it recovers the law that made the rounds, and says how sure it is."""

import math
from functools import cache

import msgspec
import numpy as np
import pytest
from made import NGRAM, SELF_SPARSE, budgets, linear_round_s, made_profile

from planner.cost.latency import fit_latency
from planner.errors import BadInput
from planner.specs import NO_DRAFTER, PLAIN, DraftConfig, DrafterSpec, FullKV, SparseKV


def bilinear(kv, draft_len, context_len):
    """Decoding alone has its own kernel, 8 ms; verifying reads a little more for every token and every cached one."""
    n = draft_len + 1
    verify_s = 8e-3 + 1e-6 * context_len if draft_len == 0 else 10e-3 + 1e-3 * n + 1e-6 * context_len + 2e-7 * n * context_len
    return linear_round_s(kv, draft_len, context_len)[0], verify_s, 1e-4 + 1e-5 * draft_len


def floor(kv, draft_len, context_len):
    """A launch-bound device: no pass takes less than 16 ms."""
    draft_s, _, commit_s = bilinear(kv, draft_len, context_len)
    return draft_s, max(16e-3, 5e-3 + 2.5e-3 * (draft_len + 1) + 1e-6 * context_len), commit_s


def steps(kv, draft_len, context_len):
    """Matrix units: widths are rounded up to multiples of 4."""
    draft_s, _, commit_s = bilinear(kv, draft_len, context_len)
    return draft_s, 4e-3 + 6e-3 * math.ceil((draft_len + 1) / 4) + 1e-6 * context_len, commit_s


LAWS = {"bilinear": bilinear, "floor": floor, "steps": steps}
WIDE = {"contexts": (512, 1024, 4096), "draft_lens": (1, 2, 3, 4, 7), "max_draft_len": 7, "texts_per_cell": 1}
SMALL = {"contexts": (512, 4096), "draft_lens": (1, 4), "max_draft_len": 4, "texts_per_cell": 1}


@cache
def fitted(law: str):
    return fit_latency(made_profile(round_s=LAWS[law], **WIDE))


def sparse(budget: int, draft_len: int) -> DraftConfig:
    return DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=budget), draft_len=draft_len)


def predicted(model, config: DraftConfig, context_len: int) -> float:
    return model.round_s(config, context_len, context_len)[0][-1]


def with_rounds(profile, change):
    """The profile with every round sample passed through `change`."""
    return msgspec.structs.replace(profile, rounds=[change(sample) for sample in profile.rounds])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("budget", "draft_len", "context_len"), [(64, 1, 512), (64, 6, 1024), (128, 5, 1024), (256, 7, 3000), (200, 6, 3000)])
def test_a_fit_recovers_the_law_that_made_the_rounds_where_nothing_was_measured(law, budget, draft_len, context_len):
    model = fitted(law)
    truth = sum(LAWS[law](SparseKV(budget=budget), draft_len, context_len))
    assert predicted(model, sparse(budget, draft_len), context_len) == pytest.approx(truth, rel=0.01)
    assert predicted(model, PLAIN, context_len) == pytest.approx(sum(LAWS[law](FullKV(), 0, context_len)), rel=0.01)


@pytest.mark.parametrize("law", LAWS)
def test_the_error_of_a_law_that_a_form_has_is_small(law):
    model = fitted(law)
    assert model.form() == law
    assert model.error() < (0.01 if law != "steps" else 0.5)  # a step between the timed widths is anybody's guess, and the error says so


@pytest.mark.parametrize("law", LAWS)
def test_round_times_do_not_shrink_with_drafts_or_context(law):
    model = fitted(law)
    config = sparse(128, 7)
    for position in (600, 2500, 4000):
        assert (np.diff(model.round_s(config, 2048, position)[0]) >= -1e-12).all()
    assert (model.round_s(config, 2048, 3000)[0] <= model.round_s(config, 2048, 4000)[0] + 1e-12).all()


def test_a_single_token_has_a_term_of_its_own():
    """Verifying two tokens costs 10 ms more than one: a line through both would miss decoding alone by far."""

    def jump(kv, draft_len, context_len):
        return 1e-3 * draft_len, 3e-3 if draft_len == 0 else 13e-3 + 1e-3 * draft_len, 0.0

    model = fit_latency(made_profile(round_s=jump, contexts=(512, 1024), texts_per_cell=1))
    assert predicted(model, PLAIN, 1024) == pytest.approx(3e-3, rel=1e-3)
    widths = model.round_s(sparse(64, 4), 1024, 1024)[0]  # a round of K = 4 that drafts 0, 1, .. tokens
    assert widths[0] == pytest.approx(3e-3, rel=1e-3)
    assert widths[1] == pytest.approx(1e-3 + 14e-3, rel=1e-3)


def test_plain_decoding_is_not_a_drafter_that_drafts_nothing():
    """Off is measured by itself; a loaded drafter that offers nothing still pays for its turn."""

    def overhead(kv, draft_len, context_len):
        return (2e-3 + 1e-3 * draft_len) * (draft_len > 0), 10e-3, 0.0

    model = fit_latency(made_profile(round_s=overhead, contexts=(512, 1024), texts_per_cell=1))
    assert predicted(model, PLAIN, 1024) == pytest.approx(10e-3, rel=1e-3)
    assert model.round_s(sparse(64, 4), 1024, 1024)[0][0] == pytest.approx(12e-3, rel=1e-2)


def test_one_outlier_round_changes_nothing():
    clean = made_profile(round_s=bilinear, noise=0.002, rounds_per_cell=12, **SMALL)
    done = []

    def disturb(sample):
        if sample.draft_len != 4 or done:
            return sample
        done.append(sample)
        return msgspec.structs.replace(sample, verify_s=[50 * sample.verify_s[0], *sample.verify_s[1:]])

    hurt = with_rounds(clean, disturb)
    assert hurt != clean
    for config in (PLAIN, sparse(64, 1), sparse(128, 4), sparse(256, 3)):
        assert predicted(fit_latency(hurt), config, 1024) == pytest.approx(predicted(fit_latency(clean), config, 1024), rel=5e-3)


@pytest.mark.parametrize("drafted", [[4] * 12, [0, 4] * 6], ids=["always drafts", "drafts every other round"])
def test_one_outlier_round_of_an_ngram_drafter_changes_nothing(drafted):
    def of(outlier: float):
        profile = made_profile(noise=0.002, rounds_per_cell=12, drafters=[*budgets(64), (NGRAM, FullKV())], **SMALL)

        def change(sample):
            if sample.drafter != NGRAM:
                return sample
            return msgspec.structs.replace(sample, drafted=drafted, draft_s=[outlier, *sample.draft_s[1:]])

        return fit_latency(with_rounds(profile, change))

    config = DraftConfig(drafter=NGRAM, draft_len=4)
    hurt, clean = of(0.5).round_s(config, 1024, 1024)[0], of(1e-4).round_s(config, 1024, 1024)[0]
    assert hurt == pytest.approx(clean, rel=5e-3)


def test_what_was_not_timed_is_refused():
    model = fit_latency(made_profile(drafters=budgets(64), contexts=(512, 1024), draft_lens=(1, 2)))
    with pytest.raises(BadInput, match="timed no round"):
        model.round_s(DraftConfig(drafter=NGRAM, draft_len=1), 512, 512)
    with pytest.raises(BadInput, match="up to draft_len 2, got 3"):
        model.round_s(sparse(64, 3), 512, 512)
    assert model.round_s(sparse(64, 2), 512, 512).shape[1] == 3


def test_errors_of_left_out_cells_and_the_jackknife_grow_with_noise():
    fits = [fit_latency(made_profile(round_s=bilinear, noise=noise, rounds_per_cell=12, **SMALL)) for noise in (0.0, 0.02, 0.2)]
    errors = [fit.error() for fit in fits]
    assert errors[0] < 1e-3 and errors[0] < errors[1] < errors[2]
    assert 0.02 / math.sqrt(12) / 2 < errors[1] < 0.03
    spread = [np.std(fit.round_s(sparse(64, 4), 1024, 1024)[1:, -1]) for fit in fits]
    assert spread[0] < spread[1] < spread[2]
    assert fits[0].plain_error() < fits[1].plain_error() < fits[2].plain_error()


def test_a_law_that_no_form_has_shows_in_the_error():
    """Cubic in the width: what lies between the timed widths cannot be predicted well, and the model must know."""

    def cubic(kv, draft_len, context_len):
        return 1e-3 * draft_len, 10e-3 + 1e-4 * (draft_len + 1) ** 3, 0.0

    model = fit_latency(made_profile(round_s=cubic, **(WIDE | {"draft_lens": (1, 4, 7)})))
    missed = max(abs(predicted(model, sparse(64, k), 1024) / sum(cubic(None, k, 1024)) - 1) for k in (2, 3, 5, 6))
    assert missed < 2 * model.error()


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_drift_is_the_change_of_the_first_cell(factor):
    def slower(sample):
        if sample.role != "drift":
            return sample
        return msgspec.structs.replace(
            sample, **{phase: [factor * s for s in getattr(sample, phase)] for phase in ("draft_s", "verify_s", "commit_s")}
        )  # fmt: skip

    profile = with_rounds(made_profile(), slower)
    assert fit_latency(profile).drift == pytest.approx(factor - 1, abs=1e-9)


def test_a_drift_sample_takes_no_part_in_the_fit():
    profile = made_profile(round_s=bilinear)
    far = with_rounds(profile, lambda sample: msgspec.structs.replace(sample, verify_s=[9.0] * 6) if sample.role == "drift" else sample)
    assert predicted(fit_latency(far), PLAIN, 1024) == predicted(fit_latency(profile), PLAIN, 1024)


def test_without_a_drift_sample_there_is_none():
    profile = made_profile()
    assert fit_latency(msgspec.structs.replace(profile, rounds=[s for s in profile.rounds if s.role == "cell"])).drift == 0.0


def test_time_to_first_token_is_prefill_and_start():
    model = fit_latency(made_profile(contexts=(1000, 3000)))
    for context_len in (950, 1000, 2000, 3000, 3200):
        assert model.ttft_s(PLAIN, context_len)[0] == pytest.approx(1e-4 * context_len + 1e-3)
    assert model.ttft_s(PLAIN, 1000)[1] == pytest.approx(0.0, abs=1e-12)


# Not more than one context: what the command's default measures.


@pytest.mark.parametrize("context_len", [96, 1000, 1040, 2048])
def test_a_profile_of_one_context_is_enough_near_it(context_len):
    """10 % beyond, a slope that was not measured must not be made up: nothing, or the whole time, may depend on context."""

    def flat(kv, draft_len, context_len):
        return 4e-3 * draft_len, 10e-3 + 1e-3 * draft_len, 1e-4

    model = fit_latency(made_profile(round_s=flat, contexts=(context_len,), texts_per_cell=1, drafters=budgets(64), draft_lens=(1, 2, 4)))
    for position in (context_len, round(1.1 * context_len)):
        assert model.round_s(PLAIN, context_len, position)[0][0] == pytest.approx(10.1e-3, rel=0.01)
        assert model.round_s(sparse(64, 4), context_len, position)[0][-1] == pytest.approx(30.1e-3, rel=0.01)


@pytest.mark.parametrize("contexts", [(512, 1024), (512, 1024, 2048)])
def test_a_profile_of_plain_decoding_alone_can_be_fitted(contexts):
    model = fit_latency(made_profile(drafters=[], contexts=contexts))
    assert predicted(model, PLAIN, 1024) == pytest.approx(sum(linear_round_s(FullKV(), 0, 1024)), rel=1e-2)
    assert model.max_draft_len == {NO_DRAFTER: 0}


@pytest.mark.parametrize("contexts", [(512, 1024), (512, 1024, 2048)])
def test_an_ngram_drafter_that_found_nothing_can_be_fitted(contexts):
    def nothing(sample):
        return msgspec.structs.replace(sample, drafted=[0] * len(sample.drafted))

    profile = with_rounds(made_profile(drafters=[(NGRAM, FullKV())], contexts=contexts, draft_lens=(4,)), nothing)
    assert predicted(fit_latency(profile), PLAIN, 1024) == pytest.approx(sum(linear_round_s(FullKV(), 0, 1024)), rel=1e-2)


def test_a_drift_sample_of_a_cell_that_was_not_measured_is_refused_in_words():
    profile = with_rounds(made_profile(), lambda sample: msgspec.structs.replace(sample, context_len=77) if sample.role == "drift" else sample)
    with pytest.raises(BadInput, match="drift"):
        fit_latency(profile)


# Batches: a fit each, nothing shared.


BATCHES = {1: bilinear, 4: floor, 8: steps}  # other kernels at each


@cache
def batched():
    return fit_latency(made_profile(batches=BATCHES, **WIDE))


def at_batch(model, config: DraftConfig, batch: int, context_len: int = 1024) -> float:
    return model.round_s(config, context_len, context_len, batch)[0][-1]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("config", [PLAIN, sparse(64, 7), sparse(128, 4), sparse(256, 2)], ids=str)
def test_each_batch_has_the_law_that_made_its_rounds(batch, config):
    truth = sum(BATCHES[batch](config.kv, config.draft_len, 1024))
    assert at_batch(batched(), config, batch) == pytest.approx(truth, rel=0.01)
    assert batched().form(batch) == BATCHES[batch].__name__
    assert batched().notes(batch) == []


def test_what_was_timed_at_other_batches_changes_nothing():
    """Apart from the pace of the passes, which is the machine's: here there is one pass only."""
    noisy = {"noise": 0.02, "rounds_per_cell": 12, **SMALL}
    alone, among = (
        fit_latency(with_rounds(profile, lambda sample: msgspec.structs.replace(sample, start_s=sample.start_s[:1])))
        for profile in (made_profile(round_s=bilinear, **noisy), made_profile(batches=BATCHES, **noisy))
    )
    for config in (PLAIN, sparse(64, 1), sparse(128, 4)):
        assert among.round_s(config, 1024, 1024).tolist() == alone.round_s(config, 1024, 1024).tolist()
    assert among.error() == alone.error() and among.plain_error() == alone.plain_error() != among.plain_error(4)


def test_between_two_batches_a_round_lies_on_the_line_and_the_estimate_says_so():
    model = batched()
    for config in (PLAIN, sparse(128, 4)):
        assert at_batch(model, config, 5) == pytest.approx(0.75 * at_batch(model, config, 4) + 0.25 * at_batch(model, config, 8))
    [note] = model.notes(5)
    assert "batch 5 is interpolated between 4 and 8" in note
    assert model.error(5) == max(model.error(4), model.error(8)) and model.form(5) == "floor and steps"


def test_a_cell_left_out_moves_the_batches_it_was_timed_at_by_their_share():
    """Row by row the same cell for every configuration: that is what makes a difference of two of them sure."""
    model = fit_latency(made_profile(batches=BATCHES, noise=0.05, rounds_per_cell=12, **SMALL))
    one, other = sparse(64, 4), sparse(128, 2)
    for config in (one, other, PLAIN):
        low, high, between = (model.round_s(config, 1024, 1024, batch) for batch in (4, 8, 7))
        moved = np.concatenate([0.25 * (low[1:] - low[0]), 0.75 * (high[1:] - high[0])])
        assert between[1:] - between[0] == pytest.approx(moved)
    assert len(model.round_s(one, 1024, 1024, 7)) == len(model.round_s(other, 1024, 1024, 7)) == len(model.round_s(PLAIN, 1024, 1024, 7))


@pytest.mark.parametrize("batch", [1, 2, 9, 64])
def test_a_batch_outside_of_the_profiled_ones_is_refused_with_the_remedy(batch):
    model = fit_latency(made_profile(batches={4: floor, 8: steps}, **SMALL))
    wanted = ",".join(map(str, sorted({batch, 4, 8})))
    with pytest.raises(BadInput, match=f"at batch 4, 8, got {batch}; profile with `planner profile --batches {wanted}`"):
        model.round_s(PLAIN, 1024, 1024, batch)


def test_a_cell_that_failed_at_a_batch_is_refused_there_and_only_there():
    profile = made_profile(batches=BATCHES, **SMALL)

    def without(lost):
        return fit_latency(msgspec.structs.replace(profile, rounds=[s for s in profile.rounds if not lost(s)]))

    model = without(lambda s: s.batch == 8 and s.draft_len == 4)
    with pytest.raises(BadInput, match="up to draft_len 1 at batch 8, got 4"):
        model.round_s(sparse(64, 4), 1024, 1024, 6)
    assert at_batch(model, sparse(64, 4), 4) == pytest.approx(at_batch(fit_latency(profile), sparse(64, 4), 4))
    with pytest.raises(BadInput, match="no round of self_sparse window 64 K=1 at batch 8"):
        without(lambda s: s.batch == 8 and s.draft_len > 0).round_s(sparse(64, 1), 1024, 1024, 8)
    with pytest.raises(BadInput, match="at batch 1, 4, got 8"):  # no baseline, no answer
        without(lambda s: s.batch == 8 and s.draft_len == 0).round_s(sparse(64, 1), 1024, 1024, 8)


def test_the_pace_of_a_pass_is_divided_out_of_every_batch():
    """The third of three passes is half as fast again, for all cells: the fit must not see it."""
    profile = made_profile(batches=BATCHES, **SMALL)
    pace = np.repeat([1.0, 1.0, 1.5], 2)

    def slowed(sample):
        if sample.role != "cell":
            return sample
        return msgspec.structs.replace(
            sample, **{phase: (pace * getattr(sample, phase)).tolist() for phase in ("draft_s", "verify_s", "commit_s")}
        )  # fmt: skip

    even, slow = fit_latency(profile), fit_latency(with_rounds(profile, slowed))
    for batch in BATCHES:
        assert at_batch(slow, sparse(64, 4), batch) == pytest.approx(pace.mean() * at_batch(even, sparse(64, 4), batch), rel=1e-3)
    assert slow.unsteadiness > 0.2 > even.unsteadiness


def test_drift_compares_cells_of_one_batch():
    assert fit_latency(made_profile(batches={4: floor, 1: bilinear}, **SMALL)).drift == pytest.approx(0.0, abs=1e-9)


def test_the_first_token_is_that_of_one_prompt():
    """A batch selects for all its streams in turn, and its start takes as long; a request arrives by itself."""
    slow = with_rounds(made_profile(batches=BATCHES, **SMALL), lambda s: msgspec.structs.replace(s, start_s=[s.batch * t for t in s.start_s]))
    assert fit_latency(slow).ttft_s(sparse(64, 4), 512) == fit_latency(made_profile(round_s=bilinear, **SMALL)).ttft_s(sparse(64, 4), 512)


# Variants of one drafter: the same code on the same cache, other weights.

INT8, INT4 = DrafterSpec(kind="self_sparse", weights="int8"), DrafterSpec(kind="self_sparse", weights="int4", vocab=8192)
PASS_S = {SELF_SPARSE: 60e-3, INT8: 22e-3, INT4: 14e-3}  # over the weights, whatever is attended to
FEW = ((1, 64), (4, 64), (8, 1024))  # draft_len, budget: all that a variant is timed at, beside one with a cell or more besides:
FOUR, SEVEN = (*FEW, (8, 64)), (*FEW, (8, 64), (2, 64), (1, 1024), (4, 1024))  # at both budgets with one draft_len
UNMEASURED = [DraftConfig(drafter=v, kv=SparseKV(budget=b), draft_len=k) for v in PASS_S for b in (64, 200, 1024) for k in (2, 3, 6, 7)]


def variant_law(drafter, kv, draft_len, context_len, setup_s=1e-3):
    _, verify_s, commit_s = bilinear(kv, draft_len, context_len)
    return (setup_s + draft_len * (PASS_S[drafter] + 8e-6 * kv.read(context_len)) if draft_len else 0.0), 5 * verify_s, commit_s


def of_variants(cells, *, law=variant_law, noise=0.0, seed=0, contexts=(2048, 4096)):
    """A profile of the variants at their cells. The noise is the cells' own: more rounds would not help."""
    rng = np.random.default_rng(seed)
    lens, both = sorted({k for own in cells.values() for k, _ in own}), (64, 1024)
    profile = made_profile(
        drafters=[(drafter, SparseKV(budget=size)) for drafter in cells for size in both], contexts=contexts, draft_lens=lens, max_draft_len=8,
        texts_per_cell=1,
    )  # fmt: skip

    def timed(sample):
        seconds = law(sample.drafter, sample.kv, sample.draft_len, sample.context_len) * (1 + noise * rng.standard_normal(3))
        return msgspec.structs.replace(sample, **{name: [t] * 6 for name, t in zip(("draft_s", "verify_s", "commit_s"), seconds, strict=True)})

    kept = [x for x in profile.rounds if x.draft_len == 0 or (x.draft_len, x.kv.budget) in cells[x.drafter]]
    return msgspec.structs.replace(profile, rounds=[timed(sample) for sample in kept if sample.role == "cell"])


def misses(model, law=variant_law, context_len=2048):
    """[configurations] relative errors where nothing was measured, and the half-widths of their intervals at 90 %."""
    found = []
    for config in UNMEASURED:
        whole, *left_out = model.round_s(config, context_len, context_len)[:, -1]
        jackknife = (len(left_out) - 1) * np.var(left_out)
        half = 1.645 * math.sqrt(jackknife + (whole * model.error()) ** 2)
        truth = sum(law(config.drafter, config.kv, config.draft_len, context_len))
        found.append((whole / truth - 1, half / truth))
    return np.array(found).T


def test_few_cells_of_each_variant_are_enough():
    missed, half = misses(fit_latency(of_variants({SELF_SPARSE: SEVEN, INT8: FEW, INT4: FEW})))
    assert np.abs(missed).max() < 2e-3
    assert half.max() < 0.01


def test_a_variant_timed_at_one_budget_takes_the_slope_of_the_others():
    model = fit_latency(of_variants({SELF_SPARSE: SEVEN, INT4: ((1, 64), (8, 64))}))
    config = DraftConfig(drafter=INT4, kv=SparseKV(budget=1024), draft_len=5)
    assert predicted(model, config, 2048) == pytest.approx(sum(variant_law(INT4, config.kv, 5, 2048)), rel=1e-3)


@pytest.mark.parametrize("contexts", [(2048,), (2048, 4096)])
@pytest.mark.parametrize("first", [SEVEN, FOUR], ids=["seven cells of one", "four cells of one"])
def test_noisy_variants_come_back_within_intervals_that_cover(contexts, first):
    """3 % on every cell. The intervals include a cell's own noise, so they cover more than 90 % of the truth."""
    cells = {SELF_SPARSE: first, INT8: FEW, INT4: FEW}
    missed, half = np.hstack([misses(fit_latency(of_variants(cells, noise=0.03, seed=seed, contexts=contexts))) for seed in range(8)])
    assert np.sqrt(np.mean(missed**2)) < 0.025
    assert np.mean(np.abs(missed) <= half) > 0.9
    assert np.median(half) < 0.08
    assert np.mean(np.abs(missed) <= half / 5) < 0.9  # an interval five times narrower would be caught


def test_a_variant_that_shares_less_than_assumed_widens_the_intervals():
    """A round of the int4 drafter pays 8 ms more once, which no coefficient of its own can say."""

    def law(drafter, *rest):
        return variant_law(drafter, *rest, setup_s=9e-3 if drafter == INT4 else 1e-3)

    cells = {SELF_SPARSE: SEVEN, INT8: FEW, INT4: FEW}
    missed, half = misses(fit_latency(of_variants(cells, law=law)), law)
    assert np.abs(missed).max() > 0.01
    assert (np.abs(missed) <= half).all()
