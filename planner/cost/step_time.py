"""Seconds of a round by running batch, draft_len and context: a physical law, and a smooth correction of it.

The law is a sum of non-negative terms, fitted to relative errors: reading weights, computing tokens, reading the cache, hinges
where matrix units fill up, drafting, the glue of a round, prompts of other requests that are read in between. A Gaussian
process on the logarithm corrects it (Rasmussen and Williams 2006, chapters 2 and 5): how far each term may be off, a smooth
part that all drafters share, since they are verified by one target, and one of each drafter's own. Its posterior is the
uncertainty of a prediction. Steps of matrix tiles and of graph buckets are its noise: a dozen cells cannot place them.

n  cells asked for      m  cells measured      F  terms of the law
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize, nnls

HINGES = (64, 128, 256, 512)  # tokens of a pass, from where on computing costs more: tile sizes, and what makes a pass compute-bound
TILE = 128
GRAPHS = 512  # tokens of the largest captured pass
FILLS = (16, 64)  # tokens of a pass within which a cost saturates: experts of a mixture are read by a few tokens already, as all of them by many
DRAFT_HINGE = 128  # requests, the same for a drafter's pass over one token of each
IDLE_TAX, IDLE_TAX_SD = 0.12, 0.05  # an idle drafter that nobody measured: 7 to 22 % were seen on an H100
IDLE_CELL_SD = 0.03  # of a cell that was measured: the tax is not quite the same at every load
OUTLIER = 4.0  # standard deviations, beyond which a cell counts no more
STEP_SD = 0.014  # steps between the measured cells that no cell of a dozen shows
LEAST_TERM = 0.1  # a hinge that the cells hardly pass says nothing; other terms are far larger wherever they are
STEPPED = (3, 4, 5, 6)  # terms of the law that know graphs and tiles, left out where cells are predicted as well without
SIMPLER, OUTLYING = 1.05, 0.2
FOLDS = 30
PRIOR_CELLS, PRIOR_WIDTH = 8, 1.1  # so many cells that missed by so many standard deviations are added to those that calibrate

# Hyperparameters, as medians and standard deviations of their logarithms.
HYPER = {
    "term": (0.10, 0.7),  # how far a term may be off, as a share of the round where it weighs most
    "shared": (0.03, 0.6),  # smooth correction of all drafters
    "own": (0.03, 0.6),  # of each
    "noise": (0.015, 0.4),
    "length": (2.0, 0.4),  # doublings over which a correction stays the same
    "draft_length": (1.2, 0.4),  # the same, of draft_len + 1
}


def graph_size(running: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n] requests that a captured pass over `rows` tokens of each holds, `running` of them real.

    vLLM captures passes of 1, 2, 4 and multiples of 8 tokens, each rounded up to whole requests; above GRAPHS nothing is padded.
    """
    least = np.maximum(running - 1, 0) * rows + 1  # a pass of fewer tokens has not room for all
    size = np.where(least <= 4, np.exp2(np.ceil(np.log2(least) - 1e-6)), 8 * np.ceil(least / 8 - 1e-6))
    return np.where(running * rows > GRAPHS, running, np.maximum(running, np.ceil(size / rows - 1e-6)))


class At(NamedTuple):
    """Where a round's time is asked for."""

    drafter: np.ndarray  # [n]
    running: np.ndarray  # [n] in doublings, as the next two
    context: np.ndarray  # [n]
    drafts: np.ndarray  # [n] of draft_len + 1
    terms: np.ndarray  # [terms that the cells show, n] as shares of the round's time, 1 where they weighed most


