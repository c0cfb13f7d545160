"""Parts of validation.py: does a simulated run become the real one, and are inconsistent tables caught?

real run   300 requests of ShareGPT through vLLM 0.19 on an RTX 4090 (Llama-3.1-8B, a KV pool of 41,408 tokens, so that a request
           waits for a minute and about 190 preemptions happen), simulated from their arrivals and lengths with steps composed of one layer's
           kernel times (cost/layer_step.py). Of the run's own times only the arrivals are used, set against the engine's clock by
           the request that was queued soonest: no overhead, no factor. Beside it the error that the tables' authors print of their simulator, and what happens with every second value
           of each column, and without prefix caching (preempted requests compute everything again).
audit      the two known faults of the tables of arXiv:2606.00144, by the rows they are in.
"""

import gzip
import json
import re
import time
from pathlib import Path

import numpy as np
from common import Shown, measured

import planner
from planner.cost.layer_step import LayerStep
from planner.importers.layer_tables import LayerTables, read_layer_tables
from planner.simulator.engine import Outcome, Server, simulate
from planner.simulator.scheduler import Batching, KVRoom
from planner.simulator.workload import Request

RUN = "serving/rtx4090_real_run/Llama-3.1-8B"
LAYER = "serving/rtx4090_layer_profile/meta-llama/Llama-3.1-8B/bf16/tp1"
NUM_LAYERS = 32
BUDGETDRAFT = Path(__file__).resolve().parents[1] / "tests/published/budgetdraft.csv"
PERCENTILES = {"mean": None, "p50": 50, "p90": 90, "p99": 99}
OTHERS = {"mean": "Mean", "p50": "Median", "p90": "P90", "p99": "P99"}  # in the other simulator's summary
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "Latency"}


def real_run() -> Shown:
    meta = json.loads(measured(f"{RUN}/meta.json").read_text())
    lines = gzip.decompress(measured(f"{RUN}/requests.jsonl.gz").read_bytes()).splitlines()
    column = {name: np.array([json.loads(line)[name] for line in lines]) for name in json.loads(lines[0]) if name != "request_id"}
    # the client's clock and the engine's: the request that was queued soonest took no time
    arrival_s = column["arrival_time"] + (column["queued_ts"] - column["arrival_time"]).min()
    real = {
        "ttft": column["first_token_ts"] - arrival_s,
        "tpot": (column["last_token_ts"] - column["first_token_ts"]) / (column["output_toks"] - 1),
        "e2e": column["last_token_ts"] - arrival_s,
    }
    lengths = zip((arrival_s - arrival_s.min()).tolist(), column["input_toks"].tolist(), column["output_toks"].tolist(), strict=True)
    requests = [Request(arrival_s=at, input_len=a, output_len=b) for at, a, b in lengths]
    tables = read_layer_tables(measured(f"{LAYER}/attention.csv.gz").parent)

    start = time.perf_counter()
    outcome = serve(requests, meta, tables)
    seconds = time.perf_counter() - start
    variants = {
        f"{len(tables.attention_s)} rows": outcome,
        f"{len(thinned(tables).attention_s)} rows": serve(requests, meta, thinned(tables)),
        "no prefix caching": serve(requests, meta, tables, prefix_caching=False),
    }
    other = other_simulator(measured(f"{RUN}/summary.txt").read_text())
    rows = []
    for name, title in NAMES.items():
        for which in PERCENTILES:
            errors = {variant: error(one, real, name, which) for variant, one in variants.items()}
            unit = 1e3 if name == "tpot" else 1.0
            rows.append(
                {
                    "": f"{title.replace('Latency', 'end to end')} {which}",
                    "vLLM": f"{unit * statistic(real[name], which):.1f} {'ms' if name == 'tpot' else 's'}",
                    "simulated": f"{unit * statistic(times(outcome)[name], which):.1f}",
                    **{variant: f"{share:+.1%}" for variant, share in errors.items()},
                    "the other simulator": f"{other[name, which]:+.1%}",
                }
            )
    each = {name: np.median(np.abs(values / real[name] - 1)) for name, values in times(outcome).items()}
    steps = int(outcome.series.steps.sum())
    title = (
        f"A real vLLM run, simulated from its arrivals: {len(requests)} requests, {steps} steps, {outcome.preemptions.sum()} preemptions, "
        f"to the last token {outcome.makespan_s:.1f} s (vLLM: {column['last_token_ts'].max() - arrival_s.min():.1f} s), "
        f"in {seconds:.1f} s.\nRequest by request, the median error is {each['ttft']:.1%} of TTFT, {each['tpot']:.1%} of TPOT, {each['e2e']:.1%} end to end"
    )
    return Shown({f"real_run/{name}_mean": abs(error(outcome, real, name, "mean")) for name in ("tpot", "e2e", "ttft")}, {title: rows})


