"""What a memory cap costs: the choice and its time per token under ever less memory, from one profile. Needs no torch.

    python examples/plan_under_cap.py [PROFILE] [CONTEXT_LEN]

Without arguments, the measured profile of this repository at 4,096 tokens.
"""

import sys
from pathlib import Path

import planner
from planner.specs import describe
from planner.units import format_bytes

SHIPPED = Path(__file__).parents[1] / "profiles/intel-xeon-2-cores/smollm2-135m__self_sparse.json"


def main(profile: str = str(SHIPPED), context_len: str = "4096") -> None:
    question = {"context_len": int(context_len), "temperature": 1.0, "objective": "tpot"}
    free = planner.plan(profile, **question)
    for share in (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.5):
        cap = int(share * free.estimate.memory_bytes.high)
        try:
            plan = planner.plan(profile, memory_cap_bytes=cap, **question)
        except planner.BadInput as error:  # plain decoding itself no longer fits
            print(f"{format_bytes(cap)}: {error}")
            return
        tpot = plan.estimate.tpot_s
        print(f"{format_bytes(cap)}: {describe(plan.chosen)}, {1e3 * tpot.value:.1f} [{1e3 * tpot.low:.1f}, {1e3 * tpot.high:.1f}] ms per token")


if __name__ == "__main__":
    main(*sys.argv[1:])
