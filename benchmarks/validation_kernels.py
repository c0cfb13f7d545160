"""Kernels of real GPUs and verification passes of a real engine, from few rows. Data: ../shared/measured, see its README.

Test errors are mean absolute percentage errors over the rows of a table that were not fitted. What was seen before: the terms of
decode attention were chosen on 32 query heads as well, with other draws of rows; its constants were set on the RTX PRO 6000 and on
64 heads. The terms of products were written with their tables in view and not tuned. The terms and cells of trees were chosen among
several with both surfaces in view, the exponent of the floor on Qwen3-4B alone: these figures are not of unseen data.
"""

import csv
import gzip
import heapq
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from common import Shown, measured, progress

from planner.cost.kernel_time import (
    KernelTime,
    best_tree_sizes,
    choose_rows,
    decode_attention,
    first_rows,
    matrix_product,
    rising_widths,
    tree_verification,
)

GPUS = {"a100_sxm": 108, "h100_sxm": 132, "h200_sxm": 132}  # SMs, from the data sheets
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SEEDS = 20
FEW, MANY, FIRST = 20, 50, 5  # rows fitted; rows of a chosen set that are taken before any is timed
PLANTED = (4.0, 0.25)  # what a wrong row is off by
Z90 = 1.645

STEP = 0.04  # a rise of the time by one more row of the product that counts as a step
WIDEST, WIDTHS = 513, 16  # rows of the products looked at, and how many of those are timed

MODELS = {"qwen3_4b": "Qwen3-4B", "qwen3_8b": "Qwen3-8B"}
TREE_CELLS, SPREAD_CELLS = 8, 7  # timed, and how many of them before any time is known
TREE_SIZES = (0, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512)  # that a profile may time
DRAFTERS = {"weak": 0.55, "middle": 0.7, "strong": 0.85}  # share of the likeliest token
BLOCK, DECAY = 16, 0.97  # tokens drafted at once (DFlash), and what each later position has of the likeliest token's share


