"""Seconds of a round by running batch, draft_len and context: a physical law (step_law.py), and a smooth correction of it.

A Gaussian process on the logarithm corrects the law (Rasmussen and Williams 2006, chapters 2 and 5): how far each term may be
off, a smooth part that all drafters share, since they are verified by one target, and one of each drafter's own. Its posterior
is the uncertainty of a prediction. Steps that a dozen cells cannot place are its noise.

n  cells asked for      m  cells measured
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from planner.cost.gaussian_process import fit_hyper
from planner.cost.step_law import StepLaw

STEP_SD = 0.015  # steps between the measured cells that no cell of a dozen shows
PRIOR_CELLS, PRIOR_WIDTH = 8, 1.2  # so many cells that missed by so many standard deviations are added to those that calibrate
WIDEST_SD = 1.4  # a tenth to ten times: any round is known that well
OUTLIER = 4.0  # standard deviations, beyond which a cell counts no more

# Hyperparameters, as medians and standard deviations of their logarithms.
HYPER = {
    "term": (
        0.20,
        0.2,
    ),  # how far a term may be off, as a share of the round where it weighs most: held near, since a fit hides it where cells are few
    "shared": (0.03, 0.6),  # smooth correction of all drafters
    "own": (0.03, 0.6),  # of each
    "noise": (0.015, 0.4),
    "length": (2.0, 0.4),  # doublings over which a correction stays the same
    "draft_length": (1.2, 0.4),  # the same, of draft_len + 1
}


class At(NamedTuple):
    """Where a round's time is asked for."""

    drafter: np.ndarray  # [n]
    running: np.ndarray  # [n] in doublings, as the next two
    context: np.ndarray  # [n]
    drafts: np.ndarray  # [n] of draft_len + 1
    terms: np.ndarray  # [terms that the cells show, n] of the law, as StepLaw.doubts has them


class StepTime:
    """Round times of an engine, asked for as those of StepLaw."""

    def __init__(self, cells, running: np.ndarray, tokens_per_round: np.ndarray, round_s: np.ndarray, num_drafters: int):
        self._num_drafters = num_drafters
        self.law = StepLaw(cells, running, tokens_per_round, round_s, num_drafters)
        self._at = self._place(cells, running, tokens_per_round)
        self._hyper = fit_hyper(self._covariance, self.law.residual, HYPER)
        self._factor = cholesky(self._covariance(self._hyper), lower=True)
        self._weights = cho_solve((self._factor, True), self.law.residual)
        self._widen = self._calibration()

    def predict(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] seconds, and the standard deviation of a fresh measurement's logarithm [n]."""
        at = self._place(cells, running, tokens_per_round)
        cross = self._kernel(at, self._at, self._hyper)
        explained = self._explained(cross)
        variance = self._pairwise(at, at, self._hyper) - np.einsum("mn,mn->n", explained, explained)
        sd = np.hypot(self._widen * np.sqrt(np.maximum(variance, 0.0) + self._hyper["noise"] ** 2), STEP_SD)
        seconds = self.law.seconds(cells, running, tokens_per_round) * np.exp(cross @ self._weights)
        return seconds, np.minimum(np.hypot(sd, self.law.idle_doubt(cells)), WIDEST_SD)

    def difference_sd(self, a: tuple, b: tuple) -> np.ndarray:
        """[n] standard deviation of the logarithm of the ratio of two rounds, each (cells, running, tokens_per_round)."""
        one, other = (self._place(*each) for each in (a, b))
        moved = self._explained(self._kernel(one, self._at, self._hyper)) - self._explained(self._kernel(other, self._at, self._hyper))
        variance = sum(self._pairwise(at, at, self._hyper) for at in (one, other)) - 2 * self._pairwise(one, other, self._hyper)
        variance = np.maximum(variance - np.einsum("mn,mn->n", moved, moved), 0.0) + 2 * self._hyper["noise"] ** 2
        return np.sqrt(self._widen**2 * variance + 2 * STEP_SD**2 + sum(self.law.idle_doubt(cells) ** 2 for cells, *_ in (a, b)))

    def _place(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> At:
        context = cells.context_len + cells.output_len / 2  # mean tokens of a request's cache
        doubts = self.law.doubts(cells, running, tokens_per_round)
        return At(cells.drafter, np.log2(running), np.log2(context), np.log2(cells.draft_len + 1), doubts)

    def _explained(self, cross: np.ndarray) -> np.ndarray:
        """[m, n] what the measured cells say of others, from covariances [n, m], so that its squares add up to a variance."""
        return solve_triangular(self._factor, cross.T, lower=True, check_finite=False)

    def _kernel(self, a: At, b: At, hyper: dict) -> np.ndarray:
        """[a, b] covariance of the logarithms of two rounds."""
        one, other = _scaled(a, hyper), _scaled(b, hyper)
        drafters = np.arange(self._num_drafters)
        scale = hyper["shared"] ** 2 + hyper["own"] ** 2 * ((drafters[:, None] == drafters) & (drafters > 0))
        covariance = one @ other.T  # in place from here on: these are the largest arrays of a plan
        covariance -= 0.5 * np.square(one).sum(1)[:, None]
        covariance -= 0.5 * np.square(other).sum(1)  # half the squared distance, negative
        np.exp(covariance, out=covariance)
        covariance *= scale[:, b.drafter][a.drafter]
        covariance += (hyper["term"] ** 2 * a.terms.T) @ b.terms
        return covariance

    def _pairwise(self, a: At, b: At, hyper: dict) -> np.ndarray:
        """[n] the same, cell by cell."""
        far = np.square(_scaled(a, hyper) - _scaled(b, hyper)).sum(1)
        same = (a.drafter == b.drafter) & (a.drafter > 0)
        terms = hyper["term"] ** 2 * np.einsum("fn,fn->n", a.terms, b.terms)
        return terms + (hyper["shared"] ** 2 + hyper["own"] ** 2 * same) * np.exp(-0.5 * far)

    def _covariance(self, hyper: dict) -> np.ndarray:
        """[m, m] of the measured cells."""
        return self._kernel(self._at, self._at, hyper) + hyper["noise"] ** 2 * np.eye(len(self._at.running))

    def _calibration(self) -> float:
        """How much wider intervals must be than the process says, by cells predicted from all others: law and correction fitted without them."""
        covariance, standardised = self._factor @ self._factor.T, []
        for fold, rest, residual in self.law.refits():
            factor, cross = cho_factor(covariance[np.ix_(rest, rest)], lower=True), covariance[np.ix_(fold, rest)]
            error = residual[fold] - cross @ cho_solve(factor, residual[rest])
            variance = np.diag(covariance)[fold] - np.einsum("ij,ji->i", cross, cho_solve(factor, cross.T))
            standardised.append(error / np.sqrt(variance))
        squares = np.minimum(np.square(np.concatenate(standardised)), OUTLIER**2)
        return float(np.sqrt((squares.sum() + PRIOR_CELLS * PRIOR_WIDTH**2) / (len(squares) + PRIOR_CELLS)))


def _scaled(at: At, hyper: dict) -> np.ndarray:
    """[n, 3] coordinates in lengths over which a correction stays the same."""
    return np.stack([at.running / hyper["length"], at.context / hyper["length"], at.drafts / hyper["draft_length"]], axis=1)
