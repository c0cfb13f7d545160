"""What a drafter's path probabilities are worth, from texts: how often a text went down a path of which it said so much.

Products of marginals are overconfident, the deeper the more, and an overconfident tree is too large. The map from what was
reported to what was observed is monotone, so that the best nodes stay the best; monotone least squares on means of bins.
"""

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import logit

from planner.specs import Calibration

BIN = 0.5  # width in log-odds: fine where a path is nearly certain, as where it is nearly impossible
EDGE = 8.0  # log-odds beyond which all paths are one bin: a probability of 0.0003


def fit_calibration(
    reported: np.ndarray,  # [n] path probabilities of nodes
    member: np.ndarray,  # [n] whether the text went through them
    weights: np.ndarray | None = None,  # [n] how often a round meets them; None: all alike
) -> Calibration | None:
    """Observed frequency by reported probability; None where no node has a weight."""
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
