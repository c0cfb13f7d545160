"""What is shown of a checkup: the verdict first, then the machine, what is missing and how to get it."""

from planner.checkups import Checkup, Gpu, Package
from planner.report.layout import Column, clean, format_number, open_console, put_lines, put_title, show_table
from planner.units import format_bytes


def show_checkup(found: Checkup) -> None:
    console = open_console()
    put_title(console, f"planner {clean(found.planner_version)}, Python {clean(found.python)} on {clean(found.platform)}")
    fit = [("Fit", "to measure on, as far as one can see now")] if not found.unfit else [("Not fit", clean(reason)) for reason in found.unfit]
    put_lines(
        console,
        [
            *fit,
            *(("Do", clean(sentence)) for sentence in found.advice),
            *(("Missing", f"{', '.join(map(clean, extra.missing))}: {clean(extra.use)}; {clean(extra.install)}") for extra in found.extras if extra.missing),
        ],
    )  # fmt: skip
    put_title(console, "Machine")
    memory = "not known" if found.memory_bytes is None else f"{format_bytes(found.memory_bytes)}, {format_bytes(found.free_bytes or 0)} free"
    put_lines(
        console,
        [
            *(("GPU", _gpu(gpu)) for gpu in found.gpus or []),
            *([] if found.gpus else [("GPU", "none that NVML sees")]),
            ("CPU", f"{clean(found.cpu)}, {found.cores:g} cores for this process"),
            ("Memory", memory),
            ("Load", _load(found)),
            *(("Busy", f"{clean(one.name)} (process {one.pid}) used {format_number(one.cores)} cores") for one in found.neighbours),
            ("Compiler", f"{clean(found.compiler)} {clean(found.compiler_version)}" if found.compiler_version else f"{clean(found.compiler)}: not there"),
        ],
    )  # fmt: skip
    put_title(console, "Packages")
    columns = [
        Column("version", lambda package: clean(package.version or "missing"), right=False),
        Column("wanted", lambda package: clean(package.wanted), right=False),
    ]
    show_table(console, [Column("package", lambda package: clean(package.name), right=False)], [columns], found.packages, _style)


def _style(package: Package) -> str:
    return "" if package.enough else "bold"


def _gpu(gpu: Gpu) -> str:
    state = ", ".join(f"{clean(name)} {clean(value)}" for name, value in gpu.state.items() if value not in (None, ""))
    return f"{clean(gpu.name)}, {format_bytes(gpu.memory_bytes)}, {format_bytes(gpu.free_bytes)} free; {state}"


def _load(found: Checkup) -> str:
    parts = [f"{found.load_1min:.1f} in the last minute"] if found.load_1min is not None else []
    if found.busy_share is not None:
        parts.append(f"others used {found.busy_share:.0%} of the CPU just now")
    if found.stolen_share:
        parts.append(f"other virtual machines took {found.stolen_share:.0%}")
    return ", ".join(parts) or "not known"
