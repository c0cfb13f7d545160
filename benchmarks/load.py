"""Planning under load: twelve cells per drafter of engines whose law nobody fitted, then every other cell and every choice.

A hundred synthetic engines (engines.py). Of each, planner gets a dozen noisy cells per drafter and some of off, as a user would
measure them; it predicts the rest of the grid and chooses drafter and K at every load. A choice's regret is the share of the best
setting's throughput (or the excess over its TPOT) that it loses in truth, off among the settings. Beside it: a sweep that
measures the whole grid once, and from planner's own cells the nearest measured one, the choice at batch 1 everywhere, and a
planner that knows latency but no capacity.
Then two published tables. About two minutes on two cores; --engines shortens it.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from common import make_parser, progress, report_tables
from engines import Cell, Engine, measured_cells, random_engine
from scipy.optimize import nnls

import planner
from planner.cost.serving import Cells, Served, ServingModel, fit_serving
from planner.search.engine_loads import EngineLoads
from planner.search.grid import Question, choose, evaluate
from planner.search.schedule import make_schedule
from planner.serving import OFF, ModelSize, ServedCell, ServingProfile, SystemSpec

LOADS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256])  # where a choice is judged: each octave counts the same
Z90 = 1.645  # of a normal's central 90 %
BASELINES = ("sweep", "nearest", "batch_1", "no_capacity")


class Judged(NamedTuple):
    """One engine: errors and regrets are shares, 0.01 is one per cent."""

    seed: int
    name: str
    tpot_error: float  # median over unseen cells
    throughput_error: float
    bias: float  # median signed error of TPOT
    coverage: float  # of freshly measured TPOT
    truth_coverage: float
    half_width: float  # median, of TPOT
    regret: float  # of throughput, mean over loads and contexts
    regret_worst: float  # the worst load
    worst: str  # which, and what was taken for what
    regret_tpot: float
    sweep: float  # regrets of the baselines
    nearest: float
    batch_1: float
    no_capacity: float


def ask(model: ServingModel, cells: list[Cell], output_len: dict[int, int]) -> Served:
    index = {name: i for i, name in enumerate(model.drafters)}
    columns = [
        [index[cell.drafter] for cell in cells],
        *([cell[i] for cell in cells] for i in (1, 2, 3)),
        [output_len[cell.context_len] for cell in cells],
    ]
    return model.predict(Cells(*(np.array(column) for column in columns)))


def nearest_throughput(measured: list[ServedCell], settings: list[tuple[str, int]], context: int) -> np.ndarray:
    """[settings, loads] the throughput of the drafter's measured cell that is nearest in K and in octaves of concurrency."""
    out = np.zeros((len(settings), len(LOADS)))
    for i, (drafter, draft_len) in enumerate(settings):
        mine = [cell for cell in measured if cell.drafter == drafter]
        far = np.array([[abs(cell.draft_len - draft_len) + abs(np.log2(cell.concurrency / load)) for load in LOADS] for cell in mine])
        far += np.array([[4 * abs(np.log2(cell.context_len / context))] for cell in mine])
        out[i] = np.array([cell.output_tokens_per_s for cell in mine])[far.argmin(axis=0)]
    return out


def capacity_blind_tpot(measured: list[ServedCell], settings: list[tuple[str, int]], context: int) -> np.ndarray:
    """[settings, loads] TPOT if all requests ran at once: a bilinear round over the batch that was seen running, tokens by K."""
    out = np.full((len(settings), len(LOADS)), np.inf)
    for drafter in dict.fromkeys(name for name, _ in settings):
        mine = [cell for cell in measured if cell.drafter == drafter]
        mine = [cell for cell in mine if cell.context_len == context] if drafter == OFF else mine
        terms = lambda k, b: np.stack([np.ones_like(b), k, b, b * k], axis=-1)
        k = np.array([cell.draft_len for cell in mine], dtype=float)
        batch = np.array([min(cell.concurrency, cell.output_tokens_per_s * cell.tpot_s) for cell in mine])
        tokens = np.array([mean_tokens(mine, cell.draft_len) for cell in mine])
        round_s = np.array([cell.tpot_s for cell in mine]) * tokens
        fitted, _ = nnls(terms(k, batch) / round_s[:, None], np.ones(len(mine)))
        for i, (name, draft_len) in enumerate(settings):
            if name == drafter:
                whole = terms(np.full(len(LOADS), float(draft_len)), LOADS.astype(float)) @ fitted
                out[i] = whole / mean_tokens(mine, draft_len)
    return out


