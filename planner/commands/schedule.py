"""planner plan and planner estimate by load: from a profile of either kind to a Schedule, or to estimates of settings at loads."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from planner.commands.configs import valid
from planner.commands.flags import Asked
from planner.commands.plan import check_objective, find_workload
from planner.errors import BadInput
from planner.files import read_bytes
from planner.measurements import Profile, fingerprint, kind_of
from planner.schedules import Compared, Limits, Schedule, Setting
from planner.serving import OFF, ServedCell, ServingProfile, load_any_profile
from planner.specs import Objective, Workload
from planner.units import MAX_NUMBER

if TYPE_CHECKING:
    from planner.search.loads import Loads
    from planner.search.runtime_loads import RuntimeLoads

MAX_CELLS = 100_000  # of a table of cells
CELL_COLUMNS = ("drafter", "draft_len", "concurrency", "context_len")


def is_serving(profile_path: str | Path) -> bool:
    """Whether a profile says it is a serving engine's."""
    return kind_of(read_bytes(profile_path, "profile")) == "serving"


def schedule(
    profile_path: str | Path,
    *,
    concurrency: tuple[int, int] | None = None,
    contexts: list[int] | None = None,
    output_len: int | None = None,
    objective: Objective = "e2e",
    goodput: Limits = Limits(),
    histogram: str | Path | None = None,
    price_per_hour: float | None = None,
    memory_cap_bytes: int | None = None,
    tensor_parallel: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Schedule:
    """What to run by load and context. What is left out takes what was measured: concurrencies, contexts, the longest output.

    histogram  a CSV table with columns concurrency and weight, and context_len if it tells contexts apart: the share of time,
               in any unit, that the server spends at each load; it decides which drafter is worth loading
    memory_cap_bytes, temperature, top_p and top_k are for profiles of the own runtime, tensor_parallel for those of engines
    """
    from planner.search.grid import Question
    from planner.search.schedule import make_schedule

    check_goodput(objective, goodput)
    check_objective(objective, price_per_hour)
    profile = load_any_profile(profile_path)
    if isinstance(profile, ServingProfile):
        _refuse({"--memory-cap": memory_cap_bytes, "--temperature": temperature, "--top-p": top_p, "--top-k": top_k})
        cells = _cells_at(profile, tensor_parallel)
        measured, batches = [cell.context_len for cell in cells], [cell.concurrency for cell in cells]
    else:
        if tensor_parallel is not None:
            raise BadInput(f"--tp is for a profile of a serving engine, got {tensor_parallel} with one of the own runtime; drop it")
        measured, batches = profile.contexts, [sample.batch for sample in profile.rounds if sample.draft_len == 0]
    contexts = _contexts(measured, contexts)
    concurrency = concurrency or (min(batches), max(batches))
    weights = None if histogram is None else read_weights(histogram, concurrency, contexts)  # before a fit, which takes longer than a look at a table
    if isinstance(profile, ServingProfile):
        loads, devices = engine_loads(profile, tensor_parallel, output_len), cells[0].tensor_parallel
        about = {"model": profile.model.name, "system": profile.system.name, "tensor_parallel": devices}
    else:
        workload = [find_workload(profile, context_len, output_len, temperature, top_p, top_k) for context_len in contexts][-1]
        loads, devices = runtime_loads(profile, workload, concurrency, memory_cap_bytes), 1
        about = {"model": profile.model, "system": profile.device.name, "tensor_parallel": profile.tensor_parallel}
    question = Question(*concurrency, contexts, objective, goodput, weights, None if price_per_hour is None else price_per_hour * devices / 3600)
    about |= {"source": profile.source, "profile_sha256": fingerprint(profile_path)}
    return make_schedule(loads, question, price_per_hour=price_per_hour, memory_cap_bytes=memory_cap_bytes, **about)


def estimate_served(
    profile_path: str | Path,
    cells: list[tuple[str, int, int, int | None]],
    *,
    output_len: int | None = None,
    objective: Objective = "e2e",
    price_per_hour: float | None = None,
    tensor_parallel: int | None = None,
) -> list[Compared]:
    """Settings at loads of a serving engine, in the order asked, each beside off.

    cells  drafter, draft_len, concurrency and context_len of each, the last None where the profile has only one
    """
    from planner.search.loads import compare_with_off

    if objective == "goodput":
        raise BadInput("an estimate has no goodput, which needs limits and a choice; take --objective throughput, or plan with --goodput")
    check_objective(objective, price_per_hour)
    profile = load_any_profile(profile_path)
    if not isinstance(profile, ServingProfile):
        raise BadInput(
            "several cells at once are for a profile of a serving engine, got one of the own runtime; estimate one at a time without --cells"
        )
    own = _cells_at(profile, tensor_parallel)
    measured = [cell.context_len for cell in own]
    rows = [
        (_setting(drafter, draft_len), at, _contexts(measured, None if context is None else [context])) for drafter, draft_len, at, context in cells
    ]
    if severals := next((contexts for _, _, contexts in rows if len(contexts) > 1), None):
        raise BadInput(f"the profile holds several values ({'; '.join(map(str, severals))}); choose one with --isl")
    loads = engine_loads(profile, tensor_parallel, output_len, [setting for setting, _, _ in rows])
    places = {setting: i for i, setting in enumerate(loads.settings)}
    asked = np.array([(places[setting], at, contexts[0]) for setting, at, contexts in rows]).T
    return compare_with_off(loads, *asked, objective, None if price_per_hour is None else price_per_hour * own[0].tensor_parallel / 3600)


def asked_cell(asked: Asked, concurrency: int, context_len: int | None) -> list[tuple[str, int, int, int | None]]:
    """The one cell that flags ask for; an engine's drafters have no other knob."""
    _refuse({f"--{name.replace('_', '-')}": value for name, value in asked._asdict().items() if name not in ("drafter", "draft_len")})
    return [(asked.drafter, asked.draft_len, concurrency, context_len)]


def read_cells(path: str | Path) -> list[tuple[str, int, int, int | None]]:
    """Cells of a CSV table with the columns of CELL_COLUMNS; drafter empty or none is off."""
    rows = _read_table(path, "table of cells", CELL_COLUMNS)
    numbers = [[_whole(row, name, where, least) for name, least in zip(CELL_COLUMNS[1:], (0, 1, 1), strict=True)] for where, row in rows]
    return [(row["drafter"].strip() or OFF, *own) for (_, row), own in zip(rows, numbers, strict=True)]


def _cells_at(profile: ServingProfile, tensor_parallel: int | None) -> list[ServedCell]:
    """Of one degree of tensor parallelism, the profile's only one where none is named."""
    degrees = sorted({cell.tensor_parallel for cell in profile.cells})
    if tensor_parallel not in degrees and (tensor_parallel is not None or len(degrees) > 1):
        raise BadInput(f"the profile holds tensor parallelism {', '.join(map(str, degrees))}, got --tp {tensor_parallel}; choose one of them")
    return [cell for cell in profile.cells if tensor_parallel in (None, cell.tensor_parallel)]


def engine_loads(
    profile: ServingProfile, tensor_parallel: int | None, output_len: int | None, asked: list[Setting] = (), *, idle: bool = True
) -> "Loads":
    """Loads of an engine, with the settings `asked` beside the candidates. idle  its drafters may be loaded and draft nothing"""
    from planner.cost.serving import fit_serving
    from planner.search.engine_loads import EngineLoads

    measured = {cell.output_len for cell in _cells_at(profile, tensor_parallel)}
    if output_len is not None and not 2 <= output_len <= MAX_NUMBER:
        raise BadInput(f"an output has at least 2 tokens, got {output_len}; set --osl")
    loads = EngineLoads(fit_serving(profile, tensor_parallel), output_len or max(measured), asked, idle=idle)
    if output_len is None and len(measured) > 1:
        loads.notes.append(f"outputs are taken as {max(measured)} tokens long, the longest of those measured; --osl sets another length")
    return loads


def runtime_loads(profile: Profile, workload: Workload, concurrency: tuple[int, int], memory_cap_bytes: int | None) -> "RuntimeLoads":
    """Loads of the own runtime, with the workload's sampler and output."""
    from planner.search.runtime_loads import RuntimeLoads

    return RuntimeLoads(profile, workload.sampler, workload.output_len, concurrency, memory_cap_bytes)


def _setting(drafter: str, draft_len: int) -> Setting:
    if drafter == OFF and draft_len:
        raise BadInput(f"draft_len must be 0 without a drafter, got {draft_len}; name one with --drafter")
    return valid(Setting, drafter=drafter, draft_len=draft_len)


def _contexts(measured: list[int], asked: list[int] | None) -> list[int]:
    contexts = sorted(set(measured if asked is None else asked))
    if contexts[0] < 1:
        raise BadInput(f"context_len must be >= 1, got {contexts[0]}; set --isl")
    return contexts


def check_goodput(objective: str, limits: Limits) -> None:
    if (objective == "goodput") != (limits != Limits()):
        given = "none" if limits == Limits() else "some"
        raise BadInput(f"objective goodput goes with limits, got objective {objective} with {given}; give for example --goodput tpot:50 ttft:500")


def _refuse(flags: dict[str, object]) -> None:
    """BadInput for a flag that says nothing about a serving engine's profile."""
    for flag, value in flags.items():
        if value is not None:
            raise BadInput(f"{flag} means nothing to a profile of a serving engine, whose runs had their own, got {value}; drop it")


def read_weights(path: str | Path, concurrency: tuple[int, int], contexts: list[int]) -> np.ndarray:
    """[X, C] shares of a histogram of load, sum 1; what names no context is spread evenly over those asked about."""
    from planner.search.schedule import context_ranges

    first, last = concurrency
    if last - first >= MAX_NUMBER // 2**20:
        raise BadInput(f"a histogram of load goes with at most {MAX_NUMBER // 2**20} concurrencies, got {first}..{last}; narrow --max-concurrency")
    weights = np.zeros((len(contexts), last - first + 1))
    for where, row in _read_table(path, "histogram of load", ("concurrency", "weight"), ("context_len",)):
        at = _whole(row, "concurrency", where, 0)
        try:
            weight = float(row["weight"])
        except ValueError:
            weight = np.nan
        if not 0 <= weight <= MAX_NUMBER:
            raise BadInput(f"{where}: weight must be a number from 0 up, got {row['weight'][:80]!r}")
        if at == 0 or weight == 0:
            continue  # nothing runs, so nothing is to be decided
        if not first <= at <= last:
            raise BadInput(f"{where}: concurrency must lie within {first}..{last}, got {at}; widen --max-concurrency")
        places = range(len(contexts))
        if row.get("context_len", "").strip():
            context = _whole(row, "context_len", where, 1)
            places = [i for i, (start, end) in enumerate(context_ranges(contexts)) if start <= context <= end]
            if not places:
                raise BadInput(f"{where}: context_len must be at most {contexts[-1]}, got {context}; add it to --isl")
        for i in places:
            weights[i, at - first] += weight / len(places)
    if weights.sum() == 0:
        raise BadInput(f"the histogram of load {path} needs a weight above 0 at a concurrency from 1 up, it has none")
    return weights / weights.sum()


def _read_table(path: str | Path, what: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[tuple[str, dict[str, str]]]:
    """Rows of a CSV table with a header, each with "file:line"; BadInput names what does not fit."""
    try:
        text = read_bytes(path, what).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"the {what} {path} must be a CSV table in UTF-8: {error}") from None
    header = [name.strip() for name in lines[0]] if lines else []
    wrong = [name for name in required if name not in header] + [name for name in header if name not in required + optional]
    if wrong or len(set(header)) < len(header):
        more = f" and maybe {', '.join(optional)}" if optional else ""
        raise BadInput(f"the {what} {path} needs a header of {', '.join(required)}{more}, got {','.join(header)[:80]!r}")
    rows = [(f"{path}:{number}", fields) for number, fields in enumerate(lines[1:], 2) if fields]
    if not 1 <= len(rows) <= MAX_CELLS:
        raise BadInput(f"the {what} {path} must hold 1 to {MAX_CELLS} rows, got {len(rows)}")
    for where, fields in rows:
        if len(fields) != len(header):
            raise BadInput(f"{where}: a row has {len(header)} fields as its header does, got {len(fields)}")
    return [(where, dict(zip(header, fields, strict=True))) for where, fields in rows]


def _whole(row: dict[str, str], name: str, where: str, least: int) -> int:
    text = row[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 14 and least <= int(text) <= MAX_NUMBER):
        raise BadInput(f"{where}: {name} must be a whole number from {least} up, got {text[:80]!r}")
    return int(text)
