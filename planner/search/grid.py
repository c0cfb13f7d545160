"""Every setting at every load, in arrays, and the best of some settings at each.

S settings    X contexts    C concurrencies
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.errors import BadInput
from planner.schedules import Limits
from planner.search.loads import HALF_WIDTH, Forecast, Loads, measure
from planner.search.rows import fewest_rows
from planner.specs import Objective

TOLERANCE = 0.005  # what a load may lose so that rows are few
TIED = 2 * TOLERANCE  # likewise, where the interval of the difference holds zero
MAX_CANDIDATES = 5_000_000  # settings x loads x contexts: about 1 GB of numbers
BROKEN = 50.0  # taken off the score of what breaks a limit that something else keeps; a score is a logarithm
MAX_PLACES = 33  # loads at which a standard deviation is asked for, to be interpolated between: it changes slowly with load


class Question(NamedTuple):
    """What a schedule is asked for."""

    concurrency_from: int
    concurrency_to: int
    contexts: list[int]  # ascending
    objective: Objective
    limits: Limits = Limits()
    weights: np.ndarray | None = None  # [X, C] of a histogram of load, sum 1; None: every load counts alike
    price_per_s: float | None = None  # of all devices


class Grid(NamedTuple):
    """Every setting at every load."""

    loads: Loads
    asked: Question
    concurrency: np.ndarray  # [C]
    forecast: Forecast  # [S, X, C]
    free: np.ndarray  # settings to choose from where each load may have its own server: an idle drafter is never worth loading

    def score(self, members: np.ndarray, objective: Objective) -> np.ndarray:
        """[members, X, C] logarithm of what is gained, the larger the better; -inf where it cannot run."""
        f = Forecast(*(values[members] for values in self.forecast))
        speed = -np.log(f.tpot_s) if objective == "tpot" else np.log(f.output_tokens_per_s)
        speed = np.where(np.isnan(speed), -np.inf, speed)
        if objective != "goodput":
            return speed
        excess = violation(f, self.asked.limits)
        kept = excess == 0
        return np.where(kept, speed, np.where(kept.any(0), speed - BROKEN, np.where(np.isinf(speed), speed, -np.log1p(excess))))

    def value(self, path: np.ndarray) -> np.ndarray:
        """[X, C] what adds up over loads: tokens/s, or seconds of tpot and e2e. path  [X, C]"""
        x, c = np.indices(path.shape)
        throughput = self.forecast.output_tokens_per_s[path, x, c]
        match self.asked.objective:
            case "tpot":
                return self.forecast.tpot_s[path, x, c]
            case "e2e":  # Little's law: each request is followed by the next
                return self.concurrency * self.loads.output_len / throughput
            case "goodput":
                return throughput * (violation(Forecast(*(v[path, x, c] for v in self.forecast)), self.asked.limits) == 0)
        return throughput


class Path(NamedTuple):
    """A setting for every load."""

    members: np.ndarray  # settings it was chosen from
    score: np.ndarray  # [members, X, C]
    best: np.ndarray  # [X, C] the best of them at each load
    chosen: np.ndarray  # [X, C] in few rows


def evaluate(loads: Loads, question: Question) -> Grid:
    """Every setting at every load."""
    concurrency = np.arange(question.concurrency_from, question.concurrency_to + 1)
    shape = len(loads.settings), len(question.contexts), len(concurrency)
    if np.prod(shape) > MAX_CANDIDATES:
        raise BadInput(
            f"settings x concurrencies x contexts must be at most {MAX_CANDIDATES}, got {' x '.join(map(str, shape))}; "
            "narrow --max-concurrency or give fewer --isl"
        )
    setting, x, c = (index.ravel() for index in np.indices(shape))
    found = loads.predict(setting, concurrency[c], np.array(question.contexts)[x])
    forecast = Forecast(*(np.asarray(values).reshape(shape) for values in found))
    if question.limits.ttft_s is not None and np.isnan(forecast.ttft_s).all():
        raise BadInput("a limit of ttft needs times to the first token, and the profile has none; drop ttft from --goodput")
    free = np.array([i for i, setting in enumerate(loads.settings) if not setting.idle])
    return Grid(loads, question, concurrency, forecast, free)


def violation(forecast: Forecast, limits: Limits) -> np.ndarray:
    """By how much the worse of the two limits is exceeded, relatively; 0 where both are kept, inf where it is not known."""
    excess = np.zeros_like(forecast.tpot_s)
    for values, limit in ((forecast.tpot_s, limits.tpot_s), (forecast.ttft_s, limits.ttft_s)):
        if limit is not None:
            excess = np.maximum(excess, np.where(np.isnan(values), np.inf, values / limit - 1))
    return np.where(np.isnan(forecast.tpot_s), np.inf, excess)


def choose(grid: Grid, groups: Sequence[np.ndarray], objective: Objective) -> list[Path]:
    """Of each group of settings the best at each load, and the fewest rows that lose almost nothing against it."""
    found = []
    for members in groups:
        score = grid.score(members, objective)
        top = score.max(0)
        if np.isinf(top).any():
            x, c = np.argwhere(np.isinf(top))[0]
            raise BadInput(f"nothing can run at concurrency {grid.concurrency[c]} and context {grid.asked.contexts[x]}; lower one of them")
        loss = -np.expm1(score - top)
        found.append((members, score, members[score.argmax(0)], loss, ((loss > TOLERANCE) & (loss <= TIED)).nonzero()))
    pairs = [(best[x, c], members[i], x, c) for members, _, best, _, (i, x, c) in found]
    gaps = ratio_sds(grid, pairs, objective)
    paths = []
    for (members, score, best, loss, (i, x, c)), sd in zip(found, gaps, strict=True):
        tight = loss <= TOLERANCE
        loose = tight.copy()
        loose[i, x, c] = -np.log1p(-loss[i, x, c]) <= HALF_WIDTH * sd
        lost, tied, strict = (values.swapaxes(0, 1) for values in (loss, loose, tight))  # [contexts, members, C]
        chosen = fewest_rows(lost, tied)
        far = np.take_along_axis(lost, chosen[:, None], 1)[:, 0].mean(1) > TOLERANCE
        chosen[far] = fewest_rows(lost[far], strict[far])
        paths.append(Path(members, score, best, members[chosen]))
    return paths


def ratio_sds(grid: Grid, questions: Sequence[tuple], objective: Objective) -> list[np.ndarray]:
    """Of each question (a, b, x, c), settings and places as arrays [n] or numbers: [n] sd of the logarithm of a's ratio to b. Asked at once."""
    parts = [np.broadcast_arrays(*question) for question in questions]
    sizes = [part[0].size for part in parts]
    if not sum(sizes):
        return [np.zeros(0) for _ in parts]
    a, b, x, c = (np.concatenate([part[i].ravel() for part in parts]) for i in range(4))
    sd = grid.loads.ratio_sd(a, b, grid.concurrency[c], np.array(grid.asked.contexts)[x], measure(objective))
    return np.split(np.where(a == b, 0.0, sd), np.cumsum(sizes)[:-1])


def some_places(C: int) -> np.ndarray:
    """Places among C concurrencies that show how something changes with load: denser where load is small."""
    return np.unique([*np.linspace(0, C - 1, MAX_PLACES // 2 + 1).round(), *np.geomspace(1, C, MAX_PLACES // 2).round() - 1]).astype(int)
