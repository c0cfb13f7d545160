"""Tokens per round by draft_len, from an engine's counters at a few draft lengths: a decaying mixture of two states.

Along a text stretches that are easy to draft alternate with hard ones. A token's state is easy or hard, and stays what it
was with some probability; draft i (from 0) of a round is accepted with a probability of its state that decays with i. Rounds
start behind the token where the last one failed, so they start in hard stretches more often the longer they draft: that is
why an acceptance measured at one draft_len does not hold at another.

What the mixture does not say, a Gaussian process over draft_len and context corrects, whose posterior is the uncertainty.

K  longest draft_len asked for      rows  of what was measured: one draft_len at one context
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit

from planner.cost.running_batch import distinct

PRIOR_MEAN = np.array(
    [2.2, 0.0, 0.0, 0.5, 0.05, 0.0]
)  # logit accept easy, logit accept hard, logit share of hard, logit persistence, decay, slope in log context
PRIOR_SD = np.array([1.0, 1.0, 1.0, 1.0, 0.15, 0.3])
POSITION_SD = 0.03  # of a position's measured acceptance, on top of the counter's own noise
RESIDUAL_SD = 0.015  # of the logarithm of tokens_per_round about the mixture
LENGTH = 0.7  # in logarithms of draft_len + 1
LEAST_NOISE, USUAL_NOISE = 0.003, 0.008


class Row(NamedTuple):
    """Measurements of one draft_len at one context, repeated ones averaged."""

    draft_len: int
    context_len: int
    tokens_per_round: float
    acceptance: tuple[float, ...]  # conditional, by position; may be empty
    repeats: int


class AcceptanceCurve:
    """Tokens per round of one drafter. Without rows it is a usual drafter's, and says nothing of its own doubt."""

    def __init__(self, rows: list[Row], noise: float, text_sd: float = 0.0):
        """noise    standard deviation of the logarithm of a row's tokens_per_round between repetitions
        text_sd  the part of it that comes from which texts were asked for: it moves all draft lengths alike, and a fresh run again
        """
        self._text_variance = text_sd**2 * (1 + 1 / max((row.repeats for row in rows), default=1))
        self._draft_len = np.array([row.draft_len for row in rows], dtype=int)
        self._context_len = np.array([row.context_len for row in rows], dtype=int)
        self._mean_log_context = float(np.mean(np.log(self._context_len))) if rows else 0.0
        self._theta = self._fit(rows, noise)
        self._known: dict[tuple[int, int], float] = {}  # tokens per round by the mixture
        measured = np.log([row.tokens_per_round for row in rows])
        variance = noise**2 / np.array([row.repeats for row in rows])
        kernel = self._kernel(self._draft_len, self._context_len, self._draft_len, self._context_len)
        self._inverse = np.linalg.inv(kernel + np.diag(variance))  # a row per draft_len and context: small
        self._weights = self._inverse @ (measured - np.log(self._mixture(self._draft_len, self._context_len)))

    def predict(self, draft_len: np.ndarray, context_len: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens per round [n] and the standard deviation of their logarithm [n]."""
        pairs, where = distinct(draft_len, context_len)
        cross = self._kernel(*pairs, self._draft_len, self._context_len)
        mean = np.clip(np.exp(np.log(self._mixture(*pairs)) + cross @ self._weights), 1.0, pairs[0] + 1.0)
        sd = np.sqrt(np.maximum(self.covariance(*pairs, *pairs), 0.0))
        return mean[where], sd[where]

    def covariance(self, k: np.ndarray, context: np.ndarray, other_k: np.ndarray, other_context: np.ndarray) -> np.ndarray:
        """[n] of the logarithms of tokens per round in two cells, pair by pair."""
        if not len(self._draft_len):
            return np.zeros(len(k))
        one, other = (self._kernel(*pair, self._draft_len, self._context_len) for pair in ((k, context), (other_k, other_context)))
        texts = self._text_variance * _drafting(k) * _drafting(other_k)
        return texts + _covariance(k, context, other_k, other_context) - np.einsum("ni,ij,nj->n", one, self._inverse, other)

    def _fit(self, rows: list[Row], noise: float) -> np.ndarray:
        """Six numbers, those that the rows leave open near where drafters usually are."""

        def residuals(theta: np.ndarray) -> np.ndarray:
            parts = [(theta - PRIOR_MEAN) / PRIOR_SD]
            for row in rows:
                survival = _survival(theta, row.draft_len, np.log(row.context_len) - self._mean_log_context)
                spread = np.hypot(noise, RESIDUAL_SD / 2) / np.sqrt(row.repeats)
                parts.append([(np.log1p(survival.sum()) - np.log(row.tokens_per_round)) / spread])
                if row.acceptance:
                    conditional = survival / np.concatenate([[1.0], survival[:-1]])
                    parts.append((conditional[: len(row.acceptance)] - row.acceptance) / POSITION_SD)
            return np.concatenate(parts)

        return least_squares(residuals, PRIOR_MEAN, max_nfev=60).x

    def _mixture(self, draft_len: np.ndarray, context_len: np.ndarray) -> np.ndarray:
        return np.array([self._expected(int(k), int(context)) for k, context in zip(draft_len, context_len, strict=True)])

    def _expected(self, draft_len: int, context_len: int) -> float:
        key = draft_len, context_len
        if key not in self._known:
            self._known[key] = 1.0 + float(_survival(self._theta, draft_len, np.log(context_len) - self._mean_log_context).sum())
        return self._known[key]

    @staticmethod
    def _kernel(k: np.ndarray, context: np.ndarray, other_k: np.ndarray, other_context: np.ndarray) -> np.ndarray:
        """[n, m] of every cell with every other."""
        return _covariance(k[:, None], context[:, None], other_k, other_context)


def _covariance(k: np.ndarray, context: np.ndarray, other_k: np.ndarray, other_context: np.ndarray) -> np.ndarray:
    """How alike two cells depart from the mixture: a part that all contexts share, and one that changes with them. Nothing departs at draft_len 0."""
    near = np.exp(-0.5 * ((np.log1p(k) - np.log1p(other_k)) / LENGTH) ** 2)
    near_context = np.exp(-0.5 * (np.log(context) - np.log(other_context)) ** 2)
    return RESIDUAL_SD**2 * _drafting(k) * _drafting(other_k) * near * (1 + near_context)


def _drafting(k: np.ndarray) -> np.ndarray:
    """How much of what drafts may do a draft_len shows."""
    return np.sqrt(np.minimum(1.0, k / 2))


def _survival(theta: np.ndarray, draft_len: int, log_context: float) -> np.ndarray:
    """[K] P(drafts 0..i of a round are all accepted), in the long run of rounds that draft as many."""
    easy, hard, share, persistence, decay, slope = theta
    hard_share, keep = expit(share), expit(persistence)
    stationary = np.array([1 - hard_share, hard_share])
    step = keep * np.eye(2) + (1 - keep) * stationary  # [from, to]
    position = np.arange(draft_len)[:, None]
    accept = expit(np.array([max(easy, hard), min(easy, hard)]) + slope * log_context - decay * position)  # [K, 2]
    alive = np.eye(2)  # [state that the round starts in, state of this draft]
    ends, survival = np.zeros((2, 2)), []  # ends: [start, state of the next round's start]
    for probability in accept:
        ends += (alive * (1 - probability)) @ step  # rejected: the recovered token stands here, the next round behind it
        alive = (alive * probability) @ step
        survival.append(alive.sum(1))
    ends += alive @ step  # all accepted: the bonus token stands behind the last
    to_hard = ends[:, 1]
    hard_start = to_hard[0] / (1 + to_hard[0] - to_hard[1])
    return np.array(survival) @ np.array([1 - hard_start, hard_start])
