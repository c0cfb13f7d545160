"""What an adaptive tree is told before a run: what the drafter's probabilities are worth, and what a second is.

R  rounds     N  nodes of the largest tree
"""

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import logit

from planner.specs import Calibration

BIN = 0.5  # width in log-odds: fine where a path is nearly certain, as where it is nearly impossible
EDGE = 8.0  # log-odds beyond which all paths are one bin: a probability of 0.0003
MAX_ITERATIONS = 100  # of the long-run rate, which converges faster than any geometric series: five or so


def fit_calibration(
    reported: np.ndarray,  # [n] path probabilities of nodes
    member: np.ndarray,  # [n] whether the text went through them
    weights: np.ndarray | None = None,  # [n] how often a round meets them; None: all alike
) -> Calibration | None:
    """How often texts went down a path, by what the drafter gave it; None where no node has a weight.

    Products of marginals are overconfident, the deeper the more, and an overconfident tree is too large. The map is monotone,
    so that the best nodes stay the best: monotone least squares on the means of bins.
    """
    weights = np.ones(len(reported)) if weights is None else weights
    bins = np.floor((np.clip(logit(reported), -EDGE, EDGE) + EDGE) / BIN).astype(int)
    total = np.bincount(bins, weights)
    used = np.flatnonzero(total)
    if not len(used):
        return None
    x = np.bincount(bins, weights * reported)[used] / total[used]
    y = np.bincount(bins, weights * member)[used] / total[used]
    risen = np.concatenate([[True], np.diff(x) > 0]) & (x > 0)
    observed = np.clip(isotonic_regression(y[risen], weights=total[used][risen]).x, 0.0, 1.0)
    return Calibration(reported=(0.0, *x[risen].tolist()), observed=(0.0, *np.maximum.accumulate(observed).tolist()))


def long_run_rate(
    tokens: np.ndarray,  # [R, N + 1] that a round yields with 0, 1, .. N nodes
    seconds: np.ndarray,  # [N + 1] that it takes
    weights: np.ndarray | None = None,  # [R] how often each occurs; None: all alike
) -> float:
    """The most tokens per second that any choice of sizes gets out of these rounds.

    The mean of the ratios is not the ratio of the means: what counts in a run is all tokens over all seconds, so a round
    may only spend time at the rate of the whole run. That rate is the fixed point of "take what maximises tokens - rate x
    seconds in every round, then count" (Dinkelbach 1967); it rises with every step.
    """
    weights = np.ones(len(tokens)) if weights is None else weights
    rows, rate = np.arange(len(tokens)), 0.0
    for _ in range(MAX_ITERATIONS):
        sizes = (tokens - rate * seconds).argmax(1)
        better = float(weights @ tokens[rows, sizes] / (weights @ seconds[sizes]))
        if better <= rate * (1 + 1e-12):
            break
        rate = better
    return rate
