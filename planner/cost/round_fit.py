"""How long the phases of a round take, fitted to whole rounds that were timed in place, all at one batch.

    plain(L)      = a + c L                              decoding without a drafter, from its own cells
    draft(k, r)   = a + b k + c k r                      k drafts that read r cached tokens each
    verify(n, L)  = a + b n + c L + d n L                n = k + 1 tokens of the target over L cached ones, in one of three forms
    commit(k)     = a + b k

`verify` is the target's and the same behind every drafter. Variants of a drafter (weights, vocabulary, of one checkpoint) run the same code
on the same cache and differ in what a pass over their weights takes: `b` of `draft` is each variant's own, `a`, `c` and
`commit` are shared, so that a variant needs few cells. Where that does not hold, left-out cells are missed, and the error says so.

n = 1 has a term of its own: devices use other kernels for it. `verify` is also tried with a floor, max(floor, ..), as
launch-bound devices have it, and with a free value at every measured width ("steps"), as matrix units have it; the
simplest form that predicts left-out cells about as well as any is used. Coefficients are not negative. Rounds far from
their cell's median are left out; what remains is fitted by relative error.

k  tokens drafted in a round     r  tokens a draft step reads     L  committed tokens
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from planner.measurements import RoundSample
from planner.specs import CACHED, LOADED, DraftConfig, DrafterSpec

OUTLIER_MADS = 5.0  # standard deviations, by the median absolute deviation: keeps all but a few in a million of a normal sample
HUBER = 0.02  # relative residual from which a cell's pull on the fit no longer grows
FORMS = ("bilinear", "floor", "steps")  # simplest first


class Point(NamedTuple):
    """Mean phases of the rounds of one cell that drafted the same number of tokens."""

    cell: int
    context_len: int
    drafter: DrafterSpec
    drafted: int
    read: int
    position: float
    draft_s: float
    verify_s: float
    commit_s: float
    standard_error: float  # of the mean round, relative


class RoundFits:
    """The fit to all cells of a batch, and those that leave one cell out each, which is where intervals come from."""

    def __init__(self, points: list[Point], longest: int):
        """longest  the largest draft_len that will be asked for"""
        self._drafted = np.arange(longest + 1)
        self._known: dict[tuple, np.ndarray] = {}  # rounds of every length, by what else they depend on
        by_cell, by_width = (_without(points, field) for field in ("cell", "drafted"))
        scores = {form: [error for fit, left in by_width + by_cell for error in fit.errors(form, left)] for form in FORMS}
        enough = 1.05 * min(map(_rms, scores.values())) + 1e-3  # a richer form has to be better by more than chance
        self.form = next(form for form in FORMS if _rms(scores[form]) <= enough)
        self._fits = [_Fit(points), *(fit for fit, _ in by_cell)]
        self.error = max(_rms(scores[self.form]), _rms([point.standard_error for point in points]))  # relative, of a round in a cell not measured
        self.plain_error = _rms([point.standard_error for point in points if point.drafter.kind == "none"])

    def round_s(self, config: DraftConfig, context_len: int, position: float) -> np.ndarray:
        """[1 + J, draft_len + 1]: seconds of a round that drafts 0..draft_len tokens, by all cells first, then with a cell left out."""
        asked = config.drafter, config.kv.read(context_len), position
        if asked not in self._known:
            drafter, read, _ = asked
            self._known[asked] = np.array([fit.round_s(self.form, drafter, self._drafted, read, position) for fit in self._fits])
        return self._known[asked][:, : config.draft_len + 1]

    def draft_s(self, drafter: DrafterSpec, drafted: int, read: int) -> np.ndarray:
        """[1 + J]: seconds to draft so many tokens in sequence."""
        return np.array([fit.draft_s(drafter, drafted, read) for fit in self._fits])

    def narrow_s(self, drafter: DrafterSpec, position: float) -> float:
        """Seconds of a pass over one token behind a draft, and to commit what it wrote."""
        return self._fits[0].narrow_s(drafter, position)


class _Fit:
    """One fit of all phases, `verify` in every form."""

    def __init__(self, points: list[Point]):
        self._many_contexts = len({p.context_len for p in points}) > 1
        plain = [p for p in points if p.drafter.kind == "none"]
        lines = self._lines([p.position for p in plain])
        self._plain = _nonnegative(lines, [p.draft_s + p.verify_s + p.commit_s for p in plain])
        self._narrow = _nonnegative(lines, [p.verify_s for p in plain])

        wide = [p for p in points if p.drafted > 0]
        n = np.array([p.drafted + 1 for p in wide])
        positions = np.array([p.position for p in wide])
        seconds = np.array([p.verify_s for p in wide])
        self._widths = np.unique(n)
        line, steps = (_nonnegative(self._verify_rows(form, n, positions), seconds) for form in ("bilinear", "steps"))
        with_floor = _with_floor(self._verify_rows("floor", n, positions), seconds, line)
        self._verify = {"bilinear": (0.0, line), "floor": with_floor, "steps": (0.0, steps)}  # floor and coefficients

        self._draft, self._commit = {}, {}
        for family in {_family(p.drafter) for p in points if p.drafter.kind != "none"}:
            self._fit_drafters(family, [p for p in points if _family(p.drafter) == family])

    def round_s(self, form: str, drafter: DrafterSpec, drafted: np.ndarray, read: int, position: float) -> np.ndarray:
        """[len(drafted)] seconds of a round by the tokens it drafts."""
        if drafter.kind == "none":
            return np.full(len(drafted), self._lines([position])[0] @ self._plain)
        setup_s, each_s = self._commit[_family(drafter)]
        return self.draft_s(drafter, drafted, read) + self._verify_s(form, drafted + 1, position) + setup_s + each_s * drafted

    def draft_s(self, drafter: DrafterSpec, drafted, read: int):
        """Seconds by the tokens that are drafted, one number or several."""
        setup_s, each_s, slope = self._draft[drafter]
        return setup_s + (each_s + slope * read / 1000) * drafted

    def narrow_s(self, drafter: DrafterSpec, position: float) -> float:
        return float(self._lines([position])[0] @ self._narrow) + float(self._commit[_family(drafter)][0])

    def errors(self, form: str, points: list[Point]) -> list[float]:
        """Relative errors of predicted rounds."""
        predicted = [self.round_s(form, p.drafter, np.array([p.drafted]), p.read, p.position)[0] for p in points]
        return [seconds / (p.draft_s + p.verify_s + p.commit_s) - 1 for seconds, p in zip(predicted, points, strict=True)]

    def _fit_drafters(self, family: tuple, points: list[Point]) -> None:
        """All variants of a drafter at once: they share everything but what a pass over their weights takes."""
        variants = list(dict.fromkeys(p.drafter for p in points))
        drafted = np.array([p.drafted for p in points])
        reads = np.array([p.read for p in points])
        is_own = np.array([[p.drafter == variant for variant in variants] for p in points])
        several_reads = any(len(set(reads[own])) > 1 for own in is_own.T)  # the slope of one variant serves all
        ones = np.ones(len(points))
        columns = [ones, drafted * reads / 1000 * several_reads, drafted[:, None] * is_own]
        setup_s, slope, *each_s = _nonnegative(np.column_stack(columns), [p.draft_s for p in points])
        self._draft |= {variant: (setup_s, own_s, slope) for variant, own_s in zip(variants, each_s, strict=True)}
        self._commit[family] = _nonnegative(np.column_stack([ones, drafted]), [p.commit_s for p in points])

    def _verify_s(self, form: str, n: np.ndarray, position: float) -> np.ndarray:
        narrow_s = self._lines([position])[0] @ self._narrow
        if not len(self._widths):
            return np.full(len(n), narrow_s)
        floor, rest = self._verify[form]
        wide_s = np.maximum(floor, self._verify_rows(form, n, np.full(len(n), position)) @ rest)
        return np.where(n == 1, narrow_s, wide_s)

    def _verify_rows(self, form: str, n: np.ndarray, positions: np.ndarray) -> np.ndarray:
        L = positions / 1000 * self._many_contexts
        if form == "steps":
            return np.column_stack([*(np.interp(n, self._widths, hat) for hat in np.eye(len(self._widths))), L, n * L])
        return np.column_stack([np.ones(len(n)), n, L, n * L])

    def _lines(self, positions: list[float]) -> np.ndarray:
        return np.column_stack([np.ones(len(positions)), np.array(positions) / 1000 * self._many_contexts])


def _family(drafter: DrafterSpec) -> tuple:
    """What variants of a drafter have in common: its kind, and its checkpoint if it has one of its own."""
    return drafter.kind, drafter.path, drafter.dtype


def points_of(cell: int, sample: RoundSample, pace: np.ndarray) -> list[Point]:
    """The cell's rounds as they would have been at the mean pace."""
    drafted = np.array(sample.drafted)
    slow = np.repeat(pace, [len(part) for part in np.array_split(drafted, len(pace))])
    draft_s, verify_s, commit_s = (np.array(phase) / slow for phase in (sample.draft_s, sample.verify_s, sample.commit_s))
    total = draft_s + verify_s + commit_s
    read = sample.kv.read(sample.context_len) if sample.drafter.kind in (*CACHED, *LOADED) else 0
    found = []
    for count in sorted(set(sample.drafted)):
        rows = _without_outliers(total, np.flatnonzero(drafted == count))
        mean = [float(np.mean(values[rows])) for values in (np.array(sample.position), draft_s, verify_s, commit_s)]
        error = float(np.std(total[rows], ddof=1) / np.sqrt(len(rows)) / total[rows].mean()) if len(rows) > 1 else 0.0
        found.append(Point(cell, sample.context_len, sample.drafter, count, read, *mean, error))
    return found


