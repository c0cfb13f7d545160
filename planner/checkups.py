"""A Checkup: what a machine has for measuring and planning, what it lacks, and whether timings taken now can be trusted."""

from planner.measurements import Name, Share
from planner.specs import Count, Positive, Size, Spec


class Package(Spec, kw_only=True):
    """A distribution that planner uses."""

    name: Name
    wanted: Name  # as the project states it, "torch<3,>=2.9"; empty for what it does not state
    version: Name | None  # that is installed; None: it is not
    enough: bool  # installed, in a version as wanted


class Extra(Spec, kw_only=True):
    """An optional part of the installation."""

    name: Name  # as in specplan[runtime]
    use: Name  # what needs it
    missing: list[Name]  # packages of it that are not there, or in another version
    install: Name  # the command that adds it


class Gpu(Spec, kw_only=True):
    name: Name
    memory_bytes: Size
    free_bytes: Size
    state: dict[Name, str | float | int | None]  # driver, clocks in MHz, power cap in W, throttle reasons, other processes


class BusyProcess(Spec, kw_only=True):
    """Who used the CPU while nothing was measured."""

    pid: Count
    name: Name
    cores: Positive


class Checkup(Spec, kw_only=True):
    date: Name  # ISO 8601, UTC
    planner_version: Name
    python: Name
    platform: Name
    cpu: Name
    cores: Positive  # that this process may use
    memory_bytes: Size | None  # of the machine, or of its container; None where the system does not say
    free_bytes: Size | None
    load_1min: float | None
    busy_share: Share | None  # CPU time that others used; None where the system does not say
    stolen_share: Share | None  # that other virtual machines of the host took
    neighbours: list[BusyProcess]  # the busiest first
    gpus: list[Gpu]
    compiler: Name  # of the native kernels: its command
    compiler_version: Name | None  # None: it is not there
    packages: list[Package]
    extras: list[Extra]
    unfit: list[Name]  # why timings taken now may mislead; none: fit to measure on
    advice: list[Name]  # what to do about the rest
