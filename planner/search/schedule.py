"""Which setting to run at which load: every setting at every load, the best at each, and few rows that lose almost nothing.

A row holds for a range of concurrencies and of contexts. Rows are as few as can be while no load loses more than TOLERANCE
against its best setting, or TIED where the interval of the difference holds zero. Rows cost a server nothing, so rare loads
are served as well as frequent ones: a histogram of load decides which drafter is loaded, not where rows end.

S settings    X contexts    C concurrencies    n  loads of a row
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

import planner
from planner.plans import Interval
from planner.schedules import Compared, Deployment, Disagreement, Flip, LoadCurve, Schedule, ScheduleRow, SettingTie, describe_setting
from planner.search.grid import TIED, Grid, Path, Question, choose, evaluate, ratio_sds, some_places, violation
from planner.search.loads import HALF_WIDTH, Forecast, Loads, compare_with_off
from planner.search.rows import runs
from planner.search.totals import LARGEST, counts_of, gains, relative, total
from planner.serving import OFF

MAX_TIES = 5
MAX_KNOTS, KNOT_ERROR = 48, 0.01  # of the curves that a schedule keeps; the error is relative


def make_schedule(loads: Loads, question: Question, **about) -> Schedule:
    """The schedule of an engine or profile; `about` fills the fields that say where it comes from.

    Without a histogram it is the best at each load, deployments free to differ; with one it is that of the best deployment.
    """
    grid = evaluate(loads, question)
    members = {
        name: np.array([i for i, s in enumerate(loads.settings) if s.drafter == name]) for name in dict.fromkeys(s.drafter for s in loads.settings)
    }
    able = {name: own for name, own in members.items() if np.isfinite(grid.forecast.tpot_s[own]).any(0).all()}
    free, *paths = choose(grid, [grid.free, *able.values()], question.objective)
    counts = counts_of(grid, free.best)
    totals = [total(grid, path.chosen, counts) for path in paths]
    best, off = total(grid, free.best, counts)[0], totals[0][0]
    free_rows, *rows = _rows(grid, [free, *paths])
    deployments = [
        Deployment(
            drafter=name,
            schedule=own,
            loss=max(0.0, -float(np.expm1(gained - best))) if np.isfinite(best) else 0.0,
            gain_over_off=gain if np.isfinite(off) else None,
        )
        for name, own, (gained, _), gain in zip(
            able, rows, totals, gains(grid, [path.chosen for path in paths], np.zeros_like(free.best), counts), strict=True
        )
    ]
    order = sorted(range(len(paths)), key=lambda i: totals[i], reverse=True)  # stable: off is first among equals
    if question.weights is None:
        deployment, chosen, schedule = None, free, free_rows
    else:
        deployment, chosen, schedule = deployments[order[0]].drafter, paths[order[0]], rows[order[0]]
    return Schedule(
        planner_version=planner.__version__,
        objective=question.objective,
        goodput=question.limits if question.objective == "goodput" else None,
        concurrency_from=question.concurrency_from,
        concurrency_to=question.concurrency_to,
        contexts=question.contexts,
        output_len=loads.output_len,
        weighted=question.weights is not None,
        deployment=deployment,
        schedule=schedule,
        flips=_flips(grid, chosen),
        deployments=[deployments[i] for i in order],
        disagreements=_disagreements(grid),
        estimates=_at_ends(grid, chosen),
        curves=_curves(grid, {(row.drafter, row.kv) for own in (schedule, *rows) for row in own if row.drafter != OFF}),
        num_candidates=grid.forecast.tpot_s.size,
        notes=[
            *loads.notes,
            *(f"{name} cannot be loaded at every load asked about, so no server is offered with it" for name in members if name not in able),
            *_notes(grid, schedule),
        ],
        **about,
    )


def _rows(grid: Grid, paths: Sequence[Path]) -> list[list[ScheduleRow]]:
    """The rows of each path, and how they compare with the other settings it was chosen from."""
    spans = [
        _Span(path, x, first, last, edges)
        for path in paths
        for x, edges in enumerate(context_ranges(grid.asked.contexts))
        for first, last in _stretches(grid, path, x)
    ]
    rivals = [_rivals(grid, span) for span in spans]
    questions = [
        (span.setting, others[:, None], span.x, np.unique([span.first, (span.first + span.last) // 2, span.last])[None])  # errors change slowly
        for span, (others, _) in zip(spans, rivals, strict=True)
    ]
    gaps = ratio_sds(grid, questions, grid.asked.objective)
    rows = [
        (span.path, _row(grid, span, others, ahead, sd.reshape(len(others), -1).mean(1) if len(others) else sd))
        for span, (others, ahead), sd in zip(spans, rivals, gaps, strict=True)
    ]
    return [[row for own, row in rows if own is path] for path in paths]


class _Span(NamedTuple):
    """Where a row lies: at context x, from place `first` to `last`."""

    path: Path
    x: int
    first: int
    last: int
    context_range: tuple[int, int]

    @property
    def setting(self) -> int:
        return int(self.path.chosen[self.x, self.first])

    @property
    def loads(self) -> tuple[int, slice]:
        return self.x, slice(self.first, self.last + 1)


def _rivals(grid: Grid, span: _Span) -> tuple[np.ndarray, np.ndarray]:
    """The best other setting of a row and those that may tie with it; and by how much the row's is ahead, a logarithm, mean over its loads."""
    path, number = span.path, span.last + 1 - span.first
    score, own = path.score[:, *span.loads], path.score[path.members == span.setting][:, *span.loads]
    weights = np.zeros(1) if grid.asked.weights is None else grid.asked.weights[span.loads]
    share = weights / weights.sum() if weights.sum() > 0 else np.full(number, 1 / number)
    able = (path.members != span.setting) & np.isfinite(score).any(1)
    ahead = np.minimum(-np.log(np.maximum(np.exp(score[able] - own) @ share, 1e-9)), LARGEST)
    sds = grid.forecast.sd_tpot if grid.asked.objective == "tpot" else grid.forecast.sd_throughput
    both = np.nan_to_num(sds[path.members[able]][:, *span.loads]).max(1) + sds[span.setting][span.loads].max()
    near = ahead <= HALF_WIDTH * both  # a ratio deviates by at most what both numbers do together: the others cannot tie
    if len(ahead):
        near[ahead.argmin()] = True
    return path.members[able][near], ahead[near]


