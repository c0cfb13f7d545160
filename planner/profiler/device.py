"""The device and its state: what it is, who else uses it, how much memory a run takes."""

import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

import planner
from planner.errors import BadInput
from planner.machine import BUSY_SECONDS, cpu_name, gpu_state
from planner.measurements import Environment
from planner.specs import DeviceSpec


def find_device(name: str | None) -> torch.device:
    """The named device, else a GPU if there is one, else the CPU. BadInput if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"a device is cpu, cuda or cuda:N, got {name!r}; take cuda for a GPU")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"a device is cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device {name} must exist, this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def describe_device(device: torch.device) -> DeviceSpec:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceSpec(kind="cuda", name=properties.name, memory_bytes=properties.total_memory)
    return DeviceSpec(kind="cpu", name=cpu_name(), memory_bytes=psutil.virtual_memory().total, num_cores=torch.get_num_threads())


def read_environment(device: torch.device) -> Environment:
    """Versions, load and clocks right now. Takes half a second to watch what others do to the CPU."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        planner_version=planner.__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=platform.platform(),
        num_threads=torch.get_num_threads() if device.type == "cpu" else None,
        busy_share=min(1.0, psutil.cpu_percent(interval=BUSY_SECONDS) / 100),  # this process sleeps meanwhile
        load_1min=os.getloadavg()[0],
        gpu=_read_gpu(device),
    )


class PeakMemory:
    """The most memory used since `reset`: of the process on a CPU (Linux), of the allocator on CUDA."""

    def __init__(self, device: torch.device):
        self._device = device

    def reset(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
            except OSError:
                pass  # some containers forbid it: the peak is then the one since the process began, an upper bound

    def read(self) -> int:
        """Bytes at the peak."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
        return psutil.Process().memory_info().rss

    def now(self) -> int:
        """Bytes in use at this moment."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return psutil.Process().memory_info().rss


@contextmanager
def nvml_handle(device: torch.device) -> Iterator:
    """NVML's handle of a CUDA device, while the context lasts."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    with nvml_handle(device) as handle:
        return gpu_state(handle)
