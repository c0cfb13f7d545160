"""The energy stage of a profile, on a tiny model with a made-up counter: every cell has a sample, and what is missing is said."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from made import NGRAM, SELF_SPARSE, WARM
from tiny import prefilled, random_prompt, tiny_model

from planner.commands.profile_rounds import Timing
from planner.commands.profile_settings import Settings, latency_cells
from planner.commands.progress import Silent
from planner.measurements import Failure
from planner.profiler import energy, latency
from planner.profiler.latency import Ground, rounds_room
from planner.runtime.ranks import Ranks
from planner.specs import PLAIN, SparseKV, describe

SETTINGS = Settings(
    contexts=[40], samplers=[WARM], policies=[SparseKV(budget=20, sink=4, recent=8)], max_draft_len=2, drafters=[SELF_SPARSE, NGRAM], batches=[1, 2]
)


class Clock:
    """Half a second passes whenever somebody looks."""

    now = 0.0

    def __call__(self, device) -> float:
        self.now += 0.5
        return self.now


@pytest.fixture
def timing(monkeypatch):
    """A profile that has come to its energy, and a way to choose what its counter says."""
    model, prompt, clock = tiny_model(), random_prompt(40), Clock()
    monkeypatch.setattr(latency, "synchronize", clock)

    def call(read, warnings=(), failures=()):
        @contextmanager
        def opened(device, num_ranks):
            yield (SimpleNamespace(name="made", read=lambda: read(clock.now)) if read else None), list(warnings)

        monkeypatch.setattr(energy, "open_counter", opened)
        grounds = {40: Ground(prompt, *prefilled(model, [prompt], 40 + rounds_room(2)))}
        done = [SimpleNamespace(failures=list(failures), rounds=[])]
        return Timing(SimpleNamespace(model=model, ranks=Ranks()), grounds, SETTINGS, done).energy(Silent())

    return call


CELLS = [(cell, batch) for batch in (1, 2) for cell in latency_cells(SETTINGS, batch)]


def test_every_cell_of_every_batch_has_its_energy(timing):
    found = timing(lambda now: 40 * now)
    assert [(s.drafter, s.kv, s.draft_len, s.batch) for s in found.samples] == [(c.drafter, c.kv, c.draft_len, b) for c, b in CELLS]
    assert all(sample.watts == pytest.approx(40) for sample in found.samples)
    assert (found.source, found.warnings) == ("made", [])


def test_a_cell_that_could_not_be_timed_is_passed_over_and_not_missed(timing):
    found = timing(lambda now: 40 * now, failures=[Failure(cell=f"{describe(PLAIN)} at context 40, batch 2", reason="out of memory")])
    assert len(found.samples) == len(CELLS) - 1 and found.warnings == []


def test_a_counter_that_never_moves_is_given_up_after_one_batch_and_said_so(timing):
    looks = []
    found = timing(lambda now: looks.append(now) or 7.0)
    assert found.samples == [] and f"energy of {len(CELLS)} cells is missing" in found.warnings[0]
    assert max(looks) < 3 * len(latency_cells(SETTINGS, 1))


def test_a_counter_that_stops_answering_costs_its_cells_and_not_the_profile(timing):
    def read(now):
        if now > 20:
            raise OSError("GPU is lost")
        return 40 * now

    found = timing(read)
    assert found.samples and len(found.samples) < len(CELLS)
    assert "stopped answering: GPU is lost" in found.warnings[0] and "is missing" in found.warnings[1]


def test_without_a_counter_a_profile_says_what_the_device_said(timing):
    found = timing(None, warnings=["NVML counts none"])
    assert (found.samples, found.source, found.warnings) == ([], None, ["NVML counts none"])
