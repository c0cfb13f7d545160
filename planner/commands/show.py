"""planner show: a document of any kind, and what its page is made of. Does not need torch."""

import math
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np

from planner.commands.import_bench import summarise
from planner.documents import Document, kind_of, load_document
from planner.errors import BadInput
from planner.files import check_writable
from planner.measurements import Profile, RoundSample, fingerprint, load_profile
from planner.plans import Check, Interval, Plan, Sweep
from planner.serving import ServingProfile, Summary
from planner.shown import AcceptanceCurve, RoundCurve, Shown, SpeedupMap
from planner.specs import DraftConfig, FixedTree, SparseKV, Workload

Z90 = 1.645  # of a normal's central 90 %


def show(path: str | Path, out: str | Path, *, profile_path: str | Path | None = None, measured_path: str | Path | None = None) -> None:
    """Write a document's page: one self-contained HTML file. The arguments are those of `gather`."""
    from planner.report.show import write_page

    check_writable(out)
    write_page(gather(path, profile_path=profile_path, measured_path=measured_path), out)


def reported(document: Document, path: str | Path) -> Document | Summary:
    """What stands for a document in a report."""
    return summarise(document, path) if isinstance(document, ServingProfile) else document


def gather(path: str | Path, *, profile_path: str | Path | None = None, measured_path: str | Path | None = None) -> Shown:
    """What a page of a document shows: the document, and what follows from it.

    profile_path   of a plan: its profile, for the map of all configurations, the fits and the front
    measured_path  of a plan: a check of it, or a sweep of its workload, measured beside predicted
    """
    document = load_document(path)
    if not isinstance(document, Plan) and (profile_path is not None or measured_path is not None):
        raise BadInput(f"--profile and --measured belong to a plan, got a {kind_of(document).name}; show the plan, or drop them")
    found = Shown(document, reported(document, path), Path(path), fingerprint(path))
    match document:
        case Profile():
            return _of_profile(found, document)
        case ServingProfile():
            return _of_serving(found)
        case Plan():
            return _of_plan(found, document, profile_path, measured_path)
    return found


def _of_profile(found: Shown, profile: Profile) -> Shown:
    """A plan by time per token for each context and sampler that was measured."""
    from planner.search.objective import fit_models
    from planner.search.optimize import make_plan

    plans, maps = [], []
    found = found._replace(profile=profile, acceptance=_acceptance(profile))
    try:
        models = fit_models(profile)
        for sampler in profile.samplers:
            for context_len in profile.contexts:
                written = [text.output_len for text in profile.texts if (text.context_len, text.sampler) == (context_len, sampler)]
                workload = Workload(context_len=context_len, output_len=max(written, default=128), sampler=sampler)
                plans.append(make_plan(profile, found.sha256, workload, objective="tpot", memory_cap_bytes=None))
                maps.append(_map(models, plans[-1]))
        return found._replace(plans=plans, maps=maps, rounds=_rounds(models))
    except BadInput as error:
        return found._replace(plans=plans, maps=maps, refused=str(error))


def _of_serving(found: Shown) -> Shown:
    from planner.commands.schedule import schedule

    try:
        return found._replace(schedule=schedule(found.path, objective="throughput"))
    except BadInput as error:
        return found._replace(refused=str(error))


def _of_plan(found: Shown, plan: Plan, profile_path: str | Path | None, measured_path: str | Path | None) -> Shown:
    from planner.search.objective import fit_models

    if profile_path is None:
        named = {estimate.config: estimate for estimate in [plan.estimate, *plan.runners_up, *plan.by_draft_len]}
        estimates = [estimate for config, estimate in named.items() if config.draft_len > 0]
        ties = [tie.config for tie in plan.ties]
        maps = [SpeedupMap(plan.workload, plan.objective, estimates, plan.baseline, plan.chosen, ties, plan.memory_cap_bytes)]
        found = found._replace(maps=maps)
    else:
        if (sha256 := fingerprint(profile_path)) != plan.profile_sha256:
            raise BadInput(
                f"the plan was made from the profile with sha256 {plan.profile_sha256[:12]}, {profile_path} has {sha256[:12]}; give that one"
            )
        profile = load_profile(profile_path)
        models = fit_models(profile)
        about = plan.workload
        acceptance = [curve for curve in _acceptance(profile) if curve.sampler == about.sampler]
        rounds = [curve for curve in _rounds(models) if curve.batch == about.batch]
        found = found._replace(profile=profile, maps=[_map(models, plan)], acceptance=acceptance, rounds=rounds)
    if measured_path is None:
        return found
    measured = load_document(measured_path)
    if not isinstance(measured, Check | Sweep):
        raise BadInput(f"--measured takes a check or a sweep, {measured_path} is a {kind_of(measured).name}")
    if isinstance(measured, Check) and measured.plan_sha256 != found.sha256:
        raise BadInput(f"{measured_path} checked the plan with sha256 {measured.plan_sha256[:12]}, this one has {found.sha256[:12]}; check this plan")
    if isinstance(measured, Sweep) and measured.workload != plan.workload:
        raise BadInput(f"{measured_path} is a sweep of another workload than the plan's; sweep with its --isl, --osl and sampler")
    return found._replace(measured=measured)


