"""How long does it take to simulate the Mooncake conversations: 12,031 requests of 12,000 tokens each, prefix caching on?

Four replicas with 40 GiB of KV each, off and with a drafter by batch: step times are those of an 8 B model on an H100 by its
data sheet, 60 % of 989 TFLOPS and 80 % of 3.35 TB/s, and tokens per round an EAGLE-3 head's; what counts here is how many
steps there are. One core; reading the trace and drawing the texts are included.
"""

import time

import numpy as np
from common import Shown, measured, report_tables, wants_json

from planner.simulator.engine import Policy, Server, StepLoad, simulate
from planner.simulator.scheduler import KVRoom
from planner.simulator.texts import Acceptance
from planner.simulator.workload import read_trace

WEIGHTS_BYTES, KV_BYTES_PER_TOKEN, FLOPS_PER_TOKEN, FLOPS_PER_PAIR = 16e9, 131072, 16e9, 4 * 32 * 4096
FLOPS_PER_S, BYTES_PER_S, FLOOR_S = 0.6 * 989e12, 0.8 * 3.35e12, 0.001
DRAFT_S = 0.0006  # of one drafted token for all requests
TOKENS_PER_ROUND = ((1.75, 2.25, 2.6, 2.8, 2.95),)


class DataSheet:
    """Step times of a roofline."""

    def step_s(self, load: StepLoad) -> np.ndarray:
        tokens = load.prefill_tokens + load.decode_requests * (load.draft_len + 1)
        pairs = load.prefill_pairs + load.decode_context * (load.draft_len + 1)
        compute_s = (FLOPS_PER_TOKEN * tokens + FLOPS_PER_PAIR * pairs) / FLOPS_PER_S
        memory_s = (WEIGHTS_BYTES + KV_BYTES_PER_TOKEN * load.decode_context) / BYTES_PER_S
        return FLOOR_S + DRAFT_S * load.draft_len + np.maximum(compute_s, memory_s)


def mooncake() -> Shown:
    path = measured("traces/mooncake_conversation.jsonl.gz")
    acceptance = Acceptance(tokens_per_round=TOKENS_PER_ROUND)
    policies = {"off": Policy.fixed(0), "K = 3": Policy.fixed(3), "by batch": Policy(batches=(1, 9, 33), draft_len=((5,), (3,), (1,)))}
    rows, seconds = [], {}
    for name, policy in policies.items():
        start = time.perf_counter()
        server = Server(
            cost=DataSheet(), room=KVRoom.of_bytes(40 * 2**30, bytes_per_token=KV_BYTES_PER_TOKEN), policy=policy, acceptance=acceptance, replicas=4
        )
        outcome = simulate(read_trace(path), server)
        seconds[name] = time.perf_counter() - start
        rows.append(
            {
                "policy": name,
                "seconds": f"{seconds[name]:.2f}",
                "steps": int(outcome.series.steps.sum()),
                "TTFT p50 s": f"{np.nanmedian(outcome.ttft_s):.3f}",
                "TPOT p50 ms": f"{1e3 * np.nanmedian(outcome.tpot_s):.2f}",
                "requests at once": f"{np.nansum(outcome.e2e_s) / outcome.makespan_s:.1f}",
                "found in the cache": f"{outcome.reused_tokens.sum() / outcome.input_len.sum():.1%}",
                "preemptions": int(outcome.preemptions.sum()),
            }
        )
    return Shown({"simulator/mooncake_seconds": max(seconds.values())}, {"12,031 requests simulated": rows})


def main() -> None:
    as_json = wants_json(__doc__)
    shown = mooncake()
    report_tables(shown.tables, shown.figures, as_json)


if __name__ == "__main__":
    main()
