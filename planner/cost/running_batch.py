"""How many requests decode at once, of those in the system: the rest has its prompt read, or waits for memory.

    running = smooth minimum of   concurrency x share of a request's time that it decodes   and   capacity

The share follows from Little's law, the seconds that a request spends outside of decoding being linear in the load and in
the length of its prompt. The capacity is the byte count of capacity.py, corrected by what was measured: where
output_tokens_per_s x tpot_s lags the concurrency and prompts do not explain it, that running batch is believed and not the
bytes.

n  cells asked for      m  cells measured
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from planner.cost.capacity import request_capacity
from planner.serving import ServingProfile

SHARPNESS = 12  # of the smooth minimum: at the corner the batch is 6 % below both
COMMON_SD, OWN_SD = 0.15, 0.06  # of the logarithm of capacity: the engine's reserve, which all drafters share, and each drafter's own
NOISE = 0.02  # of a measured running batch
LEAST_CAPACITY = 0.8  # requests; the byte count may be that wrong about the one that does run


class Load(NamedTuple):
    running: np.ndarray  # [n]
    ttft_s: np.ndarray  # [n] queueing included; nan where none was measured
    sd: np.ndarray  # [n] of the logarithm of running


class RunningBatch:
    """The running batch of every drafter of a profile. Cells are those of serving.py."""

    def __init__(self, profile: ServingProfile, drafters: list[str], cells, tpot_s: np.ndarray, throughput: np.ndarray, ttft_s: np.ndarray, tp: int):
        """tpot_s, throughput, ttft_s [m]: measured, nan where unknown. tp: devices that share the target."""
        self._profile, self._drafters, self._tp = profile, drafters, tp
        self._counted: dict[tuple[int, ...], float] = {}
        self._mean_context = float(np.mean(cells.context_len))
        self._outside_s = np.zeros(2)  # seconds outside of decoding: a floor, and per request in the system; at the mean context
        self._correction = np.zeros(1 + len(drafters))  # of the logarithm of capacity: of all, and of each
        self._sd = np.full(len(drafters), np.hypot(COMMON_SD, OWN_SD))
        self._first_s = None
        if (known := np.isfinite(throughput)).any():
            self._fit(_pick(cells, known), tpot_s[known], throughput[known])
        if (known := np.isfinite(ttft_s)).any():
            self._fit_first(_pick(cells, known), tpot_s[known], ttft_s[known])

    def capacity(self, cells) -> np.ndarray:
        """[n] requests that memory holds side by side; below LEAST_CAPACITY the drafter does not fit."""
        return self._capacity(cells, self._correction)

    def predict(self, cells, tpot_s: np.ndarray) -> Load:
        """[n] at these times per token."""
        running, weight = self._running(cells, tpot_s, self._outside_s, self.capacity(cells))
        waiting = self._waiting_s(cells, tpot_s, running)
        first = np.nan if self._first_s is None else self._first_terms(cells) @ self._first_s
        return Load(running, first + waiting, np.hypot(weight * self._sd[cells.drafter], NOISE / 2))

    def _fit(self, cells, tpot_s: np.ndarray, throughput: np.ndarray) -> None:
        measured = np.log(np.clip(throughput * tpot_s, 1e-3, cells.concurrency))
        decoding_s = float(np.median(cells.output_len * tpot_s))
        spread = np.array([COMMON_SD, *([OWN_SD] * len(self._drafters))])

        def residuals(theta: np.ndarray) -> np.ndarray:
            running, _ = self._running(cells, tpot_s, theta[:2] * decoding_s, self._capacity(cells, theta[2:]))
            return np.concatenate([(np.log(running) - measured) / NOISE, theta[2:] / spread, theta[:2] * [1, 100]])

        start = np.concatenate([[0.02, 0.0002], np.zeros(len(spread))])
        bounds = ([0.0, 0.0, *([-1.5] * len(spread))], [100.0, 10.0, *([1.5] * len(spread))])
        found = least_squares(residuals, start, bounds=bounds, loss="soft_l1", max_nfev=200)
        self._outside_s, self._correction = found.x[:2] * decoding_s, found.x[2:]
        covariance = np.linalg.pinv(found.jac.T @ found.jac + 1e-9 * np.eye(len(start)))[2:, 2:]
        own = np.arange(1, len(spread))
        self._sd = np.sqrt(np.maximum(covariance[0, 0] + covariance[own, own] + 2 * covariance[0, own], 0.0))

    def _fit_first(self, cells, tpot_s: np.ndarray, ttft_s: np.ndarray) -> None:
        """Seconds to the first token where memory does not let a request wait: a floor, and a part that grows with the load."""
        running, _ = self._running(cells, tpot_s, self._outside_s, self.capacity(cells))
        own = np.maximum(ttft_s - self._waiting_s(cells, tpot_s, running), 0.1 * ttft_s)
        self._first_s = nnls(self._first_terms(cells) / own[:, None], np.ones(len(own)))[0]

    def _running(self, cells, tpot_s: np.ndarray, outside_s: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] requests, and how far the capacity decides them, in [0, 1]."""
        wanted = cells.concurrency * self._decoding_share(cells, tpot_s, outside_s)
        ratio = (wanted / np.maximum(capacity, LEAST_CAPACITY)) ** SHARPNESS
        return wanted * (1 + ratio) ** (-1 / SHARPNESS), ratio / (1 + ratio)

    def _decoding_share(self, cells, tpot_s: np.ndarray, outside_s: np.ndarray) -> np.ndarray:
        decoding_s = cells.output_len * tpot_s
        return decoding_s / (decoding_s + (outside_s[0] + outside_s[1] * cells.concurrency) * cells.context_len / self._mean_context)

    def _waiting_s(self, cells, tpot_s: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Little's law for the requests that neither decode nor have their prompt read."""
        waiting = np.maximum(cells.concurrency - running / self._decoding_share(cells, tpot_s, self._outside_s), 0.0)
        return waiting * cells.output_len * tpot_s / running

    def _first_terms(self, cells) -> np.ndarray:
        prompt = cells.context_len / self._mean_context
        return np.stack([prompt, prompt * np.minimum(cells.concurrency, self.capacity(cells))], axis=1)

    def _capacity(self, cells, correction: np.ndarray) -> np.ndarray:
        return self._counted_capacity(cells) * np.exp(correction[0] + correction[1 + cells.drafter])

    def _counted_capacity(self, cells) -> np.ndarray:
        """[n] by bytes alone. A drafter of unknown size takes none."""
        kinds, where = np.unique(np.stack([cells.drafter, cells.draft_len, cells.context_len, cells.output_len]), axis=1, return_inverse=True)
        return np.array([self._count(*map(int, kind)) for kind in kinds.T])[where.ravel()]

    def _count(self, drafter: int, draft_len: int, context_len: int, output_len: int) -> float:
        key = drafter, draft_len, context_len, output_len
        if key not in self._counted:
            self._counted[key] = request_capacity(
                self._profile.model, self._profile.drafters.get(self._drafters[drafter]), self._profile.system, tensor_parallel=self._tp,
                context_len=context_len, output_len=output_len, draft_len=draft_len,
            )  # fmt: skip
        return self._counted[key]


def _pick(cells, which: np.ndarray):
    return type(cells)(*(column[which] for column in cells))
