"""The physical law of a round's time: a sum of non-negative terms, fitted to relative errors.

Reading weights, computing tokens, reading the cache, hinges where matrix units fill up, drafting, the glue of a round, prompts
of other requests that are read in between; and, where that predicts cells left out better, the steps of captured graphs and
matrix tiles. A loaded drafter that idles costs a share of the round.

n  cells asked for      m  cells measured      F  terms
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.optimize import nnls

HINGES = (64, 128, 256, 512)  # tokens of a pass, from where on computing costs more: tile sizes, and what makes a pass compute-bound
DRAFT_HINGE = 128  # requests, the same for a drafter's pass over one token of each
TILE = 128  # tokens of a pass that matrix units take at once
GRAPHS = 512  # tokens of the largest captured pass
FILLS = (16, 64)  # tokens of a pass within which a cost saturates: a few already read most experts of a mixture
STEPPED = slice(3, 5 + len(FILLS))  # the terms below that know graphs, tiles and mixtures
SIMPLER, OUTLYING = 1.05, 0.2  # the law without them is taken if it misses at most so much more; an error counts as at most so large
LEAST_TERM = 0.1  # a hinge that the cells hardly pass says nothing; other terms are far larger wherever they are
FOLDS = 30  # groups of cells that are left out, one cell each where there are fewer

IDLE_TAX, IDLE_TAX_SD = 0.12, 0.05  # of an idle drafter that nobody measured: 7 to 22 % were seen on an H100
IDLE_CELL_SD = 0.03  # of a cell that was measured: the tax is not quite the same at every load
IDLE_WEIGHT = 0.1  # an idle drafter's cells say little about the rest of the law where off was measured


def graph_size(running: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n] requests that a captured pass over `rows` tokens of each holds, `running` of them real.

    vLLM captures passes of 1, 2, 4 and multiples of 8 tokens, each rounded up to whole requests; above GRAPHS nothing is padded.
    """
    least = np.maximum(running - 1, 0) * rows + 1  # a pass of fewer tokens has not room for all
    size = np.where(least <= 4, np.exp2(np.ceil(np.log2(least) - 1e-6)), 8 * np.ceil(least / 8 - 1e-6))
    return np.where(running * rows > GRAPHS, running, np.maximum(running, np.ceil(size / rows - 1e-6)))


class StepLaw:
    """The law of one engine. Cells are those of serving.py; they, running and tokens_per_round together say where a round is asked for."""

    def __init__(self, cells, running: np.ndarray, tokens_per_round: np.ndarray, round_s: np.ndarray, num_drafters: int):
        """running, tokens_per_round, round_s [m]: as measured."""
        self._num_drafters = num_drafters
        self._log_tax, self._tax_sd = np.full(num_drafters, np.log1p(IDLE_TAX)), np.full(num_drafters, IDLE_TAX_SD)
        self._log_tax[0] = self._tax_sd[0] = 0.0
        idle = (cells.drafter > 0) & (cells.draft_len == 0)
        off = (cells.drafter == 0).any()
        self._weight = np.where(idle & off, IDLE_WEIGHT, 1.0)

        terms = np.stack([term() for term in self._terms(cells, running, tokens_per_round)], axis=1) * self._tax(cells)[:, None]
        self._unit = np.where(terms.max(0) > LEAST_TERM, terms.max(0), np.inf)  # a term that no cell shows is always 0
        self._shares = terms / self._unit / round_s[:, None]  # [m, F] of the round, where a coefficient is 1
        plain = self._shares.copy()
        plain[:, STEPPED] = 0.0
        if self._missed(plain) < SIMPLER * self._missed(self._shares):
            self._unit[STEPPED], self._shares = np.inf, plain
        self._coefficients = self._fit(self._shares, self._weight)
        self._reach = np.where(np.isfinite(self._unit), self._shares.max(0), 1.0)
        for drafter in np.unique(cells.drafter[idle]):
            self._learn_tax(drafter, np.log(round_s / self.seconds(cells, running, tokens_per_round))[idle & (cells.drafter == drafter)])
        self.residual = np.log(round_s / self.seconds(cells, running, tokens_per_round))  # [m] of the logarithm

    def seconds(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> np.ndarray:
        """[n] of a round."""
        terms = self._terms(cells, running, tokens_per_round)
        seconds = sum(self._coefficients[f] / self._unit[f] * terms[f]() for f in np.flatnonzero(self._coefficients))
        return np.maximum(seconds, 1e-9) * self._tax(cells)

    def doubts(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> np.ndarray:
        """[terms that the cells show, n] each term's share of a round, over the largest share it could take of a measured one."""
        terms, seconds = self._terms(cells, running, tokens_per_round), self.seconds(cells, running, tokens_per_round)
        return np.stack([terms[f]() / (self._unit[f] * self._reach[f] * seconds) for f in np.flatnonzero(np.isfinite(self._unit))])

    def elasticity(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> np.ndarray:
        """[n] how many percent a round takes longer for a percent more of requests, in [0, 1]."""
        more = self.seconds(cells, 1.25 * running, tokens_per_round) / self.seconds(cells, running, tokens_per_round)
        return np.clip(np.log(more) / np.log(1.25), 0.0, 1.0)

    def idle_doubt(self, cells) -> np.ndarray:
        """[n] standard deviation of the logarithm that an idle drafter's tax adds; 0 where nothing idles."""
        return np.where(cells.draft_len == 0, self._tax_sd[cells.drafter], 0.0)

    def refits(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Cells left out, the other ones, and [m] the residual of all about the law that was fitted without the former."""
        for fold, rest in _folds(len(self._shares)):
            refitted = np.maximum(self._shares @ self._fit(self._shares[rest], self._weight[rest]), 1e-9)
            yield fold, rest, self.residual + np.log(self._shares @ self._coefficients) - np.log(refitted)

    @staticmethod
    def _fit(shares: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return nnls(shares * weight[:, None], weight)[0]

    def _missed(self, shares: np.ndarray) -> float:
        """Mean error of the law's logarithm in cells that it was fitted without."""
        missed = np.zeros(len(shares))
        for fold, rest in _folds(len(shares)):
            missed[fold] = np.abs(np.log(np.maximum(shares[fold] @ self._fit(shares[rest], self._weight[rest]), 1e-9)))
        return float(np.average(np.minimum(missed, OUTLYING), weights=self._weight))

    def _learn_tax(self, drafter: int, residual: np.ndarray) -> None:
        """From an idle drafter's cells about the law with the usual tax: a mean with a prior."""
        precision = 1 / IDLE_TAX_SD**2 + len(residual) / IDLE_CELL_SD**2
        self._log_tax[drafter] += residual.sum() / IDLE_CELL_SD**2 / precision
        self._tax_sd[drafter] = precision**-0.5

    def _tax(self, cells) -> np.ndarray:
        return np.where(cells.draft_len == 0, np.exp(self._log_tax[cells.drafter]), 1.0)

    def _terms(self, cells, running: np.ndarray, tokens_per_round: np.ndarray) -> list[Callable[[], np.ndarray]]:
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
                lambda active=active: active.astype(float),
                lambda active=active: active * running,
                lambda steps=steps: steps,
                lambda steps=steps: steps * running,
                lambda steps=steps: steps * np.maximum(running - DRAFT_HINGE, 0) / DRAFT_HINGE,
                lambda steps=steps: steps * cache,
            ]
        return terms


def _folds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cells left out together, and the rest."""
    parts = np.array_split(np.random.default_rng(0).permutation(count), min(count, FOLDS))
    return [(part, np.setdiff1d(np.arange(count), part)) for part in parts]
