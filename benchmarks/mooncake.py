"""What speculation changes for the Mooncake conversations: off, K = 3 everywhere, by batch, and by batch and context.

Llama-3.1-8B in 16 bit on H100s, drafting for itself with a sparse cache of 512 tokens (MagicDec, arXiv:2408.11049). Nobody here
owns the GPU. What is measured: the trace (12,031 requests of an hour, arrivals, lengths and prefix hashes) and the acceptance that
MagicDec publishes by context, .84 at 4K to .79 at 100K a token. What is not: round times, which are the roofline of
planner/cost/roofline.py, in whose intervals MagicDec's 19 speedups lie, and prompts, a roofline too. Cells of that are imported as a
user's would be, and everything behind them is planner's: the fit, the schedule, the KV pool, and `planner simulate`.

Goodput is the share of requests within a TPOT and a TTFT. About a minute on two cores; --speedup lets the hour pass faster.
"""

import tempfile
from pathlib import Path

import numpy as np
from common import make_parser, measured, progress, report_tables

import planner
from planner.cost.capacity import request_capacity
from planner.cost.roofline import LIKELY, Load, round_s
from planner.plans import Interval
from planner.schedules import Limits
from planner.serving import OFF, ModelSize, ServedCell, ServingProfile, SystemSpec, save_serving_profile
from planner.systems import SYSTEMS

ALPHA = {4096: 0.84, 8192: 0.83, 16384: 0.82, 32768: 0.81, 65536: 0.79, 102400: 0.79}  # per token, budget 512 (MagicDec)
DRAFTER, BUDGET, OUTPUT = "self_sparse", 512, 343  # tokens; the trace's mean output
CONTEXTS, CONCURRENCIES, DRAFT_LENS = (2048, 8192, 16384, 32768, 65536), (1, 4, 16, 64, 256), (1, 2, 3, 5)
LLAMA_8B = ModelSize(
    name="Llama-3.1-8B", num_layers=32, num_kv_heads=8, head_dim=128, num_heads=32, weights_bytes=16_060_522_496, hidden_size=4096,
    intermediate_size=14336, vocab_size=128256, max_context_len=131072,
)  # fmt: skip
LIMITS = (Limits(tpot_s=0.025, ttft_s=5.0), Limits(tpot_s=0.05, ttft_s=10.0))


def profile() -> ServingProfile:
    """Cells that the roofline and the published acceptance make, as an engine's benchmark would print them."""
    h100 = SYSTEMS["h100_sxm"]
    system = SystemSpec(
        name="h100_sxm", memory_bytes=h100.memory_bytes, fraction=0.9, bandwidth_bytes_per_s=float(h100.bandwidth_bytes_per_s),
        flops_per_s=float(h100.flops_per_s),
    )  # fmt: skip
    cells = []
    for context in CONTEXTS:
        accept = float(np.interp(np.log(context), np.log(list(ALPHA)), list(ALPHA.values())))
        for drafter, k in ((OFF, 0), *((DRAFTER, k) for k in (0, *DRAFT_LENS))):  # idle it is off: it loads nothing
            tokens = sum(accept**i for i in range(k + 1))
            for concurrency in CONCURRENCIES:
                room = request_capacity(LLAMA_8B, None, system, tensor_parallel=1, context_len=context, output_len=OUTPUT, draft_len=k)
                running = min(concurrency, room)
                took = round_s(LLAMA_8B, None, system, Load(running, context + OUTPUT / 2), LIKELY, draft_len=k, kv_budget=BUDGET)
                cells.append(
                    ServedCell(
                        drafter=drafter, draft_len=k, concurrency=concurrency, context_len=context, output_len=OUTPUT,
                        tpot_s=took / tokens, itl_s=took, output_tokens_per_s=running * tokens / took, tokens_per_round=tokens if k else None,
                        acceptance=[accept] * k, source="roofline and MagicDec's acceptance",
                    )
                )  # fmt: skip
    return ServingProfile(
        source="roofline with MagicDec's acceptance", date="2026-01-01T00:00:00Z", planner_version=planner.__version__, model=LLAMA_8B,
        drafters={}, system=system, cells=cells,
    )  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--replicas", type=int, default=4, metavar="N", help="engines behind a least-loaded router (default 4)")
    parser.add_argument("--speedup", type=float, default=1.0, metavar="X", help="of arrival times (default 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first requests only")
    args = parser.parse_args()
    trace = measured("traces/mooncake_conversation.jsonl.gz")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serving.json"
        save_serving_profile(profile(), path)
        asked = planner.AskedSimulation(
            trace=str(trace), also=("K=3",), replicas=args.replicas, router="least_loaded", speedup=args.speedup, limit=args.limit, workers=2
        )
        found = planner.simulate(path, asked, limits=LIMITS, seed=1)
    for note in found.notes:
        progress(f"note: {note}")
    figures = {}
    for arm in found.arms:
        figures |= {f"mooncake/{arm.name}/tpot_mean": arm.tpot_s.mean.value, f"mooncake/{arm.name}/ttft_mean": arm.ttft_s.mean.value,
                    f"mooncake/{arm.name}/e2e_mean": arm.e2e_s.mean.value}  # fmt: skip
        figures |= {f"mooncake/{arm.name}/goodput_{i}": good.share.value for i, good in enumerate(arm.goodput)}
    report_tables({"": [row(arm, LIMITS) for arm in found.arms]}, figures, args.json)


def row(arm, limits) -> dict[str, str]:
    shown = {
        "setting": arm.name, "TPOT ms": of(arm.tpot_s.mean, 1e3, 1), "p90": of(arm.tpot_s.p90, 1e3, 1), "TTFT s": of(arm.ttft_s.mean, 1, 2), "p90 ": of(arm.ttft_s.p90, 1, 2),
        "end to end s": of(arm.e2e_s.mean, 1, 2),
    }  # fmt: skip
    for limit, good in zip(limits, arm.goodput, strict=True):
        shown[f"goodput % at TPOT {1e3 * limit.tpot_s:g} ms, TTFT {limit.ttft_s:g} s"] = of(good.share, 100, 1)
    change = arm.against_off
    shown["end to end against off %"] = "" if change is None else of(change.e2e, 100, 1, "+")
    shown["decoding at once"] = f"{arm.running:.1f}"
    shown["tokens/round"] = f"{arm.tokens_per_round:.2f}"
    shown["busy %"] = f"{100 * arm.busy.mean:.0f}"
    shown["KV %"] = f"{100 * arm.kv.mean:.0f}"
    return shown


def of(interval: Interval, scale: float, decimals: int, sign: str = "") -> str:
    value, low, high = (f"{scale * bound:{sign}.{decimals}f}" for bound in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
