"""import bench: benchmark files of a serving engine -> ServingProfile. Needs no torch."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import planner
from planner.commands.sizes import sized, system_spec
from planner.errors import BadInput
from planner.files import read_bytes
from planner.importers.consistency import doubts, drafter_reads
from planner.importers.contract import MAX_CELLS, Given, Imported, make_cell
from planner.importers.recognise import read_any
from planner.serving import OFF, DrafterSummary, ModelSize, ServedCell, ServingProfile, Summary, SystemSpec
from planner.specs import checked
from planner.units import format_bytes

MAX_FILES = 10_000
MAX_WARNINGS = 50  # that a profile keeps; the rest is counted


def import_bench(
    files: Sequence[str | Path],
    *,
    model: str,
    system: str,
    draft_models: Mapping[str, str] | None = None,
    drafter: str | None = None,
    draft_len: int | None = None,
    concurrency: int | None = None,
    context_len: int | None = None,
    output_len: int | None = None,
    tensor_parallel: int | None = None,
    since: str | Path | None = None,
) -> ServingProfile:
    """The cells of all files together; a serving profile among them is carried on with its cells.

    model, system    as sizes.py reads them; draft_models likewise, by the drafter's name in the files
    drafter, draft_len, concurrency, context_len, output_len, tensor_parallel
                     for files that do not say them; what contradicts a file is refused
    since            an earlier scrape of the same server: the one file given counts from there
    """
    if not 1 <= len(files) <= MAX_FILES or since is not None and len(files) > 1:
        raise BadInput(f"an import takes 1 to {MAX_FILES} files, and one together with --since, got {len(files)}")
    given = Given(drafter or None, draft_len, concurrency, context_len, output_len, tensor_parallel)
    make_cell("the flags", "", tpot_s=1.0, **{"concurrency": 1, "context_len": 1, "output_len": 1} | _said(given))
    target, notes, _ = sized(model)
    device = system_spec(system)
    before = None if since is None else (read_bytes(since, "metrics"), str(since))
    found = [read_any(read_bytes(path, "benchmark"), str(path), given, before) for path in files]
    cells = [cell for one in found for cell in one.cells]
    if len(cells) > MAX_CELLS:
        raise BadInput(f"a profile holds at most {MAX_CELLS} cells, the files hold {len(cells)}; import fewer")
    if any(one.assumed for one in found) and any(cell.draft_len and cell.tokens_per_round for one in found if not one.profile for cell in one.cells):
        path = next(path for one, path in zip(found, files, strict=True) if one.assumed)
        raise BadInput(
            f"{path} has no counters of speculation and other runs have, so --draft-len cannot stand for both; import the runs that did not draft "
            "first, without --draft-len, and give their profile as one of the files"
        )
    sizes: dict[str, ModelSize] = {}
    for one, path in zip(found, files, strict=True):
        if one.profile is not None:
            _same(str(path), one.profile, target, device)
            sizes |= one.profile.drafters
    names = list(dict.fromkeys(cell.drafter for cell in cells if cell.drafter != OFF))
    if unknown := [name for name in draft_models or () if name not in names]:
        raise BadInput(
            f"--draft-model NAME=SPEC must name a drafter of the files ({', '.join(names[:20]) or 'they have none'}), got {unknown[0][:80]!r}"
        )
    for name, text in (draft_models or {}).items():
        sizes[name], own, _ = sized(text)
        notes = [*notes, *(f"{name}: {note}" for note in own)]
    said = [warning for one in found for warning in one.warnings]
    judged = doubts(cells, drafter_reads(sizes, device, cells))
    warnings = list(dict.fromkeys([*notes, *said, *judged, *_too_large(target, sizes, device, cells)]))
    if len(warnings) > MAX_WARNINGS:
        warnings = [*warnings[: MAX_WARNINGS - 1], f"{len(warnings) - MAX_WARNINGS + 1} more warnings are not kept"]
    profile = ServingProfile(
        source=_source(found, files), date=max([one.date for one in found]) or datetime.now(UTC).isoformat(timespec="seconds"),
        planner_version=planner.__version__, model=target, drafters=sizes, system=device, cells=cells,
        warnings=[warning[:2000] for warning in warnings],
    )  # fmt: skip
    return checked(profile)


def _said(given: Given) -> dict:
    """The fields of a cell that flags give; a drafter for those that need one."""
    fields = {name: value for name, value in given._asdict().items() if value is not None}
    return {"drafter": "any"} | fields if fields.get("draft_len") else fields


def _same(path: str, profile: ServingProfile, target: ModelSize, device: SystemSpec) -> None:
    """BadInput where a profile's cells are of another model or system than the flags say."""
    for flag, theirs, ours in (("--model", profile.model, target), ("--system", profile.system, device)):
        names = [name for name in ours.__struct_fields__ if name != "name" and getattr(theirs, name) != getattr(ours, name)]
        if names:
            raise BadInput(
                f"{path} has {names[0]} {getattr(theirs, names[0])}, {flag} says {getattr(ours, names[0])}; give what it was imported with"
            )


