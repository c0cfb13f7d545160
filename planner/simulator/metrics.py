"""What a run's requests say together: percentiles, throughput, goodput, with intervals; one run, or two on the same arrivals.

Requests that are in the system together are not independent. Intervals come from resampling stretches of consecutive arrivals
(a block bootstrap), and two runs are compared by resampling the same stretches of both.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from planner.errors import BadInput
from planner.plans import CONFIDENCE, Interval
from planner.schedules import Limits
from planner.simulator.engine import Outcome

NUM_BLOCKS = 32  # stretches of arrivals; fewer where there are fewer requests
NUM_DRAWS = 300
PERCENTILES = (50, 90, 95, 99)

Statistic = Callable[[Outcome, np.ndarray], float]  # of the requests with these indices; nan where they do not say


class Summary(NamedTuple):
    """Of a run. Requests that were refused count in `rejected` alone, and as missing every limit. None: not defined, as nobody was served."""

    requests: int
    rejected: int
    makespan_s: float
    ttft_s: dict[str, Interval | None]  # mean, p50, p90, p95, p99
    tpot_s: dict[str, Interval | None]
    e2e_s: dict[str, Interval | None]
    requests_per_s: float  # finished, over the makespan
    output_tokens_per_s: float
    within: Interval | None  # share of all requests that keep the limits
    goodput_requests_per_s: Interval | None  # finished within the limits
    goodput_tokens_per_s: Interval | None  # output tokens of these
    tokens_per_round: float
    preemptions: int
    reused_share: float  # of prompt tokens, found in the prefix cache
    busy_share: float  # time in steps, over replicas and the makespan
    mean_running: float  # requests at once, all replicas together, over the makespan
    mean_waiting: float
    mean_kv_share: float  # of the blocks of a replica, over the makespan
    max_kv_share: float


def summarise(outcome: Outcome, limits: Limits = Limits(), *, seed: int = 0) -> Summary:
    """All of it, with intervals at 90 %."""
    series, makespan_s = outcome.series, outcome.makespan_s
    replicas = max(int(series.replica.max(initial=0)), int(outcome.replica.max())) + 1
    span_s = series.end_s - series.start_s
    total_s = makespan_s or np.nan
    times = {name: {str(of): interval(outcome, statistic(name, of), seed=seed) for of in ("mean", *(f"p{p}" for p in PERCENTILES))} for name in TIMES}
    served = ~outcome.rejected
    return Summary(
        requests=len(outcome.arrival_s),
        rejected=int(outcome.rejected.sum()),
        makespan_s=makespan_s,
        ttft_s=times["ttft_s"],
        tpot_s=times["tpot_s"],
        e2e_s=times["e2e_s"],
        requests_per_s=float(served.sum() / total_s),
        output_tokens_per_s=float(outcome.output_len[served].sum() / total_s),
        within=interval(outcome, lambda run, which: float(keeps(run, limits)[which].mean()), seed=seed),
        goodput_requests_per_s=interval(outcome, goodput(limits), seed=seed),
        goodput_tokens_per_s=interval(outcome, goodput(limits, tokens=True), seed=seed),
        tokens_per_round=outcome.tokens_per_round,
        preemptions=int(outcome.preemptions.sum()),
        reused_share=float(outcome.reused_tokens[served].sum() / max(outcome.input_len[served].sum(), 1)),
        busy_share=float(span_s.sum() / (replicas * total_s)),
        mean_running=float(span_s @ series.running / total_s),
        mean_waiting=float(span_s @ series.waiting / total_s),
        mean_kv_share=float(span_s @ series.kv_share / (replicas * total_s)),
        max_kv_share=float(series.kv_share.max(initial=0.0)),
    )


TIMES = ("ttft_s", "tpot_s", "e2e_s")


def statistic(name: str, of: str) -> Statistic:
    """`mean` or a percentile, as in `p99`, of one of TIMES; requests without it (refused; one token) are left out."""
    if name not in TIMES or not (of == "mean" or (of[:1] == "p" and of[1:].replace(".", "", 1).isdigit() and float(of[1:]) <= 100)):
        raise BadInput(f"a statistic is mean or p0 to p100 of {', '.join(TIMES)}, got {of} of {name}")

    def of_requests(outcome: Outcome, which: np.ndarray) -> float:
        values = getattr(outcome, name)[which]
        values = values[np.isfinite(values)]
        if not len(values):
            return np.nan
        return float(values.mean() if of == "mean" else np.percentile(values, float(of[1:])))

    return of_requests


def keeps(outcome: Outcome, limits: Limits) -> np.ndarray:
    """[requests] bool: finished within the limits. A single token has no tpot and keeps that limit."""
    kept = ~outcome.rejected
    if limits.ttft_s is not None:
        kept &= outcome.ttft_s <= limits.ttft_s
    if limits.tpot_s is not None:
        kept &= (outcome.output_len == 1) | (outcome.tpot_s <= limits.tpot_s)
    return kept


def goodput(limits: Limits, *, tokens: bool = False) -> Statistic:
    """Requests per second, or their output tokens, within the limits: of all the run, by what the chosen requests do on average."""

    def of_requests(outcome: Outcome, which: np.ndarray) -> float:
        good = keeps(outcome, limits) * (outcome.output_len if tokens else 1)
        return float(good[which].mean() * len(good) / outcome.makespan_s) if outcome.makespan_s else np.nan

    return of_requests


def interval(outcome: Outcome, of: Statistic, *, seed: int = 0, blocks: int = NUM_BLOCKS, draws: int = NUM_DRAWS) -> Interval | None:
    """A statistic and its 90 % interval; None where it is not defined."""
    return compared([outcome], lambda value: value, of, seed=seed, blocks=blocks, draws=draws)


def ratio(outcome: Outcome, base: Outcome, of: Statistic, *, seed: int = 0, blocks: int = NUM_BLOCKS, draws: int = NUM_DRAWS) -> Interval | None:
    """A statistic over that of another run on the same arrivals."""
    return compared([outcome, base], lambda value, other: value / other if other else np.nan, of, seed=seed, blocks=blocks, draws=draws)


def difference(outcome: Outcome, base: Outcome, of: Statistic, *, seed: int = 0, blocks: int = NUM_BLOCKS, draws: int = NUM_DRAWS) -> Interval | None:
    """A statistic minus that of another run on the same arrivals."""
    return compared([outcome, base], lambda value, other: value - other, of, seed=seed, blocks=blocks, draws=draws)


def compared(outcomes: list[Outcome], combine: Callable[..., float], of: Statistic, *, seed: int, blocks: int, draws: int) -> Interval | None:
    """A function of the same statistic in each of several runs on the same arrivals, with its 90 % interval; None where it is not defined."""
    arrival_s = outcomes[0].arrival_s
    if any(len(other.arrival_s) != len(arrival_s) or (other.arrival_s != arrival_s).any() for other in outcomes[1:]):
        raise BadInput("runs must have the same arrivals to be compared; simulate the same requests")
    order = np.argsort(arrival_s, kind="stable")
    stretches = np.array_split(order, min(blocks, len(order)))
    rng = np.random.default_rng(seed)
    value = combine(*(of(outcome, order) for outcome in outcomes))
    if not np.isfinite(value):
        return None
    resampled = (np.concatenate([stretches[i] for i in rng.integers(len(stretches), size=len(stretches))]) for _ in range(draws))
    drawn = [combine(*(of(outcome, which) for outcome in outcomes)) for which in resampled]
    known = [value, *(one for one in drawn if np.isfinite(one))]
    low, high = np.percentile(known, [50 - 50 * CONFIDENCE, 50 + 50 * CONFIDENCE])
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))
