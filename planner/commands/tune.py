"""planner tune: a user's own engine is started a few times, measured, and told what to draft at each load. Does not need torch.

off and the drafter at a few lengths, a few loads each  ->  cells  ->  fit and choice, as of any profile  ->  prompts not used before
"""

import hashlib
import math
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

import planner
from planner.commands.flags import AskedTune
from planner.commands.plan import check_objective
from planner.commands.progress import Progress, Silent
from planner.commands.schedule import check_goodput, engine_loads, read_weights
from planner.commands.tune_choice import Choice, checked_loads, choose_setting, pace, served_cells
from planner.commands.tune_runs import Bench, Item, Piece
from planner.commands.tune_servers import Launched, Subject, There
from planner.engines.completions import Prompt
from planner.engines.contract import Drafting
from planner.engines.http import Key
from planner.engines.launch import recorded
from planner.engines.prompts import read_prompts
from planner.errors import BadInput, Unfinished
from planner.exports import Step
from planner.files import Journal, journal_path, write_whole
from planner.measurements import encode, fingerprint
from planner.schedules import Limits, save_schedule
from planner.search.defects import collapsed, find_defects
from planner.search.design import Probe, draft_lens, loads_between, probes
from planner.search.grid import Question
from planner.serving import OFF, ServingProfile, save_serving_profile
from planner.specs import Objective
from planner.tunings import Defect, Tuning

MAX_CONCURRENCY, MAX_DRAFT_LEN, MAX_TEXTS = 1024, 64, 10_000
RESTLESS = 1.3  # times as long in one start as in another, beyond which the machine and not the engine explains it
WARM = 4  # requests of a start that are not measured
TUNING, PROFILE, SCHEDULE = "tuning.json", "profile.json", "schedule.json"  # in the folder, beside the servers' logs


def tune(
    dataset: Sequence[str],
    folder: str | Path,
    asked: AskedTune,
    *,
    objective: Objective = "e2e",
    goodput: Limits = Limits(),
    histogram: str | Path | None = None,
    price_per_hour: float | None = None,
    seed: int = 1,
    key: Key | None = None,
    resume: bool = False,
    progress: Progress = Silent(),
) -> Tuning:
    """What to set at each load, measured. Writes TUNING, PROFILE, SCHEDULE and the servers' logs into the folder.

    What is finished stands in a journal there, and resume goes on from it with the same arguments. Whatever was started here ends here.
    """
    check_objective(objective, price_per_hour)
    check_goodput(objective, goodput)
    _check(asked)
    subject: Subject = Launched(asked, key) if asked.launch else There(asked, key)
    places = loads_between(*asked.concurrency)
    items = _items(subject, asked, places)
    prompts = _Prompts(dataset, asked, items, places, seed)
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {folder}: {error.strerror or error}; change --out") from None
    header = _TuneRun(planner_version=planner.__version__, asked=_identity(asked), seed=seed, prompts=prompts.digest)
    with Journal(journal_path(folder / TUNING), header, resume=resume) as journal:
        bench = Bench(subject, folder, asked, seed, list(journal.entries(Piece)), journal.add, progress)
        progress.stage("measure", sum(len(item.loads) for item in items))
        for item in items:
            bench(item, partial(prompts.to_measure, item.repeat), prompts.to_check(places[0])[:WARM])
        profile, scheduled = _profile(bench, subject)
        save_serving_profile(profile, folder / PROFILE)
        choice, loads = _choose(subject, asked, profile, scheduled, folder, places, objective, goodput, histogram, price_per_hour)
        save_schedule(choice.schedule, folder / SCHEDULE)
        checks = _check_items(subject, choice, asked, places)
        progress.stage("check", sum(len(item.loads) for own in checks.values() for item in own))
        for item in sorted((item for own in checks.values() for item in own), key=lambda item: item.repeat):
            bench(item, prompts.to_check, prompts.to_measure(0, places[0])[:WARM])
        steady = pace(bench.runs) < RESTLESS
        roles = {role: own for role, items in checks.items() if (own := bench.runs_of(items))}
        tuning = Tuning(
            planner_version=planner.__version__, engine=subject.rules.name, engine_version=_version(bench, subject), method=subject.method,
            draft_model=asked.draft_model, model=profile.model.name, system=profile.system.name, objective=objective, output_len=asked.output_len,
            context_len=profile.cells[0].context_len, temperature=asked.temperature, seed=seed, minutes=bench.minutes, requests=bench.requests,
            launches=bench.launches, runs=bench.runs, profile=PROFILE, schedule=SCHEDULE, chosen=list(choice.steps), loads=choice.loads,
            yours=subject.yours, predicted_gain=choice.gain, paste=subject.paste(choice.steps, folder),
            checked=checked_loads(roles, loads, profile.cells[0].context_len, objective) if "chosen" in roles else [],
            max_draft_len=asked.max_draft_len, defects=_defects(bench, subject, steady), cut=bench.cut,
            notes=[*_restless(bench, steady), *loads.notes, *profile.warnings, *prompts.notes, *_differences(bench)],
        )  # fmt: skip
        write_whole(folder / TUNING, encode(tuning))
    return tuning


