"""planner drift: a plan, or a schedule, against the metrics of a live server: what moved, whether it still pays, what to change."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

import planner
from planner.commands.progress import Progress, Silent
from planner.drifts import Choice, Drift
from planner.engines.http import Bounds, Client, Key
from planner.engines.metrics import Watched, compare_files, watch
from planner.errors import BadInput, ServerError
from planner.files import read_bytes
from planner.importers.prometheus import ENGINES
from planner.measurements import fingerprint, kind_of
from planner.plans import Estimate, Interval, Plan, load_plan
from planner.schedules import LoadCurve, Schedule, ScheduleRow, Setting, describe_setting, load_schedule
from planner.search.loads import HALF_WIDTH
from planner.search.watched import TOLERANCE, Curves, Seen, choices, load_of, look, positions, speedup
from planner.serving import OFF
from planner.specs import FullKV

MAX_WINDOW_S = 7 * 24 * 3600
MAX_SCRAPES = 10_000
SCRAPE = Bounds(connect_s=5.0, read_s=10.0, total_s=20.0)
NEARBY = 1.25  # a load further off the planned ones than this factor has no prediction
LLAMA_CPP = ENGINES["llamacpp:"]  # takes its draft length at start only
WORTH_CHANGING = 0.02  # relative gain below which another setting is not advised


class Planned(NamedTuple):
    """What a plan of either kind says for watching a server."""

    model: str
    objective: str
    drafter: str  # that the server has loaded; none: it has none
    rows: list[ScheduleRow]  # of one context, by load
    curves: Curves
    context_len: int  # of these predictions
    first: int  # loads that are planned for
    last: int
    notes: list[str]

    def setting(self, load: float) -> Setting:
        """What the plan runs at a load, the nearest planned one where it lies outside."""
        at = min(max(round(load), self.first), self.last)
        return next(row.setting for row in self.rows if row.concurrency_from <= at <= row.concurrency_to)


def drift(
    plan_path: str | Path,
    *,
    metrics: str | None = None,
    window_s: float | None = None,
    interval_s: float = 15.0,
    once: tuple[str | Path, str | Path] | None = None,
    drafter: str | None = None,
    context_len: int | None = None,
    key: Key | None = None,
    progress: Progress = Silent(),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Drift:
    """What a server did, beside what the plan predicted for its load.

    metrics  URL of its /metrics, watched for `window_s` (10 minutes), or `once`, two scrapes on disk, with window_s between them if known
    drafter  that the server has loaded, where the schedule's rows have several; context_len where its predictions do
    """
    if (metrics is None) == (once is None):
        raise BadInput("drift needs --metrics URL of a live server, or --once BEFORE AFTER, two scrapes on disk; give one of them")
    if window_s is not None and not 0 < window_s <= MAX_WINDOW_S or not 0 < interval_s <= MAX_WINDOW_S:
        raise BadInput(f"a window and its interval must be above 0 s and at most a week, got {window_s} s and {interval_s} s; set --window")
    plan = load_either(plan_path)  # before a window passes
    if once is not None:
        seen = compare_files(*((read_bytes(path, "scrape"), Path(path).name) for path in once), window_s)
    else:
        window_s = window_s or 600.0
        if window_s / interval_s > MAX_SCRAPES:
            raise BadInput(f"a window holds at most {MAX_SCRAPES} scrapes, got {window_s:g} s every {interval_s:g} s; raise --interval")
        client = Client(metrics, key, SCRAPE)
        if not client.path:
            client = Client(f"{client.name}/metrics", key, SCRAPE)
        progress.stage("watching the server", math.ceil(window_s / interval_s))
        seen = watch(client, window_s=window_s, interval_s=interval_s, sleep=sleep, clock=clock, advance=progress.advance)
    if not seen.stretches:
        raise ServerError("the server generated nothing while it was watched; watch it under load, or for longer with --window")
    return judge(plan, fingerprint(plan_path), seen, drafter=drafter, context_len=context_len)


def judge(plan: Plan | Schedule, sha256: str, seen: Watched, *, drafter: str | None, context_len: int | None) -> Drift:
    """What was seen beside the plan. BadInput where the plan predicts nothing of the kind."""
    requests, prompts = sum(own.requests or 0 for own in seen.stretches), sum(own.prompt_tokens for own in seen.stretches)
    prompt_len = round(prompts / requests) if requests and prompts else None
    planned = describe_plan(plan, drafter, context_len or prompt_len)
    found = look(seen.stretches, planned.curves, lambda load: planned.setting(load).draft_len)
    if changed := found.changed:  # what holds now is asked, not the mean of what was and is
        late = seen.stretches[-(len(seen.stretches) // 2) :]
        seen = seen._replace(stretches=late, seconds=sum(own.seconds or 0.0 for own in late))
        found = look(late, planned.curves, lambda load: planned.setting(load).draft_len)._replace(changed=changed)
    outside = not planned.first / NEARBY <= found.concurrency <= planned.last * NEARBY
    if outside:  # the nearest prediction stands there for the reader, and decides nothing
        found = found._replace(**{name: msgspec.structs.replace(getattr(found, name), moved=False) for name in ("round_s", "tpot_s")})
    target = planned.setting(found.concurrency)
    drafts = round(found.draft_len) or int(found.draft_len > 0)
    loaded = drafts > 0 or target.idle
    running = next((own for own in planned.curves.settings if own.draft_len == drafts and (own.drafter != OFF) == loaded), Setting())
    if drafts == 0 and target.draft_len > 0:
        raise ServerError(
            f"the server drafted nothing while it was watched, the plan has {describe_setting(target)} at concurrency {found.concurrency:.3g}; "
            "is speculation switched on, and this the right server?"
        )
    now, before = speedup(found, planned.objective) if loaded else (Interval(value=1.0, low=1.0, high=1.0), 1.0)
    pays = "not known" if outside else "yes" if now.low >= 1 else "no" if now.high < 1 else "not known"
    options = choices(found, planned.curves, running, planned.objective, fixed=seen.engine == LLAMA_CPP)
    rounds = found.round_s.measured
    even = Interval(**{bound: getattr(rounds, bound) / found.off.tpot_s for bound in ("value", "low", "high")})
    load_moved, load = _load_moved(planned, found, running, target, outside)
    return Drift(
        planner_version=planner.__version__,
        plan_sha256=sha256,
        model=planned.model,
        engine=seen.engine,
        seconds=seen.seconds,
        num_scrapes=seen.num_scrapes,
        num_restarts=seen.num_restarts,
        num_failed=seen.num_failed,
        concurrency=found.concurrency,
        concurrency_low=found.concurrency_low,
        concurrency_high=found.concurrency_high,
        running_batch=_running_batch(seen),
        context_len=prompt_len,
        context_planned=planned.context_len,
        planned=target,
        running=running,
        draft_len=found.draft_len,
        positions=positions(found, planned.curves),
        tokens_per_round=found.tokens_per_round,
        round_s=found.round_s,
        tpot_s=found.tpot_s,
        off_tpot_s=_off(found),
        break_even_tokens_per_round=even,
        speedup=now,
        speedup_planned=before,
        load_moved=load_moved,
        pays=pays,
        verdict=_verdict(pays, now, running, loaded, found, outside),
        causes=_causes(found, load, drafts, outside),
        choices=options,
        advice=_advice(options, running, target, pays, load_moved, math.ceil(found.concurrency) if outside else None),
        notes=[*planned.notes, *_notes(seen, found, planned)],
    )


def load_either(path: str | Path) -> Plan | Schedule:
    """A plan or a schedule, by what the file says it is."""
    return load_schedule(path) if kind_of(read_bytes(path, "plan")) == "schedule" else load_plan(path)


def describe_plan(plan: Plan | Schedule, drafter: str | None, context_len: int | None) -> Planned:
    """BadInput where it does not say enough to be compared with a server."""
    return (_of_schedule if isinstance(plan, Schedule) else _of_plan)(plan, drafter, context_len)


def _of_schedule(schedule: Schedule, drafter: str | None, context_len: int | None) -> Planned:
    if not schedule.curves:
        raise BadInput("this schedule keeps no predictions between the ends of its rows; make it again with this version of planner plan")
    notes = []
    context = schedule.contexts[0]
    if len(schedule.contexts) > 1:
        if context_len is None:
            raise BadInput(f"the schedule is for contexts {', '.join(map(str, schedule.contexts))}, and the metrics say no lengths; give --isl")
        context = next((own for own in schedule.contexts if context_len <= own), schedule.contexts[-1])  # as its rows are laid out
    elif context_len is not None and abs(context_len / context - 1) > 0.25:
        notes.append(f"prompts are {context_len} tokens long, the schedule is for {context}: plan again for that context")
    named = list(dict.fromkeys(row.drafter for row in schedule.schedule if row.drafter != OFF))
    known = [own.drafter for own in schedule.deployments if own.drafter != OFF]
    chosen = drafter or schedule.deployment or _only(named) or _only(known) or (None if known else OFF)
    if chosen is None or chosen not in (*known, OFF):
        raise BadInput(
            f"the schedule has drafters {', '.join(known) or 'none'}, got {drafter or 'none named'}; say with --drafter what the server loads"
        )
    rows = schedule.schedule if drafter is None else next(own.schedule for own in schedule.deployments if own.drafter == chosen)
    rows = [row for row in rows if row.context_from <= context <= row.context_to]
    own = [curve for curve in schedule.curves if curve.context_len == context]
    off = next((curve for curve in own if curve.setting.drafter == OFF), None)
    if off is None or not rows:
        raise BadInput("the schedule holds no prediction without a drafter at this context; make it again with this version of planner plan")
    kv = next((row.kv for row in rows if row.drafter == chosen and row.draft_len), None)  # a server has one kv policy
    drafting = [curve for curve in own if curve.setting.drafter == chosen != OFF and curve.setting.kv == kv]
    curves = Curves(off, drafting, idle=any(row.setting.idle for row in rows))
    return Planned(schedule.model, schedule.objective, chosen, rows, curves, context, schedule.concurrency_from, schedule.concurrency_to, notes)


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _of_plan(plan: Plan, drafter: str | None, context_len: int | None) -> Planned:
    """A plan is for one load: its choice, plain decoding, and what runs the same drafter with another draft_len."""
    if drafter is not None and drafter != plan.chosen.drafter.kind:
        raise BadInput(f"the plan's drafter is {plan.chosen.drafter.kind}, got --drafter {drafter}; drop it, it is for schedules with several")
    workload, chosen = plan.workload, plan.chosen
    batch = workload.batch

    def curve(estimate: Estimate) -> LoadCurve:
        config = estimate.config
        columns = {name: getattr(estimate, name) for name in ("tokens_per_round", "round_s", "tpot_s")}
        sds = {name.removesuffix("_s"): [math.log(own.high / own.low) / 2 / HALF_WIDTH] for name, own in columns.items()}
        return LoadCurve(
            setting=_setting(config), context_len=workload.context_len, concurrency=[batch], running_batch=[float(batch)],
            **{name: [own.value] for name, own in columns.items()}, sd_tokens=sds["tokens_per_round"], sd_round=sds["round"], sd_tpot=sds["tpot"],
        )  # fmt: skip

    same = [own for own in [plan.estimate, *plan.runners_up] if (own.config.drafter, own.config.kv) == (chosen.drafter, chosen.kv)]
    drafting = [] if chosen.drafter.kind == OFF else [curve(own) for own in same]
    setting = _setting(chosen)
    row = ScheduleRow(
        concurrency_from=batch, concurrency_to=batch, context_from=workload.context_len, context_to=workload.context_len, drafter=setting.drafter,
        draft_len=setting.draft_len, kv=setting.kv, margin=0.0, margin_low=0.0, margin_high=0.0, runner_up=None,
    )  # fmt: skip
    notes = [
        f"a plan is for one load, concurrency {batch}: its times say little of another one; planner plan --max-concurrency A..B makes a schedule"
    ]
    curves = Curves(curve(plan.baseline), drafting)
    return Planned(plan.model, plan.objective, setting.drafter, [row], curves, workload.context_len, batch, batch, notes)


def _setting(config) -> Setting:
    return Setting(drafter=config.drafter.kind, draft_len=config.draft_len, kv=None if isinstance(config.kv, FullKV) else config.kv)


def _running_batch(seen: Watched) -> float | None:
    """By the gauges, since llama.cpp counts time as requests end; without them by Little's law."""
    if all(own.running is not None for own in seen.stretches):
        return sum(own.running * own.tokens for own in seen.stretches) / sum(own.tokens for own in seen.stretches)
    return sum(own.decode_s for own in seen.stretches) / seen.seconds if seen.seconds else None


