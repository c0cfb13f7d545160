"""The synthetic engines that plans are judged on (benchmarks/engines.py) obey the laws that real ones do."""

import csv

import numpy as np
import pytest
from drafted_texts import MAX_DRAFT_LEN, NUM_REQUESTS, NUM_TOKENS, Drafted, expected, simulate
from engines import CONCURRENCIES, MAX_CONCURRENCY, Cell, measured_cells, qwen_on_h100, random_engine, twelve_cells
from step_times import GPUS, product_s

from planner.measurements import encode
from planner.serving import OFF, decode_serving_profile

SEEDS = (0, 3, 5, 7, 12)


@pytest.fixture(scope="module", params=SEEDS)
def engine(request):
    return random_engine(request.param)


def settings_to_try(engine) -> list[tuple[str, int, int]]:
    return [(*setting, context) for context in engine.contexts for setting in engine.settings() if setting[1] in (0, 1, 3)]


def test_requests_in_the_system_are_those_that_wait_prefill_and_decode(engine):
    """Little's law: concurrency = requests per second x the whole time of one."""
    for drafter, draft_len, context in settings_to_try(engine):
        for concurrency in (1, 16, 256):
            truth, output = engine.truth(drafter, draft_len, concurrency, context), engine.output_len[context]
            whole_s = truth.ttft_s + (output - 1) * truth.tpot_s
            assert truth.output_tokens_per_s / output * whole_s == pytest.approx(concurrency, rel=1e-6)
            assert truth.output_tokens_per_s * truth.tpot_s == pytest.approx(truth.running * output / (output - 1), rel=1e-6)


def test_no_more_run_than_fit(engine):
    for setting in settings_to_try(engine):
        running = engine.curve(*setting).running
        assert running.max() <= min(max(1.0, engine.capacity(*setting)), engine.scheduler.max_running) + 1e-9
        assert np.all(running <= np.arange(1, MAX_CONCURRENCY + 1) + 1e-9)


def test_a_drafter_takes_room_from_the_kv_of_the_requests(engine):
    for name, method in engine.methods.items():
        for context in engine.contexts:
            off, idle = engine.capacity(OFF, 0, context), engine.capacity(name, 0, context)
            assert idle == off if method.at is None else idle < off