def _without_outliers(seconds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows whose time is near their median."""
    distance = np.abs(seconds[rows] - np.median(seconds[rows]))
    scale = 1.4826 * np.median(distance)  # of a normal sample, the standard deviation
    return rows[distance <= OUTLIER_MADS * scale] if scale > 0 else rows


def _without(points: list[Point], field: str) -> list[tuple[_Fit, list[Point]]]:
    """Fits with the points of one value of a field left out each, and those points; what the rest says nothing about is passed over."""
    found = []
    for value in sorted({getattr(p, field) for p in points}):
        left, kept = ([p for p in points if (getattr(p, field) == value) == out] for out in (True, False))
        if all(_determined(kept, point) for point in left):
            found.append((_Fit(kept), left))
    return found


def _determined(kept: list[Point], left: Point) -> bool:
    """Whether what was kept says anything about a point that was left out, without extrapolating in context or width."""
    plain = left.drafter.kind == "none"
    same = [p for p in kept if (p.drafter.kind == "none") == plain]
    if not any(p.drafter == left.drafter and (p.drafted > 0 or left.drafted == 0) for p in kept):
        return False
    contexts = {p.context_len for p in same}
    widths = {p.drafted for p in same}
    inside = min(widths) <= left.drafted <= max(widths)
    return inside and (len(contexts) > 1 or contexts == {p.context_len for p in [*kept, left]})


def _with_floor(rows: np.ndarray, seconds: np.ndarray, line: np.ndarray) -> tuple[float, np.ndarray]:
    """Floor and coefficients of max(floor, rows @ coefficients): split at each width, the points that the floor holds are found in turns.

    line  the coefficients without a floor
    """
    best = 0.0, line
    least = _huber_loss(rows @ line / seconds - 1) if len(rows) else 0.0
    for width in np.unique(rows[:, 1])[:-1]:
        held = rows[:, 1] <= width
        for _ in range(4):
            floor, line = _nonnegative(np.ones((held.sum(), 1)), seconds[held])[0], _nonnegative(rows[~held], seconds[~held])
            loss = _huber_loss(np.maximum(floor, rows @ line) / seconds - 1)
            if loss < least:
                least, best = loss, (floor, line)
            before, held = held, rows @ line < floor
            if not held.any() or held.all() or (held == before).all():
                break
    return best


def _nonnegative(rows: np.ndarray, seconds) -> np.ndarray:
    """Coefficients >= 0 with small relative errors; cells with large ones pull less (Huber weights, five rounds)."""
    if not len(rows):
        return np.zeros(rows.shape[1])
    target = np.maximum(np.asarray(seconds), 1e-9)
    design = rows / target[:, None]
    weights = np.ones(len(target))
    for _ in range(5):
        coefficients, _ = nnls(design * weights[:, None], weights)
        residual = np.abs(design @ coefficients - 1)
        weights = np.sqrt(HUBER / np.maximum(residual, HUBER))
    return coefficients


def _huber_loss(residual: np.ndarray) -> float:
    size = np.abs(residual)
    return float(np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum())


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0
