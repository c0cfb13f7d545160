import numpy as np
import pytest

from planner.cost.kernel_time import (
    KernelTime,
    best_tree_sizes,
    choose_rows,
    decode_attention,
    first_rows,
    matrix_product,
    rising_widths,
    tree_verification,
)

ROWS = np.array([(batch, kv_len) for batch in 2.0 ** np.arange(10) for kv_len in 2.0 ** np.arange(15) if batch * kv_len <= 2**19])
ATTENTION = decode_attention(8, 128, 132)
TOKEN = 2 * 8 * 128 * 2  # bytes of a token's keys and values
CACHE = 50e6


def made(rows, *, sd=0.0, cliff=0.0, seed=0):
    """Launch, requests, bytes at 3 TB/s, and what misses the cache again."""
    batch, read = rows[:, 0], rows.prod(1) * TOKEN
    seconds = 9e-6 + 0.15e-6 * batch + read / 3e12 + cliff * np.where(read > CACHE, read, 0) / 3e12
    return seconds * np.exp(sd * np.random.default_rng(seed).standard_normal(len(rows)))


def drawn(count, seed=0):
    order = np.random.default_rng(seed).permutation(len(ROWS))
    return order[:count], order[count:]


def missed(model, rows, seconds):
    return np.abs(model.predict(rows)[0] / seconds - 1)


@pytest.mark.parametrize("cliff", [0.0, 2.0])
def test_a_law_of_its_own_terms_is_recovered_with_the_size_of_the_cache(cliff):
    fitted, rest = drawn(40)
    model = KernelTime(ATTENTION, ROWS[fitted], made(ROWS[fitted], cliff=cliff))
    assert missed(model, ROWS[rest], made(ROWS[rest], cliff=cliff)).mean() < 0.015
    likeliest = model.law.edge[model.law.weight.argmax()]
    assert (CACHE / 2 < likeliest < 2 * CACHE) if cliff else missed(model, ROWS[rest], made(ROWS[rest])).max() < 0.05


def test_more_rows_predict_better_and_intervals_cover():
    errors, inside = {12: [], 60: []}, []
    for seed in range(4):
        truth = made(ROWS, sd=0.04, cliff=1.0, seed=seed)
        for count, each in errors.items():
            fitted, rest = drawn(count, seed)
            model = KernelTime(ATTENTION, ROWS[fitted], truth[fitted])
            predicted, sd = model.predict(ROWS[rest])
            each.append(np.abs(predicted / truth[rest] - 1).mean())
            inside.append((np.abs(np.log(truth[rest] / predicted)) <= 1.645 * sd).mean())
    assert np.mean(errors[60]) < 0.06 < 1.5 * np.mean(errors[12])
    assert 0.8 < np.mean(inside) <= 1


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_wrong_row_is_named_and_does_not_move_the_others(factor):
    fitted, rest = drawn(30, seed=1)
    seconds = made(ROWS[fitted], sd=0.02)
    clean = KernelTime(ATTENTION, ROWS[fitted], seconds)
    assert not clean.outliers.any()
    seconds[7] *= factor
    model = KernelTime(ATTENTION, ROWS[fitted], seconds)
    assert np.flatnonzero(model.outliers).tolist() == [7]
    assert missed(model, ROWS[rest], made(ROWS[rest])).mean() < missed(clean, ROWS[rest], made(ROWS[rest])).mean() + 0.01


def test_a_corner_that_the_others_do_not_predict_is_no_outlier():
    rows = np.array([(1, 0), (1, 512), (8000, 0), (8000, 512), (4000, 256), (8000, 256), (1, 256), (4000, 0)], float)
    seconds = np.maximum(35e-3, 15e-3 + 80e-6 * rows[:, 1] + 4e-6 * rows[:, 0] + 4.6e-9 * rows.prod(1))
    assert not KernelTime(tree_verification(), rows, seconds).outliers.any()


def test_a_timed_row_is_known_better_than_one_far_from_all():
    near = ROWS[(ROWS[:, 0] <= 8) & (ROWS[:, 1] <= 256)]
    model = KernelTime(ATTENTION, near, made(near, sd=0.02))
    sd = model.predict(np.array([[4.0, 64.0], [1024.0, 4096.0]]))[1]
    assert sd[0] < sd[1]


def test_rows_are_chosen_without_their_times_and_never_twice():
    timed = []
    truth = made(ROWS, sd=0.02, cliff=2.0)

    def time_row(row):
        timed.append(row)
        return truth[row]

    first = first_rows(ATTENTION, ROWS, 5)
    taken, model = choose_rows(ATTENTION, ROWS, 18, time_row, first)
    assert taken == timed and len(set(taken)) == 18 and taken[:5] == first
    swapped = truth.copy()
    swapped[np.setdiff1d(np.arange(len(ROWS)), taken)] *= 7.0
    assert choose_rows(ATTENTION, ROWS, 18, swapped.__getitem__, first)[0] == taken
    rest = np.setdiff1d(np.arange(len(ROWS)), taken)
    assert missed(model, ROWS[rest], truth[rest]).mean() < 0.08


def test_the_next_row_is_none_that_was_timed_and_lowers_the_doubt_of_all():
    fitted, _ = drawn(10)
    model = KernelTime(ATTENTION, ROWS[fitted], made(ROWS[fitted], sd=0.02))
    row = model.next_rows(ROWS, 1)[0]
    assert row not in fitted
    assert model.next_rows(ROWS[fitted], 3) == []


def test_a_tree_verified_under_a_floor_is_recovered_and_its_best_size_found():
    rows = np.array([(context, size) for context in (1, 2000, 4000, 8000) for size in (0, 64, 128, 256, 384, 512)], float)
    seconds = lambda at: np.maximum(34e-3, 10e-3 + 60e-6 * at[:, 1] + 3e-6 * at[:, 0] + 4e-9 * at[:, 0] * at[:, 1])
    form = tree_verification()
    _, model = choose_rows(form, rows, 10, lambda row: float(seconds(rows[row : row + 1])[0]), first_rows(form, rows, 8))
    assert missed(model, rows, seconds(rows)).mean() < 0.03
    tokens = 1 + 6 * -np.expm1(-np.arange(513) / 80)
    contexts = np.array([1000, 6000])
    chosen = best_tree_sizes(model, contexts, tokens, 6.5e-3)
    for context, size in zip(contexts, chosen, strict=True):
        rate = tokens / (6.5e-3 + seconds(np.stack([np.full(513, context), np.arange(513)], axis=1)))
        assert rate[size] > 0.98 * rate.max()


def test_the_steps_of_a_products_tiles_are_found_between_the_timed_widths():
    widths = np.array([1, 32, 64, 65, 96, 128, 129, 160, 192, 193, 224, 256, 257, 320, 384, 385, 448, 512], float)
    seconds = lambda m: 15e-6 + 5e-6 * (np.ceil(m / 128) - 1)
    timed = np.isin(widths, (64, 128, 257, 384, 385, 512)) | (widths == 1)
    model = KernelTime(matrix_product(4096, 132), widths[timed][:, None], seconds(widths[timed]))
    assert rising_widths(model, np.array([32.0, 64, 128, 192, 256, 320, 384]), 0.04).tolist() == [128, 256, 384]


def test_seconds_that_are_none_are_refused():
    with pytest.raises(ValueError, match="positive seconds"):
        KernelTime(ATTENTION, ROWS[:3], np.array([1e-5, 0.0, 1e-5]))