def mean_tokens(measured: list[ServedCell], draft_len: int) -> float:
    """Tokens per round at one K, interpolated between those where they were counted; 1 + 0.6 K^0.7 if none were."""
    seen: dict[int, list[float]] = {0: [1.0]}
    for cell in measured:
        if cell.tokens_per_round is not None:
            seen.setdefault(cell.draft_len, []).append(cell.tokens_per_round)
    if len(seen) == 1:
        return 1 + 0.6 * draft_len**0.7
    lens = sorted(seen)
    return float(np.interp(draft_len, lens, [np.mean(seen[k]) for k in lens]))


def judge(seed: int, drawn: bool = False) -> Judged:
    """What planner makes of one engine; `drawn`: the inner cells at random instead of staircases."""
    engine, rng = random_engine(seed), np.random.default_rng([5, seed])
    taken = measured_cells(engine, rng if drawn else None)
    profile = engine.profile(taken, rng)
    model = fit_serving(profile)
    unseen = sorted(set(engine.grid()) - set(taken))
    served = ask(model, unseen, engine.output_len)
    truth = [engine.truth(*cell) for cell in unseen]
    tpot, rate = np.array([one.tpot_s for one in truth]), np.array([one.output_tokens_per_s for one in truth])
    rest = engine.measure(unseen, rng)
    fresh = np.array([cell.tpot_s for cell in rest])
    half = np.expm1(Z90 * served.sd_tpot)
    regrets = judge_choices(engine, model, profile.cells, rest)
    return Judged(
        seed=seed,
        name=str(engine),
        tpot_error=float(np.median(np.abs(served.tpot_s / tpot - 1))),
        throughput_error=float(np.median(np.abs(served.output_tokens_per_s / rate - 1))),
        bias=float(np.median(served.tpot_s / tpot - 1)),
        coverage=float((np.abs(np.log(fresh / served.tpot_s)) <= Z90 * served.sd_tpot).mean()),
        truth_coverage=float((np.abs(np.log(tpot / served.tpot_s)) <= Z90 * served.sd_tpot).mean()),
        half_width=float(np.median(half)),
        **regrets,
    )


def scheduled(model: ServingModel, settings: list[tuple[str, int]], context: int, output_len: int) -> dict[str, np.ndarray]:
    """By objective, [loads] which of the settings the schedule's row for each load holds."""
    loads = EngineLoads(model, output_len)
    grid = evaluate(loads, Question(1, int(LOADS[-1]), [context], "throughput"))
    place = np.array([settings.index((setting.drafter, setting.draft_len)) for setting in loads.settings])
    return {objective: place[choose(grid, [grid.free], objective)[0].chosen[0, LOADS - 1]] for objective in ("throughput", "tpot")}