def _too_large(target: ModelSize, sizes: dict[str, ModelSize], device: SystemSpec, cells: list[ServedCell]) -> list[str]:
    """Sentences about weights that ran and cannot have fitted: then the byte count of what fits says nothing."""
    room, found = device.memory_bytes * device.fraction, []
    for name in dict.fromkeys(cell.drafter for cell in cells):
        devices = min(cell.tensor_parallel for cell in cells if cell.drafter == name)
        weights = (target.weights_bytes + (sizes[name].weights_bytes if name in sizes else 0)) / devices
        if weights > room:
            what = "the target" if name == OFF else f"the target and {name}"
            found.append(
                f"the weights of {what} take {format_bytes(weights)} of each device, which has {format_bytes(room)} for them: a size, --system or tp "
                "is wrong, and how many requests fit is guessed from those that ran"
            )
    return found


def _source(found: list[Imported], files: Sequence[str | Path]) -> str:
    engines = list(dict.fromkeys(one.engine for one in found if one.engine))
    return (", ".join(engines) or ", ".join(Path(path).name for path in files))[:500]


# ---- in short


def summarise(profile: ServingProfile, path: str | Path) -> Summary:
    """A profile that lies at `path`, in short."""
    by_drafter: dict[str, list[ServedCell]] = {}
    for cell in sorted(profile.cells, key=lambda cell: cell.drafter != OFF):
        by_drafter.setdefault(cell.drafter, []).append(cell)
    most = max(cell.concurrency for cell in profile.cells)
    return Summary(
        source=profile.source, model=profile.model, system=profile.system, cells=len(profile.cells),
        drafters=[_drafter(name, cells, profile) for name, cells in by_drafter.items()], missing=_missing(profile),
        warnings=profile.warnings, next_command=f"planner plan {path} --max-concurrency 1..{most}",
    )  # fmt: skip


def _drafter(name: str, cells: list[ServedCell], profile: ServingProfile) -> DrafterSummary:
    lengths = sorted({cell.draft_len for cell in cells})
    drafting = [cell for cell in cells if cell.draft_len > 0]
    missing = []
    if name != OFF:
        if name not in profile.drafters:
            missing.append("its size: its weights and KV count as 0 bytes; give --draft-model")
        if 0 not in lengths:
            missing.append("draft_len 0 with it loaded: what it costs while idle is assumed")
        if not any(cell.acceptance or cell.tokens_per_round for cell in drafting):
            missing.append("acceptance and tokens_per_round: no other draft_len can be predicted well")
        elif len([length for length in lengths if length]) == 1:
            missing.append("a second draft_len: the others are extrapolated")
    return DrafterSummary(
        drafter=name, cells=len(cells), draft_len=lengths, concurrency=_range([cell.concurrency for cell in cells]),
        context_len=_range([cell.context_len for cell in cells]), missing=missing,
    )  # fmt: skip


def _missing(profile: ServingProfile) -> list[str]:
    cells = profile.cells
    costs = {
        "output_tokens_per_s": "the running batch comes from the count of bytes, not from a measurement",
        "itl_s": "the time of a round follows from tpot_s and tokens_per_round",
        "ttft_s": "limits of the time to the first token cannot be planned",
    }
    found = []
    for field, cost in costs.items():
        if without := sum(getattr(cell, field) is None for cell in cells):
            found.append(f"{field} in {without} of {len(cells)} cells: {cost}")
    if len({cell.concurrency for cell in cells}) == 1:
        found.append("a second concurrency: other loads are extrapolated")
    if len({cell.context_len for cell in cells}) == 1:
        found.append("a second context_len: what a longer prompt costs is not known")
    return found


def _range(values: list[int]) -> tuple[int, int]:
    return min(values), max(values)
