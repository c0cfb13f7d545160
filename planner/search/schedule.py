"""Which setting to run at which load: every setting at every load, the best at each, and few rows that lose almost nothing.

A row holds for a range of concurrencies and of contexts. Rows are as few as can be while no load loses more than TOLERANCE
against its best setting, or TIED where the interval of the difference holds zero. Rows cost a server nothing, so rare loads
are served as well as frequent ones: a histogram of load decides which drafter is loaded, not where rows end.

S settings    X contexts    C concurrencies    n  loads of a row
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

import planner
from planner.errors import BadInput
from planner.plans import Interval
from planner.schedules import Compared, Deployment, Disagreement, Flip, Limits, Schedule, ScheduleRow, SettingTie, describe_setting
from planner.search.loads import HALF_WIDTH, Forecast, Loads, compare_with_off, log_interval, measure
from planner.search.rows import fewest_rows, runs
from planner.serving import OFF
from planner.specs import Objective

TOLERANCE = 0.005
TIED = 2 * TOLERANCE
MAX_TIES = 5
MAX_CANDIDATES = 5_000_000  # settings x loads x contexts: about 1 GB of numbers
BROKEN = 50.0  # taken off the score of what breaks a limit that something else keeps; a score is a logarithm
LARGEST = np.log(1e3)  # what a margin is cut at: where nothing else keeps the limits it would be infinite


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


def make_schedule(loads: Loads, question: Question, **about) -> Schedule:
    """The schedule of an engine or profile; `about` fills the fields that say where it comes from.

    Without a histogram it is the best at each load, deployments free to differ; with one it is that of the best deployment.
    """
    grid = evaluate(loads, question)
    free = choose(grid, grid.free, question.objective)
    counts = _counts(grid, free)
    names = list(dict.fromkeys(setting.drafter for setting in loads.settings))
    members = {name: np.array([i for i, setting in enumerate(loads.settings) if setting.drafter == name]) for name in names}
    names = [name for name in names if np.isfinite(grid.forecast.tpot_s[members[name]]).any(0).all()]  # those that can be loaded everywhere
    unable = [name for name in members if name not in names]
    paths = {name: choose(grid, members[name], question.objective) for name in names}
    totals = {name: _total(grid, path.chosen, counts) for name, path in paths.items()}
    deployments = [
        Deployment(
            drafter=name,
            schedule=_rows(grid, paths[name]),
            loss=max(0.0, -float(np.expm1(totals[name][0] - _total(grid, free.best, counts)[0]))) if np.isfinite(totals[name][0]) else 1.0,
            gain_over_off=_gain(grid, paths[name].chosen, totals[name][0] - totals[OFF][0], counts) if np.isfinite(totals[OFF][0]) else None,
        )
        for name in sorted(names, key=lambda name: totals[name], reverse=True)  # stable: off is first among equals
    ]
    chosen = paths[deployments[0].drafter] if question.weights is not None else free
    rows = deployments[0].schedule if question.weights is not None else _rows(grid, free)
    return Schedule(
        planner_version=planner.__version__,
        objective=question.objective,
        goodput=question.limits if question.objective == "goodput" else None,
        concurrency_from=question.concurrency_from,
        concurrency_to=question.concurrency_to,
        contexts=question.contexts,
        output_len=loads.output_len,
        weighted=question.weights is not None,
        deployment=deployments[0].drafter if question.weights is not None else None,
        schedule=rows,
        flips=_flips(grid, chosen),
        deployments=deployments,
        disagreements=_disagreements(grid),
        estimates=_at_ends(grid, chosen),
        num_candidates=grid.forecast.tpot_s.size,
        notes=loads.notes
        + [f"{name} cannot be loaded at every load asked about, so no server is offered with it" for name in unable]
        + _notes(grid, rows),
        **about,
    )


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


def choose(grid: Grid, members: np.ndarray, objective: Objective) -> Path:
    """The best of some settings at each load, and the fewest rows that lose almost nothing against it."""
    score = grid.score(members, objective)
    best, top = score.argmax(0), score.max(0)
    if np.isinf(top).any():
        x, c = np.argwhere(np.isinf(top))[0]
        raise BadInput(f"nothing can run at concurrency {grid.concurrency[c]} and context {grid.asked.contexts[x]}; lower one of them")
    loss = -np.expm1(score - top)
    close = (loss > TOLERANCE) & (loss <= TIED)
    member, x, c = close.nonzero()
    sd = _ratio_sd(grid, members[best[x, c]], members[member], x, c, objective)
    close[member, x, c] = top[x, c] - score[member, x, c] <= HALF_WIDTH * sd
    tight = loss <= TOLERANCE
    chosen = []
    for i in range(len(grid.asked.contexts)):
        path = fewest_rows(loss[:, i], tight[:, i] | close[:, i])
        if loss[path, i, np.arange(len(path))].mean() > TOLERANCE:
            path = fewest_rows(loss[:, i], tight[:, i])
        chosen.append(path)
    return Path(members, score, members[best], members[np.array(chosen)])


def _ratio_sd(grid: Grid, a: np.ndarray, b: np.ndarray, x: np.ndarray, c: np.ndarray, objective: Objective) -> np.ndarray:
    """[n] of setting a against b at places x and c."""
    if not len(a):
        return np.zeros(0)
    return grid.loads.ratio_sd(a, b, grid.concurrency[c], np.array(grid.asked.contexts)[x], measure(objective))


def _rows(grid: Grid, path: Path) -> list[ScheduleRow]:
    return [
        _row(grid, path, x, first, last, edges)
        for x, edges in enumerate(context_ranges(grid.asked.contexts))
        for first, last in _stretches(grid, path, x)
    ]


def _stretches(grid: Grid, path: Path, x: int) -> list[tuple[int, int]]:
    """Places of one setting that keep the limits throughout, or nowhere."""
    chosen, c = path.chosen[x], np.arange(len(grid.concurrency))
    kept = violation(Forecast(*(v[chosen, x, c] for v in grid.forecast)), grid.asked.limits) == 0
    return runs(np.stack([chosen, kept], axis=1))


def context_ranges(contexts: list[int]) -> list[tuple[int, int]]:
    """From and to of the row of each context: cut in the middle between two on a log scale, from 1 to the longest asked about."""
    cuts = [int(np.sqrt(a * b)) for a, b in pairwise(contexts)]
    return list(zip([1, *(cut + 1 for cut in cuts)], [*cuts, contexts[-1]], strict=True))


def _row(grid: Grid, path: Path, x: int, first: int, last: int, context_range: tuple[int, int]) -> ScheduleRow:
    """One setting from place `first` to `last`, and how it compares with the others there."""
    setting = int(path.chosen[x, first])
    own = path.score[path.members == setting, x, first : last + 1]  # [1, n]
    weights = None if grid.asked.weights is None else grid.asked.weights[x, first : last + 1]
    share = weights / weights.sum() if weights is not None and weights.sum() > 0 else np.full(last + 1 - first, 1 / (last + 1 - first))
    able = (path.members != setting) & np.isfinite(path.score[:, x, first : last + 1]).any(1)
    others = path.members[able]
    ahead = np.minimum(-np.log(np.maximum(np.exp(path.score[able, x, first : last + 1] - own) @ share, 1e-9)), LARGEST)  # [others]
    places = np.unique([first, (first + last) // 2, last])  # errors change slowly with load
    which, at = (index.ravel() for index in np.indices((len(others), len(places))))
    sd = _ratio_sd(grid, np.full(len(which), setting), others[which], np.full(len(which), x), places[at], grid.asked.objective)
    sd = sd.reshape(len(others), len(places)).mean(1)
    tied = sorted(np.flatnonzero(ahead <= HALF_WIDTH * sd), key=lambda i: (others[i] != 0, ahead[i]))  # that it may not pay at all comes first
    runner_up = int(ahead.argmin()) if len(others) else None
    margin = _relative(ahead[runner_up], sd[runner_up]) if runner_up is not None else Interval(value=0.0, low=0.0, high=0.0)
    settings, what = grid.loads.settings, grid.loads.settings[setting]
    excess = violation(Forecast(*(v[setting, x, first : last + 1] for v in grid.forecast)), grid.asked.limits).max()
    return ScheduleRow(
        concurrency_from=int(grid.concurrency[first]),
        concurrency_to=int(grid.concurrency[last]),
        context_from=context_range[0],
        context_to=context_range[1],
        drafter=what.drafter,
        draft_len=what.draft_len,
        kv=what.kv,
        margin=margin.value,
        margin_low=margin.low,
        margin_high=margin.high,
        runner_up=settings[others[runner_up]] if runner_up is not None else None,
        ties=[
            SettingTie(
                setting=settings[others[i]],
                difference=_relative(ahead[i], sd[i]),
                cost_of_being_wrong=max(0.0, float(np.expm1(min(HALF_WIDTH * sd[i] - ahead[i], LARGEST)))),
            )
            for i in tied[:MAX_TIES]
        ],
        violation=min(float(excess), 1e9),
        extrapolated=bool(grid.forecast.extrapolated[setting, x, first : last + 1].any()),
        weight=None if weights is None else float(weights.sum()),
    )


def _relative(value: float, sd: float) -> Interval:
    """A relative difference from a difference of logarithms."""
    ratio = log_interval(value, sd)
    return Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)


def _counts(grid: Grid, free: Path) -> np.ndarray:
    """[X, C] what a load's value counts: its share of the histogram; without one, so that each load's best counts the same."""
    if grid.asked.weights is not None:
        return grid.asked.weights
    value = grid.value(free.best)
    return np.divide(1.0, value, out=np.zeros_like(value), where=value > 0) / value.size


def _total(grid: Grid, path: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Logarithm of what all loads together gain, -inf where no limit is ever kept; and what then decides, minus the mean violation."""
    value = float((grid.value(path) * counts).sum())
    x, c = np.indices(path.shape)
    excess = violation(Forecast(*(v[path, x, c] for v in grid.forecast)), grid.asked.limits)
    gained = np.log(value) if value > 0 else -np.inf
    return float(-gained if grid.asked.objective in ("tpot", "e2e") else gained), -float(excess.mean())


