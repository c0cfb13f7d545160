import time

import numpy as np
import pytest
from msgspec.structs import replace
from served import CONTEXT, OUTPUT, SYSTEM, plain_round_s, served_profile, tokens_of

from planner.cost.serving import Cells, fit_serving
from planner.errors import BadInput

Z90 = 1.645


def ask(model, *cells, context=CONTEXT):
    """[(drafter, draft_len, concurrency)] -> Cells"""
    drafter, draft_len, concurrency = zip(*cells, strict=True)
    return Cells(
        np.array([model.drafters.index(d) for d in drafter]), np.array(draft_len), np.array(concurrency), np.array([context]), np.array([OUTPUT])
    )


UNSEEN = [("eagle3", k, c) for k in (2, 6, 7) for c in (2, 8, 48, 200)]


def test_a_dozen_cells_predict_the_others():
    model = fit_serving(served_profile())
    found = model.predict(ask(model, *UNSEEN))
    truth = np.array([plain_round_s(c, k) / tokens_of(0.75, k) for _, k, c in UNSEEN])
    assert np.abs(found.tpot_s / truth - 1).max() < 0.02
    assert found.output_tokens_per_s == pytest.approx(found.running / found.tpot_s)
    assert not found.extrapolated.any()


def test_intervals_hold_what_a_fresh_measurement_shows():
    inside = []
    for seed in range(12):
        model = fit_serving(served_profile(noise=0.012, seed=seed))
        found = model.predict(ask(model, *UNSEEN))
        rng = np.random.default_rng(100 + seed)
        fresh = np.array([plain_round_s(c, k) / tokens_of(0.75, k) for _, k, c in UNSEEN]) * np.exp(0.012 * rng.standard_normal(len(UNSEEN)))
        inside += list(np.abs(np.log(fresh / found.tpot_s)) < Z90 * found.sd_tpot)
    assert 0.85 <= np.mean(inside) <= 0.99


def test_a_small_pool_limits_the_running_batch_of_its_drafter_only():
    model = fit_serving(served_profile(accept={"draft_model": 0.8, "ngram": 0.5}, capacity={"draft_model": 40.0}))
    found = model.predict(ask(model, ("draft_model", 3, 256), ("draft_model", 2, 128), ("ngram", 3, 256), ("none", 0, 256), ("draft_model", 3, 8)))
    assert found.running[:2] == pytest.approx(40, rel=0.06)
    assert found.running[2:4] == pytest.approx(256, rel=0.06)
    assert found.running[4] == pytest.approx(8, rel=0.06)


def test_one_stream_that_hardly_waits_is_enough_for_a_fit():
    cells = [("none", 0, 1), *(("eagle3", k, 1) for k in (1, 3, 5))]
    found = (model := fit_serving(served_profile(cells=cells, capacity={"none": 0.98, "eagle3": 0.98}))).predict(
        ask(model, ("none", 0, 1), ("eagle3", 2, 1), ("eagle3", 3, 200))
    )
    assert found.tpot_s[:2] == pytest.approx([plain_round_s(0.98, 0), plain_round_s(0.98, 2) / tokens_of(0.75, 2)], rel=0.03)
    assert found.extrapolated.tolist() == [False, False, True]
    assert (found.sd_round <= 1.4).all()  # whatever is asked, not a number without meaning


def test_intervals_are_wide_where_one_draft_length_cannot_tell_a_pass_from_the_glue_of_a_round():
    loads = (1, 8, 64)
    off = [("none", 0, c) for c in (1, 4, 16, 64, 256)]
    one, three = (
        fit_serving(served_profile(cells=[*off, *(("eagle3", k, c) for k in lengths for c in loads)], noise=0.01)) for lengths in ((5,), (1, 3, 5))
    )
    asked = [("eagle3", 1, c) for c in loads]
    known, guessed = (model.predict(ask(model, *asked)).sd_round for model in (three, one))
    assert (guessed > 1.5 * known).all()
    assert (guessed[:2] > 0.06).all()


def test_a_drafter_is_extrapolated_beyond_its_own_loads():
    cells = [*(("none", 0, c) for c in (1, 16, 256)), *(("eagle3", k, c) for k in (1, 4) for c in (1, 16))]
    model = fit_serving(served_profile(cells=cells))
    assert model.predict(ask(model, ("none", 0, 256), ("eagle3", 4, 16), ("eagle3", 4, 64))).extrapolated.tolist() == [False, False, True]


