"""planner plan and planner estimate: from a Profile and a workload to numbers. Does not need torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from planner.errors import BadInput
from planner.measurements import Profile, fingerprint, load_profile
from planner.plans import Estimate, Plan
from planner.specs import (
    MAX_PRICE,
    OBJECTIVES,
    PLAIN,
    DraftConfig,
    DrafterSpec,
    FullKV,
    Objective,
    Sampler,
    SparseKV,
    Weights,
    Workload,
    checked,
    describe_drafter,
    describe_sampler,
)


def plan(
    profile_path: str | Path,
    *,
    context_len: int | None = None,
    output_len: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    batch: int = 1,
    memory_cap_bytes: int | None = None,
    objective: Objective = "e2e",
    price_per_hour: float | None = None,
) -> Plan:
    """The configuration to run, with intervals, ties and refusals. What is left out takes the profile's only value.

    batch           streams that run side by side, all the time: the running batch, not what is offered
    price_per_hour  of the device, in any currency; what objective price needs
    """
    from planner.search.optimize import make_plan

    _check_objective(objective, price_per_hour)
    profile = load_profile(profile_path)
    workload = find_workload(profile, context_len, output_len, temperature, top_p, top_k, batch)
    return make_plan(
        profile, fingerprint(profile_path), workload, objective=objective, memory_cap_bytes=memory_cap_bytes, price_per_hour=price_per_hour
    )


def estimate(
    profile_path: str | Path,
    *,
    drafter: str,
    drafter_weights: Weights | None = None,
    drafter_vocab: int | None = None,
    kv_budget: int | None = None,
    selection: str | None = None,
    draft_len: int = 0,
    context_len: int | None = None,
    output_len: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    batch: int = 1,
    objective: Objective = "e2e",
    price_per_hour: float | None = None,
) -> tuple[Estimate, Estimate]:
    """One configuration of the caller's choosing, and plain decoding beside it."""
    from planner.search.objective import fit_models, predict, with_speedup

    _check_objective(objective, price_per_hour)
    profile = load_profile(profile_path)
    workload = find_workload(profile, context_len, output_len, temperature, top_p, top_k, batch)
    models = fit_models(profile)
    profiled = [sample for sample in profile.acceptance if sample.drafter.kind == drafter]
    config = make_config(
        drafter, kv_budget, selection, draft_len, weights=drafter_weights, vocab=drafter_vocab,
        like=[DraftConfig(drafter=sample.drafter, kv=sample.kv, draft_len=1) for sample in profiled],
    )  # fmt: skip
    baseline = predict(models, PLAIN, workload, price_per_hour)
    return with_speedup(predict(models, config, workload, price_per_hour), baseline, objective).estimate, baseline.estimate


def make_config(
    drafter: str, kv_budget: int | None, selection: str | None, draft_len: int, *, weights: str | None = None, vocab: int | None = None,
    sink: int | None = None, recent: int | None = None, like: Sequence[DraftConfig] = (),
) -> DraftConfig:  # fmt: skip
    """A configuration from flags. What was profiled, `like`, gives the defaults of weights, vocabulary, selection, sink and recent window."""
    asked = make_drafter_spec(drafter, weights or "full", vocab)
    variants = list(dict.fromkeys(c.drafter for c in like if weights in (None, c.drafter.weights) and vocab in (None, c.drafter.vocab)))
    if len(variants) > 1:
        names = "; ".join(describe_drafter(variant) for variant in variants)
        raise BadInput(f"the profile holds several drafters ({names}); choose one with --drafter-weights and --drafter-vocab")
    kv = FullKV()
    if drafter == "self_sparse":
        if kv_budget is None:
            raise BadInput("drafter self_sparse needs --kv-budget, the tokens it attends to")
        known = [config.kv for config in like if selection in (None, config.kv.selection)]
        selections = list(dict.fromkeys(policy.selection for policy in known))
        if selection is None and len(selections) > 1:
            raise BadInput(f"the profile holds selections {', '.join(selections)}; choose one with --selection")
        if selection not in (None, "window", "chunk"):
            raise BadInput(f"a selection is window or chunk, got {selection!r}")
        base = known[0] if known else SparseKV(budget=2**20, selection=selection or "window")
        kv = sparse(kv_budget, base.selection, sink=base.sink if sink is None else sink, recent=base.recent if recent is None else recent)
    elif kv_budget is not None or selection is not None:
        raise BadInput(f"--kv-budget and --selection go with drafter self_sparse, got drafter {drafter}")
    try:
        return checked(DraftConfig(drafter=variants[0] if variants else asked, kv=kv, draft_len=draft_len))
    except ValueError as error:
        raise BadInput(str(error)) from None


def make_drafter_spec(kind: str, weights: str, vocab: int | None) -> DrafterSpec:
    """A drafter, its own rules turned into BadInput."""
    if kind not in ("none", "ngram", "self_sparse"):
        raise BadInput(f"a drafter is none, ngram or self_sparse, got {kind!r}")
    if weights not in get_args(Weights):
        raise BadInput(f"weights of a drafter are one of {', '.join(get_args(Weights))}, got {weights!r}")
    try:
        return checked(DrafterSpec(kind=kind, weights=weights, vocab=vocab))
    except ValueError as error:
        raise BadInput(str(error)) from None


def sparse(budget: int, selection: str, *, sink: int, recent: int) -> SparseKV:
    """A policy, its own rules turned into BadInput."""
    try:
        return checked(SparseKV(budget=budget, sink=sink, recent=recent, selection=selection))
    except ValueError as error:
        raise BadInput(str(error)) from None


def find_workload(
    profile: Profile,
    context_len: int | None,
    output_len: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    batch: int = 1,
) -> Workload:
    """What was asked for, filled up with the profile's only values; BadInput lists them where there are several."""
    if context_len is None:
        context_len = _only(profile.contexts, "--isl", [str(c) for c in profile.contexts])
    if output_len is None:
        output_len = max(text.output_len for text in profile.texts) if profile.texts else 128
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    matching = [s for s in profile.samplers if all(value is None or getattr(s, name) == value for name, value in given.items())]
    if matching:
        sampler = _only(matching, "--temperature, --top-p, --top-k", [describe_sampler(s) for s in matching])
    else:
        sampler = checked(Sampler(**{name: value for name, value in given.items() if value is not None}))
    return checked(Workload(context_len=context_len, output_len=output_len, sampler=sampler, batch=batch))


def _check_objective(objective: str, price_per_hour: float | None) -> None:
    if objective not in OBJECTIVES:
        raise BadInput(f"an objective is one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if price_per_hour is not None and not 0 < price_per_hour <= MAX_PRICE:  # not NaN either
        raise BadInput(
            f"a price per device-hour must be positive and at most {MAX_PRICE:.0e}, got {price_per_hour:g}; give for example --price-per-hour 2.5"
        )
    if objective == "price" and price_per_hour is None:
        raise BadInput("objective price needs the price of a device-hour, got none; give --price-per-hour, or choose --objective e2e")


def _only(values: list, flag: str, names: list[str]):
    if len(values) == 1:
        return values[0]
    raise BadInput(f"the profile holds several values ({'; '.join(names)}); choose one with {flag}")
