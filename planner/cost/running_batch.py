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
from scipy.special import expit

from planner.cost.capacity import request_capacity
from planner.serving import OFF, ServingProfile

SHARPNESS = 30  # of the smooth minimum: at the corner the batch is 2 % below both
COMMON_SD, OWN_SD = 0.15, 0.06  # of the logarithm of capacity: the engine's reserve, which all drafters share, and each drafter's own
UNSIZED_SD = 1.0  # the same, of a drafter whose size nobody gave
LIMIT_COST = 2.0  # of explaining a lag by a limit of requests and not by memory, in units of half a squared deviation
NOISE = 0.02  # of a measured running batch
LEAST_CAPACITY = 0.8  # requests; the byte count may be that wrong about the one that does run
LEAST_COUNT = 0.1  # requests; a byte count of none could not be corrected


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
        self._longest = np.array([max(cells.context_len[cells.drafter == d], default=0) for d in range(len(drafters))])  # context that ran
        self._most = np.inf  # requests that the engine lets run, whatever the memory
        self._sd = np.full(len(drafters), np.hypot(COMMON_SD, OWN_SD))
        self._first_s = None
        if (known := np.isfinite(throughput)).any():
            self._fit(_pick(cells, known), tpot_s[known], throughput[known])
        else:
            self._refute(cells)
        if (known := np.isfinite(ttft_s)).any():
            self._fit_first(_pick(cells, known), tpot_s[known], ttft_s[known])

    def capacity(self, cells) -> np.ndarray:
        """[n] requests that memory holds side by side; below LEAST_CAPACITY the drafter does not fit."""
        memory = self._counted_capacity(cells) * self._factor(cells, self._correction)
        ran = cells.context_len <= self._longest[cells.drafter]  # whatever the bytes say
        return np.minimum(np.where(ran, np.maximum(memory, 1.0), memory), self._most)

    def correction(self, drafter: int) -> float:
        """The factor on the byte count of a drafter's capacity."""
        return float(np.exp(self._correction[0] + self._correction[1 + drafter]))

    def running(self, cells, tpot_s: np.ndarray, capacity: np.ndarray) -> np.ndarray:
        """[n] requests that decode at once, at these times per token."""
        return self._running(cells, tpot_s, self._outside_s, capacity)[0]

    def predict(self, cells, tpot_s: np.ndarray, capacity: np.ndarray) -> Load:
        """[n] the same, and what comes of it."""
        running, weight = self._running(cells, tpot_s, self._outside_s, capacity)
        waiting = self._waiting_s(cells, tpot_s, running)
        first = np.nan if self._first_s is None else self._first_terms(cells, capacity) @ self._first_s
        return Load(running, first + waiting, np.hypot(weight * self._sd[cells.drafter], NOISE / 2))

    def _fit(self, cells, tpot_s: np.ndarray, throughput: np.ndarray) -> None:
        """Least squares over: two numbers of the time outside of decoding, the most requests, and the corrections of capacity."""
        measured = np.log(np.clip(throughput * tpot_s, 1e-3, cells.concurrency))
        counted, decoding_s = self._counted_capacity(cells), float(np.median(cells.output_len * tpot_s))
        known = [name == OFF or name in self._profile.drafters for name in self._drafters]
        spread = np.array([COMMON_SD, *(OWN_SD if sized else UNSIZED_SD for sized in known)])

        def residuals(theta: np.ndarray) -> np.ndarray:
            capacity = np.minimum(counted * self._factor(cells, theta[3:]), np.exp(theta[2]))
            running, _ = self._running(cells, tpot_s, theta[:2] * decoding_s, capacity)
            doubt = 2 * np.sqrt(1 + np.square(theta[3:] / spread)) - 2  # grows linearly: a byte count may be quite wrong
            return np.concatenate([(np.log(running) - measured) / NOISE, np.sqrt(doubt), theta[:2] * [1, 100]])

        def fit(log_most: float, own: np.ndarray):
            start = [0.02, 0.0002, log_most, 0.0, *own]
            bounds = [0, 0, 0, *([-9] * len(spread))], [100, 10, 30, *([9] * len(spread))]
            return least_squares(residuals, np.clip(start, *bounds), bounds=bounds, max_nfev=200)

        # Far from the truth the batch depends neither on a capacity nor on a limit of requests: start near either.
        lagging, unlimited = self._lagging(cells, measured, counted), 20.0
        none = np.zeros_like(lagging)
        fits = [(fit(unlimited, none), 0.0), (fit(unlimited, lagging), 0.0), (fit(float(measured.max()), none), LIMIT_COST)]
        found = min(fits, key=lambda one: one[0].cost + one[1])[0]
        self._outside_s, self._most, self._correction = found.x[:2] * decoding_s, float(np.exp(found.x[2])), found.x[3:]
        slopes = np.vstack([found.jac[: len(measured)], np.diag(np.concatenate([[1, 100, 0.1], 1 / spread]))])
        covariance = np.linalg.inv(slopes.T @ slopes)[3:, 3:]
        own = np.arange(1, len(spread))
        self._sd = np.sqrt(np.maximum(covariance[0, 0] + covariance[own, own] + 2 * covariance[0, own], 0.0))

    def _lagging(self, cells, measured: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """[drafters] logarithm of the largest measured batch over the counted capacity, where one of them is certainly wrong; else 0."""
        start = np.zeros(len(self._drafters))
        for drafter in np.unique(cells.drafter):
            own = np.flatnonzero(cells.drafter == drafter)
            top = own[np.argmax(measured[own])]
            if measured[top] < np.log(0.9 * cells.concurrency[own].max()) or counted[top] < np.exp(measured[top]):
                start[drafter] = measured[top] - np.log(counted[top])
        return start

    def _refute(self, cells) -> None:
        """Where nobody counted throughput, a byte count that has no room for one of the requests that ran says nothing."""
        counted = self._counted_capacity(cells)
        for drafter in np.unique(cells.drafter[counted < LEAST_CAPACITY]):
            own = cells.drafter == drafter
            self._correction[1 + drafter] = np.log(2 * cells.concurrency[own].max() / counted[own].min())

    def _fit_first(self, cells, tpot_s: np.ndarray, ttft_s: np.ndarray) -> None:
        """Seconds to the first token where memory does not let a request wait: a floor, and a part that grows with the load."""
        capacity = self.capacity(cells)
        running = self.running(cells, tpot_s, capacity)
        own = np.maximum(ttft_s - self._waiting_s(cells, tpot_s, running), 0.1 * ttft_s)
        self._first_s = nnls(self._first_terms(cells, capacity) / own[:, None], np.ones(len(own)))[0]

    def _running(self, cells, tpot_s: np.ndarray, outside_s: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] requests, and how far the capacity decides them, in [0, 1]."""
        wanted = cells.concurrency * self._decoding_share(cells, tpot_s, outside_s)
        capacity = np.maximum(capacity, LEAST_CAPACITY)
        low, high = np.minimum(wanted, capacity), np.maximum(wanted, capacity)
        return low * (1 + (low / high) ** SHARPNESS) ** (-1 / SHARPNESS), expit(SHARPNESS * np.log(wanted / capacity))

    def _decoding_share(self, cells, tpot_s: np.ndarray, outside_s: np.ndarray) -> np.ndarray:
        decoding_s = cells.output_len * tpot_s
        return decoding_s / (decoding_s + (outside_s[0] + outside_s[1] * cells.concurrency) * cells.context_len / self._mean_context)

    def _waiting_s(self, cells, tpot_s: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Little's law for the requests that neither decode nor have their prompt read."""
        waiting = np.maximum(cells.concurrency - running / self._decoding_share(cells, tpot_s, self._outside_s), 0.0)
        return waiting * cells.output_len * tpot_s / running

    def _first_terms(self, cells, capacity: np.ndarray) -> np.ndarray:
        prompt = cells.context_len / self._mean_context
        return np.stack([prompt, prompt * np.minimum(cells.concurrency, capacity)], axis=1)

    @staticmethod
    def _factor(cells, correction: np.ndarray) -> np.ndarray:
        return np.exp(correction[0] + correction[1 + cells.drafter])

    def _counted_capacity(self, cells) -> np.ndarray:
        """[n] by bytes alone. A drafter of unknown size takes none."""
        kinds, where = distinct(cells.drafter, cells.draft_len, cells.context_len, cells.output_len)
        return np.array([self._count(*map(int, kind)) for kind in zip(*kinds, strict=True)])[where]

    def _count(self, drafter: int, draft_len: int, context_len: int, output_len: int) -> float:
        key = drafter, draft_len, context_len, output_len
        if key not in self._counted:
            counted = request_capacity(
                self._profile.model, self._profile.drafters.get(self._drafters[drafter]), self._profile.system, tensor_parallel=self._tp,
                context_len=context_len, output_len=output_len, draft_len=draft_len,
            )  # fmt: skip
            self._counted[key] = max(counted, LEAST_COUNT)
        return self._counted[key]


def distinct(*columns: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct rows of columns [n] as shorter columns, and [n] which of them each row is: np.unique along an axis, but quick."""
    key = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        _, ranks = np.unique(column, return_inverse=True)
        _, key = np.unique(key * (int(ranks.max(initial=0)) + 1) + ranks, return_inverse=True)
    _, first = np.unique(key, return_index=True)
    return [column[first] for column in columns], key


def _pick(cells, which: np.ndarray):
    return type(cells)(*(column[which] for column in cells))
