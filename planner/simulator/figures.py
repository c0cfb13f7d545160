"""An arm of a simulation's document, from what came of its requests."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from planner.plans import Interval
from planner.schedules import Limits
from planner.simulations import QUANTILES, Arm, Change, Goodput, Latency, Step, Use
from planner.simulator import metrics
from planner.simulator.engine import Outcome, Server
from planner.simulator.metrics import goodput, keeps, statistic

DRAWS = 100  # of stretches, for an interval
SERIES = 48  # stretches of time that a series has

interval, ratio = (partial(of, draws=DRAWS) for of in (metrics.interval, metrics.ratio))


def report_arm(
    name: str, drafter: str, steps: list[Step], server: Server, outcome: Outcome, limits: Sequence[Limits], off: Outcome | None, seed: int
) -> Arm:  # fmt: skip
    """off  None: this is it"""
    series, served = outcome.series, ~outcome.rejected
    rounds = series.steps * (series.decoding > 0)
    prompts = outcome.input_len[served].sum()
    kept = [_goodput(outcome, one, seed) for one in limits]
    return Arm(
        name=name, drafter=drafter, steps=steps, kv_tokens=server.room.tokens, served=int(served.sum()), rejected=int(outcome.rejected.sum()),
        ttft_s=_latency(outcome, "ttft_s", seed), tpot_s=_latency(outcome, "tpot_s", seed), e2e_s=_latency(outcome, "e2e_s", seed),
        output_tokens_per_s=interval(outcome, goodput(Limits(), tokens=True), seed=seed) or _exactly(0.0), goodput=kept, duration_s=max(0.0, outcome.makespan_s),
        busy=_use(outcome, server.replicas, np.ones(len(series.start_s))), kv=_use(outcome, server.replicas, series.kv_share),
        running=float((rounds * series.decoding).sum() / max(1, rounds.sum())),
        tokens_per_round=outcome.tokens_per_round if outcome.rounds.sum() else 0.0,
        preemptions=int(outcome.preemptions.sum()), prefix_hits=min(1.0, float(outcome.reused_tokens.sum() / prompts)) if prompts else 0.0,
        against_off=None if off is None else _change(outcome, off, limits, seed),
    )  # fmt: skip


def overloaded(outcome: Outcome) -> bool:
    """Whether requests came faster than they were served: the last tenth of them waits longer than it decodes, and far longer than the first."""
    order = np.argsort(outcome.arrival_s, kind="stable")
    order = order[~outcome.rejected[order]]
    if not len(order):
        return False
    tenth = max(1, len(order) // 10)
    first, last = (np.median(outcome.ttft_s[part]) for part in (order[:tenth], order[-tenth:]))
    return bool(last > 3 * first and last > np.median((outcome.finish_s - outcome.first_token_s)[order[-tenth:]]))


def _latency(outcome: Outcome, name: str, seed: int) -> Latency | None:
    found = {of: interval(outcome, statistic(name, of), seed=seed) for of in ("mean", "p50", "p90", "p99")}
    if None in found.values():
        return None
    times = getattr(outcome, name)
    return Latency(**found, quantiles=np.percentile(times[np.isfinite(times)], QUANTILES).tolist())


def _goodput(outcome: Outcome, limits: Limits, seed: int) -> Goodput:
    return Goodput(
        limits=limits, share=interval(outcome, partial(_share, limits), seed=seed) or _exactly(0.0),
        requests_per_s=interval(outcome, goodput(limits), seed=seed) or _exactly(0.0),
        output_tokens_per_s=interval(outcome, goodput(limits, tokens=True), seed=seed) or _exactly(0.0),
    )  # fmt: skip


def _change(outcome: Outcome, off: Outcome, limits: Sequence[Limits], seed: int) -> Change:
    def of(figure) -> Interval | None:
        found = ratio(outcome, off, figure, seed=seed)
        return found and Interval(value=found.value - 1, low=found.low - 1, high=found.high - 1)

    return Change(
        ttft=of(statistic("ttft_s", "mean")), tpot=of(statistic("tpot_s", "mean")), e2e=of(statistic("e2e_s", "mean")),
        goodput=[of(partial(_share, one)) for one in limits],
    )  # fmt: skip


def _share(limits: Limits, outcome: Outcome, which: np.ndarray) -> float:
    return float(keeps(outcome, limits)[which].mean())


def _exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _use(outcome: Outcome, replicas: int, level: np.ndarray) -> Use:
    """Of a level that each row of the series has while it lasts, 0 between them; over replicas and time."""
    series, begin_s = outcome.series, float(outcome.arrival_s.min())
    edges = begin_s + np.linspace(0, max(outcome.makespan_s, 1e-9), SERIES + 1)
    total = np.zeros(SERIES + 1)
    for replica in np.unique(series.replica):
        own = series.replica == replica
        start, end = series.start_s[own], series.end_s[own]
        knots = np.stack([start, end], axis=1).ravel()
        total += np.interp(edges, knots, np.stack([np.zeros(len(start)), (end - start) * level[own]], axis=1).ravel().cumsum())
    over_time = np.clip(np.diff(total) / np.diff(edges) / replicas, 0.0, 1.0)
    return Use(mean=float(over_time.mean()), max=float(np.clip(level.max(initial=0.0), 0, 1)), series=[round(float(share), 4) for share in over_time])