def read(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        yield from csv.DictReader(file)


def attention_table(gpu: str) -> tuple[np.ndarray, np.ndarray]:
    """(batch, kv_len) [n, 2] and seconds [n]."""
    rows = [
        (float(row["batch_size"]), float(row["kv_len"]), float(row["latency_ms"]) / 1e3)
        for row in read(measured() / "kernels" / "decode_attention.csv.gz")
        if (row["gpu"], row["q_heads"], row["kv_heads"]) == (gpu, str(Q_HEADS), str(KV_HEADS))
    ]
    table = np.array(rows)
    return table[:, :2], table[:, 2]


def missed(model: KernelTime, rows: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Mean absolute percentage error, as a share, and the share of rows inside the 90 % interval."""
    predicted, sd = model.predict(rows)
    inside = np.abs(np.log(seconds / predicted)) <= Z90 * sd
    return float(np.abs(predicted / seconds - 1).mean()), float(inside.mean())


def attention(gpus: tuple[str, ...] = tuple(GPUS), seeds: int = SEEDS) -> Shown:
    """Random rows, chosen rows, and a random row made wrong."""
    figures, errors, wrong = {}, [], []
    for gpu in gpus:
        progress(f"decode attention, {gpu}")
        rows, seconds = attention_table(gpu)
        form = decode_attention(KV_HEADS, HEAD_DIM, GPUS[gpu])
        scores: dict[str, list[tuple[float, float]]] = {}
        flagged: set[tuple[int, int]] = set()
        found = false = 0
        for seed in range(seeds):
            order = np.random.default_rng([7, seed]).permutation(len(rows))
            for count in (FEW, MANY):
                fitted, rest = order[:count], order[count:]
                model = KernelTime(form, rows[fitted], seconds[fitted])
                scores.setdefault(f"n{count}", []).append(missed(model, rows[rest], seconds[rest]))
                flagged |= {(int(batch), int(kv_len)) for batch, kv_len in rows[fitted][model.outliers]}
            planted, place = seconds[fitted].copy(), seed % MANY
            planted[place] *= PLANTED[seed % len(PLANTED)]
            outliers = KernelTime(form, rows[fitted], planted).outliers
            found += outliers[place]
            false += int(outliers.sum() - outliers[place])

            taken, model = choose_rows(form, rows, MANY, seconds.__getitem__, first_rows(form, rows, FIRST, begin=int(order[0])))
            few = KernelTime(form, rows[taken[:FEW]], seconds[taken[:FEW]])  # the same rows come first whatever the count
            for name, own, used in ((f"n{FEW}_chosen", few, taken[:FEW]), (f"n{MANY}_chosen", model, taken)):
                rest = np.setdiff1d(np.arange(len(rows)), used)
                scores.setdefault(name, []).append(missed(own, rows[rest], seconds[rest]))
        for name, each in scores.items():
            error, inside = np.array(each).T
            figures[f"decode_attention/{gpu}/{name}"] = float(error.mean())
            figures[f"decode_attention/{gpu}/{name}_coverage"] = float(inside.mean())
            shown = {"error %": f"{100 * error.mean():.1f}", "best": f"{100 * error.min():.1f}", "worst": f"{100 * error.max():.1f}"}
            errors.append({"GPU": gpu, "rows": name, **shown, "inside 90 % interval": f"{100 * inside.mean():.0f} %"})
        figures[f"decode_attention/{gpu}/planted_found"] = found / seeds
        figures[f"decode_attention/{gpu}/false_outliers"] = false / seeds
        names = ", ".join(f"{batch} x {kv_len}" for batch, kv_len in sorted(flagged))
        wrong.append({"GPU": gpu, "planted": seeds, "found": found, "others flagged with them": false, "flagged in the data": names or "none"})
    whole = table_outliers()
    figures["decode_attention/rtx_pro_6000_outliers"] = float(len(whole))
    wrong.append(
        {"GPU": "rtx_pro_6000 (whole table)", "planted": 0, "found": 0, "others flagged with them": 0, "flagged in the data": ", ".join(whole)}
    )
    return Shown(
        figures, {f"Decode attention, {Q_HEADS}/{KV_HEADS} heads, {seeds} seeds: rows not fitted": errors, "Outliers (batch x kv_len)": wrong}
    )


def table_outliers() -> list[str]:
    """What a fit to every row of the RTX PRO 6000's table flags."""
    rows, seconds = attention_table("rtx_pro_6000_server")
    model = KernelTime(decode_attention(KV_HEADS, HEAD_DIM, 188), rows, seconds)
    return [
        f"{int(batch)} x {int(kv_len)} ({1e6 * took:.0f} us)"
        for (batch, kv_len), took in zip(rows[model.outliers], seconds[model.outliers], strict=True)
    ]


def matrix_products() -> Shown:
    """At which widths a product's time steps. Rises that both versions of the library show are called real."""
    tables: dict[tuple, dict[int, float]] = {}
    for row in read(measured() / "kernels" / "gemm_by_m.csv.gz"):
        if row["gpu"] == "h100_sxm" and row["version"] != "0.14.0" and int(row["m"]) <= WIDEST:
            tables.setdefault((row["version"], int(row["n"]), int(row["k"])), {})[int(row["m"])] = float(row["latency_ms"]) / 1e3
    versions = sorted({version for version, *_ in tables})
    shown, errors = [], []
    counts = Counter()
    for n, k in sorted({key[1:] for key in tables}):
        each = [tables[version, n, k] for version in versions]
        pairs = np.array([m for m in sorted(each[0]) if m + 1 in each[0]])
        rises = [{int(m) for m in pairs if table[m + 1] >= (1 + STEP) * table[m]} for table in each]
        real, any_rise = set.intersection(*rises), set.union(*rises)
        for version, table, own in zip(versions, each, rises, strict=True):
            widths = np.array(sorted(table))
            seconds = np.array([table[m] for m in widths])
            form, rows = matrix_product(n, GPUS["h100_sxm"]), widths[:, None].astype(float)
            taken, model = choose_rows(form, rows, WIDTHS, seconds.__getitem__, first_rows(form, rows, 6))
            rest = np.setdiff1d(np.arange(len(widths)), taken)
            errors.append(missed(model, rows[rest], seconds[rest]))
            found = {int(m) for m in rising_widths(model, pairs.astype(float), STEP)}
            for name, steps in {"found": found, "real": real, "own": own}.items():
                counts[name] += len(steps)
            for name, steps in {"found_real": real, "found_any": any_rise, "found_own": own}.items():
                counts[name] += len(found & steps)
            listed = lambda steps: " ".join(map(str, sorted(steps))) or "none"
            shown.append(
                {
                    "n x k": f"{n} x {k}",
                    "version": version,
                    "found after": listed(found),
                    "real": listed(real),
                    "error %": f"{100 * errors[-1][0]:.1f}",
                }
            )
    error, inside = np.array(errors).mean(0)
    figures = {
        "gemm/steps_recall": counts["found_real"] / counts["real"],
        "gemm/steps_precision": counts["found_any"] / counts["found"],
        "gemm/steps_recall_own": counts["found_own"] / counts["own"],
        "gemm/steps_precision_own": counts["found_own"] / counts["found"],
        "gemm/mape": float(error),
        "gemm/coverage": float(inside),
    }
    title = f"Widths after which a product takes {100 * STEP:.0f} % longer, H100, {WIDTHS} of {len(widths)} widths timed"
    return Shown(figures, {title: shown})


@cache
def surface(model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Contexts [C], tree sizes [N], verify seconds [C, N], draft seconds."""
    rows = list(read(measured() / "trees" / f"{model}_verify_cost_fitted.csv.gz"))
    contexts, sizes = (np.array(sorted({int(row[name]) for row in rows})) for name in ("context_len", "tree_nodes"))
    verify = {(int(row["context_len"]), int(row["tree_nodes"])): float(row["verify_ms_fitted"]) / 1e3 for row in rows}
    return contexts, sizes, np.array([[verify[c, n] for n in sizes] for c in contexts]), float(rows[0]["draft_ms"]) / 1e3


def accepted_by_size(top: float, largest: int) -> np.ndarray:
    """Phi(n), n = 0..largest: accepted tokens expected of the n likeliest nodes. DDTree's tree (arXiv:2604.12989) of marginals that
    decay geometrically by rank, `top` being the likeliest token's share at the first position."""
    shares = [top * DECAY**depth for depth in range(BLOCK)]
    heap = [(-shares[0], 0, 0, 1.0)]  # a node's probability, depth, rank, and its parent's
    gained = [0.0]
    while len(gained) <= largest:
        probability, depth, rank, parent = heapq.heappop(heap)
        gained.append(-probability)
        heapq.heappush(heap, (probability * (1 - shares[depth]), depth, rank + 1, parent))
        if depth + 1 < BLOCK:
            heapq.heappush(heap, (probability * shares[depth + 1], depth + 1, 0, -probability))
    return np.cumsum(gained)


def time_trees(contexts: np.ndarray, verify: np.ndarray, draft_s: float) -> tuple[np.ndarray, KernelTime]:
    """Cells (context, size) [8, 2] spread over the surface, and then the trees that would be chosen where that tells most."""
    form, row = tree_verification(), {context: i for i, context in enumerate(contexts)}
    time_cell = lambda cell: verify[row[cell[0]], int(cell[1])]
    spread = np.array([(context, size) for context in contexts for size in TREE_SIZES], float)
    cells = spread[first_rows(form, spread, SPREAD_CELLS)]
    tokens = 1 + accepted_by_size(DRAFTERS["middle"], verify.shape[1] - 1)
    while True:
        model = KernelTime(form, cells, np.array([time_cell(cell) for cell in cells]))
        if len(cells) == TREE_CELLS:
            return cells, model
        chosen = np.stack([contexts, best_tree_sizes(model, contexts, tokens, draft_s)], axis=1).astype(float)
        cells = np.concatenate([cells, chosen[model.next_rows(chosen, 1)]])


def a800() -> Shown:
    """CaDDTree's verification surfaces from eight cells; then theta(n) = (1 + Phi(n)) / (draft + verify) is maximised on what was fitted."""
    figures, errors, losses = {}, [], []
    for key, model in MODELS.items():
        contexts, sizes, verify, draft_s = surface(model)
        cells, fitted = time_trees(contexts, verify, draft_s)
        rows = np.array([(context, size) for context in contexts for size in sizes], float)
        unseen = ~(rows[:, None] == cells).all(2).any(1)
        error, inside = missed(fitted, rows[unseen], verify.ravel()[unseen])
        predicted = fitted.predict(rows)[0].reshape(verify.shape)
        worst = np.abs(predicted / verify - 1).max()
        named = " ".join(f"{context:.0f}/{size:.0f}" for context, size in cells)
        errors.append(
            {
                "target": model,
                "error %": f"{100 * error:.2f}",
                "worst %": f"{100 * worst:.1f}",
                "inside 90 % interval": f"{100 * inside:.0f} %",
                "cells (context/nodes)": named,
            }
        )
        largest = 0.0
        for drafter, top in DRAFTERS.items():
            tokens = 1 + accepted_by_size(top, int(sizes[-1]))
            rate = tokens / (draft_s + verify)  # [C, N]
            chosen = best_tree_sizes(fitted, contexts, tokens, draft_s)
            lost = 1 - rate[np.arange(len(contexts)), chosen] / rate.max(1)
            fixed = (1 - rate / rate.max(1, keepdims=True)).max(0).min()  # one size at every context, the best by the whole table
            largest = max(largest, float(lost.max()))
            losses.append(
                {
                    "target": model,
                    "drafter": drafter,
                    "Phi(512)": f"{tokens[-1] - 1:.2f}",
                    "sizes chosen": " ".join(map(str, sizes[chosen])),
                    "best": " ".join(map(str, sizes[rate.argmax(1)])),
                    "lost %, mean": f"{100 * lost.mean():.2f}",
                    "worst": f"{100 * lost.max():.2f}",
                    "one size everywhere, worst": f"{100 * fixed:.1f}",
                }
            )
        figures |= {f"a800/{key}/mape": error, f"a800/{key}/error_max": float(worst), f"a800/{key}/coverage": inside}
        figures[f"a800/{key}/throughput_loss_max"] = largest
    return Shown(
        figures, {f"A800, verification from {TREE_CELLS} cells": errors, "Tree size that maximises tokens per second, at contexts 1 to 8000": losses}
    )
