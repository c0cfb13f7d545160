"""Any document as a report on the terminal, or as a page: the answer first, then figures, then that same report."""

from pathlib import Path

from planner.audits import Audit
from planner.canaries import Canary
from planner.capacities import Capacity
from planner.documents import Document, kind_of
from planner.drifts import Drift
from planner.exports import Export
from planner.files import write_whole
from planner.measurements import Environment, Profile
from planner.plans import Check, Plan, Sweep
from planner.replays import ServedReplay
from planner.report import audit, canary, capacity, drift, export, imports, schedule, simulate, terminal, tune
from planner.report import pages_load as load
from planner.report import pages_runtime as runtime
from planner.report import pages_watch as watch
from planner.report.html import Answer, Fact, Figure, Page, assumed_in, render
from planner.report.layout import Heading, clean, recording
from planner.schedules import Schedule
from planner.serving import ServingProfile, Summary
from planner.shown import Shown
from planner.simulations import Simulation
from planner.specs import Spec
from planner.tunings import Tuning


def show_document(document: Document | Summary, path: str | Path) -> None:
    """The report that the command which wrote it shows."""
    shows = {
        Profile: terminal.show_profile, Plan: terminal.show_plan, Check: terminal.show_check, Sweep: terminal.show_sweep,
        ServedReplay: terminal.show_replay, Summary: imports.show_import, Schedule: schedule.show_schedule, Simulation: simulate.show_simulation,
        Drift: drift.show_drift, Canary: canary.show_canary,
    }  # fmt: skip
    folder = Path(path).parent  # that a tuning or an export is a file of
    match document:
        case Tuning():
            tune.show_tuning(document, folder)
        case Export():
            export.show_export(document, folder)
        case Capacity():
            capacity.show_capacity(document)
        case Audit():
            audit.show_audit(document)
        case _:
            shows[type(document)](document, path)


def write_page(shown: Shown, out: str | Path) -> None:
    """Write a document's page whole."""
    write_whole(out, render(compose(shown)))


def compose(shown: Shown) -> Page:
    """The page of a document."""
    with recording() as recorder:
        show_document(shown.reported, shown.path)
    title, *rest = recorder.blocks if isinstance(recorder.blocks[0], Heading) else _title_first(recorder.blocks)
    answer, figures = _content(shown)
    answer = answer._replace(headline=clean(answer.headline), facts=[Fact(*map(clean, fact)) for fact in answer.facts])
    assumed = [*assumed_in(recorder.blocks), *([f"no plan follows from it: {shown.refused}"] if shown.refused else [])]
    return Page(
        kind=kind_of(shown.document).name, title=title.text, answer=answer, figures=figures, blocks=rest, assumed=list(dict.fromkeys(map(clean, assumed))),
        source=_source(shown),
    )  # fmt: skip


def _title_first(blocks: list) -> list:
    """Warnings may come before the title of a report."""
    title = next(block for block in blocks if isinstance(block, Heading))
    return [title, *(block for block in blocks if block is not title)]


def _content(shown: Shown) -> tuple[Answer, list[Figure]]:
    document = shown.document
    match document:
        case Profile():
            return runtime.of_profile(shown, document)
        case Plan():
            return runtime.of_plan(shown, document)
        case Check():
            return runtime.of_check(document)
        case Sweep():
            return runtime.of_sweep(document)
        case ServingProfile():
            return load.of_serving(shown, document)
        case Schedule():
            return load.of_schedule(document)
        case Tuning():
            return load.of_tuning(document)
        case Simulation():
            return load.of_simulation(document)
        case ServedReplay():
            return watch.of_replay(document)
        case Drift():
            return watch.of_drift(document)
        case Canary():
            return watch.of_canary(document)
        case Capacity():
            return watch.of_capacity(document)
        case Audit():
            return watch.of_audit(document)
        case Export():
            return watch.of_export(document, shown.path.parent)


def _source(shown: Shown) -> list[tuple[str, str]]:
    """The file and its hash, what it was made from, and where it was measured."""
    document = shown.document
    lines = [("File", clean(shown.path.name)), ("sha256", shown.sha256)]
    names = {"profile_sha256": "Of the profile", "plan_sha256": "Of the plan", "planner_version": "planner", "date": "Date", "source": "Latency from"}
    names |= {
        "model": "Model",
        "target_fingerprint": "Fingerprint",
        "system": "System",
        "engine": "Engine",
        "execution_mode": "Execution",
        "seed": "Seed",
    }
    for name, label in names.items():
        value = getattr(document, name, None)
        text = getattr(value, "name", value) if isinstance(value, Spec) else value
        if text not in (None, ""):
            lines.append((label, clean(text)))
    device = getattr(document, "device", None)
    if device is not None:
        lines.append(("Device", clean(getattr(device, "name", device))))
    environment = getattr(document, "environment", None) or getattr(shown.profile, "environment", None)
    return lines + (_environment(environment) if environment is not None else [])


def _environment(environment: Environment) -> list[tuple[str, str]]:
    shown = [
        ("Measured", environment.date), ("By", f"planner {environment.planner_version}, Python {environment.python}, torch {environment.torch}"),
        ("On", environment.platform),
    ]  # fmt: skip
    shown += [("Threads", str(environment.num_threads))] if environment.num_threads else []
    shown += [("Others used", f"{environment.busy_share:.0%} of the CPU before the run")] if environment.busy_share is not None else []
    shown += [("GPU", f"{key} {value}") for key, value in environment.gpu.items() if value not in (None, "")]
    return [(label, clean(text)) for label, text in shown]