def _stretches(grid: Grid, path: Path, x: int) -> list[tuple[int, int]]:
    """Places of one setting that keep the limits throughout, or nowhere."""
    chosen, c = path.chosen[x], np.arange(len(grid.concurrency))
    kept = violation(Forecast(*(v[chosen, x, c] for v in grid.forecast)), grid.asked.limits) == 0
    return runs(np.stack([chosen, kept], axis=1))


def context_ranges(contexts: list[int]) -> list[tuple[int, int]]:
    """From and to of the row of each context: cut in the middle between two on a log scale, from 1 to the longest asked about."""
    cuts = [int(np.sqrt(a * b)) for a, b in pairwise(contexts)]
    return list(zip([1, *(cut + 1 for cut in cuts)], [*cuts, contexts[-1]], strict=True))


def _row(grid: Grid, span: _Span, others: np.ndarray, ahead: np.ndarray, sd: np.ndarray) -> ScheduleRow:
    """One row beside the settings `others`, which it is `ahead` of with a standard deviation `sd`, all [others]."""
    tied = sorted(np.flatnonzero(ahead <= HALF_WIDTH * sd), key=lambda i: (others[i] != 0, ahead[i]))  # that it may not pay at all comes first
    runner_up = int(ahead.argmin()) if len(others) else None
    margin = relative(ahead[runner_up], sd[runner_up]) if runner_up is not None else Interval(value=0.0, low=0.0, high=0.0)
    settings, what = grid.loads.settings, grid.loads.settings[span.setting]
    excess = violation(Forecast(*(v[span.setting, *span.loads] for v in grid.forecast)), grid.asked.limits).max()
    return ScheduleRow(
        concurrency_from=int(grid.concurrency[span.first]),
        concurrency_to=int(grid.concurrency[span.last]),
        context_from=span.context_range[0],
        context_to=span.context_range[1],
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
                difference=relative(ahead[i], sd[i]),
                cost_of_being_wrong=max(0.0, float(np.expm1(min(HALF_WIDTH * sd[i] - ahead[i], LARGEST)))),
            )
            for i in tied[:MAX_TIES]
        ],
        violation=min(float(excess), 1e9),
        extrapolated=bool(grid.forecast.extrapolated[span.setting, *span.loads].any()),
        weight=None if grid.asked.weights is None else float(grid.asked.weights[span.loads].sum()),
    )