def test_tpot_rises_with_concurrency_apart_from_steps(engine):
    """A fuller batch can pick a better kernel, so it may fall a little, but not over an octave."""
    for setting in settings_to_try(engine):
        round_s = engine.curve(*setting).round_s
        assert np.all(np.diff(np.log(round_s)) > -0.08)
        assert np.all(round_s[1::2] >= 0.99 * round_s[: len(round_s) // 2])  # at 2 c and at c


def test_a_loaded_drafter_that_drafts_nothing_costs_something(engine):
    for name, method in engine.methods.items():
        context = engine.contexts[0]
        idle, off = engine.truth(name, 0, 1, context), engine.truth(OFF, 0, 1, context)
        assert idle.tpot_s == pytest.approx(off.tpot_s * (1 + method.idle_tax), rel=1e-9)


def test_steps_are_not_smooth(engine):
    """Somewhere one more request costs much more than it does elsewhere."""
    round_s = engine.decoding_s(OFF, 0, engine.contexts[0])
    steps = np.diff(round_s)
    assert steps.max() > 5 * np.median(np.abs(steps))


def test_many_noisy_measurements_average_to_the_truth(engine):
    rng = np.random.default_rng(0)
    name, method = next(iter(engine.methods.items()))
    for cell in (Cell(OFF, 0, 32, engine.contexts[0]), Cell(name, method.max_draft_len, 8, engine.contexts[-1])):
        truth, measured = engine.truth(*cell), engine.measure([cell] * 150, rng)
        for field in ("tpot_s", "output_tokens_per_s", "ttft_s"):
            values = np.array([getattr(one, field) for one in measured])
            assert values.mean() == pytest.approx(getattr(truth, field), rel=4 * values.std() / values.mean() / np.sqrt(150) + 2e-3), field
            assert 0.003 < values.std() / values.mean() < 0.06


def test_measurements_repeat_with_their_seed(engine):
    cells = measured_cells(engine)
    first, again, other = (engine.measure(cells, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("drawn", [False, True])
def test_a_dozen_per_drafter_lies_in_the_grid_with_its_ends(engine, drawn):
    rng = np.random.default_rng(0) if drawn else None
    grid = set(engine.grid())
    for name, method in engine.methods.items():
        cells = twelve_cells(engine, name, rng)
        assert len(set(cells)) == 12 and set(cells) <= grid
        assert {(1, method.max_draft_len), (256, method.max_draft_len), (256, 0)} <= {(cell.concurrency, cell.draft_len) for cell in cells}
    assert len(twelve_cells(engine, OFF)) >= 6
    assert len(grid) == len(engine.contexts) * len(engine.settings()) * len(CONCURRENCIES)


def test_a_table_says_what_was_measured(engine, tmp_path):
    """The CSV and the profile of one seed are the same runs, digit for digit."""
    cells = measured_cells(engine)
    engine.table(tmp_path / "bench.csv", cells, np.random.default_rng(4))
    profile = engine.profile(cells, np.random.default_rng(4))
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(profile.cells) == len(cells)
    for row, cell in zip(rows, profile.cells, strict=True):
        assert (row["drafter"] or OFF, int(row["draft_len"]), int(row["concurrency"])) == (cell.drafter, cell.draft_len, cell.concurrency)
        assert [float(row[name]) for name in ("tpot_s", "output_tokens_per_s", "ttft_s")] == [cell.tpot_s, cell.output_tokens_per_s, cell.ttft_s]
        assert [float(row[f"acceptance_{i + 1}"]) for i in range(MAX_DRAFT_LEN) if row[f"acceptance_{i + 1}"]] == cell.acceptance
        assert (float(row["tokens_per_round"]) if row["tokens_per_round"] else None) == cell.tokens_per_round


def test_a_profile_round_trips_through_json():
    profile = random_engine(0).profile(measured_cells(random_engine(0)), np.random.default_rng(0))
    assert decode_serving_profile(encode(profile), "profile.json") == profile


def test_constant_acceptance_gives_the_closed_form():
    """1 + a + .. + a^K tokens a round (arXiv:2211.17192), at a text's end a little fewer: the last round is cut off."""
    shape = (NUM_REQUESTS, NUM_TOKENS)
    drafted = Drafted(np.full(shape, 0.7), np.ones(MAX_DRAFT_LEN), np.ones(shape, dtype=bool))
    for draft_len in (1, 3, 8):
        counters = expected(drafted, draft_len)
        closed = sum(0.7**i for i in range(draft_len + 1))
        assert 0.98 * closed < counters.tokens_per_round <= closed
        assert counters.acceptance == pytest.approx((0.7,) * draft_len)
        assert counters.drafting == pytest.approx(1.0)


def test_simulated_rounds_average_to_the_expected_ones():
    for name, method in random_engine(5).methods.items():
        draft_len = np.array([1, 3])
        counted = simulate(method.drafted, draft_len, np.array([20_000, 20_000]), np.random.default_rng(0))
        for k, one in zip(draft_len, counted, strict=True):
            exact = expected(method.drafted, k)
            assert one.tokens_per_round == pytest.approx(exact.tokens_per_round, rel=0.01), name
            assert one.acceptance == pytest.approx(exact.acceptance, abs=0.02), name


def test_counters_at_one_draft_len_are_not_those_at_another():
    """Rounds start where the last one failed, so the first position's acceptance depends on K."""
    drafted = random_engine(5).methods["eagle3"].drafted
    first = [expected(drafted, k).acceptance[0] for k in (1, 5)]
    assert abs(first[0] - first[1]) > 0.002


@pytest.mark.parametrize(
    ("gpu", "m", "n", "k", "microseconds"),
    [  # measured: aiconfigurator's tables of vLLM 0.14 (Apache-2.0), bf16
        ("a100_80gb", 8, 4096, 12288, 72.3),
        ("a100_80gb", 128, 4096, 4096, 37.4),
        ("a100_80gb", 256, 4096, 4096, 54.4),
        ("a100_80gb", 1024, 4096, 4096, 203.9),
        ("a100_80gb", 8192, 4096, 4096, 1108.5),
        ("h100_sxm", 1, 4096, 4096, 16.0),
        ("h100_sxm", 128, 10240, 5120, 39.8),
        ("h100_sxm", 512, 4096, 4096, 23.8),
        ("h100_sxm", 1024, 4096, 4096, 42.6),
        ("h100_sxm", 8192, 4096, 4096, 335.7),
    ],
)
def test_matrix_products_take_about_what_was_measured(gpu, m, n, k, microseconds):
    device = next(one for one in GPUS if one.name == gpu)
    assert 1e6 * product_s(np.array([m]), n, k, device, 2)[0] == pytest.approx(microseconds, rel=0.25)


def test_one_stream_of_qwen3_32b_takes_about_what_was_measured():
    """A public vLLM run: 23.65 ms a step, a round of 24.35 + 2.5 K ms with Qwen3-1.7B."""
    engine = qwen_on_h100()
    assert 1e3 * engine.truth(OFF, 0, 1, 500).round_s == pytest.approx(23.65, rel=0.05)
    round_ms = np.array([1e3 * engine.truth("draft_model", k, 1, 500).round_s for k in range(1, 9)])
    assert round_ms == pytest.approx(24.35 + 2.5 * np.arange(1, 9), rel=0.06)