def _map(models, plan: Plan) -> SpeedupMap:
    """Every configuration that can be predicted, whether or not it fits under the cap."""
    from planner.search.objective import predict, with_speedup
    from planner.search.optimize import candidates
    from planner.specs import PLAIN

    baseline = predict(models, PLAIN, plan.workload, plan.price_per_hour)
    estimates = []
    for config in candidates(models):
        try:
            estimates.append(with_speedup(predict(models, config, plan.workload, plan.price_per_hour), baseline, plan.objective).estimate)
        except BadInput:
            continue  # stands among the plan's refusals
    ties = [tie.config for tie in plan.ties]
    return SpeedupMap(plan.workload, plan.objective, estimates, baseline.estimate, plan.chosen, ties, plan.memory_cap_bytes)


def _rounds(models) -> list[RoundCurve]:
    """The fit through every timed drafter and policy, chains and trees, with the cells it was fitted to."""
    latency, cells = models.latency, defaultdict(list)
    for sample in models.profile.rounds:
        if sample.role == "cell":
            levels = sample.draft_len if sample.tree_size else 0
            cells[sample.drafter, sample.kv, sample.context_len, sample.batch, levels].append(sample)
    curves = []
    for (drafter, kv, context_len, batch, levels), samples in cells.items():
        longest = max(sample.tree_size if levels else sample.draft_len for sample in samples)
        position = float(np.mean([np.mean(sample.position) for sample in samples]))
        config = DraftConfig(drafter=drafter, kv=kv, draft_len=levels or longest, tree=FixedTree(size=longest) if levels else None)
        try:
            seconds = latency.round_s(config, context_len, position, batch)  # [1 + J, longest + 1]
            error = latency.error(batch, drafter if levels else None)
        except BadInput:
            continue  # a batch at which plain decoding failed
        measured = [point for sample in samples for point in _by_drafted(sample)]
        lengths = range(min(k for k, _ in measured), longest + 1)
        predicted = [(k, _with_width(seconds[0, k], seconds[1:, k], error)) for k in lengths]
        curves.append(RoundCurve(drafter, kv, context_len, batch, predicted, sorted(measured), levels))
    return curves


def _by_drafted(sample: RoundSample) -> list[tuple[int, float]]:
    """Median round by how much was drafted in it: a drafter may find less than its draft_len."""
    drafted = np.array(sample.drafted)
    return [(int(k), float(np.median(sample.round_s[drafted == k]))) for k in np.unique(drafted)]


def _with_width(value: float, left_out: np.ndarray, error: float) -> Interval:
    """A round in a cell that was not measured: what leaving cells out moves, and the fit's error."""
    J = len(left_out)
    moved = (J - 1) / J * float(np.square(left_out - left_out.mean()).sum()) if J > 1 else 0.0
    factor = math.exp(Z90 * math.sqrt(moved / value**2 + error**2))
    return Interval(value=float(value), low=float(value / factor), high=float(value * factor))


def _acceptance(profile: Profile) -> list[AcceptanceCurve]:
    """P(first draft is accepted) where one was drafted, text by text."""
    from planner.search.compare import mean_interval

    curves: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    for sample in profile.acceptance:
        text, kv = profile.texts[sample.text], sample.kv
        drafts = sample.drafted.unpack() > 0
        if drafts.any():
            family = msgspec.structs.replace(kv, budget=2**30) if isinstance(kv, SparseKV) else kv
            budget = kv.budget if isinstance(kv, SparseKV) else None
            first = float(sample.accept_prob.unpack()[drafts, 0].mean() / 255)
            curves[text.context_len, text.sampler, sample.drafter, family][budget].append(first)
    return [
        AcceptanceCurve(drafter, kv, context_len, sampler, [(budget, _share(mean_interval(values))) for budget, values in by_budget.items()])
        for (context_len, sampler, drafter, kv), by_budget in curves.items()
    ]


def _share(mean: Interval) -> Interval:
    """Cut at 0 and 1, where no share can lie."""
    return Interval(value=mean.value, low=max(0.0, mean.low), high=min(1.0, mean.high))
