"""Joules from counters that tick slowly, wrap around, stand still or are not there. Boards and clocks are made up, the code that reads them is not."""

from types import SimpleNamespace

import pynvml
import pytest
import torch
from made import NGRAM, SELF_SPARSE
from tiny import prefilled, random_prompt, tiny_model

from planner.profiler import energy, latency
from planner.profiler.energy import WINDOW_S, RaplCounter, measure_energy, open_counter
from planner.profiler.latency import Ground, energy_pass, rounds_room
from planner.specs import PLAIN, DraftConfig, Sampler, SparseKV

CUDA = torch.device("cuda")


class Board:
    """A device that draws so many watts, and a counter that shows what it used up to its last tick."""

    name = "made"

    def __init__(self, watts: float, tick_s: float, round_s: float):
        self.watts, self.tick_s, self.round_s, self.now = watts, tick_s, round_s, 0.0137  # somewhere between two ticks

    def run_round(self) -> None:
        self.now += self.round_s

    def clock(self) -> float:
        return self.now

    def read(self) -> float:
        return self.watts * self.tick_s * int(self.now / self.tick_s)


def measured(board):
    return measure_energy(board, board.run_round, board.clock)


@pytest.mark.parametrize("round_s", [0.003, 0.03, 0.7])
@pytest.mark.parametrize("tick_s", [0.001, 0.03, 0.15])  # the last does not divide a window
def test_a_window_cut_at_ticks_knows_the_power_to_a_round_at_either_end(tick_s, round_s):
    found = measured(Board(300.0, tick_s, round_s))
    assert found.seconds >= WINDOW_S
    assert found.rounds == pytest.approx(found.seconds / round_s)
    assert found.joules / found.seconds == pytest.approx(300, rel=min(round_s, tick_s) / WINDOW_S)


def test_a_window_that_ignores_ticks_would_know_less():
    """The same board, read at any moment a second apart: what cutting at ticks is for."""
    board = Board(300.0, 0.1, 0.003)
    board.now = 0.199
    before = board.read()
    board.now += 1.003
    naive = (board.read() - before) / 1.003
    assert abs(naive / 300 - 1) > 0.05
    assert abs(measured(Board(300.0, 0.1, 0.003)).joules / measured(Board(300.0, 0.1, 0.003)).seconds / 300 - 1) < 0.004


def test_a_counter_that_stands_still_is_given_up_after_a_second():
    board = Board(0.0, 0.1, 0.03)
    assert measured(board) is None
    assert 1.0 < board.now < 1.1
    slow = Board(0.0, 0.1, 20.0)
    assert measured(slow) is None and slow.now < 30  # one round was enough to tell


def test_a_counter_that_begins_again_says_nothing():
    board = Board(300.0, 0.1, 0.03)
    board.read = lambda: 1e6 + 300 * board.now if board.now < 0.6 else 300 * board.now  # the driver was loaded anew
    assert measured(board) is None


@pytest.fixture
def nvml(monkeypatch):
    """pynvml as it is, its driver made up: `answer` is what the counter says, in mJ, or an error to raise."""
    driver = SimpleNamespace(answer=0, opened=0, asked=None)

    def counter(handle):
        assert handle == "the handle" and driver.opened == 1
        if isinstance(driver.answer, Exception):
            raise driver.answer
        return driver.answer

    def handle(uuid):
        driver.asked = uuid
        return "the handle"

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: setattr(driver, "opened", driver.opened + 1))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: setattr(driver, "opened", driver.opened - 1))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", counter)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-abcd"))
    return driver


def test_nvml_counts_millijoules_of_the_device_in_use(nvml):
    nvml.answer = 5_000
    with open_counter(CUDA) as (counter, warnings):
        assert warnings == [] and nvml.asked == "GPU-1234-abcd"
        assert counter.read() == 5
        nvml.answer += 250
        assert counter.read() == 5.25
        assert nvml.opened == 1
    assert nvml.opened == 0


def test_a_gpu_without_a_counter_has_none_and_a_warning_and_never_a_guess(nvml):
    nvml.answer = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    with open_counter(CUDA) as (counter, warnings):
        assert counter is None
        assert len(warnings) == 1 and "Not Supported" in warnings[0] and "no J per token" in warnings[0]
    assert nvml.opened == 0


def test_a_machine_without_nvml_has_no_counter(nvml, monkeypatch):
    def missing():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    with open_counter(CUDA) as (counter, warnings):
        assert counter is None and "NVML" in warnings[0]


