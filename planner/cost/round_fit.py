"""How long the phases of a round take, fitted to whole rounds that were timed in place, all at one batch.

    plain(L)      = a + c L                              decoding without a drafter, from its own cells
    draft(k, r)   = a + b k + c k r                      k drafts that read r cached tokens each
    verify(n, L)  = a + b n + c L + d n L                n = k + 1 tokens of the target over L cached ones, in one of three forms
    commit(k)     = a + b k

n = 1 has a term of its own: devices use other kernels for it. `verify` is also tried with a floor, max(floor, ..), as
launch-bound devices have it, and with a free value at every measured width ("steps"), as matrix units have it; the
simplest form that predicts left-out cells about as well as any is used. Coefficients are not negative. Rounds far from
their cell's median are left out; what remains is fitted by relative error.

k  tokens drafted in a round     r  tokens a draft step reads     L  committed tokens
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from planner.measurements import RoundSample
from planner.specs import DraftConfig, DrafterSpec, FullKV

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

    def __init__(self, points: list[Point]):
        scores = {form: _errors(points, form) for form in FORMS}
        enough = 1.05 * min(map(_rms, scores.values())) + 1e-3  # a richer form has to be better by more than chance
        self.form = next(form for form in FORMS if _rms(scores[form]) <= enough)
        self._fits = [_Fit(points, self.form), *(fit for fit, _ in _without(points, _groups(points, "cell"), self.form))]
        self.error = max(_rms(scores[self.form]), _rms([point.standard_error for point in points]))  # relative, of a round in a cell not measured
        self.plain_error = _rms([point.standard_error for point in points if point.drafter.kind == "none"])

    def round_s(self, config: DraftConfig, context_len: int, position: float) -> np.ndarray:
        """[1 + J, draft_len + 1]: seconds of a round that drafts 0..draft_len tokens, by all cells first, then with a cell left out."""
        drafted = np.arange(config.draft_len + 1)
        read = config.kv.read(context_len)
        return np.array([fit.round_s(config.drafter, drafted, read, position) for fit in self._fits])


class _Fit:
    """One fit of all phases."""

    def __init__(self, points: list[Point], form: str):
        many_contexts = len({p.context_len for p in points}) > 1
        plain = [p for p in points if p.drafter.kind == "none"]
        self._plain = _nonnegative([_line(p.position, many_contexts) for p in plain], [p.draft_s + p.verify_s + p.commit_s for p in plain])
        self._many_contexts = many_contexts

        self._form = form
        wide = [p for p in points if p.drafted > 0]
        self._widths = sorted({p.drafted + 1 for p in wide})
        self._verify = _nonnegative([self._verify_row(p.drafted + 1, p.position) for p in wide], [p.verify_s for p in wide])
        self._floor = 0.0
        if form == "floor" and wide:
            self._fit_floor(wide)
        narrow = [p.verify_s for p in plain]
        self._narrow = _nonnegative([_line(p.position, many_contexts) for p in plain], narrow)

        self._draft, self._commit = {}, {}
        for drafter in {p.drafter for p in points if p.drafter.kind != "none"}:
            own = [p for p in points if p.drafter == drafter]
            several_reads = len({p.read for p in own}) > 1
            self._draft[drafter] = several_reads, _nonnegative([_draft_row(p.drafted, p.read, several_reads) for p in own], [p.draft_s for p in own])
            self._commit[drafter] = _nonnegative([[1.0, p.drafted] for p in own], [p.commit_s for p in own])

    def round_s(self, drafter: DrafterSpec, drafted: np.ndarray, read: int, position: float) -> np.ndarray:
        if drafter.kind == "none":
            return np.full(len(drafted), _line(position, self._many_contexts) @ self._plain)
        several_reads, draft = self._draft[drafter]
        return np.array(
            [
                _draft_row(k, read, several_reads) @ draft + self._verify_s(int(k) + 1, position) + np.array([1.0, k]) @ self._commit[drafter]
                for k in drafted
            ]
        )

    def _verify_s(self, n: int, position: float) -> float:
        if n == 1 or not self._widths:
            return _line(position, self._many_contexts) @ self._narrow
        return max(self._floor, self._verify_row(n, position) @ self._verify)

    def _verify_row(self, n: int, position: float) -> np.ndarray:
        L = position / 1000 if self._many_contexts else 0.0
        if self._form == "steps":
            hats = [np.interp(n, self._widths, np.eye(len(self._widths))[i]) for i in range(len(self._widths))]
            return np.array([*hats, L, n * L])
        return np.array([1.0, n, L, n * L])

    def _fit_floor(self, wide: list[Point]) -> None:
        rows = np.array([self._verify_row(p.drafted + 1, p.position) for p in wide])
        seen = np.array([p.verify_s for p in wide])

        def residual(theta: np.ndarray) -> np.ndarray:
            return np.maximum(theta[0], rows @ theta[1:]) / seen - 1

        start = np.concatenate([[seen.min() * 0.99], self._verify])
        found = least_squares(residual, start, bounds=(0, np.inf), loss="soft_l1", f_scale=HUBER, x_scale=np.maximum(start, seen.min() / 100))
        self._floor, self._verify = found.x[0], found.x[1:]


def points_of(cell: int, sample: RoundSample, pace: np.ndarray) -> list[Point]:
    """The cell's rounds as they would have been at the mean pace."""
    drafted = np.array(sample.drafted)
    slow = np.repeat(pace, [len(part) for part in np.array_split(drafted, len(pace))])
    draft_s, verify_s, commit_s = (np.array(phase) / slow for phase in (sample.draft_s, sample.verify_s, sample.commit_s))
    total = draft_s + verify_s + commit_s
    read = 0 if isinstance(sample.kv, FullKV) else sample.kv.read(sample.context_len)
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