def serve(requests: list[Request], meta: dict, tables: LayerTables, prefix_caching: bool = True) -> Outcome:
    """With the run's own limits and graph sizes."""
    cache, batching, graphs = meta["kv_cache"], meta["engine_kwargs"], meta["resolved_config"]["compilation_config"]["cudagraph_capture_sizes"]
    server = Server(
        cost=LayerStep(tables, NUM_LAYERS, captured=graphs),
        room=KVRoom(blocks=cache["num_gpu_blocks"], block_tokens=cache["block_size"]),
        batching=Batching(
            max_num_batched_tokens=batching["max_num_batched_tokens"], max_num_seqs=batching["max_num_seqs"],
            prefix_caching=cache["enable_prefix_caching"] and prefix_caching,
        ),
    )  # fmt: skip
    return simulate(requests, server)


def thinned(tables: LayerTables) -> LayerTables:
    """Every second value of each column, the last one kept, and 0."""
    kept = np.ones(len(tables.attention), dtype=bool)
    for column in tables.attention.T:
        values = np.unique(column[column > 0])
        kept &= np.isin(column, [0, *values[::-2]])
    return tables._replace(attention=tables.attention[kept], attention_s=tables.attention_s[kept])


def times(outcome: Outcome) -> dict[str, np.ndarray]:
    return {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2e": outcome.e2e_s}


def statistic(values: np.ndarray, which: str) -> float:
    return float(values.mean() if PERCENTILES[which] is None else np.percentile(values, PERCENTILES[which]))


def error(outcome: Outcome, real: dict[str, np.ndarray], name: str, which: str) -> float:
    return statistic(times(outcome)[name], which) / statistic(real[name], which) - 1


def other_simulator(summary: str) -> dict[tuple[str, str], float]:
    """Its relative errors, as printed."""
    found = {}
    for name, title in NAMES.items():
        for which, word in OTHERS.items():
            found[name, which] = float(re.search(rf"^{title} {word} .*?([+-][\d.]+)%$", summary, re.MULTILINE)[1]) / 100
    return found


def audit() -> Shown:
    """Both faults of the BudgetDraft tables, by the rows that they are known to be in (../shared/facts/published.md)."""
    lines = BUDGETDRAFT.read_text().splitlines()
    faults = planner.audit(BUDGETDRAFT).faults
    by_kind = {fault.kind: {lines[int(row.rpartition(":")[2]) - 1] for row in fault.rows} for fault in faults}
    found = [
        by_kind.get("baseline") == {line for line in lines if line.startswith("1,") and ",8192," in line},
        by_kind.get("acceptance") == {line for line in lines if ",LWM,16384,2048," in line},
    ]
    rows = [{"fault": fault.what, "rows": len(fault.rows), "e.g.": fault.examples[0]} for fault in faults]
    return Shown({"audit/budgetdraft_found": float(sum(found))}, {f"BudgetDraft's tables, {len(lines) - 1} rows": rows})
