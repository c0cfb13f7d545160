"""How many real runs does a study need? Trials until one is within 2 % of the best: ours, Optuna's TPE, and random order.

The evaluation is the time per token that the committed profile predicts, with noise of 1 % on each, over all of its
configurations: 55 of them for each context and temperature, plain decoding first. Medians over seeds. TPE proposes points
between the candidates, so the nearest one that was not run yet stands for its proposal. About two minutes.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import optuna
from common import report, wants_json

from planner.commands.sweep import coordinates
from planner.measurements import load_profile
from planner.search.objective import fit_models, predict
from planner.search.optimize import candidates
from planner.search.study import Evaluated, run_study
from planner.search.surrogate import NUM_RANDOM, features
from planner.specs import PLAIN, DraftConfig, Workload, describe_workload

PROFILE = Path(__file__).parents[1] / "profiles/intel-xeon-2-cores/smollm2-135m__self_sparse.json"
OUTPUT_LEN, NOISE, WITHIN, NUM_SEEDS = 128, 0.01, 0.02, 20


def spaces() -> dict[str, dict[DraftConfig, float]]:
    """Predicted seconds per token of every configuration, by workload."""
    profile = load_profile(PROFILE)
    models = fit_models(profile)
    workloads = [Workload(context_len=c, output_len=OUTPUT_LEN, sampler=s) for c in profile.contexts for s in profile.samplers]
    configs = [PLAIN, *candidates(models)]
    return {describe_workload(load): {config: predict(models, config, load).estimate.tpot_s.value for config in configs} for load in workloads}


class Found(Exception):
    pass


def trials_needed(tpot_s: dict[DraftConfig, float], search: Callable, seed: int) -> int:
    """Evaluations up to the first of a configuration that is in truth near the best."""
    noise = dict(zip(tpot_s, np.exp(np.random.default_rng(1000 + seed).normal(0, NOISE, len(tpot_s)))))
    ran = []

    def evaluate(config: DraftConfig) -> float:
        ran.append(config)
        if tpot_s[config] <= min(tpot_s.values()) * (1 + WITHIN):
            raise Found
        return tpot_s[config] * noise[config]

    with suppress(Found):
        search(list(tpot_s), evaluate, seed)
    return len(ran)


def ours(configs: list[DraftConfig], evaluate: Callable, seed: int) -> None:
    points = [coordinates(config) for config in configs]
    run_study(
        configs, lambda config: Evaluated(evaluate(config)), coordinates=points, num_trials=len(configs), seed=seed, identity={}, first=[PLAIN]
    )  # fmt: skip


def in_random_order(configs: list[DraftConfig], evaluate: Callable, seed: int) -> None:
    for index in [0, *(1 + np.random.default_rng(seed).permutation(len(configs) - 1))]:
        evaluate(configs[index])


def tpe(configs: list[DraftConfig], evaluate: Callable, seed: int) -> None:
    """Optuna's, told the candidates that were run; as many random ones at first as ours has, which serves it better than its ten."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    points = [coordinates(config) for config in configs]
    budgets, lengths = (sorted({point[name] for point in points if name in point}) for name in ("kv_budget", "draft_len"))
    choices = {name: sorted({point[name] for point in points if name in point}) for name in ("drafter", "selection")}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=NUM_RANDOM))
    choices = {name: values for name, values in choices.items() if len(values) > 1}
    left, index, first = list(range(len(configs))), 0, True
    while left:
        trial = study.ask({name: optuna.distributions.CategoricalDistribution(values) for name, values in choices.items()})
        point = dict(trial.params)
        point["kv_budget"] = trial.suggest_int("kv_budget", budgets[0], budgets[-1], log=True)
        point["draft_len"] = trial.suggest_int("draft_len", lengths[0], lengths[-1])
        if not first:  # plain decoding is
            both = features([*points, point])
            index = min(left, key=lambda i: float(np.square(both[i] - both[-1]).sum()))
        first = False
        left.remove(index)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        cost = evaluate(configs[index])
        study.add_trial(_as_trial(points[index], choices, budgets, lengths, cost))


def _as_trial(point: dict, choices: dict, budgets: list[int], lengths: list[int], cost: float):
    from optuna.distributions import CategoricalDistribution, IntDistribution

    space = {name: CategoricalDistribution(values) for name, values in choices.items()}
    space |= {"kv_budget": IntDistribution(budgets[0], budgets[-1], log=True), "draft_len": IntDistribution(lengths[0], lengths[-1])}
    return optuna.trial.create_trial(
        params={name: point[name] for name in space if name in point},
        distributions={name: space[name] for name in space if name in point},
        value=cost,
    )


def main() -> None:
    as_json = wants_json(__doc__)
    searches = {"ours": ours, "tpe": tpe, "random": in_random_order}
    rows, needed = [], {name: [] for name in searches}
    for load, tpot_s in spaces().items():
        near = sum(value <= min(tpot_s.values()) * (1 + WITHIN) for value in tpot_s.values())
        row = {"workload": load, "configurations": len(tpot_s), "within 2 %": near}
        for name, search in searches.items():
            counts = [trials_needed(tpot_s, search, seed) for seed in range(NUM_SEEDS)]
            needed[name] += counts
            row[name] = f"{np.median(counts):g}"
        rows.append(row)
    figures = {
        f"study/trials_{kind}/{name}": float(of(counts)) for name, counts in needed.items() for kind, of in (("median", np.median), ("mean", np.mean))
    }
    rows.append(
        {"workload": "mean of all", "configurations": "", "within 2 %": ""} | {name: f"{np.mean(counts):.1f}" for name, counts in needed.items()}
    )
    report(rows, figures, as_json)


if __name__ == "__main__":
    main()