def _flips(grid: Grid, path: Path) -> list[Flip]:
    pairs = [
        (x, int(path.chosen[x, start]), int(path.chosen[x, first]), first)
        for x in range(len(grid.asked.contexts))
        for (start, _), (first, _) in pairwise(runs(path.chosen[x]))
    ]
    C = len(grid.concurrency)
    places = some_places(C)
    gaps = ratio_sds(grid, [(before, after, x, places) for x, before, after, _ in pairs], grid.asked.objective)
    found = []
    for (x, before, after, first), sd in zip(pairs, gaps, strict=True):
        gap = path.score[path.members == before, x][0] - path.score[path.members == after, x][0]
        decided = ~(np.abs(gap) <= HALF_WIDTH * np.interp(np.arange(C), places, sd))
        below, above = np.flatnonzero(decided[:first]), np.flatnonzero(decided[first:])
        found.append(
            Flip(
                context_len=grid.asked.contexts[x],
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
    quick, many = (choose(grid, [grid.free], objective)[0].chosen for objective in ("tpot", "throughput"))
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


def _curves(grid: Grid, drafters: set[tuple]) -> list[LoadCurve]:
    """Of off and of every draft_len of these (drafter, kv): predictions at as few loads as keep what is interpolated between them right."""
    own = [s for s, what in enumerate(grid.loads.settings) if what.drafter == OFF or (what.drafter, what.kv) in drafters]
    f, found, places = grid.forecast, [], _knots(grid, own)
    columns = {
        "running_batch": f.running, "tokens_per_round": f.tokens_per_round, "round_s": f.round_s, "tpot_s": f.tpot_s,
        "sd_tokens": f.sd_tokens, "sd_round": f.sd_round, "sd_tpot": f.sd_tpot,
    }  # fmt: skip
    for s in own:
        for x, context_len in enumerate(grid.asked.contexts):
            c = places[np.isfinite(f.tpot_s[s, x, places])]
            if len(c):
                shown = {name: [float(f"{value:.6g}") for value in values[s, x, c]] for name, values in columns.items()}
                found.append(LoadCurve(setting=grid.loads.settings[s], context_len=context_len, concurrency=grid.concurrency[c].tolist(), **shown))
    return found


def _knots(grid: Grid, settings: list[int]) -> np.ndarray:
    """Loads between which no time per token is off by more than KNOT_ERROR when it is interpolated on logarithms; more where it bends."""
    C = len(grid.concurrency)
    looked_at = np.unique(np.geomspace(1, C, min(C, MAX_KNOTS * 4)).round().astype(int)) - 1
    x, y = np.log(grid.concurrency[looked_at]), np.log(grid.forecast.tpot_s[settings][:, :, looked_at]).reshape(-1, len(looked_at))
    y = y[np.isfinite(y).all(1)]  # what cannot run everywhere shares the others' loads
    knots = [0, len(looked_at) - 1]
    while len(y) and len(knots) < MAX_KNOTS:
        knots = sorted(set(knots))
        error = np.abs([np.interp(x, x[knots], row[knots]) - row for row in y]).max(0)
        if error.max() <= KNOT_ERROR:
            break
        knots.append(int(error.argmax()))
    return looked_at[sorted(set(knots))]


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
