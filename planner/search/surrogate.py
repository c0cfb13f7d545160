"""Which candidate to evaluate next, where an evaluation is dear: a Gaussian process over a finite set, by expected improvement.

A candidate is described by coordinates: text for a choice, a number for an amount; one that it does not have is absent.
On grids of a few dozen configurations this needs about two thirds of the evaluations of random order; Optuna's TPE, which proposes points
between the candidates, needs as many as random order (benchmarks/study.py), and its own Gaussian process needs torch.

Source: expected improvement, Jones et al. 1998; the kernel's scale by marginal likelihood, Rasmussen and Williams, chapter 5.

n  candidates        D  features        s  finished        p  pending
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr

Coordinates = dict[str, str | float]

NUM_RANDOM = 5  # finished before the process has a say
LOG_SPAN = 8  # amounts that span more than this factor are told apart by ratio
CHOICE = 0.5**0.5  # of a feature that stands for one choice, so that two choices lie one apart
LENGTHS = (0.25, 0.5, 1.0, 2.0)  # of the kernel, in spans of an amount
NOISE = 0.02  # of an evaluation, as a part of the variance of costs


def features(coordinates: Sequence[Coordinates]) -> np.ndarray:
    """[n, D] amounts as 0..1, choices one by one; an amount that a candidate does not have lies in the middle."""
    columns = []
    for name in dict.fromkeys(name for point in coordinates for name in point):
        values = [point.get(name) for point in coordinates]
        there = [value for value in values if value is not None]
        if len(set(there)) == 1:
            continue  # says nothing
        if isinstance(there[0], str):
            columns += [[CHOICE * (value == choice) for value in values] for choice in dict.fromkeys(there)]
            continue
        low, high = min(there), max(there)
        scale = np.log if low > 0 and high / low > LOG_SPAN else float
        columns.append([0.5 if value is None else (scale(value) - scale(low)) / (scale(high) - scale(low)) for value in values])
    return np.array(columns, dtype=float).T.reshape(len(coordinates), -1)


def next_candidate(
    x: np.ndarray,  # [n, D]
    costs: dict[int, float],  # of the finished; lower is better
    pending: Sequence[int],  # being evaluated elsewhere
    unseen: Sequence[int],
    rng: np.random.Generator,
) -> int:
    """The unseen candidate from which the largest improvement on the best cost is expected."""
    done, y = list(costs), np.array(list(costs.values()))
    if len(done) + len(pending) < NUM_RANDOM or not done or np.ptp(y) == 0:
        return int(rng.choice(unseen))
    y = (y - y.mean()) / y.std()
    mean, variance = _predict(x, done, y, pending, unseen)
    sd = np.sqrt(variance)
    better = (y.min() - mean) / sd
    gain = sd * (better * ndtr(better) + np.exp(-(better**2) / 2) / np.sqrt(2 * np.pi))
    return int(unseen[int(gain.argmax())])


def _predict(x, done, y, pending, unseen) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance at the unseen. What is pending is certain already, and says nothing about the mean (kriging believer)."""
    best, fit = -np.inf, None
    for length in LENGTHS:
        L = np.linalg.cholesky(_kernel(x[done], x[done], length) + NOISE * np.eye(len(done)))  # [s, s]
        z = np.linalg.solve(L, y)
        amplitude = z @ z / len(y)
        likelihood = -np.log(np.diag(L)).sum() - 0.5 * len(y) * np.log(amplitude)
        if likelihood > best:
            best, fit = likelihood, (length, L, z, amplitude)
    length, L, z, amplitude = fit
    mean = np.linalg.solve(L, _kernel(x[done], x[unseen], length)).T @ z
    known = [*done, *pending]
    L = np.linalg.cholesky(_kernel(x[known], x[known], length) + NOISE * np.eye(len(known)))
    V = np.linalg.solve(L, _kernel(x[known], x[unseen], length))  # [s + p, unseen]
    return mean, amplitude * np.maximum(1 - np.square(V).sum(0), 1e-9)


def _kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.exp(-np.maximum(squared, 0) / (2 * length**2))