def _off(seen: Seen) -> Interval:
    spread = math.exp(min(HALF_WIDTH * seen.off.sd_tpot, 30.0))
    return Interval(value=seen.off.tpot_s, low=seen.off.tpot_s / spread, high=seen.off.tpot_s * spread)


def _load_moved(planned: Planned, seen: Seen, running: Setting, target: Setting, outside: bool) -> tuple[bool, str]:
    load = f"load is {seen.concurrency:.3g} requests at once"
    if outside:
        span = f"{planned.first}..{planned.last}" if planned.last > planned.first else f"{planned.first}"
        return True, f"load moved: {load[8:]}, the plan is for {span}, whose nearest prediction is taken"
    if running.draft_len != target.draft_len and any(row.setting == running for row in planned.rows):
        return (
            True,
            f"load moved: {load[8:]}, where the plan has {describe_setting(target)}, and the server runs {describe_setting(running)} as for another row",
        )
    return False, f"{load}, where the plan has {describe_setting(target)}"


def _causes(seen: Seen, load: str, drafts: int, outside: bool) -> list[str]:
    def said(name: str, what: str, shift, unit: str, scale: float) -> str:
        ratio = f"{shift.measured.value * scale:.3g}{unit} against {shift.predicted.value * scale:.3g}{unit} planned, {shift.ratio.value - 1:+.0%}"
        return f"{name} moved: {what} {ratio}" if shift.moved else f"{name} is not shown to have moved by more than {TOLERANCE:.0%}: {what} {ratio}"

    found = [said("acceptance", "tokens per round", seen.tokens_per_round, "", 1.0)] if drafts else []
    found.append(
        "latency is not judged: nothing is predicted for such a load" if outside else said("latency", "a round takes", seen.round_s, " ms", 1e3)
    )
    if seen.changed:
        before, after = seen.changed
        found.append(
            f"acceptance changed while it was watched: tokens per round were {before - 1:+.0%} off the plan in the first half of the window, "
            f"{after - 1:+.0%} in the second; "
            "all else here is of the second"
        )
    return [*found, load]