class StepTime:
    """Round times of an engine."""

    def __init__(self, cells, running: np.ndarray, tokens_per_round: np.ndarray, round_s: np.ndarray, num_drafters: int):
        self._num_drafters = num_drafters
        idle = (cells.drafter > 0) & (cells.draft_len == 0)
        self._log_tax, self._tax_sd = np.full(num_drafters, np.log1p(IDLE_TAX)), np.full(num_drafters, IDLE_TAX_SD)
        self._log_tax[0] = self._tax_sd[0] = 0.0
        terms = self._terms(cells, running, tokens_per_round) * self._idle_tax(cells)[:, None]
        self._seen = terms.max(0) > LEAST_TERM
        self._stepped = np.isin(np.arange(terms.shape[1]), STEPPED)
        terms = np.where(self._seen, terms, 0.0)
        self._unit = np.where(self._seen, terms.max(0), 1.0)
        shares = terms / self._unit / round_s[:, None]
        weight = np.where(idle & np.any(~idle & (cells.draft_len == 0)), 0.1, 1.0)  # an idle drafter says little about off where that was measured
        if _missed(np.where(self._stepped, 0.0, shares), weight) < SIMPLER * _missed(shares, weight):
            self._seen, shares = self._seen & ~self._stepped, np.where(self._stepped, 0.0, shares)
        self._coefficients = nnls(shares * weight[:, None], weight)[0]
        for drafter in np.unique(cells.drafter[idle]):
            self._learn_tax(drafter, np.log(round_s / self.law(cells, running, tokens_per_round))[idle & (cells.drafter == drafter)])
        self._reach = np.where(self._seen, shares.max(0), 1.0)  # the largest share that a unit of each term takes of a measured round

        self._at = self._place(cells, running, tokens_per_round)
        residual = np.log(round_s) - np.log(self.law(cells, running, tokens_per_round))
        self._hyper = self._fit(residual)
        self._factor = self._cholesky(self._hyper)
        self._weights = cho_solve((self._factor, True), residual)
        self._widen = self._calibration(shares, weight, residual)

    def law(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> np.ndarray:
        """[n] seconds by the physical law alone."""
        terms = self._each_term(cells, running, tokens_per_round)
        seconds = sum(self._coefficients[f] / self._unit[f] * terms[f]() for f in np.flatnonzero(self._coefficients))
        return np.maximum(seconds, 1e-9) * self._idle_tax(cells)

    def predict(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] seconds, and the standard deviation of a fresh measurement's logarithm [n]."""
        at = self._place(cells, running, tokens_per_round)
        cross = self._kernel(at, self._at, self._hyper)
        explained = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)  # [m, n]
        variance = self._own_variance(at, self._hyper) - np.einsum("mn,mn->n", explained, explained)
        sd = np.hypot(self._widen * np.sqrt(np.maximum(variance, 0.0) + self._hyper["noise"] ** 2), STEP_SD)
        seconds = self.law(cells, running, tokens_per_round) * np.exp(cross @ self._weights)
        return seconds, np.hypot(sd, self._idle_doubt(cells))

    def difference_sd(self, a: tuple, b: tuple) -> np.ndarray:
        """[n] standard deviation of the logarithm of the ratio of two rounds, each (cells, running, tokens_per_round)."""
        places = [self._place(*one) for one in (a, b)]
        explained = [solve_triangular(self._factor, self._kernel(at, self._at, self._hyper).T, lower=True, check_finite=False) for at in places]
        moved = explained[0] - explained[1]
        variance = sum(self._own_variance(at, self._hyper) for at in places) - 2 * self._pairwise(*places, self._hyper)
        variance = np.maximum(variance - np.einsum("mn,mn->n", moved, moved), 0.0) + 2 * self._hyper["noise"] ** 2
        return np.sqrt(self._widen**2 * variance + 2 * STEP_SD**2 + self._idle_doubt(a[0]) ** 2 + self._idle_doubt(b[0]) ** 2)

    def elasticity(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> np.ndarray:
        """[n] how many percent a round takes longer for a percent more of requests, in [0, 1]."""
        more = self.law(cells, 1.25 * running, tokens_per_round) / self.law(cells, running, tokens_per_round)
        return np.clip(np.log(more) / np.log(1.25), 0.0, 1.0)

    def _terms(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> np.ndarray:
        """[n, F] every term of the law, up to factors."""
        return np.stack([term() for term in self._each_term(cells, running, tokens_per_round)], axis=1).astype(float)

    def _each_term(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> list[Callable[[], np.ndarray]]:
        """Of the target first, then of each drafter. Functions: a fit leaves most terms at zero, and those need not be computed."""
        k = cells.draft_len
        rows = running * (k + 1)  # tokens that the target's pass computes
        cache = running * (cells.context_len + cells.output_len / 2)  # tokens that it reads
        padded = graph_size(running, k + 1) * (k + 1)
        others = np.maximum(running - 1, 0)  # nobody waits for a prompt of his own between two tokens
        terms = [
            lambda: np.ones(len(running)),
            lambda: running,
            lambda: rows,
            lambda: padded,
            lambda: np.maximum(np.ceil(padded / TILE - 1e-6) - 1, 0),
            *(lambda fill=fill: -np.expm1(-padded / fill) for fill in FILLS),
            *(lambda hinge=hinge: np.maximum(rows - hinge, 0) / hinge for hinge in HINGES),
            lambda: cache,
            lambda: cache * k,
            lambda: others * tokens_per_round * cells.context_len / cells.output_len,  # prompt tokens read during a round
        ]
        for drafter in range(1, self._num_drafters):
            steps = np.where(cells.drafter == drafter, k, 0)
            active = steps > 0
            terms += [
                lambda active=active: active,
                lambda active=active: active * running,
                lambda steps=steps: steps,
                lambda steps=steps: steps * running,
                lambda steps=steps: steps * np.maximum(running - DRAFT_HINGE, 0) / DRAFT_HINGE,
                lambda steps=steps: steps * cache,
            ]
        return terms

    def _place(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> At:
        each, seconds = self._each_term(cells, running, tokens_per_round), self.law(cells, running, tokens_per_round)
        terms = np.stack([each[f]() / (self._unit[f] * self._reach[f] * seconds) for f in np.flatnonzero(self._seen)])
        context = cells.context_len + cells.output_len / 2  # mean tokens of a request's cache
        return At(cells.drafter, np.log2(running), np.log2(context), np.log2(cells.draft_len + 1), terms)

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

    def _own_variance(self, at: At, hyper: dict) -> np.ndarray:
        return self._pairwise(at, at, hyper)

    def _fit(self, residual: np.ndarray) -> dict:
        """The hyperparameters that the residuals make likeliest, near where engines usually are."""
        centre = np.log([median for median, _ in HYPER.values()])
        spread = np.array([sd for _, sd in HYPER.values()])

        def cost(logs: np.ndarray) -> float:
            try:
                factor = self._cholesky(dict(zip(HYPER, np.exp(logs), strict=True)))
            except np.linalg.LinAlgError:
                return 1e10
            white = solve_triangular(factor, residual, lower=True)
            return float(0.5 * white @ white + np.log(np.diag(factor)).sum() + 0.5 * np.square((logs - centre) / spread).sum())

        found = minimize(cost, centre, method="L-BFGS-B", bounds=list(zip(centre - 3 * spread, centre + 3 * spread, strict=True)))
        return dict(zip(HYPER, np.exp(found.x), strict=True))

    def _cholesky(self, hyper: dict) -> np.ndarray:
        return cholesky(self._kernel(self._at, self._at, hyper) + hyper["noise"] ** 2 * np.eye(len(self._at.running)), lower=True)

    def _learn_tax(self, drafter: int, residual: np.ndarray) -> None:
        """The tax of an idle drafter, from cells about the law with the usual tax: a mean with a prior."""
        precision = 1 / IDLE_TAX_SD**2 + len(residual) / IDLE_CELL_SD**2
        self._log_tax[drafter] += residual.sum() / IDLE_CELL_SD**2 / precision
        self._tax_sd[drafter] = precision**-0.5

    def _calibration(self, shares: np.ndarray, weight: np.ndarray, residual: np.ndarray) -> float:
        """How much wider intervals must be than the process says, by cells predicted from all others: law and correction fitted without them."""
        covariance = self._factor @ self._factor.T
        count, standardised, whole = len(residual), [], shares @ self._coefficients
        for fold, rest in _folds(count):
            coefficients = nnls(shares[rest] * weight[rest, None], weight[rest])[0]
            moved = residual + np.log(whole) - np.log(np.maximum(shares @ coefficients, 1e-9))  # about the law without the fold
            factor = cho_factor(covariance[np.ix_(rest, rest)], lower=True)
            cross = covariance[np.ix_(fold, rest)]
            error = moved[fold] - cross @ cho_solve(factor, moved[rest])
            variance = np.diag(covariance)[fold] - np.einsum("ij,ji->i", cross, cho_solve(factor, cross.T))
            standardised.append(error / np.sqrt(variance))
        squares = np.square(np.concatenate(standardised))
        return float(np.sqrt((np.minimum(squares, OUTLIER**2).sum() + PRIOR_CELLS * PRIOR_WIDTH**2) / (count + PRIOR_CELLS)))

    def _idle_tax(self, cells) -> np.ndarray:
        return np.where(cells.draft_len == 0, np.exp(self._log_tax[cells.drafter]), 1.0)

    def _idle_doubt(self, cells) -> np.ndarray:
        return np.where(cells.draft_len == 0, self._tax_sd[cells.drafter], 0.0)


def _scaled(at: At, hyper: dict) -> np.ndarray:
    """[n, 3] coordinates in lengths over which a correction stays the same."""
    return np.stack([at.running / hyper["length"], at.context / hyper["length"], at.drafts / hyper["draft_length"]], axis=1)


def _folds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cells left out together, and the rest: one by one where they are few."""
    parts = np.array_split(np.random.default_rng(0).permutation(count), min(count, FOLDS))
    return [(part, np.setdiff1d(np.arange(count), part)) for part in parts]


def _missed(shares: np.ndarray, weight: np.ndarray) -> float:
    """Mean error of the law's logarithm in cells that it was fitted without, an error counting as at most OUTLYING."""
    errors = []
    for fold, rest in _folds(len(shares)):
        coefficients = nnls(shares[rest] * weight[rest, None], weight[rest])[0]
        errors.append(weight[fold] * np.minimum(np.abs(np.log(np.maximum(shares[fold] @ coefficients, 1e-9))), OUTLYING))
    return float(np.concatenate(errors).sum() / weight.sum())
