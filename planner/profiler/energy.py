"""Joules of a device, from a counter that only ever counts up: NVML's on CUDA, RAPL's on a CPU. Never a guess from rated power.

Counters tick slowly (NVML's about ten times a second), so a window is cut where the counter ticks, and lasts many ticks.
Both count everything on the device: other processes, and NVML all of the board.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from planner.profiler.device import nvml_handle

WINDOW_S = 1.0  # ten ticks of a slow counter; cut at ticks, the window is known to one round at either end
TICK_S = 1.0  # a counter that stands still for as long, and for a round, does not count
POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    name: str

    def read(self) -> float:
        """Joules since some moment. OSError where the device does not say."""


class Reading(NamedTuple):
    """Since some moment, or between two."""

    rounds: int
    seconds: float
    joules: float


@contextmanager
def open_counter(device: torch.device, num_ranks: int = 1) -> Iterator[tuple[Counter | None, list[str]]]:
    """The device's counter while the context lasts; None where there is none, on CUDA with a warning that says why.

    num_ranks  processes that share the model: each would count until its own second is over, and leave the others behind
    """
    if num_ranks > 1:
        yield None, [f"no energy was measured, it is counted on one device only and there are {num_ranks}: plans will show no J per token"]
        return
    if device.type != "cuda":
        packages = rapl_packages()
        yield (RaplCounter(packages) if packages else None), []
        return
    import pynvml

    with ExitStack() as stack:
        try:
            counter, warnings = NvmlCounter(stack.enter_context(nvml_handle(device))), []
            counter.read()
        except (pynvml.NVMLError, OSError) as error:
            counter, warnings = None, [f"no energy was measured, NVML counts none on this device ({error}): plans will show no J per token"]
        yield counter, warnings


class NvmlCounter:
    """Energy of the whole GPU since its driver was loaded, memory included (Volta and later)."""

    name = "NVML, whole GPU"

    def __init__(self, handle):
        self._handle = handle

    def read(self) -> float:
        import pynvml

        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from None


class RaplCounter:
    """Energy of all CPU packages; their counters wrap around, which reading more often than that hides."""

    name = "RAPL, CPU packages without memory, all processes"

    def __init__(self, packages: list[Path]):
        self._packages = packages
        self._range = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        self._last = self._now()
        self._joules = 0.0

    def read(self) -> float:
        now = self._now()
        self._joules += sum((new - old) % wrap for new, old, wrap in zip(now, self._last, self._range, strict=True)) / 1e6
        self._last = now
        return self._joules

    def _now(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]


def rapl_packages() -> list[Path]:
    """The counters of CPU packages that this process may read: none in most containers, and for most users but root."""
    found = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            whole = re.fullmatch(r"intel-rapl:\d+", zone.name) and (zone / "name").read_text().startswith("package")  # not psys, not a part
            if whole and all(int((zone / file).read_text()) >= 0 for file in ("energy_uj", "max_energy_range_uj")):
                found.append(zone)
        except (OSError, ValueError):
            continue
    return found


def measure_energy(counter: Counter, run_round: Callable[[], None], clock: Callable[[], float]) -> Reading | None:
    """Rounds, one after the other for a second or longer, and what they used. None if the counter stands still or goes back.

    clock  seconds, once the device has done what it was given
    """
    rounds = 0

    def next_tick() -> Reading | None:
        """The first reading after the counter moves, rounds running meanwhile."""
        nonlocal rounds
        begin_s, before = clock(), counter.read()
        while True:
            run_round()
            rounds += 1
            now_s, now = clock(), counter.read()
            if now != before:
                return Reading(rounds, now_s, now)
            if now_s - begin_s > TICK_S:
                return None

    if (first := next_tick()) is None:
        return None
    while clock() - first.seconds < WINDOW_S:
        run_round()
        rounds += 1
    if (last := next_tick()) is None or last.joules <= first.joules:
        return None
    return Reading(*(end - begin for begin, end in zip(first, last, strict=True)))
