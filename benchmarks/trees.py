"""Is an adaptive draft tree worth its name, and does the planner choose rightly between chains and trees?

SmolLM2-135M, OUTPUT_LEN tokens behind prompts that the profile did not see and that no shipped drafter was trained on. By
context and temperature the plan's profile names the arms: the best chain, of one drafter the best tree of each size and the
adaptive one (by --family, or the drafter of the best tree), and what the planner chooses among all. They and plain decoding
follow each other on every text, each text beginning with another arm. At temperature 0 only texts whose plain continuation
has distinct 4-grams of at least MIN_DISTINCT are taken, and what the profile says of others is left out: repetition flatters
every drafter, n-gram most.
Ratios are paired over texts, intervals 90 %; the best fixed size is picked from the same numbers, which flatters it.
The profile is made first, about 18 minutes on two idle cores, and kept (--profile); the rest takes about 20.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import held_out, make_parser, progress, report_tables
from continuations import continuations
from msgspec.structs import replace

import planner
from planner.commands.session import Session, load_drafters, open_session
from planner.errors import BadInput
from planner.files import remove_journal
from planner.measurements import Profile, fingerprint
from planner.plans import Trial
from planner.profiler.texts import Prompt, draw_prompts
from planner.profiler.trial import run_trials
from planner.search.compare import objective_by_text, paired_ratio
from planner.search.objective import Models, fit_models, predict
from planner.search.optimize import candidates, make_plan, tree_candidates
from planner.specs import PLAIN, AdaptiveTree, DraftConfig, DrafterSpec, Sampler, SparseKV, Workload, describe

CONTEXTS, TEMPERATURES, SIZES = [2048, 4096], [0.0, 0.7, 1.0], [8, 16, 32, 64]
OUTPUT_LEN, NUM_TEXTS, MIN_DISTINCT, SEED = 96, 8, 0.6, 1
CHEAP = {"weights": "int8", "vocab": 16384}  # a draft step is mostly its head
SETTINGS = planner.Settings(
    contexts=CONTEXTS, samplers=[Sampler(temperature=temperature) for temperature in TEMPERATURES],
    policies=[SparseKV(budget=budget, selection="window", storage="evict") for budget in (512, 1024)],
    drafters=[
        DrafterSpec(kind="self_sparse", **CHEAP), DrafterSpec(kind="ngram"), DrafterSpec(kind="draft_model", path="smollm2-multi-view", **CHEAP),
        DrafterSpec(kind="dflash", path="smollm2-dflash", **CHEAP),
    ],
    max_draft_len=7, num_texts=10, output_len=OUTPUT_LEN, tree_sizes=SIZES, tree_levels=[2, 4, 7],
)  # fmt: skip


class Arm(NamedTuple):
    config: DraftConfig
    predicted_s: float  # per token


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", type=Path, default=Path("trees.profile.json"), help="where the profile is, or is made (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS, help="per context and temperature")
    parser.add_argument("--family", help="kind of the drafter whose trees are compared, such as dflash; default: that of the best tree")
    parser.add_argument("--arms", help="only these, such as plain,chain,tree_8,adaptive; default: all")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--temperatures", default=",".join(f"{t:g}" for t in TEMPERATURES))
    arguments = parser.parse_args()
    if not arguments.profile.exists():
        make_profile(arguments.profile)
    profile = without_repetition(planner.load_profile(arguments.profile))
    models = fit_models(profile)
    session = open_session(profile.model, dtype=profile.dtype, execution=profile.execution_mode, weights=profile.weights)
    if session.model.fingerprint != profile.target_fingerprint:
        raise SystemExit(f"the profile is of model {profile.target_fingerprint}, this one is {session.model.fingerprint}; profile it again")
    cells = []
    for context_len in map(int, arguments.contexts.split(",")):
        for temperature in map(float, arguments.temperatures.split(",")):
            workload = Workload(context_len=context_len, output_len=OUTPUT_LEN, sampler=Sampler(temperature=temperature))
            plan = make_plan(profile, fingerprint(arguments.profile), workload, objective="tpot", memory_cap_bytes=None)
            arms = choose_arms(models, workload, arguments.family) | {"planned": Arm(plan.chosen, plan.estimate.tpot_s.value)}
            if arguments.arms:
                arms = {name: arm for name, arm in arms.items() if name in ("plain", *arguments.arms.split(","))}
            cells.append((workload, arms, plan.seen_texts))
    load_drafters(session, [arm.config.drafter for _, arms, _ in cells for arm in arms.values()])
    tables, figures, prefilled = {}, {}, {}  # a prompt is processed once for all temperatures
    for workload, arms, seen in cells:
        context_len, temperature = workload.context_len, workload.sampler.temperature
        prefilled = {key: ground for key, ground in prefilled.items() if len(ground.prompts[0].tokens) == context_len}
        configs = list(dict.fromkeys(arm.config for arm in arms.values()))
        prompts = draw(session, context_len, temperature, arguments.texts, seen)
        trials = []
        for trial in run_trials(
            session.model, prompts, configs, workload.sampler, output_len=OUTPUT_LEN, stop_tokens=(), seed=SEED, prefilled=prefilled,
            longest=max(SIZES),
        ):  # fmt: skip
            trials.append(trial)
            progress(f"{context_len}/{temperature:g}: {len(trials)} of {len(prompts) * len(configs)}")
        rows, found = judged(arms, trials)
        tables[f"context {context_len}, temperature {temperature:g}, {len(prompts)} texts"] = rows
        for name, value in found.items():
            kind, _, arm = name.partition("/")
            figures["/".join([kind, str(context_len), f"{temperature:g}", *([arm] if arm else [])])] = value
    tables["time per token over that of another arm; upper and lower are ends of 90 % intervals"] = [
        {"cell": "/".join(name.split("/")[1:])} | {"figure": name.split("/")[0], "value": f"{value:.3f}"}
        for name, value in figures.items()
        if not name.startswith("tpot_ms")
    ]
    report_tables(tables, figures, arguments.json)


def make_profile(path: Path) -> None:
    """Goes on where an earlier one was interrupted."""
    progress(f"profiling into {path}: about 18 minutes")
    planner.save_profile(planner.profile("smollm2", [str(file) for file in held_out()], settings=SETTINGS, out=path, resume=True), path)
    remove_journal(path)


def without_repetition(profile: Profile) -> Profile:
    """What it says of texts like those that are run here."""
    kept = {index for index, text in enumerate(profile.texts) if text.distinct_4grams >= MIN_DISTINCT}
    return replace(profile, acceptance=[s for s in profile.acceptance if s.text in kept], trees=[s for s in profile.trees if s.text in kept])


def choose_arms(models: Models, workload: Workload, family: str | None) -> dict[str, Arm]:
    """By the profile alone: plain, the best chain, the best tree of each size and the adaptive one, of one drafter."""

    def best(configs: list[DraftConfig]) -> Arm | None:
        arms = []
        for config in configs:
            try:
                arms.append(Arm(config, predict(models, config, workload).estimate.tpot_s.value))
            except BadInput:  # not profiled for this workload
                continue
        return min(arms, key=lambda arm: arm.predicted_s, default=None)

    trees, _ = tree_candidates(models, workload)
    trees = [config for config in trees if family in (None, config.drafter.kind)]
    if (first := best(trees)) is None:
        raise SystemExit(f"the profile holds no trees{f' of {family}' if family else ''} at {workload.context_len} tokens; profile with --tree-sizes")
    own = [config for config in trees if config.drafter == first.config.drafter]
    arms = {"plain": best([PLAIN]), "chain": best(candidates(models))}
    for size in SIZES:
        arms[f"tree_{size}"] = best([config for config in own if not isinstance(config.tree, AdaptiveTree) and config.tree.size == size])
    arms["adaptive"] = best([config for config in own if isinstance(config.tree, AdaptiveTree)])
    return {name: arm for name, arm in arms.items() if arm is not None}


def draw(session: Session, context_len: int, temperature: float, count: int, seen: list[str]) -> list[Prompt]:
    """Unseen prompts; at temperature 0 those that are not answered by repetition."""
    if temperature > 0:
        return draw_prompts(session.tokenizer, held_out(), length=context_len, count=count, seed=SEED, seen=seen)
    among = draw_prompts(session.tokenizer, held_out(), length=context_len, count=6 * count, seed=SEED, seen=seen)
    kept = []
    for looked_at, found in enumerate(continuations(session.model, among, [context_len], [0.0], output_len=OUTPUT_LEN, group=8), 1):
        kept += [among[found.number]] * (found.text.distinct_4grams >= MIN_DISTINCT)
        if len(kept) == count:
            break
    progress(f"{len(kept)} of {looked_at} texts are continued without repetition")
    return kept


def judged(arms: dict[str, Arm], trials: list[Trial]) -> tuple[list[dict], dict[str, float]]:
    table = objective_by_text(trials, "tpot")
    means = {name: float(np.mean(list(table[arm.config].values()))) for name, arm in arms.items()}
    fixed = [name for name in arms if name.startswith("tree_")]
    best_fixed, best = min(fixed, key=means.__getitem__, default=None), min(means, key=means.__getitem__)
    rows, figures = [], {f"tpot_ms/{name}": 1000 * value for name, value in means.items() if name != "planned"}
    for name, arm in arms.items():
        own = [trial for trial in trials if trial.config == arm.config]
        gain = paired_ratio(table[arms["plain"].config], table[arm.config])
        adaptive = isinstance(arm.config.tree, AdaptiveTree)
        shown = describe(replace(arm.config, tree=None)) + " adaptive" if adaptive else describe(arm.config)
        rows.append({
            "arm": name, "configuration": shown, "measured, ms/token": f"{1000 * means[name]:.2f}",
            "speedup": f"{1 + gain.value:.3f} [{1 + gain.low:.3f}, {1 + gain.high:.3f}]",
            "tokens/round": f"{1 + np.mean([n for trial in own for n in trial.accepted]):.2f}" if arm.config.draft_len else "1.00",
            "nodes/round": f"{np.mean([n for trial in own for n in trial.drafted]):.1f}",
            "predicted, ms/token": f"{1000 * arm.predicted_s:.2f}",
        })  # fmt: skip
    pairs = [("adaptive_vs_best_fixed", "adaptive", best_fixed), ("planned_vs_best", "planned", best), ("planned_vs_chain", "planned", "chain")]
    for kind, one, other in pairs:
        if one in arms and other in arms:
            ratio = paired_ratio(table[arms[one].config], table[arms[other].config])
            figures |= {kind: 1 + ratio.value, f"{kind}_upper": 1 + ratio.high}
    if "planned" in arms:
        speedup = paired_ratio(table[arms["plain"].config], table[arms["planned"].config])
        figures |= {"planned_speedup": 1 + speedup.value, "planned_speedup_lower": 1 + speedup.low}
    return rows, figures


if __name__ == "__main__":
    main()