def test_what_goes_wrong_while_counting_is_not_taken_for_a_missing_counter(nvml):
    with pytest.raises(pynvml.NVMLError), open_counter(CUDA):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
    assert nvml.opened == 0
    with open_counter(CUDA) as (counter, _):
        nvml.answer = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        with pytest.raises(OSError, match="lost"):
            counter.read()


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages, a part of one, and psys, which counts both again."""

    def zone(folder: str, name: str, microjoules: int):
        (tmp_path / folder).mkdir()
        for file, content in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 1_000_000)):
            (tmp_path / folder / file).write_text(f"{content}\n")

    for folder, name, microjoules in (
        ("intel-rapl:0", "package-0", 999_000), ("intel-rapl:1", "package-1", 5_000), ("intel-rapl:0:0", "core", 1), ("intel-rapl:2", "psys", 7),
    ):  # fmt: skip
        zone(folder, name, microjoules)
    (tmp_path / "intel-rapl").mkdir()
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def test_rapl_adds_packages_and_counts_on_where_one_wraps_around(powercap):
    with open_counter(torch.device("cpu")) as (counter, warnings):
        assert isinstance(counter, RaplCounter) and warnings == [] and "all processes" in counter.name
        assert counter.read() == 0
        (powercap / "intel-rapl:0/energy_uj").write_text("1500\n")  # 999 000 -> 1 001 500
        (powercap / "intel-rapl:1/energy_uj").write_text("15000\n")
        (powercap / "intel-rapl:2/energy_uj").write_text("900000\n")
        assert counter.read() == pytest.approx((2_500 + 10_000) / 1e6)
        assert counter.read() == pytest.approx(12_500 / 1e6)


def test_a_cpu_whose_counter_may_not_be_read_has_none(powercap, monkeypatch):
    for package in ("intel-rapl:0", "intel-rapl:1"):
        (powercap / package / "energy_uj").unlink()
        (powercap / package / "energy_uj").mkdir()  # reading it is an OSError, whoever asks
    with open_counter(torch.device("cpu")) as found:
        assert found == (None, [])
    monkeypatch.setattr(energy, "POWERCAP", powercap / "nowhere")
    with open_counter(torch.device("cpu")) as found:
        assert found == (None, [])


@pytest.fixture
def ground():
    model = tiny_model(sharpness=1.2)
    prompt = random_prompt(40)
    return model, Ground(prompt, *prefilled(model, [prompt], 40 + rounds_room(3)))


CONFIGS = [PLAIN, DraftConfig(drafter=SELF_SPARSE, kv=SparseKV(budget=20, sink=4, recent=8), draft_len=3), DraftConfig(drafter=NGRAM, draft_len=3)]


@pytest.mark.parametrize("batch", [1, 3])
def test_rounds_of_every_cell_run_until_their_power_is_known(ground, monkeypatch, batch):
    model, alone = ground
    board = Board(watts=70.0, tick_s=0.02, round_s=0.05)
    rounds, real = 0, latency._decode

    def spy(*arguments):
        nonlocal rounds
        for number, round_ in enumerate(real(*arguments)):
            rounds += number > 0
            if number:
                board.run_round()
            yield round_

    monkeypatch.setattr(latency, "_decode", spy)
    monkeypatch.setattr(latency, "synchronize", lambda device: board.now)
    before = alone.cache.keys[..., :40, :].clone()
    found = energy_pass(model, {40: alone}, CONFIGS, Sampler(temperature=1.0), board, seed=0, batch=batch)
    assert [(s.drafter, s.kv, s.draft_len, s.context_len, s.batch) for s in found] == [(c.drafter, c.kv, c.draft_len, 40, batch) for c in CONFIGS]
    for sample in found:
        assert sample.watts == pytest.approx(70, rel=0.05)
        assert sample.rounds == pytest.approx(sample.seconds / 0.05) and sample.seconds >= WINDOW_S
    assert rounds >= sum(sample.rounds for sample in found) > 3 * 7  # the text began again
    assert torch.equal(alone.cache.keys[..., :40, :], before)


def test_a_cell_without_a_moving_counter_has_no_sample(ground, monkeypatch):
    model, alone = ground
    board = Board(watts=0.0, tick_s=0.1, round_s=0.0)
    monkeypatch.setattr(latency, "synchronize", lambda device: setattr(board, "now", board.now + 0.3) or board.now)
    assert energy_pass(model, {40: alone}, CONFIGS, Sampler(temperature=1.0), board, seed=0, batch=1) == []
