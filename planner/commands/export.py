"""planner export: a Plan or a Schedule in an engine's own files, and what the engine cannot be told. Does not need torch.

With the profile, what an engine lacks makes the planner plan again within that engine's limits, and both results are shown.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import planner
from planner.commands.deploying import Chosen, at_context, describe_choice, from_plan, from_rows, own_config, setting_at
from planner.commands.flags import AskedExport
from planner.commands.plan import find_workload
from planner.commands.schedule import engine_loads, runtime_loads
from planner.engine_rules import DraftRules, find_drafting, span
from planner.errors import BadInput
from planner.exporters import EXPORTERS
from planner.exporters.contract import Deployed, OwnRuntime, knob
from planner.exporters.quoting import SCRIPT
from planner.exporters.within import fit_engine
from planner.exports import EXPORT_FILE, CostRow, Export, Knob
from planner.files import read_bytes, write_whole
from planner.measurements import Profile, encode, fingerprint, kind_of
from planner.plans import Interval, Plan, load_plan
from planner.schedules import Schedule, Setting, load_schedule
from planner.serving import OFF, ServingProfile, load_any_profile
from planner.specs import DraftConfig, FullKV, KVPolicy, Objective

SCRIPTS = ("run", "measure", "sweep")


def export(
    plan_path: str | Path, engine: str, folder: str | Path, asked: AskedExport = AskedExport(), *, profile_path: str | Path | None = None
) -> Export:
    """Write the folder, and return what its plan.json says.

    engine  NAME@VERSION, the version being the newest known where it is left out
    """
    rules, version = find_drafting(engine)
    folder = Path(folder)
    earlier = _check_folder(folder)
    plan = load_schedule(plan_path) if _is_schedule(plan_path) else load_plan(plan_path)
    profile = None if profile_path is None else _profile(profile_path, plan)
    if isinstance(plan, Schedule):
        deployed, knobs, cost, note = _from_schedule(plan, asked, rules, profile)
    else:
        deployed, knobs, cost, note = _from_plan(plan, asked, rules, profile)
    exporter = EXPORTERS[rules.name]
    spelled = exporter.spell(deployed, rules)
    notes = list(spelled.notes)
    if plan.source == "own runtime" and rules.name != "planner":
        notes.insert(0, "acceptance carried over, latency foreign: measure on the engine before relying on a speedup")
    about = f"written by planner {planner.__version__} for {rules.name} {version}"
    if isinstance(plan, Schedule) and asked.model is None:
        notes.append("the model is called as in the profile; --model says what the engine is to load")
    lines = dict(zip(SCRIPTS, (spelled.run, spelled.measure, spelled.sweep), strict=True))
    files = spelled.files | {name: SCRIPT.format(about=about, line=line) for name, line in lines.items() if line is not None}
    found = Export(
        planner_version=planner.__version__, plan_sha256=fingerprint(plan_path), profile_sha256=plan.profile_sha256, engine=rules.name,
        engine_version=version, engine_versions=span(rules), checked=exporter.checked, model=deployed.model,
        method=None if deployed.off else deployed.method, draft_model=deployed.draft_model, objective=plan.objective,
        context_len=deployed.context_len, output_len=deployed.output_len, steps=list(deployed.steps), knobs=knobs + spelled.knobs, cost=cost,
        cost_note=note, files=sorted(files), argv=spelled.argv, run=spelled.run, measure=spelled.measure, notes=notes,
    )  # fmt: skip
    _write(folder, files, found, earlier)
    return found


def _from_plan(plan: Plan, asked: AskedExport, rules: DraftRules, profile: Profile | None) -> tuple[Deployed, list[Knob], list[CostRow], str]:
    deployed, knobs = from_plan(plan, asked, rules, plan.chosen)
    allowed = _allowed(rules)
    if rules.name == "planner" or allowed(plan.chosen):
        fitted, own = fit_engine(deployed, rules, deployed.max_batch, deployed.draft_len)
        return fitted, own + knobs, [], "the engine takes what was planned"
    if profile is None:
        fitted, own = fit_engine(deployed, rules, deployed.max_batch, deployed.draft_len)
        return fitted, own + knobs, [], NOT_COMPUTED
    from planner.search.optimize import make_plan

    original = deployed
    again = make_plan(
        profile, plan.profile_sha256, plan.workload, objective=plan.objective, memory_cap_bytes=plan.memory_cap_bytes,
        price_per_hour=plan.price_per_hour, allowed=allowed,
    )  # fmt: skip
    deployed, knobs = from_plan(plan, asked, rules, again.chosen)
    fitted, own = fit_engine(deployed, rules, deployed.max_batch, deployed.draft_len)
    before, after = describe_choice(plan.chosen), describe_choice(again.chosen)
    own += [said for said in _lost(original, rules) if said.knob not in {k.knob for k in own}]
    own.insert(0, knob("choice", before, after, "approximated", f"planned again within what {rules.name} can be told"))
    row = _cost(plan.workload.batch, plan.workload.context_len, before, after, plan.speedup, again.speedup)
    return fitted, own + knobs, [row], f"each over plain decoding, by {plan.objective}, from the same profile"


def _from_schedule(
    schedule: Schedule, asked: AskedExport, rules: DraftRules, profile: Profile | ServingProfile | None
) -> tuple[Deployed, list[Knob], list[CostRow], str]:
    chosen = Chosen(schedule, asked, rules)
    serving = profile if isinstance(profile, ServingProfile) else None
    deployed, knobs = from_rows(chosen.rows, chosen, asked, rules, serving)
    known = deployed.method in rules.methods
    static = known and deployed.method not in rules.scheduled and deployed.scheduled
    load = chosen.last
    if static and asked.max_concurrency is None and rules.max_batch is None:
        raise BadInput(
            f"{rules.name} has one draft length for {deployed.method} at every load, and the schedule has several; declare the load with --max-concurrency N"
        )
    knobs = chosen.knobs + knobs
    lacking = static or (not deployed.off and (not known or _kv_lost(deployed, rules)))
    loads = _loads(profile, schedule, chosen, asked) if profile is not None and (lacking or rules.name == "planner") else None
    rows, cost, note = chosen.rows, [], "the engine takes what was planned"
    if lacking and loads is None:
        note = NOT_COMPUTED
    elif lacking:
        rows = _plan_again(loads, schedule, chosen, deployed, rules, static)
        cost = _compare(loads, schedule, chosen, rows)
        note = f"each over off, by {_compared_by(schedule)}, from the same profile; concurrency is what is offered"
        before, after = describe_choice(chosen.setting(load)), describe_choice(setting_at(rows, load))
        again = "" if before == after else f"planned again within what {rules.name} can be told"
        knobs += _lost(deployed, rules, chosen.setting(load).draft_len)
        knobs.append(knob("choice", f"{before} at {load}", f"{after} at {load}", "approximated" if again else "exact", again))
        deployed, _ = from_rows(rows, chosen, asked, rules, serving)
    fitted, own = fit_engine(deployed, rules, load, setting_at(rows, load).draft_len)
    if rules.name == "planner":
        fitted = fitted._replace(own=_own(fitted, chosen, loads, profile))
    return fitted, own + [said for said in knobs if said.knob not in {k.knob for k in own}], cost, note


NOT_COMPUTED = "what the engine lacks costs something that could not be computed without the profile; give --profile"


def _lost(deployed: Deployed, rules: DraftRules, draft_len: int | None = None) -> list[Knob]:
    """What the engine cannot be told of a deployment as it was planned."""
    if deployed.method not in rules.methods:
        return [knob("drafter", deployed.method, "another or none", "dropped", f"{rules.name} drafts with {', '.join(rules.methods)}")]
    _, knobs = fit_engine(deployed, rules, deployed.max_batch, deployed.draft_len if draft_len is None else draft_len)
    return [said for said in knobs if said.fidelity != "exact"]


def _allowed(rules: DraftRules) -> Callable[[DraftConfig], bool]:
    """Whether an engine can be told a configuration in full."""

    def allowed(config: DraftConfig) -> bool:
        drafter = config.drafter
        if rules.name == "planner" or not config.draft_len:
            return True
        if config.tree is not None and rules.no_tree:
            return False
        plain = drafter.weights == "full" and drafter.vocab is None and drafter.kind in rules.methods
        return plain and _kv_taken(config.kv, drafter.kind, rules)

    return allowed


def _kv_taken(kv: KVPolicy | None, method: str, rules: DraftRules) -> bool:
    if kv is None or isinstance(kv, FullKV) or rules.name == "planner":
        return True
    return method in rules.windowed and kv.selection == "window" and (kv.sink == 0 or method in rules.sinks)


def _kv_lost(deployed: Deployed, rules: DraftRules) -> bool:
    return not _kv_taken(deployed.kv, deployed.method, rules)


def _profile(path: str | Path, plan: Plan | Schedule) -> Profile | ServingProfile:
    """The profile that the plan was made from, and no other."""
    if fingerprint(path) != plan.profile_sha256:
        raise BadInput(
            f"the plan was made from a profile with sha256 {plan.profile_sha256[:12]}, and {path} has another; give that one, or plan again"
        )
    return load_any_profile(path)


def _loads(profile: Profile | ServingProfile, schedule: Schedule, chosen: Chosen, asked: AskedExport):
    if isinstance(profile, ServingProfile):
        return engine_loads(profile, schedule.tensor_parallel, schedule.output_len)
    workload = find_workload(profile, chosen.context_len, schedule.output_len, asked.temperature, None, None)
    return runtime_loads(profile, workload, (schedule.concurrency_from, chosen.last), schedule.memory_cap_bytes)


def _plan_again(loads, schedule: Schedule, chosen: Chosen, deployed: Deployed, rules: DraftRules, static: bool):
    """Rows of the same drafter or off that the engine can be told."""
    from planner.search.grid import Question
    from planner.search.schedule import make_schedule
    from planner.search.within import Within

    one = next((row.kv for row in chosen.rows if row.draft_len), None)  # a server has one budget

    def keep(setting: Setting) -> bool:
        if setting.drafter != chosen.name or deployed.method not in rules.methods or (static and setting.idle):
            return False
        taken = _kv_taken(setting.kv, deployed.method, rules)
        return taken and (setting.idle or setting.kv == (one if _kv_taken(one, deployed.method, rules) else None))

    span_ = (chosen.last, chosen.last) if static else (schedule.concurrency_from, chosen.last)
    price = None if schedule.price_per_hour is None else schedule.price_per_hour * schedule.tensor_parallel / 3600
    question = Question(*span_, [chosen.context_len], schedule.objective, *([schedule.goodput] if schedule.goodput else []))._replace(
        price_per_s=price
    )
    again = make_schedule(
        Within(loads, keep), question, model=schedule.model, system=schedule.system, source=schedule.source, profile_sha256=schedule.profile_sha256
    )
    own = next((deployment.schedule for deployment in again.deployments if deployment.drafter == chosen.name), None)
    return at_context(again.schedule if static or own is None else own, chosen.context_len)


def _compare(loads, schedule: Schedule, chosen: Chosen, rows) -> list[CostRow]:
    """What was planned and what is exported, at the loads where either begins and at the last."""
    from planner.search.loads import compare_with_off

    ends = sorted({row.concurrency_from for row in chosen.rows if row.concurrency_from <= chosen.last} | {chosen.last})
    places = {setting: i for i, setting in enumerate(loads.settings)}
    pairs = [(chosen.setting(at), setting_at(rows, at)) for at in ends]
    if unknown := next((setting for pair in pairs for setting in pair if setting not in places), None):
        raise BadInput(f"the profile knows no setting {describe_choice(unknown)}, which the schedule names; plan again")
    both = np.array([places[setting] for pair in pairs for setting in pair])
    at = np.repeat(ends, 2)
    found = compare_with_off(loads, both, at, np.full(len(at), chosen.context_len), _compared_by(schedule))
    return [
        _cost(end, chosen.context_len, *map(describe_choice, pair), found[2 * i].speedup, found[2 * i + 1].speedup)
        for i, (end, pair) in enumerate(zip(ends, pairs, strict=True))
    ]


def _compared_by(schedule: Schedule) -> Objective:
    return "throughput" if schedule.objective == "goodput" else schedule.objective


def _cost(concurrency: int, context_len: int, planned: str, exported: str, before: Interval, after: Interval) -> CostRow:
    return CostRow(
        concurrency=concurrency, context_len=context_len, planned=planned, exported=exported, planned_speedup=before, exported_speedup=after,
        loss=1 - after.value / before.value,
    )  # fmt: skip


def _own(fitted: Deployed, chosen: Chosen, loads, profile: Profile | ServingProfile | None) -> OwnRuntime:
    """How the own runtime runs the setting of the load: as profiled, or by the flags' word and its defaults."""
    if isinstance(profile, Profile):
        setting = Setting(drafter=OFF if fitted.off else chosen.name, draft_len=fitted.draft_len, kv=fitted.kv)
        config = loads.config(setting)
        return OwnRuntime(config, profile.dtype, profile.execution_mode, profile.weights, profile.rope_theta, profile.max_context_len)
    return OwnRuntime(own_config(fitted, fitted.draft_len), "bfloat16", "eager", "full", None, None)