class _TuneRun(msgspec.Struct, kw_only=True):
    """What must agree for a tuning to be resumed."""

    planner_version: str
    asked: dict[str, str]
    seed: int
    prompts: str  # digest


def _identity(asked: AskedTune) -> dict[str, str]:
    """What decides which loads are run, and how; bounds may be raised when a tuning goes on."""
    free = ("cap_requests", "cap_minutes", "ready_s", "model", "draft_size", "system")
    found = {name: str(value) for name, value in asked._asdict().items() if name not in free}
    return found | ({"launch": shlex.join(recorded(shlex.split(asked.launch)))} if asked.launch else {})  # without keys


def _check(asked: AskedTune) -> None:
    if (asked.launch is None) == (asked.base_url is None):
        raise BadInput("a tuning takes --launch COMMAND, or --base-url URL of a server that is there, one of them")
    if asked.base_url is None and (asked.baseline_url or asked.draft_len):
        raise BadInput("--baseline-url and --draft-len are for a server that is there; give --base-url, or drop them")
    limits = {
        "--max-concurrency": (asked.concurrency[1], 1, MAX_CONCURRENCY), "--max-draft-len": (asked.max_draft_len, 1, MAX_DRAFT_LEN),
        "--draft-len": (asked.draft_len or 1, 1, MAX_DRAFT_LEN), "--texts": (asked.num_texts, 2, MAX_TEXTS),
        "--check-texts": (asked.check_texts, 0, MAX_TEXTS), "--isl": (asked.context_len, 1, 2**20), "--osl": (asked.output_len, 2, 2**16),
        "--repeats": (asked.repeats or 1, 1, 20), "--cap-requests": (asked.cap_requests, 1, 10**6), "--cap-minutes": (asked.cap_minutes, 0, 10**5),
        "--temperature": (asked.temperature, 0, 100), "--top-p": (asked.top_p, 0, 1), "--ready-timeout": (asked.ready_s or 1, 0.1, 10**5),
    }  # fmt: skip
    for flag, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise BadInput(f"{flag} lies within {least} to {most}, got {value:g}; change it")


def _items(subject: Subject, asked: AskedTune, places: list[int]) -> list[Item]:
    """Starts to measure; every other time in reverse, so that a machine that slows down slows both ends alike."""
    if not subject.restarts:
        steps = (Step(batch_from=1, batch_to=places[-1], draft_len=asked.draft_len),)
        starts = [Probe(steps, tuple(places)), *([Probe((), tuple(places))] if asked.baseline_url else [])]
    else:
        own = subject.yours.draft_len if subject.yours and subject.yours.drafter == subject.method else None
        scheduled = subject.method in subject.rules.scheduled
        starts = probes(places, draft_lens(max(asked.max_draft_len, own or 0), own), scheduled=scheduled)
    return [
        Item("measure", repeat, subject.drafting(probe.steps), probe.loads)
        for repeat in range(asked.repeats or subject.repeats)
        for probe in (starts if repeat % 2 == 0 else reversed(starts))
    ]