def judge_choices(engine: Engine, model: ServingModel, measured: list[ServedCell], rest: list[ServedCell]) -> dict:
    """Regrets of the schedule's rows and the baselines', over loads and contexts. rest  the grid's other cells, measured as well"""
    settings = engine.settings()
    lost: dict[str, list[np.ndarray]] = {name: [] for name in ("planner", "tpot", *BASELINES)}
    worst, worst_lost = "", -1.0
    for context, output in engine.output_len.items():
        curves = [engine.curve(*setting, context) for setting in settings]
        rate = np.array([curve.requests_per_s[LOADS - 1] for curve in curves])  # [settings, loads]
        tpot = np.array([curve.round_s[LOADS - 1] / curve.tokens_per_round for curve in curves])
        column = np.arange(len(LOADS))
        free = np.array([drafter == OFF or draft_len > 0 for drafter, draft_len in settings])  # idle starves the batch, which looks like TPOT
        rows = scheduled(model, settings, context, output)
        taken = {
            "planner": rows["throughput"],
            "sweep": nearest_throughput(measured + rest, settings, context).argmax(axis=0),
            "nearest": nearest_throughput(measured, settings, context).argmax(axis=0),
            "no_capacity": capacity_blind_tpot(measured, settings, context).argmin(axis=0),
        }
        taken["batch_1"] = np.full(len(LOADS), taken["planner"][0])
        for name, choice in taken.items():
            lost[name].append(1 - rate[choice, column] / rate[free].max(axis=0))
        lost["tpot"].append(tpot[rows["tpot"], column] / tpot[free].min(axis=0) - 1)
        if lost["planner"][-1].max() > worst_lost:
            at, worst_lost = int(lost["planner"][-1].argmax()), float(lost["planner"][-1].max())
            got, best = settings[taken["planner"][at]], settings[int(np.where(free, rate[:, at], 0).argmax())]
            worst = f"{got[0]} {got[1]} for {best[0]} {best[1]} at {LOADS[at]} x {context}"
    mean = {name: float(np.mean(values)) for name, values in lost.items()}
    return {
        "regret": mean["planner"],
        "regret_worst": worst_lost,
        "worst": worst,
        "regret_tpot": mean["tpot"],
        **{name: mean[name] for name in BASELINES},
    }


