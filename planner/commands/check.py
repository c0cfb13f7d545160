"""planner check: run a plan for real, its choice beside plain decoding and the runners-up."""

import time
from collections.abc import Sequence
from pathlib import Path

import planner
from planner.commands.groups import shared_moments, whole_groups
from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, check_drafters, load_drafters, open_session
from planner.errors import BadInput
from planner.measurements import fingerprint
from planner.plans import (
    PER_MILLION_TOKENS,
    Check,
    CheckCell,
    Estimate,
    Plan,
    Trial,
    load_plan,
    mean_round_s,
    tokens_per_round,
)
from planner.specs import PLAIN, DraftConfig, describe

TOLERANCE = 0.05  # a check passes unless the choice is shown to be worse than this
MACHINE_SHIFT = 0.05  # of plain decoding against the profile, beyond which absolute times say little
EPSILON_TEXTS = 4  # texts between two looks of an elimination
MAX_EPSILON_TEXTS = 64


def check(
    plan_path: str | Path,
    dataset: Sequence[str],
    *,
    num_texts: int = 8,
    epsilon: float | None = None,
    device: str | None = None,
    seed: int = 1,
    progress: Progress = Silent(),
) -> Check:
    """Run the plan's choice, plain decoding and the runners-up on texts that the profile did not see.

    A plan for a batch is run in groups of as many texts side by side; num_texts is rounded up to whole groups.
    """
    plan = load_plan(plan_path)
    session = open_session(
        plan.model, dtype=plan.dtype, device=device, execution=plan.execution_mode, weights=plan.weights, rope_theta=plan.rope_theta,
        max_context_len=plan.max_context_len,
    )  # fmt: skip
    return run_check(session, plan, fingerprint(plan_path), dataset, num_texts=num_texts, epsilon=epsilon, seed=seed, progress=progress)


def run_check(
    session: Session, plan: Plan, plan_sha256: str, dataset: Sequence[str], *, num_texts: int, epsilon: float | None, seed: int, progress: Progress
) -> Check:  # fmt: skip
    """The same with a model that is already loaded."""
    from planner.datasets import expand
    from planner.machine import complaints
    from planner.profiler.device import read_environment
    from planner.profiler.energy import open_counter
    from planner.profiler.texts import draw_prompts
    from planner.profiler.trial import run_trials
    from planner.search.compare import objective_by_text, tied_within

    if session.model.fingerprint != plan.target_fingerprint:
        raise BadInput(
            f"a plan is checked on the model it was made for ({plan.target_fingerprint}), this one is {session.model.fingerprint}; profile this model"
        )
    if session.ranks.size != plan.tensor_parallel:
        raise BadInput(
            f"a plan is checked on as many devices as it was made for ({plan.tensor_parallel}), got {session.ranks.size}; "
            f"use torchrun --nproc-per-node {plan.tensor_parallel} -m planner.cli check, or profile again"
        )
    arms = _arms(plan)
    drafters = [config.drafter for config in arms]
    load_drafters(session, drafters)
    check_drafters(session, [own for own in plan.drafter_models if own.drafter in drafters])
    if num_texts < 2:
        raise BadInput(f"a paired comparison needs at least 2 texts, got {num_texts}; raise --texts")
    began = time.perf_counter()
    environment = read_environment(session.model.device)
    workload = plan.workload
    num_texts, more = whole_groups(num_texts, workload.batch), whole_groups(EPSILON_TEXTS, workload.batch)
    total = num_texts if epsilon is None else max(num_texts, whole_groups(MAX_EPSILON_TEXTS, workload.batch))
    files = expand(list(dataset))
    try:
        prompts = draw_prompts(session.tokenizer, files, length=workload.context_len, count=total, seed=seed, seen=plan.seen_texts)
    except BadInput:
        if epsilon is None:
            raise
        total = num_texts  # as many as asked for must be there; more are welcome
        prompts = draw_prompts(session.tokenizer, files, length=workload.context_len, count=total, seed=seed, seen=plan.seen_texts)
    progress.stage("check", num_texts * len(arms))
    trials: list[Trial] = []
    racing, done, shown = set(arms), 0, None
    looks = 1 + max(0, len(prompts) - num_texts) // more
    while done < len(prompts):
        step = num_texts if done == 0 else more
        running = [config for config in arms if config in racing or config == plan.chosen]
        if done:
            progress.stage("telling the tied ones apart", step * len(running))
        with open_counter(session.model.device, session.ranks.size) as (counter, _):
            for trial in run_trials(
                session.model, prompts[done : done + step], running, workload.sampler, output_len=workload.output_len,
                stop_tokens=session.tokenizer.stop_tokens, seed=seed + done, batch=workload.batch, warm=done == 0, counter=counter,
            ):  # fmt: skip
                trials.append(trial)
                progress.advance()
        done += step
        if epsilon is None:
            break
        racing, shown = session.ranks.first(
            lambda: tied_within(objective_by_text(trials, plan.objective), plan.chosen, epsilon, looks), tuple[set[DraftConfig], bool | None]
        )
        if shown is not None:
            break
    warnings = complaints(environment) + shared_moments(workload.batch, done)
    minutes = (time.perf_counter() - began) / 60
    return session.ranks.first(lambda: _report(plan, plan_sha256, arms, trials, environment, warnings, minutes, epsilon, shown), Check)