def _without(points: list[Point], groups: list[list[Point]], form: str):
    """Fits with one group of points left out each, and the group; groups that the rest says nothing about are passed over."""
    for left in groups:
        kept = [p for p in points if p not in left]
        if all(_determined(kept, point) for point in left):
            yield _Fit(kept, form), left


def _errors(points: list[Point], form: str) -> list[float]:
    """Relative errors of predicted rounds: at widths of which nothing was left in, then in cells left out one at a time."""
    errors = []
    for fit, left in _without(points, _groups(points, "drafted") + _groups(points, "cell"), form):
        for p in left:
            predicted = fit.round_s(p.drafter, np.array([p.drafted]), p.read, p.position)[0]
            errors.append(predicted / (p.draft_s + p.verify_s + p.commit_s) - 1)
    return errors


def _groups(points: list[Point], field: str) -> list[list[Point]]:
    return [[p for p in points if getattr(p, field) == value] for value in sorted({getattr(p, field) for p in points})]


def _determined(points: list[Point], left: Point) -> bool:
    """Whether what remains says anything about a point that was left out, without extrapolating in context or width."""
    plain = left.drafter.kind == "none"
    same = [p for p in points if (p.drafter.kind == "none") == plain]
    if not plain and not any(p.drafter == left.drafter for p in points):
        return False
    contexts = {p.context_len for p in same}
    widths = {p.drafted for p in same}
    inside = bool(widths) and min(widths) <= left.drafted <= max(widths)
    return inside and (len(contexts) > 1 or contexts == {p.context_len for p in [*points, left]})


def _line(position: float, with_slope: bool) -> np.ndarray:
    return np.array([1.0, position / 1000 if with_slope else 0.0])


def _draft_row(drafted: float, read: int, several_reads: bool) -> np.ndarray:
    return np.array([1.0, drafted, drafted * read / 1000 if several_reads else 0.0])


def _nonnegative(rows: list, seconds: list[float]) -> np.ndarray:
    """Coefficients >= 0 with small relative errors; cells with large ones pull less (Huber weights, five rounds)."""
    if not rows:
        return np.zeros(0)
    target = np.maximum(np.array(seconds), 1e-9)
    design = np.array(rows, dtype=float) / target[:, None]
    weights = np.ones(len(target))
    for _ in range(5):
        coefficients, _ = nnls(design * weights[:, None], weights)
        residual = np.abs(design @ coefficients - 1)
        weights = np.sqrt(HUBER / np.maximum(residual, HUBER))
    return coefficients


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0
