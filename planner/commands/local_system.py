"""The device of this machine that a server started here will use: the first GPU that NVML sees, else the CPU. Needs no torch."""

import os
from pathlib import Path

from planner.commands.sizes import FRACTION
from planner.errors import BadInput
from planner.machine import cpu_name
from planner.serving import SystemSpec

DRIVER = Path("/dev/nvidiactl")  # there where an NVIDIA driver is loaded
REMEDY = "give --system, for example memory_gib=24,fraction=0.9"


def local_gpu() -> SystemSpec | None:
    """None where there is none; BadInput where it does not say what it has. Not run with a GPU so far, but for a faked driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        if DRIVER.exists():
            raise BadInput(f"this machine has a GPU, and nvidia-ml-py to ask for its memory is missing; install it, or {REMEDY}") from None
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name, memory = pynvml.nvmlDeviceGetName(handle), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError as error:
        raise BadInput(f"this machine's GPU does not say what memory it has ({error}); {REMEDY}") from None
    finally:
        pynvml.nvmlShutdown()
    return SystemSpec(name=str(name)[:500], memory_bytes=memory, fraction=FRACTION)


def local_cpu() -> SystemSpec:
    """The CPU with all memory of the machine."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        raise BadInput(f"this machine does not say what memory it has; {REMEDY}") from None
    return SystemSpec(name=cpu_name(), memory_bytes=memory, fraction=FRACTION)
