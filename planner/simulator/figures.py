"""From what came of requests to an arm's figures, with intervals over stretches of the run.

Requests that come one after the other meet the same queue, so what is drawn again is stretches of them, not requests (moving on
from Künsch 1989: fixed blocks). Two arms are drawn alike, since they served the same requests: what both share cancels.

N requests    S  stretches    D  draws
"""

from collections.abc import Callable, Sequence

import numpy as np

from planner.plans import CONFIDENCE, Interval
from planner.schedules import Limits
from planner.simulations import Arm, Change, Goodput, Latency, Step, Use
from planner.simulator.engine import Outcome, Server

STRETCHES, DRAWS = 24, 200
PERCENTILES = (50, 90, 99)
SERIES = 48  # stretches of time that a series has


class Drawn:
    """Requests of a run drawn again, the same for every arm."""

    def __init__(self, arrival_s: np.ndarray, seed: int):
        stretches = np.array_split(np.argsort(arrival_s, kind="stable"), min(STRETCHES, len(arrival_s)))
        chosen = np.random.default_rng([seed, 7]).integers(len(stretches), size=(DRAWS, len(stretches)))
        self.draws = [np.concatenate([stretches[i] for i in own]) for own in chosen]  # [D] of [N]

    def interval(self, figure: Callable[[np.ndarray], float], n: int) -> Interval | None:
        """Of a figure of some requests, by their places; None where it is not a number for all of them."""
        value = figure(np.arange(n))
        if not np.isfinite(value):
            return None
        found = np.array([figure(draw) for draw in self.draws])
        low, high = np.quantile(found[np.isfinite(found)], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(value=float(value), low=float(min(low, value)), high=float(max(high, value)))

    def latency(self, seconds: np.ndarray) -> Latency | None:
        """nan where a request has none."""
        if not np.isfinite(seconds).any():
            return None
        at = lambda draw: np.concatenate([[_mean(seconds[draw])], np.nanpercentile(seconds[draw], PERCENTILES)])
        value, found = at(np.arange(len(seconds))), np.array([at(draw) for draw in self.draws])
        bounds = np.nanquantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        mean, *rest = (Interval(value=float(v), low=float(min(v, a)), high=float(max(v, b))) for v, a, b in zip(value, *bounds, strict=True))
        return Latency(mean=mean, **{f"p{p}": interval for p, interval in zip(PERCENTILES, rest, strict=True)})


def report_arm(
    name: str, drafter: str, steps: list[Step], server: Server, outcome: Outcome, limits: Sequence[Limits], drawn: Drawn, off: Outcome | None
) -> Arm:  # fmt: skip
    """off  None: this is it"""
    n, series = len(outcome.arrival_s), outcome.series
    served = ~outcome.rejected
    duration_s = outcome.makespan_s
    share = 1 / duration_s if duration_s else 0.0
    rounds = series.steps * (series.decoding > 0)
    busy_s = _over_time(outcome, server.replicas, np.ones(len(series.start_s)))
    kv = _over_time(outcome, server.replicas, series.kv_share)
    prompts = outcome.input_len[served].sum()
    return Arm(
        name=name, drafter=drafter, steps=steps, kv_tokens=server.room.tokens, served=int(served.sum()), rejected=int(outcome.rejected.sum()),
        ttft_s=drawn.latency(outcome.ttft_s), tpot_s=drawn.latency(outcome.tpot_s), e2e_s=drawn.latency(outcome.e2e_s),
        output_tokens_per_s=drawn.interval(lambda draw: float((outcome.output_len * served)[draw].sum()) * share, n),
        goodput=[_goodput(outcome, one, drawn, share) for one in limits],
        duration_s=duration_s, busy=_use(busy_s, busy_s), kv=_use(kv, series.kv_share),
        running=float((rounds * series.decoding).sum() / max(1, rounds.sum())),
        tokens_per_round=outcome.tokens_per_round if outcome.rounds.sum() else 0.0,
        preemptions=int(outcome.preemptions.sum()), prefix_hits=min(1.0, float(outcome.reused_tokens.sum() / prompts)) if prompts else 0.0,
        against_off=None if off is None else _change(outcome, off, limits, drawn),
    )  # fmt: skip


def kept(outcome: Outcome, limits: Limits) -> np.ndarray:
    """[N] bool: served within the limits; a request of one token has no time per token, and keeps any limit of it."""
    found = ~outcome.rejected
    if limits.tpot_s is not None:
        found = found & ~(outcome.tpot_s > limits.tpot_s)
    return found & (outcome.ttft_s <= limits.ttft_s) if limits.ttft_s is not None else found


def _goodput(outcome: Outcome, limits: Limits, drawn: Drawn, share: float) -> Goodput:
    good, n = kept(outcome, limits), len(outcome.arrival_s)
    return Goodput(
        limits=limits, share=drawn.interval(lambda draw: float(good[draw].mean()), n),
        requests_per_s=drawn.interval(lambda draw: float(good[draw].sum()) * share, n),
        output_tokens_per_s=drawn.interval(lambda draw: float((outcome.output_len * good)[draw].sum()) * share, n),
    )  # fmt: skip


def _change(outcome: Outcome, off: Outcome, limits: Sequence[Limits], drawn: Drawn) -> Change:
    n = len(outcome.arrival_s)

    def of(name: str) -> Interval | None:
        """Over requests that both served."""
        own, base = getattr(outcome, name), getattr(off, name)
        both = np.isfinite(own) & np.isfinite(base)
        own, base = np.where(both, own, np.nan), np.where(both, base, np.nan)
        return drawn.interval(lambda draw: _ratio(_mean(own[draw]), _mean(base[draw])), n) if both.any() else None

    def good(one: Limits) -> Interval | None:
        own, base = kept(outcome, one), kept(off, one)
        return drawn.interval(lambda draw: _ratio(own[draw].mean(), base[draw].mean()), n)

    written = [run.output_len * ~run.rejected / max(run.makespan_s, 1e-9) for run in (outcome, off)]
    return Change(
        ttft=of("ttft_s"), tpot=of("tpot_s"), e2e=of("e2e_s"), goodput=[good(one) for one in limits],
        output_tokens_per_s=drawn.interval(lambda draw: _ratio(written[0][draw].sum(), written[1][draw].sum()), n),
    )  # fmt: skip


def _ratio(own: float, base: float) -> float:
    return float(own / base - 1) if base > 0 else np.nan


def _mean(values: np.ndarray) -> float:
    """Without nan; nan where nothing is left."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def _over_time(outcome: Outcome, replicas: int, level: np.ndarray) -> np.ndarray:
    """[SERIES] means over equal stretches of the run and over replicas, of a level that each row of the series has while it lasts."""
    series, begin_s = outcome.series, float(outcome.arrival_s.min())
    edges = begin_s + np.linspace(0, max(outcome.makespan_s, 1e-9), SERIES + 1)
    total = np.zeros(SERIES + 1)
    for replica in range(replicas):
        own = series.replica == replica
        start, end, height = series.start_s[own], series.end_s[own], level[own]
        if len(start):
            knots = np.stack([start, end], axis=1).ravel()
            area = np.stack([np.zeros(len(start)), (end - start) * height], axis=1).ravel().cumsum()
            total += np.interp(edges, knots, area)
    return np.clip(np.diff(total) / np.diff(edges) / replicas, 0.0, 1.0)


def _use(over_time: np.ndarray, levels: np.ndarray) -> Use:
    return Use(mean=float(over_time.mean()), max=float(np.clip(levels.max(initial=0.0), 0, 1)), series=[round(float(x), 4) for x in over_time])
