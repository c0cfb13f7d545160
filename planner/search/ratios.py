"""How many times one measured or predicted quantity is another, with a 90 % interval. Everything is judged on a log scale."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from planner.plans import CONFIDENCE, Interval

Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


def around(value: float, half: float) -> Interval:
    """half  of the width, of the logarithm"""
    return Interval(value=value, low=float(value * np.exp(-half)), high=float(value * np.exp(half)))


def log_half(interval: Interval) -> float:
    """Half the width of an interval on a log scale; that above the value alone where it reaches down to 0."""
    if interval.low > 0:
        return float(np.log(interval.high / interval.low)) / 2
    return float(np.log(max(interval.high, interval.value) / interval.value))


def ratio_of(after: Interval, before: Interval) -> Interval:
    """Of two quantities that know their own intervals, and nothing of each other."""
    return around(after.value / before.value, float(np.hypot(log_half(after), log_half(before))))


def mean_of(values: Sequence[float], drift: float = 0.0) -> Interval:
    """Median of repeated timings; the interval is that of a mean of logarithms, and of the machine's drift.

    drift  logarithm by which the same thing measured again was off
    """
    array = np.asarray(values, dtype=float)
    half = 0.0
    if len(array) > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * np.log(array).std(ddof=1) / np.sqrt(len(array)))
    return around(float(np.median(array)), float(np.hypot(half, Z * drift)))


def paired(after: Sequence[float], before: Sequence[float]) -> tuple[Interval, bool]:
    """Geometric mean of the ratios of pairs, and whether there are enough of them to say how they scatter."""
    logs = np.log(np.asarray(after, dtype=float) / np.asarray(before, dtype=float))
    if len(logs) < 2:
        return around(float(np.exp(logs.mean())), 0.0), False
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return around(float(np.exp(logs.mean())), half), True