def _is_schedule(path: str | Path) -> bool:
    return kind_of(read_bytes(path, "plan")) == "schedule"


def _check_folder(folder: Path) -> bool:
    """Whether an earlier export lies there; BadInput where something else does."""
    if not folder.exists() and not folder.is_symlink():
        if not folder.parent.is_dir():
            raise BadInput(f"the folder above the export must exist, {folder.parent} does not; create it or change -o")
        return False
    if not folder.is_dir():
        raise BadInput(f"an export is a folder, {folder} is a file; change -o")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return False
    about = folder / EXPORT_FILE
    if not (about.is_file() and kind_of(read_bytes(about, "export")) == "export"):
        raise BadInput(f"the folder must be new, empty or hold an earlier export, {folder} holds {names[0][:80]!r}; change -o")
    return True


def _write(folder: Path, files: dict[str, str], found: Export, earlier: bool) -> None:
    """Every file whole, plan.json last: a folder with it is complete."""
    try:
        folder.mkdir(exist_ok=True)
        if earlier:
            (folder / EXPORT_FILE).unlink()
            for name in {name for exporter in EXPORTERS.values() for name in exporter.files} | set(SCRIPTS):
                (folder / name).unlink(missing_ok=True)
        for name, text in files.items():
            write_whole(folder / name, text.encode("utf-8", errors="surrogateescape"))
        for name in files.keys() & set(SCRIPTS):
            (folder / name).chmod((folder / name).stat().st_mode | 0o111)
    except OSError as error:
        raise BadInput(f"cannot write the export {folder}: {error.strerror or error}; change -o") from None
    write_whole(folder / EXPORT_FILE, encode(found))