def _verdict(pays: str, now: Interval, running: Setting, loaded: bool, seen: Seen, outside: bool) -> str:
    if outside:
        return f"whether the plan pays is not known: nothing is predicted for concurrency {seen.concurrency:.3g}"
    if not loaded:
        return "off runs, as planned at this load: nothing to lose"
    name, times = describe_setting(running), f"{now.value:.2f} [{now.low:.2f}, {now.high:.2f}] times as fast as off"
    slower = "; whether off became slower as well is not known from here, planner check --baseline-url tells" if seen.round_s.moved else ""
    match pays:
        case "yes":
            return f"the plan still pays: {name} is {times}"
        case "no":
            return f"the plan no longer pays: {name} is {times}"
    return f"whether the plan still pays is not certain: {name} is {times}{slower}"


def _advice(options: list[Choice], running: Setting, target: Setting, pays: str, load_moved: bool, beyond: int | None) -> list[str]:
    """beyond  the load, where it lies outside of the planned ones"""
    if beyond is not None:
        return [f"plan again with a --max-concurrency that reaches {beyond}; measure there first"]
    found = []
    if running != target and load_moved:
        found.append(f"at this load the plan's row is {describe_setting(target)}")
    elif running != target:
        found.append(f"the server runs {describe_setting(running)}, the plan has {describe_setting(target)} here: is the plan deployed?")
    better = [choice for choice in options if choice.setting != running and choice.gain.value > WORTH_CHANGING]
    for choice in dict.fromkeys([*better[:1], *(choice for choice in better if not choice.restart)][:2]):
        sure = "" if choice.gain.low > 0 else ", which is not certain"
        how = "restart with" if choice.restart else "set"
        found.append(
            f"{how} {describe_setting(choice.setting)}: {choice.gain.value:+.1%} [{choice.gain.low:+.1%}, {choice.gain.high:+.1%}] over what runs{sure}"
            + ("; drafts that long were not seen, their acceptance is guessed" if choice.extrapolated else "")
        )
        if not choice.restart:
            break
    if pays == "no" and not better:
        found.append("switch speculation off at this load, and measure again: planner tune, or planner import and plan")
    return found or ["change nothing"]


def _notes(seen: Watched, found: Seen, planned: Planned) -> list[str]:
    notes = [
        "predictions between profiled loads are interpolated on logarithms of load and time; time without a drafter is the plan's, off does not run"
    ]
    if seen.num_restarts:
        notes.append(
            f"the server was restarted {seen.num_restarts} time{'s' * (seen.num_restarts > 1)} while it was watched; what lies around that is left out"
        )
    if seen.num_failed:
        notes.append(f"{seen.num_failed} scrapes were not answered, and left out")
    if found.approximate:
        notes.append(
            "one stretch says nothing of the spread of the measured times: they are taken as exact, intervals hold the plan's spread alone; "
            "watch for longer, with --metrics and --window"
        )
    if all(own.concurrency is None for own in seen.stretches):
        notes.append("the metrics say no running requests; the load follows from time spent decoding")
    if not any(own.drafts for own in seen.stretches) and any(own.accept_length for own in seen.stretches):
        notes.append("the engine counts no drafts: it is taken to draft as the plan's rows say, and tokens per round are its gauge's")
    if max(load_of(own) for own in seen.stretches) > 2 * min(load_of(own) for own in seen.stretches):
        notes.append("the load varied a lot; each stretch between two scrapes is compared at its own")
    return notes