def _gain(grid: Grid, path: np.ndarray, ratio: float, counts: np.ndarray) -> Interval | None:
    """Of a path over off, all loads together. What is not known is taken as shared by the loads, so nothing averages out."""
    if not np.isfinite(ratio):
        return Interval(value=-1.0, low=-1.0, high=-1.0)  # keeps the limits nowhere
    x, c = (index.ravel() for index in np.indices(path.shape))
    sd = np.where(path.ravel() == 0, 0.0, _ratio_sd(grid, path.ravel(), np.zeros_like(x), x, c, grid.asked.objective))
    share = (grid.value(path) * counts).ravel()
    return _relative(min(ratio, LARGEST), float(sd @ share / share.sum()))


def _flips(grid: Grid, path: Path) -> list[Flip]:
    found = []
    C = len(grid.concurrency)
    for x, context_len in enumerate(grid.asked.contexts):
        for (start, _), (first, _) in pairwise(runs(path.chosen[x])):
            before, after = int(path.chosen[x, start]), int(path.chosen[x, first])
            gap = path.score[path.members == before, x][0] - path.score[path.members == after, x][0]
            sd = _ratio_sd(grid, np.full(C, before), np.full(C, after), np.full(C, x), np.arange(C), grid.asked.objective)
            decided = ~(np.abs(gap) <= HALF_WIDTH * sd)
            below, above = np.flatnonzero(decided[:first]), np.flatnonzero(decided[first:])
            found.append(
                Flip(
                    context_len=context_len,
                    concurrency=int(grid.concurrency[first]),
                    lowest=int(grid.concurrency[below[-1] + 1 if len(below) else 0]),
                    highest=int(grid.concurrency[first + above[0] if len(above) else C - 1]),
                    before=grid.loads.settings[before],
                    after=grid.loads.settings[after],
                )
            )
    return found