def _check_items(subject: Subject, choice: Choice, asked: AskedTune, places: list[int]) -> dict[str, list[Item]]:
    """By role: what was chosen beside off and what the user runs now."""
    if not subject.restarts or not asked.check_texts:
        return {}
    at = _checked_places(places)
    roles: dict[str, Drafting] = {"chosen": subject.drafting(choice.steps)}
    for role, drafting in {"off": subject.drafting(()), "yours": subject.yours_drafting}.items():
        if drafting is not None and drafting not in roles.values():
            roles[role] = drafting
    repeats = range(asked.repeats or subject.repeats)
    found = {role: [Item("check", repeat, drafting, at) for repeat in repeats] for role, drafting in roles.items()}
    return found if len(found) > 1 else {}


def _checked_places(places: list[int]) -> tuple[int, ...]:
    """Of the loads that were measured, both ends and the middle."""
    return tuple(places[i] for i in sorted({0, len(places) // 2, len(places) - 1}))


class _Prompts:
    """Prompts of a tuning: those to measure with, and those kept for the check."""

    def __init__(self, dataset: Sequence[str], asked: AskedTune, items: list[Item], places: list[int], seed: int):
        self._sizes = _sizes(asked, items, places)
        self._checks = {load: max(asked.check_texts, load, 2) for load in _checked_places(places)} if asked.check_texts else {}
        measured, check, repeats = sum(self._sizes.values()), sum(self._checks.values()), 1 + max(item.repeat for item in items)
        least = max(self._sizes.values()) + max(self._checks.values(), default=0)
        found = read_prompts(list(dataset), count=measured * repeats + check, least=least, context_len=asked.context_len, seed=seed)
        held = min(check, max(len(found) - measured, max(self._checks.values(), default=0)))
        self._held, self._pool = found[:held], found[held:]
        self._starts = {load: sum(size for at, size in self._sizes.items() if at < load) for load in self._sizes}
        self._measured = measured
        self.digest = hashlib.sha256(msgspec.json.encode(found)).hexdigest()
        self.notes = []
        if len(self._pool) < measured:
            self.notes.append(
                f"the dataset holds {len(self._pool)} prompts to measure with, {measured} would be sent once each: some come twice to one server, "
                "whose prefix cache then knows them; time to the first token is too short by that"
            )

    def to_measure(self, repeat: int, load: int) -> list[Prompt]:
        begin = repeat * self._measured + self._starts[load]
        return [self._pool[(begin + i) % len(self._pool)] for i in range(self._sizes[load])]

    def to_check(self, load: int) -> list[Prompt]:
        if not self._held:
            return self._pool[-self._sizes[load] :]
        begin = sum(size for at, size in self._checks.items() if at < load)
        return [self._held[(begin + i) % len(self._held)] for i in range(self._checks[load])]


def _sizes(asked: AskedTune, items: list[Item], places: list[int]) -> dict[int, int]:
    """Prompts at each load: enough to fill it twice, fewer where the cap on requests asks for it."""
    sizes = {load: max(asked.num_texts, 2 * load) for load in places}
    total = sum(sizes[load] + load for item in items for load in item.loads)
    share = min(1.0, asked.cap_requests / total)
    if share < 1:
        sizes = {load: max(2, load, math.floor(share * (size + load)) - load) for load, size in sizes.items()}
        least = sum(max(2, load) + load for item in items for load in item.loads)
        if least > asked.cap_requests:
            raise BadInput(
                f"a tuning up to concurrency {places[-1]} sends at least {least} requests, --cap-requests says {asked.cap_requests}; raise it, or lower "
                "--max-concurrency"
            )
    return sizes


def _profile(bench: Bench, subject: Subject) -> tuple[ServingProfile, bool]:
    """What was measured, but for loads at which a schedule collapsed; and whether the engine runs schedules as it is told."""
    measured = [run for run in bench.runs if run.stage == "measure"]
    found = {defect.name for defect in find_defects(measured, bench.launches, engine=subject.rules.name)}
    gone = collapsed(measured, bench.launches)
    kept = [run for i, run in enumerate(measured) if i not in gone]
    if not any(run.setting.draft_len for run in kept):
        why = f" ({bench.cut[-1]})" if bench.cut else ""
        raise Unfinished(f"a tuning needs a load with {subject.method}, there is none{why}; raise the bounds or mend that, and go on with --resume")
    cells, doubts = served_cells(kept, subject.tensor_parallel)
    doubts += [f"{len(gone)} loads at which a schedule collapsed are left out"] if gone else []
    scheduled = subject.method in subject.rules.scheduled and not found & {"collapse", "draft_len ignored"}
    return ServingProfile(
        source=f"{subject.rules.name} {_version(bench, subject)}".strip(), date=datetime.now(UTC).isoformat(timespec="seconds"),
        planner_version=planner.__version__, model=subject.model, drafters={} if subject.drafter is None else {subject.method: subject.drafter},
        system=subject.system, cells=cells, warnings=[*doubts, *_left_out(bench)],
    ), scheduled  # fmt: skip


def _defects(bench: Bench, subject: Subject, steady: bool) -> list[Defect]:
    """What is surely amiss; of times, only where the machine kept its own."""
    found = find_defects(bench.runs, bench.launches, engine=subject.rules.name)
    return found if steady else [defect for defect in found if defect.name not in ("collapse", "idle drafter", "starved")]


def _restless(bench: Bench, steady: bool) -> list[str]:
    if steady:
        return []
    times = f"{pace(bench.runs):.1f} times as long in one start as in another"
    doubt = "intervals do not hold that, and what the engine may do wrong with time is not told: end what else runs there, and tune again"
    return [f"the machine changed its pace: one setting at one load took {times}; {doubt}"]


def _left_out(bench: Bench) -> list[str]:
    repetitive, short = (sum(getattr(run, what) for run in bench.runs) for what in ("degenerate", "short"))
    kept = sum(len(run.answers) for run in bench.runs)
    found = []
    if repetitive:
        found.append(f"{repetitive} of {kept + repetitive + short} answers repeat themselves and are left out: a drafter guesses them too well")
    if short:
        found.append(f"{short} of {kept + repetitive + short} answers are too short to be timed and are left out")
    return found


def _choose(
    subject: Subject,
    asked: AskedTune,
    profile: ServingProfile,
    scheduled: bool,
    folder: Path,
    places: list[int],
    objective: Objective,
    goodput: Limits,
    histogram: str | Path | None,
    price_per_hour: float | None,
) -> tuple[Choice, "Loads"]:  # noqa: F821  planner.search.loads
    context_len, yours = profile.cells[0].context_len, subject.yours
    comparable = yours is not None and yours.drafter in (OFF, subject.method)
    loads = engine_loads(profile, None, None, [yours] if comparable and yours.drafter != OFF else [], idle=scheduled)
    weights = None if histogram is None else read_weights(histogram, asked.concurrency, [context_len])
    devices = subject.tensor_parallel
    question = Question(
        *asked.concurrency, [context_len], objective, goodput, weights, None if price_per_hour is None else price_per_hour * devices / 3600
    )
    return choose_setting(
        loads, question, scheduled, yours if comparable else None, places, source=profile.source, model=profile.model.name,
        system=profile.system.name, tensor_parallel=devices, profile_sha256=fingerprint(folder / PROFILE), price_per_hour=price_per_hour,
        memory_cap_bytes=None,
    ), loads  # fmt: skip


def _version(bench: Bench, subject: Subject) -> str:
    """As a log says, else as was named."""
    return next((launch.version for launch in bench.launches if launch.version), subject.version)


def _differences(bench: Bench) -> list[str]:
    return list(dict.fromkeys(launch.difference for launch in bench.launches if launch.difference))