def _arms(plan: Plan) -> list[DraftConfig]:
    return list(dict.fromkeys([plan.chosen, PLAIN, *(estimate.config for estimate in plan.runners_up)]))


def _report(plan: Plan, plan_sha256, arms, trials, environment, warnings, minutes, epsilon, shown) -> Check:
    from planner.search.compare import best_of, expected_tokens_per_round, mean_interval, objective_by_text, paired_ratio, regret

    table = objective_by_text(trials, plan.objective)
    predicted = {estimate.config: estimate for estimate in [plan.estimate, plan.baseline, *plan.runners_up]}
    cells = []
    for config in arms:
        own = [trial for trial in trials if trial.config == config]
        estimate: Estimate = predicted[config]
        joules = [trial.decode_joules / (trial.output_len - 1) for trial in own if trial.decode_joules and trial.output_len > 1]
        rounds_per_token = 1 / estimate.tokens_per_round.value
        cells.append(
            CheckCell(
                config=config,
                role="chosen" if config == plan.chosen else "baseline" if config == PLAIN else "runner_up",
                predicted=estimate,
                measured_tpot_s=mean_interval([trial.tpot_s for trial in own]),
                measured_e2e_s=mean_interval([trial.e2e_s for trial in own]),
                measured_price_per_million_tokens=None
                if plan.price_per_hour is None
                else mean_interval([trial.device_s_per_token for trial in own]).scaled(plan.price_per_hour * PER_MILLION_TOKENS),
                measured_joules_per_token=mean_interval(joules) if joules else None,
                measured_round_s=mean_round_s(own),
                measured_tokens_per_round=tokens_per_round(own),
                expected_tokens_per_round=expected_tokens_per_round(rounds_per_token, estimate.sd_rounds_per_token, estimate.num_texts, len(own)),
                measured_memory_bytes=max(trial.peak_bytes for trial in own),
                cost_over_choice=paired_ratio(table[config], table[plan.chosen]),
                trials=own,
            )
        )
    found, best = regret(table, plan.chosen), best_of(table)
    plain = next(cell for cell in cells if cell.config == PLAIN)
    shift = plain.measured_tpot_s.value / plain.predicted.tpot_s.value - 1
    if abs(shift) > MACHINE_SHIFT:
        warnings = [
            *warnings,
            f"plain decoding took {shift:+.0%} against the profile: the machine has changed since; compare ratios, or profile again",
        ]
    num_texts = len({trial.text for trial in trials})
    passed = found.low <= TOLERANCE if epsilon is None else shown is True
    return Check(
        planner_version=planner.__version__,
        plan_sha256=plan_sha256,
        environment=environment,
        objective=plan.objective,
        num_texts=num_texts,
        cells=cells,
        best=best,
        regret=found,
        passed=passed,
        verdict=_verdict(plan, best, found, passed, epsilon, shown, num_texts),
        minutes=minutes,
        warnings=warnings,
    )


def _verdict(plan: Plan, best: DraftConfig, found, passed: bool, epsilon: float | None, shown: bool | None, num_texts: int) -> str:
    choice = describe(plan.chosen)
    if epsilon is not None:
        if shown:
            return f"{choice} is within {epsilon:.1%} of the best of those run, at 95 %, after {num_texts} texts"
        if shown is False:
            return f"{choice} is worse than {describe(best)} by more than {epsilon:.1%}, at 95 %: run {describe(best)}, and profile again"
        half = max(found.high - found.value, 1e-9)
        needed = int(num_texts * (half / max(epsilon - max(found.value, 0), epsilon / 10)) ** 2) + 1
        return f"not settled: {num_texts} texts leave a regret of up to {found.high:.1%}; about {needed} unseen texts would tell (add files to --dataset, or allow a larger --epsilon)"
    if best == plan.chosen:
        return f"{choice} was the best of those run"
    if not passed:
        return f"{choice} was worse than {describe(best)} by at least {found.low:.1%}: run {describe(best)}, and profile again (has the machine changed?)"
    told = "cannot be told apart" if found.low <= 0 else f"a difference of {found.value:.1%} is within the tolerance of {TOLERANCE:.0%}"
    return f"{describe(best)} was the best of those run; {choice} and it: {told}"
