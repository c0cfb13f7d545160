"""Choose: every configuration that the profile can answer for, the best by expected objective under the memory cap.

The space is small (drafters x policies x budgets x draft_len, and for trees x sizes), so all of it is evaluated.
"""

import math
import shlex
from collections.abc import Callable

from msgspec.structs import replace

import planner
from planner.cost.adaptive_tree import adaptive_tree
from planner.errors import BadInput
from planner.exporters.contract import OwnRuntime
from planner.exporters.own_runtime import generate_words
from planner.measurements import Profile
from planner.plans import Estimate, Interval, Plan, Rejected, Tie
from planner.search.objective import Models, Prediction, difference, fit_models, objective_s, predict, refusal, text_share, with_speedup
from planner.specs import PLAIN, DraftConfig, FixedTree, Objective, Workload

NUM_RUNNERS_UP = 3
MAX_TIES = 5
LEAST_ADAPTIVE = 4  # nodes, below which there is nothing to adapt
NEGLIGIBLE = 0.01  # relative difference that nobody should spend a measurement on


def make_plan(
    profile: Profile,
    profile_sha256: str,
    workload: Workload,
    *,
    objective: Objective,
    memory_cap_bytes: int | None,
    price_per_hour: float | None = None,
    allowed: Callable[[DraftConfig], bool] = lambda config: True,
) -> Plan:
    """The best configuration of a profile for a workload, of those allowed. Off is a candidate like any other.

    BadInput if the profile does not cover the workload or nothing fits under the cap, plain decoding included.
    """
    models = fit_models(profile)
    baseline = predict(models, PLAIN, workload, price_per_hour)
    if reason := refusal(models, baseline, workload, memory_cap_bytes):
        raise BadInput(f"plain decoding alone {reason}; raise --memory-cap, shorten the context or use a smaller model")
    feasible, refused, unanswered = [baseline], [], []
    trees, treeless = tree_candidates(models, workload)
    for config in filter(allowed, [*candidates(models), *trees]):
        try:
            prediction = with_speedup(predict(models, config, workload, price_per_hour), baseline, objective)
        except BadInput as error:
            unanswered.append(Rejected(config=config, reason=str(error)))
            continue
        if reason := refusal(models, prediction, workload, memory_cap_bytes):
            refused.append(Rejected(config=config, reason=reason))
        else:
            feasible.append(prediction)
    if len(feasible) == 1 and unanswered and not refused:
        raise BadInput(unanswered[0].reason)  # not a single drafter was profiled for this workload
    rejected = refused + unanswered + treeless

    feasible.sort(key=lambda prediction: objective_s(prediction, objective))
    chosen = feasible[0]
    others = feasible[1:]
    speculative = next((p for p in feasible if p.estimate.config.draft_len > 0), None)
    return Plan(
        planner_version=planner.__version__,
        profile_sha256=profile_sha256,
        model=profile.model,
        target_fingerprint=profile.target_fingerprint,
        drafter_models=profile.drafter_models,
        device=profile.device.name,
        dtype=profile.dtype,
        execution_mode=profile.execution_mode,
        weights=profile.weights,
        tensor_parallel=profile.tensor_parallel,
        rope_theta=profile.rope_theta,
        max_context_len=profile.max_context_len,
        source=profile.source,
        workload=workload,
        objective=objective,
        price_per_hour=price_per_hour,
        memory_cap_bytes=memory_cap_bytes,
        chosen=chosen.estimate.config,
        estimate=chosen.estimate,
        baseline=baseline.estimate,
        speedup=chosen.estimate.speedup,
        break_even_tokens_per_round=speculative.estimate.round_s.value / baseline.estimate.tpot_s.value if speculative else 1.0,
        best_speculative=speculative.estimate.config if speculative else None,
        runners_up=_runners_up(chosen, [p for p in others if p is not baseline]),
        ties=find_ties(chosen, others, objective),
        rejected=rejected,
        by_draft_len=_by_draft_len(speculative, feasible),
        num_candidates=len(feasible) + len(rejected),
        latency_error=models.latency.error(workload.batch),
        latency_form=models.latency.form(workload.batch),
        seen_texts=sorted({f"{text.source}@{text.offset}+{text.extent}" for text in profile.texts}),
        command=command(profile, chosen.estimate.config, workload),
        notes=_notes(models, chosen),
    )


def candidates(models: Models) -> list[DraftConfig]:
    """Every speculative configuration that the profile measured, at every draft_len up to its longest."""
    longest = models.profile.max_draft_len
    return [
        DraftConfig(drafter=drafter, kv=kv, draft_len=draft_len)
        for drafter in models.acceptance.drafters
        for kv in models.acceptance.policies(drafter)
        for draft_len in range(1, min(longest, models.latency.max_draft_len.get(drafter, longest)) + 1)
    ]


