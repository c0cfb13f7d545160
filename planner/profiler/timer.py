"""A clock for the device: perf_counter on a CPU, events on CUDA, read after the work is done."""

import time
from collections import defaultdict

import torch


class PhaseTimer:
    """Times the phases of rounds. Hand `mark` to decode(); a phase lasts from the mark before it to its own."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, phase: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, list[float]]:
        """Durations by phase in the order they happened; "start" begins a round and has none."""
        if self._cuda:
            torch.cuda.synchronize()
        durations = defaultdict(list)
        for (_, before), (phase, now) in zip(self._marks, self._marks[1:]):
            if phase != "start":
                durations[phase].append(before.elapsed_time(now) / 1000 if self._cuda else now - before)
        return dict(durations)


def synchronize(device: torch.device) -> float:
    """Host time in seconds once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