def plan_seconds(num_candidates: int = 100_000) -> float:
    """Seconds per 100,000 candidates to evaluate so many, choose at every load and write the schedule; the fit left out."""
    engine = next(engine for engine in map(random_engine, range(100)) if len(engine.settings()) >= 20)
    model = fit_serving(engine.profile(measured_cells(engine), np.random.default_rng(0)))
    contexts = np.geomspace(500, 32000, -(-num_candidates // (len(engine.settings()) * int(LOADS[-1])))).astype(int).tolist()
    start = time.perf_counter()
    about = {"profile_sha256": "0" * 64, "model": "synthetic", "system": "synthetic", "source": str(engine)}
    schedule = make_schedule(EngineLoads(model, 512), Question(1, int(LOADS[-1]), contexts, "throughput"), **about)
    return (time.perf_counter() - start) * 100_000 / schedule.num_candidates


# Published tables. Qwen3-32B with Qwen3-1.7B, one stream, one 80 GB GPU (a public vLLM measurement): K, tokens per round,
# inter-token ms, TPOT ms. MagicDec (arXiv:2408.11049, project page): Llama-2-7B on 8 A100, 8K prompts, ms per token of plain
# decoding and of self-speculation, by batch; K there is 3 to 4 and speedups are the page's.
SINGLE_STREAM = (
    (0, 1.0, 23.65, 23.65),
    (1, 1.8, 26.81, 14.94),
    (2, 2.4, 29.58, 12.33),
    (3, 2.87, 31.7, 11.07),
    (4, 3.28, 34.33, 10.46),
    (5, 3.53, 36.87, 10.44),
    (6, 3.7, 39.36, 10.65),
    (7, 3.9, 41.4, 10.63),
    (8, 4.04, 44.7, 11.07),
)
MAGICDEC_MS = {32: (16.53, 12.83), 48: (21.45, 15.26), 64: (31.49, 20.09), 128: (49.89, 30.41)}
QWEN_32B = ModelSize(name="Qwen3-32B", num_layers=64, num_kv_heads=8, head_dim=128, weights_bytes=65_600_000_000)
QWEN_17B = ModelSize(name="Qwen3-1.7B", num_layers=28, num_kv_heads=8, head_dim=128, weights_bytes=4_060_000_000)
LLAMA2_7B = ModelSize(name="Llama-2-7B", num_layers=32, num_kv_heads=32, head_dim=128, weights_bytes=13_480_000_000)
EIGHTY_GB = SystemSpec(name="80gb", memory_bytes=80 * 2**30, fraction=0.95)


def profile_of(source: str, model: ModelSize, drafters: dict[str, ModelSize], cells: list[ServedCell]) -> ServingProfile:
    return ServingProfile(
        source=source,
        date="2026-01-01T00:00:00Z",
        planner_version=planner.__version__,
        model=model,
        drafters=drafters,
        system=EIGHTY_GB,
        cells=cells,
    )


def replay_single_stream() -> tuple[list[dict], dict[str, float]]:
    """Import K = 0, 1, 3, 5, 8; predict the others, the best K, and its speedup with an interval."""
    name, context, output = "draft_model", 500, 256
    cells = [
        ServedCell(
            drafter=name if k else OFF,
            draft_len=k,
            concurrency=1,
            context_len=context,
            output_len=output,
            tpot_s=tpot / 1e3,
            itl_s=itl / 1e3,
            tokens_per_round=tokens if k else None,
        )
        for k, tokens, itl, tpot in SINGLE_STREAM
        if k in (0, 1, 3, 5, 8)
    ]
    model = fit_serving(profile_of("published vLLM run", QWEN_32B, {name: QWEN_17B}, cells))
    asked = [Cell(name if k else OFF, k, 1, context) for k in range(9)]
    served = ask(model, asked, {context: output})
    real = np.array([row[3] / 1e3 for row in SINGLE_STREAM])
    error = served.tpot_s / real - 1
    best = int(served.tpot_s.argmin())
    one = lambda k: Cells(*(np.array([value]) for value in (model.drafters.index(name) if k else 0, k, 1, context, output)))
    sd = float(model.ratio_sd(one(0), one(best), "tpot")[0])
    speedup = float(served.tpot_s[0] / served.tpot_s[best])
    low, high = speedup * np.exp(-Z90 * sd), speedup * np.exp(Z90 * sd)
    rows = [
        {
            "K": k,
            "seen": "yes" if k in (0, 1, 3, 5, 8) else "",
            "TPOT ms": f"{1e3 * real[k]:.2f}",
            "predicted": f"{1e3 * served.tpot_s[k]:.2f}",
            "error": f"{error[k]:+.1%}",
        }
        for k in range(9)
    ]
    unseen = [k for k in range(9) if k not in (0, 1, 3, 5, 8)]
    figures = {
        "published/single_stream_error_max": float(np.abs(error[unseen]).max()),
        "published/single_stream_best_k": float(best),
        "published/single_stream_speedup": speedup,
        "published/single_stream_speedup_low": float(low),
        "published/single_stream_speedup_high": float(high),
        "published/single_stream_speedup_covered": float(low <= 2.27 <= high),
    }
    return rows, figures


def replay_magicdec() -> tuple[list[dict], dict[str, float]]:
    """Leave each batch out in turn; predict both of its points and the speedup, with an interval."""
    name, context, output, k = "self_sparse", 8000, 256, 3
    rows, errors, covered = [], [], []
    for left_out, (plain_ms, drafted_ms) in MAGICDEC_MS.items():
        cells = [
            ServedCell(
                drafter=name if drafting else OFF,
                draft_len=k if drafting else 0,
                concurrency=batch,
                context_len=context,
                output_len=output,
                tpot_s=ms[drafting] / 1e3,
                output_tokens_per_s=batch / ms[drafting] * 1e3,
                tensor_parallel=8,
            )
            for drafting in (0, 1)
            for batch, ms in MAGICDEC_MS.items()
            if batch != left_out
        ]
        model = fit_serving(profile_of("MagicDec project page", LLAMA2_7B, {}, cells))
        asked = [Cell(OFF, 0, left_out, context), Cell(name, k, left_out, context)]
        served = ask(model, asked, {context: output})
        pair = [Cells(*(np.array([value]) for value in (model.drafters.index(cell.drafter), *cell[1:], output))) for cell in asked]
        sd = float(model.ratio_sd(pair[0], pair[1], "tpot")[0])
        speedup, real = float(served.tpot_s[0] / served.tpot_s[1]), plain_ms / drafted_ms
        errors.append(abs(speedup / real - 1))
        covered.append(abs(np.log(speedup / real)) <= Z90 * sd)
        rows.append(
            {
                "batch": left_out,
                "AR ms": plain_ms,
                "predicted AR": f"{1e3 * served.tpot_s[0]:.1f}",
                "SD ms": drafted_ms,
                "predicted SD": f"{1e3 * served.tpot_s[1]:.1f}",
                "speedup": f"{real:.2f}",
                "predicted speedup": f"{speedup:.2f} [{speedup * np.exp(-Z90 * sd):.2f}, {speedup * np.exp(Z90 * sd):.2f}]",
            }
        )
    return rows, {"published/magicdec_speedup_error_max": float(max(errors)), "published/magicdec_covered": float(np.mean(covered))}


def summary(judged: list[Judged]) -> dict[str, float]:
    column = lambda name: np.array([getattr(one, name) for one in judged])
    out = {
        "synthetic/tpot_error_median": float(np.median(column("tpot_error"))),
        "synthetic/tpot_error_p95": float(np.quantile(column("tpot_error"), 0.95)),
        "synthetic/throughput_error_median": float(np.median(column("throughput_error"))),
        "synthetic/regret_mean": float(column("regret").mean()),
        "synthetic/regret_p95": float(np.quantile(column("regret"), 0.95)),
        "synthetic/regret_worst_cell_p95": float(np.quantile(column("regret_worst"), 0.95)),
        "synthetic/regret_tpot_mean": float(column("regret_tpot").mean()),
        "synthetic/coverage": float(column("coverage").mean()),
        "synthetic/truth_coverage": float(column("truth_coverage").mean()),
        "synthetic/half_width_median": float(np.median(column("half_width"))),
    }
    for name in BASELINES:
        out[f"synthetic/regret_mean_{name}"] = float(column(name).mean())
        out[f"synthetic/regret_p95_{name}"] = float(np.quantile(column(name), 0.95))
        out[f"synthetic/planner_wins_over_{name}"] = float((column("regret") <= column(name)).mean())  # paired by engine
    return out


def rows_of(judged: list[Judged]) -> list[dict]:
    shown = ("tpot_error", "bias", "throughput_error", "coverage", "half_width", "regret", "regret_worst", *BASELINES)
    return [
        {**{name.replace("_", " ") + " %": f"{100 * getattr(one, name):.1f}" for name in shown}, "worst choice": one.worst, "engine": one.name}
        for one in judged
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--engines", type=int, default=100, metavar="N", help="how many engines (default 100)")
    parser.add_argument(
        "--first", type=int, default=100, metavar="SEED", help="the first of them (default 100; 0 to 99 were looked at when planner was written)"
    )
    parser.add_argument("--drawn", action="store_true", help="inner cells drawn at random instead of staircases")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.engines)
    start = time.perf_counter()
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        judged = list(pool.map(judge, seeds, [args.drawn] * len(seeds)))
    progress(f"{len(judged)} engines in {time.perf_counter() - start:.0f} s")
    stream, stream_figures = replay_single_stream()
    magicdec, magicdec_figures = replay_magicdec()
    figures = {**summary(judged), "plan_seconds_100k": plan_seconds(), **stream_figures, **magicdec_figures}
    worst = sorted(judged, key=lambda one: -one.regret)[:10]
    tables = {
        "All engines": [{"figure": name, "value": f"{value:.4f}"} for name, value in figures.items()],
        "Engines that lose most throughput": rows_of(worst),
        "Engines predicted worst": rows_of(sorted(judged, key=lambda one: -one.tpot_error)[:10]),
        "Qwen3-32B with Qwen3-1.7B, one stream": stream,
        "MagicDec, 8K prompts: each batch left out in turn": magicdec,
    }
    report_tables(tables, figures, args.json)


if __name__ == "__main__":
    main()
