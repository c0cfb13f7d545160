"""The settings that a simulation compares: off, one draft length everywhere, and what a schedule says by batch and context."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from planner.commands.deploying import at_context, steps_by_batch
from planner.commands.flags import AskedSimulation
from planner.commands.schedule import schedule as make_schedule
from planner.commands.sizes import model_size, system_spec
from planner.cost.serving import fit_serving
from planner.errors import BadInput
from planner.files import read_bytes
from planner.measurements import kind_of
from planner.plans import load_plan
from planner.schedules import Deployment, Schedule, ScheduleRow, load_schedule
from planner.serving import OFF, load_serving_profile
from planner.simulations import Step
from planner.simulator.engine import Policy
from planner.simulator.sources import PlanSource, ProfileSource, ScheduleSource, Sizes, Source
from planner.simulator.workload import Request


class Setting(NamedTuple):
    """What a server does in one arm."""

    name: str
    drafter: str
    policy: Policy

    @property
    def steps(self) -> list[Step]:
        policy, most = self.policy, 2**30
        batches, contexts = [*policy.batches, most], [*policy.contexts, most]
        return [
            Step(batch_from=a, batch_to=b - 1, context_from=c, context_to=d - 1, draft_len=policy.draft_len[i][j])
            for j, (c, d) in enumerate(pairwise(contexts))
            for i, (a, b) in enumerate(pairwise(batches))
        ]


class Opened(NamedTuple):
    source: Source
    settings: list[Setting]  # off first
    notes: list[str]


def open_arms(path: str | Path, asked: AskedSimulation, requests: Sequence[Request]) -> Opened:
    """The engine that a file describes, and the settings to run on it."""
    kind = kind_of(read_bytes(path, "profile, schedule or plan"))
    if kind is None:  # a plan, or a profile of the own runtime
        _refuse(asked, {"--model": asked.model, "--draft-size": asked.draft_size, "--system": asked.system, "--tp": asked.tensor_parallel})
        plan = load_plan(path)
        source = PlanSource(plan)
        chosen = [name for name in source.drafters[1:]]
        planned = [Setting("the plan's", name, Policy.fixed(source.max_draft_len[name])) for name in chosen]
        notes = [] if plan.chosen.draft_len else ["the plan says not to speculate: its best speculative configuration is shown beside off"]
        return Opened(source, [_off(), *planned, *_also(asked, source)], notes if chosen else [])
    if kind == "schedule":
        schedule = load_schedule(path)
        _refuse(asked, {"--tp": asked.tensor_parallel})
        source = ScheduleSource(schedule, _sizes(asked, schedule))
    elif kind == "serving":
        _refuse(asked, {"--model": asked.model, "--draft-size": asked.draft_size, "--system": asked.system})
        profile = load_serving_profile(path)
        cells = [cell for cell in profile.cells if asked.tensor_parallel in (None, cell.tensor_parallel)]
        source = ProfileSource(profile, fit_serving(profile, asked.tensor_parallel), cells)
        output_len = asked.output_len or max(2, round(sum(request.output_len for request in requests) / len(requests)))
        schedule = make_schedule(path, tensor_parallel=asked.tensor_parallel, output_len=output_len)
    else:
        raise BadInput(f"planner simulate takes a serving profile, a schedule or a plan, {path} is a {kind}")
    deployment = _deployment(schedule, asked.drafter)
    notes = []
    if deployment.drafter == OFF:
        notes.append("the schedule says not to load a drafter: nothing but off runs; --drafter NAME simulates one anyway")
    named = [_off(), *_also(asked, source), *_scheduled(schedule, deployment, source, requests)]
    return Opened(source, list({setting.name: setting for setting in named}.values()), notes)


def _off() -> Setting:
    return Setting("off", OFF, Policy.fixed(0))


def _deployment(schedule: Schedule, name: str | None) -> Deployment:
    """That of the drafter asked for, else the best one."""
    names = [deployment.drafter for deployment in schedule.deployments]
    if name is not None and name not in names:
        raise BadInput(f"the schedule has deployments {', '.join(names)}, got --drafter {name[:80]!r}; choose one of them")
    return schedule.deployments[names.index(name if name is not None else schedule.deployment or names[0])]


def _scheduled(schedule: Schedule, deployment: Deployment, source: Source, requests: Sequence[Request]) -> list[Setting]:
    """By batch alone, as engines do it, at the context nearest to the mean prompt; and by batch and context where that differs."""
    if deployment.drafter == OFF:
        return []
    running = ScheduleSource(schedule, None)
    edges = sorted({(row.context_from, row.context_to) for row in deployment.schedule})
    by_context = [_batches(at_context(deployment.schedule, first), running, last) for first, last in edges]
    mean = sum(request.input_len for request in requests) / len(requests)
    nearest = next((i for i, (first, last) in enumerate(edges) if first <= mean <= last), len(edges) - 1)
    found = [Setting("by batch", deployment.drafter, _policy([by_context[nearest]], (1,)))]
    if any(own != by_context[0] for own in by_context):
        starts = tuple(1 if i == 0 else first + schedule.output_len // 2 for i, (first, _) in enumerate(edges))  # a text holds half its output
        found.append(Setting("by batch and context", deployment.drafter, _policy(by_context, starts)))
    return found


def _batches(rows: Sequence[ScheduleRow], running: ScheduleSource, context_len: int) -> dict[int, int]:
    """draft_len by the first running batch it holds from."""
    known = [(row.concurrency_from, running.running(row.drafter, row.draft_len, row.concurrency_from, context_len)) for row in rows]
    steps, _, _ = steps_by_batch(rows, known, rows[-1].concurrency_to)
    return {step.batch_from: step.draft_len for step in steps}


def _policy(by_context: Sequence[dict[int, int]], contexts: tuple[int, ...]) -> Policy:
    batches = tuple(sorted({first for own in by_context for first in own}))
    rows = tuple(tuple(own[max(first for first in own if first <= batch)] for own in by_context) for batch in batches)
    return Policy(draft_len=rows, batches=batches, contexts=contexts)


def _also(asked: AskedSimulation, source: Source) -> list[Setting]:
    found = []
    for text in asked.also:
        match = re.fullmatch(r"\s*(?:(.+):)?K=(\d{1,3})\s*", text)
        if match is None:
            raise BadInput(f"--also takes one draft length for all loads such as K=3, with several drafters NAME:K=3, got {text[:80]!r}")
        drafters = [name for name in source.drafters if name != OFF]
        name = match[1] or asked.drafter or (drafters[0] if len(drafters) == 1 else None)
        if name not in drafters:
            raise BadInput(f"--also {text[:80]} needs one of the drafters {', '.join(drafters) or '(none)'}, got {name}; write NAME:K=3")
        draft_len = int(match[2])
        if draft_len > source.max_draft_len[name]:
            raise BadInput(f"{name} was measured up to K={source.max_draft_len[name]}, got --also {text[:80]}; lower it")
        label = f"K={draft_len}" if len(drafters) == 1 else f"{name} K={draft_len}"
        found.append(Setting(label if draft_len else f"{name} idle", name, Policy.fixed(draft_len)))
    return found


def _sizes(asked: AskedSimulation, schedule: Schedule) -> Sizes | None:
    """Of a schedule, which has none itself."""
    if asked.model is None or asked.system is None:
        if asked.kv_tokens is None or asked.prefill_rate is None:
            raise BadInput(
                "a schedule knows neither memory nor what prompts take: simulate its profile, or give --model and --system, or --kv-tokens and --prefill-rate"
            )
        return None
    drafters = {} if asked.draft_size is None else {name: model_size(asked.draft_size, name) for name in schedule_drafters(schedule)}
    return Sizes(model_size(asked.model), drafters, system_spec(asked.system), schedule.tensor_parallel)


def schedule_drafters(schedule: Schedule) -> list[str]:
    return [deployment.drafter for deployment in schedule.deployments if deployment.drafter != OFF]


def _refuse(asked: AskedSimulation, flags: dict[str, object]) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise BadInput(f"{flag} says what the file itself does, got {value}; drop it")