def test_what_ran_is_believed_where_the_bytes_say_that_nothing_fits():
    tiny = SYSTEM.__class__(name="card", memory_bytes=10 * 2**30, fraction=0.9)  # less than the weights
    for throughput in (True, False):
        model = fit_serving(replace(served_profile(throughput=throughput), system=tiny))
        found = model.predict(ask(model, ("none", 0, 64), ("eagle3", 3, 64)))
        assert found.fits.all()
        assert found.running == pytest.approx([64, 64], rel=0.1)


def test_what_two_settings_share_cancels():
    model = fit_serving(served_profile(noise=0.01))
    a, b = ask(model, ("eagle3", 6, 100)), ask(model, ("eagle3", 7, 100))
    far = ask(model, ("none", 0, 1))
    apart = np.hypot(model.predict(a).sd_tpot, model.predict(b).sd_tpot)
    assert model.ratio_sd(a, b, "tpot") < apart
    assert model.ratio_sd(a, b, "tpot") <= model.ratio_sd(a, far, "tpot")


def test_an_idle_drafter_is_slower_than_off_and_measured_ones_are_believed():
    measured = fit_serving(served_profile(idle_tax=0.18))
    assert measured.idle_measured == {"eagle3"}
    off, idle = measured.predict(ask(measured, ("none", 0, 32), ("eagle3", 0, 32))).tpot_s
    assert 1.13 < idle / off < 1.19
    cells = [cell for cell in served_profile().cells if cell.drafter == "none" or cell.draft_len]
    never = fit_serving(served_profile(cells=[(c.drafter, c.draft_len, c.concurrency) for c in cells]))
    served = never.predict(ask(never, ("none", 0, 32), ("eagle3", 0, 32)))
    assert 1.05 < served.tpot_s[1] / served.tpot_s[0] < 1.2
    assert served.sd_tpot[1] > served.sd_tpot[0]
    assert list(served.extrapolated) == [False, True]


def test_times_without_counters_are_predicted_all_the_same():
    model = fit_serving(served_profile(acceptance=False))
    assert model.acceptance_measured == set()
    found = model.predict(ask(model, *UNSEEN))
    truth = np.array([plain_round_s(c, k) / tokens_of(0.75, k) for _, k, c in UNSEEN])
    assert np.median(np.abs(found.tpot_s / truth - 1)) < 0.05


def test_without_throughput_the_running_batch_is_the_byte_counts():
    model = fit_serving(served_profile(throughput=False))
    found = model.predict(ask(model, ("none", 0, 16), ("none", 0, 256)))
    assert found.running == pytest.approx([16, 256], rel=0.1)  # 50 GiB of KV pool hold more


def test_contexts_that_were_measured_are_told_apart():
    short, long = served_profile(), served_profile(round_s=lambda running, k: 2 * plain_round_s(running, k), contexts=(8000,))
    model = fit_serving(replace(short, cells=short.cells + long.cells))
    at = [model.predict(ask(model, ("eagle3", 3, 32), context=context)) for context in (1000, 4000, 8000, 16000)]
    assert at[0].tpot_s < at[1].tpot_s < at[2].tpot_s
    assert at[2].tpot_s / at[0].tpot_s == pytest.approx(2, rel=0.08)
    assert [bool(one.extrapolated[0]) for one in at] == [False, False, False, True]


def test_several_degrees_of_tensor_parallelism_are_not_mixed():
    one, two = served_profile(), served_profile(round_s=lambda b, k: plain_round_s(b, k) / 2, tensor_parallel=2)
    both = replace(one, cells=one.cells + two.cells)
    with pytest.raises(BadInput, match=r"tensor parallelism 1, 2; choose one with --tp"):
        fit_serving(both)
    with pytest.raises(BadInput, match=r"got --tp 4"):
        fit_serving(both, 4)
    times = [float(fit_serving(both, tp).predict(ask(fit_serving(both, tp), ("none", 0, 1))).tpot_s[0]) for tp in (1, 2)]
    assert times[0] / times[1] == pytest.approx(2, rel=0.03)


def test_a_hundred_thousand_cells_take_a_second_or_two():
    model = fit_serving(served_profile(accept={"eagle3": 0.7, "ngram": 0.4}))
    rng = np.random.default_rng(0)
    n = 100_000
    cells = Cells(rng.integers(1, 3, n), rng.integers(1, 9, n), rng.integers(1, 257, n), rng.choice([500, 1000, 2000, 4000], n), np.array([OUTPUT]))
    start = time.perf_counter()
    assert np.isfinite(model.predict(cells).tpot_s).all()
    assert time.perf_counter() - start < 10  # 0.8 s on an idle core; other processes share it