def _disagreements(grid: Grid) -> list[Disagreement]:
    """Where the best by time per token and the best by throughput cost each other more than nothing."""
    quick, many = (choose(grid, grid.free, objective).chosen for objective in ("tpot", "throughput"))
    tpot, throughput, found = grid.forecast.tpot_s, grid.forecast.output_tokens_per_s, []
    for x, context_len in enumerate(grid.asked.contexts):
        for first, last in runs(np.stack([quick[x], many[x]], axis=1)):
            a, b, at = quick[x, first], many[x, first], slice(first, last + 1)
            lost, slower = 1 - (throughput[a, x, at] / throughput[b, x, at]).mean(), (tpot[b, x, at] / tpot[a, x, at]).mean() - 1
            if a != b and max(lost, slower) > TIED:
                found.append(
                    Disagreement(
                        concurrency_from=int(grid.concurrency[first]),
                        concurrency_to=int(grid.concurrency[last]),
                        context_len=context_len,
                        by_tpot=grid.loads.settings[a],
                        by_throughput=grid.loads.settings[b],
                        throughput_lost=float(lost),
                        tpot_lost=float(slower),
                    )
                )
    return found


def _at_ends(grid: Grid, path: Path) -> list[Compared]:
    places = [(x, c) for x in range(len(grid.asked.contexts)) for ends in _stretches(grid, path, x) for c in dict.fromkeys(ends)]
    x, c = np.array(places).T
    asked = grid.asked
    return compare_with_off(grid.loads, path.chosen[x, c], grid.concurrency[c], np.array(asked.contexts)[x], asked.objective, asked.price_per_s)


def _notes(grid: Grid, rows: list[ScheduleRow]) -> list[str]:
    notes = []
    drafters = list(dict.fromkeys(row.drafter for row in rows))
    if len(drafters) > 1:
        notes.append(
            f"rows differ in what is loaded ({', '.join(drafters)}), which a running server cannot change: see the deployments for what one server "
            "can do; a histogram of your load (--load) chooses among them"
        )
    for row in rows:
        if row.violation > 0:
            at = f"concurrency {row.concurrency_from} to {row.concurrency_to}, context {row.context_from} to {row.context_to}"
            notes.append(f"at {at} nothing keeps the limits: {describe_setting(row.setting)} violates them least, by up to {row.violation:.0%}")
    if any(row.extrapolated for row in rows):
        notes.append("some rows reach beyond what was measured; their intervals are guesses there: measure a cell at the far end")
    return notes
