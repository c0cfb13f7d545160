"""Hyperparameters of a Gaussian process: what makes the residuals likeliest, near where a prior holds them.

Rasmussen and Williams 2006, chapter 5. A dozen cells say little about six hyperparameters, so each has a log-normal prior.
"""

from collections.abc import Callable

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize

Hyper = dict[str, float]


def fit_hyper(covariance: Callable[[Hyper], np.ndarray], residual: np.ndarray, priors: dict[str, tuple[float, float]]) -> Hyper:
    """covariance  [m, m] of the measured residuals [m], their noise included; priors  medians and standard deviations of logarithms"""
    centre = np.log([median for median, _ in priors.values()])
    spread = np.array([sd for _, sd in priors.values()])

    def cost(logs: np.ndarray) -> float:
        try:
            factor = cholesky(covariance(dict(zip(priors, np.exp(logs), strict=True))), lower=True)
        except np.linalg.LinAlgError:
            return 1e10
        white = solve_triangular(factor, residual, lower=True)
        return float(0.5 * white @ white + np.log(np.diag(factor)).sum() + 0.5 * np.square((logs - centre) / spread).sum())

    found = minimize(cost, centre, method="L-BFGS-B", bounds=list(zip(centre - 3 * spread, centre + 3 * spread, strict=True)))
    return dict(zip(priors, np.exp(found.x), strict=True))
