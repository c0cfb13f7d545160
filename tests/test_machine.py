"""What a machine says of itself: read off a made-up /proc, control group and NVIDIA driver, and compared with this one."""

import os
import platform
import subprocess
import sys

import psutil
import pynvml
import pytest

from planner import machine
from planner.machine import Neighbour, cpu_name, gpu_complaints, memory_bytes, usable_cores, watch_cpu


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A made-up /proc and control group; `files` are written into it, and `later` when half a second has passed."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "group").mkdir()
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "group")

    def write(files: dict[str, str], later: dict[str, str] | None = None):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(machine.time, "sleep", lambda seconds: write(later) if later else None)

    return write


def stat(name: str, user: int, system: int) -> str:
    return f"7 ({name}) S 1 1 1 0 -1 0 0 0 0 0 {user} {system} 0 0 20 0 1 0"


def test_use_of_the_cpu_is_told_apart_from_stolen_time_and_waiting(proc):
    proc(
        {"proc/stat": "cpu 100 0 100 1000 50 0 0 10 0 0\n", "proc/7/stat": stat("a (b) c", 10, 10), "proc/8/stat": stat("still", 5, 5)},
        {"proc/stat": "cpu 120 0 110 1050 60 0 0 20 0 0\n", "proc/7/stat": stat("a (b) c", 25, 20), "proc/9/stat": stat("new", 99, 99)},
    )
    found = watch_cpu(0.5)
    assert found.busy_share == pytest.approx(0.4) and found.stolen_share == pytest.approx(0.1)
    assert found.neighbours == [Neighbour(7, "a (b) c", 25 / (os.sysconf("SC_CLK_TCK") * 0.5))]


def test_what_the_system_does_not_say_is_not_known(proc):
    assert watch_cpu(0) is None and memory_bytes() is None
    assert cpu_name() == (platform.processor() or platform.machine())
    proc({"proc/stat": "cpu\n", "proc/meminfo": "MemTotal: many kB\n"})
    assert watch_cpu(0) is None and memory_bytes() is None


def test_a_container_has_what_its_quota_and_limit_leave(proc):
    proc({"proc/meminfo": "MemTotal: 4096 kB\nMemAvailable: 2048 kB\n"})
    assert memory_bytes() == (4096 * 1024, 2048 * 1024) and usable_cores() == len(os.sched_getaffinity(0))
    proc({"group/memory.max": "1048576", "group/memory.current": "1000000", "group/cpu.max": "50000 100000"})
    assert memory_bytes() == (1048576, 48576) and usable_cores() == 0.5
    proc({"group/memory.max": "max", "group/cpu.max": "max 100000"})
    assert memory_bytes() == (4096 * 1024, 2048 * 1024) and usable_cores() >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_busy_process_is_named_and_memory_is_what_psutil_says():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        try:
            names = {one.pid for one in watch_cpu(0.3).neighbours}
        finally:
            spinning.kill()
    assert spinning.pid in names
    if not (machine.CGROUP / "memory.max").exists():
        assert memory_bytes()[0] == psutil.virtual_memory().total


def test_a_throttled_or_shared_gpu_is_complained_of(monkeypatch):
    answers = {
        "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonSwPowerCap,
        "nvmlDeviceGetComputeRunningProcesses": [type("Process", (), {"pid": pid}) for pid in (1, os.getpid())],
        "nvmlSystemGetDriverVersion": "580.1", "nvmlDeviceGetClockInfo": 1980, "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetTemperature": 60,
    }  # fmt: skip
    for name, value in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *of, value=value: value)
    state = machine.gpu_state("handle")
    assert (state["power_cap_w"], state["throttle_reasons"], state["other_processes"]) == (700, "0x4", 1)
    assert len(gpu_complaints(state)) == 2 and gpu_complaints({}) == []
