"""What a schedule does to requests that come and go: off, one K everywhere and the schedule on the same arrivals. Needs no torch.

    python examples/simulate_trace.py PROFILE TRACE [REPLICAS]

PROFILE is a serving profile or a schedule; TRACE a file in Mooncake's or Azure's format, or a CSV of arrival_s,input_len,output_len.
"""

import sys

import planner


def main(profile: str, trace: str, replicas: str = "1") -> None:
    asked = planner.AskedSimulation(trace=trace, also=("K=3",), replicas=int(replicas))
    found = planner.simulate(profile, asked, limits=[planner.Limits(tpot_s=0.05, ttft_s=2.0)])
    for arm in found.arms:
        change = f", {100 * arm.against_off.e2e.value:+.1f} % end to end against off" if arm.against_off else ""
        print(f"{arm.name}: TPOT p50 {1e3 * arm.tpot_s.p50.value:.1f} ms, TTFT p99 {arm.ttft_s.p99.value:.2f} s{change}")


if __name__ == "__main__":
    main(*sys.argv[1:])