def tree_candidates(models: Models, workload: Workload) -> tuple[list[DraftConfig], list[Rejected]]:
    """Every tree that the profile can answer for: of each size that was timed, and adaptive up to it; and the adaptive ones it cannot.

    The larger an adaptive tree may become, the more of it is built in vain, so how large is a choice as well.
    """
    found, unanswered = [], []
    for drafter, kv, draft_len, max_size in models.acceptance.trees:
        chain = DraftConfig(drafter=drafter, kv=kv, draft_len=draft_len)
        for size in (size for size in models.latency.tree_sizes(drafter, workload.batch) if size <= max_size):
            found.append(largest := replace(chain, tree=FixedTree(size=size)))
            if size < LEAST_ADAPTIVE:
                continue
            try:
                found.append(replace(chain, tree=adaptive_tree(models.acceptance, models.latency, largest, workload)))
            except BadInput as error:
                unanswered.append(Rejected(config=largest, reason=f"no adaptive tree: {error}"))
    return found, unanswered


def _runners_up(chosen: Prediction, others: list[Prediction]) -> list[Estimate]:
    """The next best, best first; the best chain, fixed tree and adaptive tree are among them, so that a check compares those."""
    kinds = {type(chosen.estimate.config.tree)}
    firsts = [p for p in others if type(p.estimate.config.tree) not in kinds and not kinds.add(type(p.estimate.config.tree))]
    rest = [p for p in others if p not in firsts]
    taken = (firsts + rest)[:NUM_RUNNERS_UP]
    return [p.estimate for p in others if p in taken]


def find_ties(chosen: Prediction, others: list[Prediction], objective: Objective) -> list[Tie]:
    """The configurations that cannot be told from the choice at 90 %: off first, then the nearest."""
    ties = []
    for other in others:
        gap = difference(other, chosen, objective)
        if gap.low > 0:
            continue
        ties.append(
            Tie(
                config=other.estimate.config,
                difference=gap,
                cost_of_being_wrong=max(0.0, 1 / (1 + gap.low) - 1),
                settle=_what_settles(chosen, other, gap),
            )
        )
    plain = [tie for tie in ties if tie.config == PLAIN]
    return [*plain, *(tie for tie in ties if tie.config != PLAIN)][:MAX_TIES]  # that it may not pay at all comes first


def _by_draft_len(best: Prediction | None, feasible: list[Prediction]) -> list[Estimate]:
    """What the best speculative drafter and policy do at each draft_len, as chains."""
    if best is None:
        return []
    own = best.estimate.config
    alike = [p.estimate for p in feasible if (p.estimate.config.drafter, p.estimate.config.kv, p.estimate.config.tree) == (own.drafter, own.kv, None)]
    return sorted((estimate for estimate in alike if estimate.config.draft_len), key=lambda estimate: estimate.config.draft_len)


def _what_settles(chosen: Prediction, other: Prediction, gap: Interval) -> str:
    """The measurement that would tell two configurations apart, or that none is worth it."""
    half = (gap.high - gap.low) / 2
    if half < NEGLIGIBLE:
        return f"nothing: they differ by less than {NEGLIGIBLE:.0%}, take either"
    if text_share(other, chosen) > 0.5:
        num_texts = max(chosen.estimate.num_texts, other.estimate.num_texts)
        needed = num_texts * (half / max(abs(gap.value), NEGLIGIBLE)) ** 2
        return f"profile about {max(num_texts + 1, math.ceil(needed))} texts instead of {num_texts} (--texts)"
    return "run them (planner check PLAN --epsilon 3%): the fit of round times is not certain enough to tell"


def command(profile: Profile, config: DraftConfig, workload: Workload) -> str:
    """The line to paste: the own runtime with the chosen setting."""
    own = OwnRuntime(config, profile.dtype, profile.execution_mode, profile.weights, profile.rope_theta, profile.max_context_len)
    usual = "native" if profile.device.kind == "cpu" else "eager"
    words = generate_words(
        profile.model, own, workload.sampler, workload.output_len, tensor_parallel=profile.tensor_parallel, usual_execution=usual
    )  # fmt: skip
    return shlex.join([*words, "--prompt-file", "PROMPT.txt"])


def _notes(models: Models, chosen: Prediction) -> list[str]:
    profile = models.profile
    notes = list(chosen.estimate.notes) + list(profile.warnings)
    if models.latency.unsteadiness > 0.05:
        notes.append(
            f"the machine's pace varied by {models.latency.unsteadiness:.0%} during the profile: times include it, speedups do not; "
            "measure on an idle machine for narrower times"
        )
    if profile.source != "own runtime":
        notes.append(f"latency was measured with {profile.source}: acceptance carries over to other engines, latency does not")
    return notes
