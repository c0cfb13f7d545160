"""This machine, as far as it says without torch: its CPU and GPUs, who else uses them, and when timings taken on it mislead."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from planner.measurements import Environment

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
BUSY_SHARE = 0.10  # of all cores, used by others: above this timings are not to be trusted
STOLEN_SHARE = 0.02  # of the cores' time, given to other virtual machines on the same host: likewise
BUSY_SECONDS = 0.5
NEIGHBOUR_CORES = 0.10  # of one core: who uses less is not named
KERNEL_COMPILER = 12  # g++, from which version on kernels.cpp compiles


class Neighbour(NamedTuple):
    """A process of somebody else, or of another session."""

    pid: int
    name: str
    cores: float  # that it kept busy


class Watched(NamedTuple):
    """Half a second of the CPU while this process slept."""

    busy_share: float  # of all cores' time, stolen time included
    stolen_share: float  # given to other virtual machines
    neighbours: list[Neighbour]  # the busiest first


def cpu_name() -> str:
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))[:500]
    except (OSError, StopIteration):
        return (platform.processor() or platform.machine() or "CPU")[:500]


def usable_cores() -> float:
    """Cores that this process may use: those it is bound to, or fewer where a container's quota says so."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(bound, int(quota) / int(period))
    except (OSError, ValueError):  # no control groups, or "max", no quota
        return bound


def memory_bytes() -> tuple[int, int] | None:
    """All memory and what of it is free for use, of the machine or of its container where that has less; None where it cannot be read."""
    try:
        fields = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        total, free = (1024 * int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit, used = int((CGROUP / "memory.max").read_text()), int((CGROUP / "memory.current").read_text())
        return min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):
        return total, free


def watch_cpu(seconds: float = BUSY_SECONDS) -> Watched | None:
    """What runs beside this process, which sleeps meanwhile; None where the system does not say (only Linux does)."""
    try:
        before, processes = _cpu_ticks(), _process_ticks()
        time.sleep(seconds)
        after = _cpu_ticks()
    except (OSError, ValueError):
        return None
    all_ticks = max(1, sum(after) - sum(before))
    idle = after[3] - before[3] + after[4] - before[4]  # idle and waiting for a disk
    per_core = os.sysconf("SC_CLK_TCK") * seconds
    used = [Neighbour(pid, name, (ticks - processes[pid][1]) / per_core) for pid, (name, ticks) in _process_ticks().items() if pid in processes]
    busiest = sorted((one for one in used if one.cores >= NEIGHBOUR_CORES and one.pid != os.getpid()), key=lambda one: -one.cores)
    return Watched(min(1.0, max(0.0, 1 - idle / all_ticks)), (after[7] - before[7]) / all_ticks, busiest)


def _cpu_ticks() -> list[int]:
    """user nice system idle iowait irq softirq steal, of all cores together (proc(5))."""
    ticks = [int(word) for word in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    if len(ticks) < 8:
        raise ValueError(f"the first line of /proc/stat must have 8 counters, got {len(ticks)}")
    return ticks


def _process_ticks() -> dict[int, tuple[str, int]]:
    found = {}
    for folder in PROC.iterdir():
        try:
            if folder.name.isdigit():
                name, fields = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
                user, system = fields.split()[11:13]
                found[int(folder.name)] = name, int(user) + int(system)
        except (OSError, IndexError, ValueError):  # it has just ended
            continue
    return found


def complaints(environment: Environment) -> list[str]:
    """Why timings taken now may mislead."""
    return busy_complaints(environment.busy_share) + gpu_complaints(environment.gpu)


def busy_complaints(busy_share: float | None) -> list[str]:
    if busy_share is None or busy_share <= BUSY_SHARE:
        return []
    return [f"other processes used {busy_share:.0%} of the CPU just before the run: timings may mislead; measure again on an idle machine"]


def gpu_complaints(state: dict) -> list[str]:
    """state  as gpu_state gives it; empty without a GPU"""
    found = []
    if state.get("throttle_reasons"):
        found.append(f"the GPU was throttled ({state['throttle_reasons']}): timings may mislead; check power and cooling")
    if state.get("other_processes"):
        found.append(f"{state['other_processes']} other processes used the GPU: timings may mislead; stop them")
    return found


@contextmanager
def open_gpus() -> Iterator[list]:
    """NVML's handles of all GPUs while the context lasts; none without a driver, ModuleNotFoundError without nvidia-ml-py."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def gpu_state(handle) -> dict:
    """Clocks, power and neighbours through NVML. Not run without a GPU, but for a faked driver."""
    import pynvml

    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    harmless = pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    others = [process for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if process.pid != os.getpid()]
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_cap_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": f"0x{reasons & ~harmless:x}" if reasons & ~harmless else None,
        "other_processes": len(others),
    }


def compiler_name() -> str:
    """What compiles the native kernels."""
    return os.environ.get("CXX") or "g++"


def compiler_version() -> str | None:
    """The number that the compiler of the native kernels gives itself; None where it is not there."""
    path = shutil.which(compiler_name())
    if path is None:
        return None
    try:
        done = subprocess.run([path, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()[:50] or None
