"""How long a round takes: draft, verify and commit, fitted to whole rounds that were timed in place.

    plain(L)      = a + c L                              decoding without a drafter, from its own cells
    draft(k, r)   = a + b k + c k r                      k drafts that read r cached tokens each
    verify(n, L)  = a + b n + c L + d n L                n = k + 1 tokens of the target over L cached ones, in one of three forms
    commit(k)     = a + b k

n = 1 has a term of its own: devices use other kernels for it. `verify` is also tried with a floor, max(floor, ..), as
launch-bound devices have it, and with a free value at every measured width ("steps"), as matrix units have it; the
simplest form that predicts left-out cells about as well as any is used. Coefficients are not negative. Each
pass over the cells has a pace of its own, which is divided out: a slow minute is the machine's, not a cell's. Rounds far
from their cell's median are left out; what remains is fitted by relative error.

k  tokens drafted in a round     r  tokens a draft step reads     L  committed tokens
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from planner.errors import BadInput
from planner.measurements import Profile, RoundSample
from planner.specs import DraftConfig, DrafterSpec, FullKV, describe

OUTLIER_MADS = 5.0  # standard deviations, by the median absolute deviation: keeps all but a few in a million of a normal sample
HUBER = 0.02  # relative residual from which a cell's pull on the fit no longer grows


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


class LatencyModel:
    """Round times with the fits that leave one cell out each, which is where intervals come from."""

    def __init__(self, profile: Profile):
        samples = [sample for sample in profile.rounds if sample.role == "cell"]
        pace = _pace(samples)
        points = [point for cell, sample in enumerate(samples) for point in _points(cell, sample, pace)]
        self._contexts = len({sample.context_len for sample in samples})
        self._prefill = {sample.context_len: np.array(sample.seconds) for sample in profile.prefill}
        self._start_s = {
            drafter: float(np.median([s for x in samples if x.drafter == drafter for s in x.start_s])) for drafter in {x.drafter for x in samples}
        }
        self.max_draft_len = {drafter: max(x.draft_len for x in samples if x.drafter == drafter) for drafter in self._start_s}
        self.drift = _drift(profile)
        self.unsteadiness = max(abs(self.drift), float(np.std(pace, ddof=1)) if len(pace) > 1 else 0.0)  # relative, common to all rounds of a moment

        scores = {form: self._errors(points, form) for form in FORMS}
        enough = 1.05 * min(map(_rms, scores.values())) + 1e-3  # a richer form has to be better by more than chance
        self.form = next(form for form in FORMS if _rms(scores[form]) <= enough)
        self._fits = [_Fit(points, self.form), *(fit for fit, _ in self._without(points, _groups(points, "cell"), self.form))]
        errors = scores[self.form]
        self.error = max(_rms(errors), _rms([point.standard_error for point in points]))  # relative, of a round in a cell not measured
        self.plain_error = _rms([point.standard_error for point in points if point.drafter.kind == "none"])

    def round_s(self, config: DraftConfig, context_len: int, position: float) -> np.ndarray:
        """Seconds of a round that drafts 0..draft_len tokens with `position` tokens committed.

        [1 + J, draft_len + 1]: the fit to all cells first, then the J fits with a cell left out. `context_len` is the
        prompt's, which decides what a sparse cache holds.
        """
        if config.drafter not in self._start_s:
            raise BadInput(f"the profile timed no round of {describe(config)}; profile with this drafter")
        if config.draft_len > self.max_draft_len[config.drafter]:
            raise BadInput(
                f"rounds were timed up to draft_len {self.max_draft_len[config.drafter]}, got {config.draft_len}; profile with --max-draft-len"
            )
        drafted = np.arange(config.draft_len + 1)
        read = config.kv.read(context_len)
        return np.array([fit.round_s(config.drafter, drafted, read, position) for fit in self._fits])

    def ttft_s(self, config: DraftConfig, context_len: int) -> tuple[float, float]:
        """Prefill, selection and the first token: seconds and their standard deviation between prompts."""
        contexts = sorted(self._prefill)
        means = [float(self._prefill[c].mean()) for c in contexts]
        spread = max(float(np.std(self._prefill[c] / self._prefill[c].mean())) for c in contexts)
        if context_len <= contexts[0]:
            prefill = means[0] * context_len / contexts[0]
        elif context_len >= contexts[-1]:
            prefill = means[-1] * context_len / contexts[-1]
        else:
            prefill = float(np.interp(context_len, contexts, means))
        return prefill + self._start_s[config.drafter], prefill * spread

    def _without(self, points: list[Point], groups: list[list[Point]], form: str):
        """Fits with one group of points left out each, and the group; groups that the rest says nothing about are passed over."""
        for left in groups:
            kept = [p for p in points if p not in left]
            if all(_determined(kept, point) for point in left):
                yield _Fit(kept, form), left

    def _errors(self, points: list[Point], form: str) -> list[float]:
        """Relative errors of predicted rounds: at widths of which nothing was left in, then in cells left out one at a time."""
        errors = []
        for fit, left in self._without(points, _groups(points, "drafted") + _groups(points, "cell"), form):
            for p in left:
                predicted = fit.round_s(p.drafter, np.array([p.drafted]), p.read, p.position)[0]
                errors.append(predicted / (p.draft_s + p.verify_s + p.commit_s) - 1)
        return errors


def fit_latency(profile: Profile) -> LatencyModel:
    """Round times of everything a profile timed."""
    return LatencyModel(profile)


FORMS = ("bilinear", "floor", "steps")  # simplest first


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


def _pace(samples: list[RoundSample]) -> np.ndarray:
    """How slow each pass was, mean 1: the median over cells of a pass's rounds against the cell's own mean. One pace where passes do not match.

    Every pass holds every cell, so what all of them share is the machine's and not theirs.
    """
    counts = {len(sample.start_s) for sample in samples}
    if len(counts) != 1 or min(len(sample.draft_s) for sample in samples) < max(counts):
        return np.ones(1)
    rounds = np.array(
        [[np.median(part) for part in np.array_split(np.maximum(sample.round_s, 1e-9), len(sample.start_s))] for sample in samples]
    )  # [cells, passes]
    pace = np.median(rounds / rounds.mean(1, keepdims=True), axis=0)
    return pace / pace.mean()


def _points(cell: int, sample: RoundSample, pace: np.ndarray) -> list[Point]:
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


def _drift(profile: Profile) -> float:
    """Relative change of the first cell between the beginning and the end of the profile."""
    again = next((sample for sample in profile.rounds if sample.role == "drift"), None)
    if again is None:
        return 0.0
    key = (again.drafter, again.kv, again.draft_len, again.context_len)
    first = next((x for x in profile.rounds if x.role == "cell" and (x.drafter, x.kv, x.draft_len, x.context_len) == key), None)
    if first is None:
        raise BadInput(
            f"a drift sample repeats a cell, the profile has none of draft_len {again.draft_len} at context {again.context_len}; profile again"
        )
    return float(np.median(again.round_s) / np.median(first.round_s) - 1)


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0
