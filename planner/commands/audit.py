"""import audit: which rows of a table cannot be true together. Needs no torch."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from planner.audits import Audit, Fault
from planner.commands.sizes import sized, system_spec
from planner.errors import BadInput
from planner.files import read_bytes
from planner.importers.claims import Reads, Row, find_faults
from planner.importers.consistency import cell_faults
from planner.importers.contract import Given
from planner.importers.published_table import Published, is_published, read_published
from planner.importers.recognise import csv_columns, read_any
from planner.serving import OFF


def audit(
    path: str | Path,
    *,
    model: str | None = None,
    draft_models: Mapping[str, str] | None = None,
    system: str | None = None,
    concurrency: int | None = None,
    context_len: int | None = None,
    output_len: int | None = None,
) -> Audit:
    """The contradictions of a table: published claims (importers/published_table.py), or anything that import bench reads.

    model, draft_models, system   sizes and device as import bench takes them: a step takes at least the reading of the weights
    concurrency, context_len, output_len   for benchmark files that do not say them
    """
    content, name = read_bytes(path, "table"), Path(path).name
    if is_published(csv_columns(content)):
        for flag, value in {"--max-concurrency": concurrency, "--isl": context_len, "--osl": output_len}.items():
            if value is not None:
                raise BadInput(f"{flag} is for benchmark files, {name} is a table of claims with columns of its own; drop it")
        found = read_published(content, name)
        reads = _reads(model, draft_models or {}, system, {row.drafter for row in found.rows})
        faults = [*_within(found), *find_faults(found.rows, reads, strict=True)]
        sources, unchecked = [row.source for row in found.rows], _unchecked(found.rows, reads)
    else:
        cells = read_any(content, name, Given(concurrency=concurrency, context_len=context_len, output_len=output_len)).cells
        reads = _reads(model, draft_models or {}, system, {cell.drafter for cell in cells})
        faults = cell_faults(cells, reads)
        sources = [cell.source for cell in cells]
        unchecked = [] if any(cell.drafter == OFF for cell in cells) else ["speedups: no row is off (no drafter loaded)"]
    doubtful = {row for fault in faults for row in fault.rows}
    return Audit(
        table=name, num_rows=len(sources), faults=faults, distrust=[row for row in dict.fromkeys(sources) if row in doubtful], unchecked=unchecked
    )


def _reads(model: str | None, draft_models: Mapping[str, str], system: str | None, drafters: set[str]) -> Reads:
    if system is None:
        if model or draft_models:
            raise BadInput("--model and --draft-model bound a step by the device's bandwidth; give --system as well")
        return Reads()
    bandwidth = system_spec(system).bandwidth_bytes_per_s
    if bandwidth is None:
        raise BadInput("--system must have a bandwidth to bound a step; add ,bandwidth_gb_s=..")
    if unknown := [name for name in draft_models if name not in drafters]:
        raise BadInput(
            f"--draft-model NAME=SPEC must name a drafter of the table ({', '.join(sorted(drafters - {OFF})[:20])}), got {unknown[0][:80]!r}"
        )
    return Reads(
        None if model is None else sized(model)[0].weights_bytes / bandwidth,
        {name: sized(text)[0].weights_bytes / bandwidth for name, text in draft_models.items()},
    )


def _within(found: Published) -> list[Fault]:
    """Rows that contradict themselves, those of one kind together."""
    by_kind = groupby(sorted(found.doubtful, key=lambda one: one[1]), key=lambda one: one[1])
    return [
        Fault(
            kind="row", what=what, rows=[row.source for row, _, _ in named], examples=[f"{row.source} {why}" for row, _, why in named],
            remedy="one of the numbers is of another run or a copy of another row's",
        )
        for what, named in ((what, list(named)) for what, named in by_kind)
    ]  # fmt: skip


def _unchecked(rows: list[Row], reads: Reads) -> list[str]:
    drafting = [row for row in rows if row.draft_len]
    baselines = {(row.series, row.context_len) for row in rows if row.drafter == OFF and row.tpot_s}
    without = [row for row in drafting if (row.series, row.context_len) not in baselines]
    silent = [row for row in drafting if row.tokens_per_round is None]
    found = []
    if without:
        found.append(
            f"costs and baselines of {len(without)} of {len(drafting)} rows: no plain decoding at their context (drafter empty, draft_len 0)"
        )
    if silent:
        found.append(f"speedups against tokens per round in {len(silent)} of {len(drafting)} rows: neither acceptance nor tokens_per_round")
    if drafting and not (reads.drafter_s or reads.target_s):
        found.append("the reading of weights: give --model, --draft-model NAME=SPEC and --system")
    return found
