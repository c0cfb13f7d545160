"""planner plan and planner estimate: from a Profile and a workload to numbers. Does not need torch."""

from pathlib import Path

from planner.commands.configs import make_config, valid
from planner.commands.flags import Asked
from planner.commands.trees import sized_for
from planner.errors import BadInput
from planner.measurements import Profile, fingerprint, load_profile
from planner.plans import Estimate, Plan
from planner.specs import (
    MAX_PRICE,
    OBJECTIVES,
    PLAIN,
    Objective,
    Sampler,
    Workload,
    checked,
    describe_sampler,
)  # fmt: skip


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

    _check_single(objective)
    check_objective(objective, price_per_hour)
    profile = load_profile(profile_path)
    workload = find_workload(profile, context_len, output_len, temperature, top_p, top_k, batch)
    return make_plan(
        profile, fingerprint(profile_path), workload, objective=objective, memory_cap_bytes=memory_cap_bytes, price_per_hour=price_per_hour
    )


def estimate(
    profile_path: str | Path,
    asked: Asked,
    *,
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

    _check_single(objective)
    check_objective(objective, price_per_hour)
    profile = load_profile(profile_path)
    workload = find_workload(profile, context_len, output_len, temperature, top_p, top_k, batch)
    models = fit_models(profile)
    config = make_config(asked, list(dict.fromkeys((sample.drafter, sample.kv) for sample in profile.acceptance)))
    config = sized_for(models, config, asked, workload)
    baseline = predict(models, PLAIN, workload, price_per_hour)
    return with_speedup(predict(models, config, workload, price_per_hour), baseline, objective).estimate, baseline.estimate


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
        sampler = valid(Sampler, **{name: value for name, value in given.items() if value is not None})
    return checked(Workload(context_len=context_len, output_len=output_len, sampler=sampler, batch=batch))


def _check_single(objective: str) -> None:
    if objective == "goodput":
        raise BadInput("goodput depends on the load, and a plan is for one; give a range such as --max-concurrency 1..8 with --goodput tpot:50")


def check_objective(objective: str, price_per_hour: float | None) -> None:
    if objective not in OBJECTIVES:
        known = ", ".join(f"{name} ({words})" for name, words in OBJECTIVES.items())
        raise BadInput(f"an objective is one of {known}, got {objective!r}")
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
