"""Seconds of one kernel, or of one pass, by its sizes, from a few timed rows: a law of non-negative terms, and a smooth correction.

    law          the floor, or what is read and computed and the waves it takes, whichever is longer; every size of a fast memory
                 that the rows leave open is weighed by how well the law then fits
    correction   a Gaussian process on the logarithm, over doublings of the sizes; the terms' own doubt is part of it
    outliers     rows that all others say are wrong: left out and named
    next_rows    which rows to time next, by what the rows so far leave unsure; never by a time that is not known yet

n  rows asked for      m  rows measured      D  sizes of a row      F  terms
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import nnls

from planner.cost.gaussian_process import Hyper, fit_hyper

ROBUST_ROUNDS, ROBUST_SD = 3, 0.03  # of reweighting; residuals within twice so much count in full, whatever the spread
CLIFF_PRICE = 4.0  # what a memory's size must gain in log likelihood before it counts as much as none
LEAST_LIKELY = 0.05  # of the likeliest: less is not looked at
CLIFF_SD, CLIFF_CAP = 0.02, 0.3  # spread that even a right law leaves, and the residual from where on a row says no more
OUTLYING, OUTLYING_SD = np.log(1.5), 4.0  # an outlier misses by more than both, and half the first even where the law knows it
FLOOR_NORM, LEAST_ALONE = 6.0, 0.3  # exponent that joins the floor and the terms; a row on the floor bounds the terms to a share of it
MOST_OUTLIERS = 0.1  # of the rows
LEAST_SD = 0.01  # of a repeated measurement
PRIOR_ROWS, PRIOR_WIDTH = 8, 2.0  # so many rows that missed by so many standard deviations are added to those that calibrate
WORST_MISS = 4.0  # standard deviations, beyond which a row calibrates no more


class Form(NamedTuple):
    """A kind of kernel: what its time is made of, and along which coordinates a correction stays alike."""

    terms: Callable[[np.ndarray], np.ndarray]  # rows [n, D] -> [n, F] non-negative, the constant first
    coordinates: Callable[[np.ndarray], np.ndarray]  # rows [n, D] -> [n, C], doublings
    hyper: dict[str, tuple[float, float]]  # medians and standard deviations of logarithms: term, smooth, noise, length_0 .. length_C
    read: int | None = None  # the term that counts bytes which a fast memory may hold
    floored: bool = False  # the terms overlap a floor instead of adding to it


def decode_attention(kv_heads: int, head_dim: int, num_sms: int, element_bytes: int = 2) -> Form:
    """One new token of each request over its keys and values. Rows are (batch, kv_len)."""

    def terms(rows: np.ndarray) -> np.ndarray:
        batch, kv_len = rows.T
        token = 2 * kv_heads * head_dim * element_bytes  # bytes of keys and values
        waves = np.ceil(batch * kv_heads / num_sms) - 1
        return np.stack([np.ones(len(rows)), batch * kv_len * token, batch, batch * np.maximum(kv_len, KV_TILE) * token, waves], axis=1)

    def coordinates(rows: np.ndarray) -> np.ndarray:
        doublings = np.log2(rows)
        return np.concatenate([doublings, doublings.sum(1, keepdims=True)], axis=1)

    return Form(terms, coordinates, ATTENTION_HYPER, read=1)


KV_TILE = 128  # tokens of a request that a thread block takes at once
ATTENTION_HYPER = {
    "term": (0.1, 0.5),
    "smooth": (0.12, 0.6),
    "noise": (0.02, 0.5),
    "length_0": (2.5, 0.5),
    "length_1": (2.5, 0.5),
    "length_2": (4.0, 0.5),
}


def tree_verification() -> Form:
    """The target's pass over a draft tree and its root at batch 1. Rows are (context_len, tree_size).

    The last term is empirical: on an A800 a node costs the more the wider the tree is, most at long contexts.
    """

    def terms(rows: np.ndarray) -> np.ndarray:
        context, tokens = rows[:, 0], rows[:, 1] + 1
        return np.stack([np.ones(len(rows)), tokens, context, tokens * context, tokens**2 * context], axis=1)

    return Form(terms, lambda rows: rows / (1000.0, 64.0), TREE_HYPER, floored=True)


TREE_HYPER = {"term": (0.1, 0.5), "smooth": (0.03, 0.6), "noise": (0.005, 0.5), "length_0": (3.0, 0.4), "length_1": (3.0, 0.4)}


def best_tree_sizes(model: "KernelTime", contexts: np.ndarray, tokens_per_round: np.ndarray, draft_s: float) -> np.ndarray:
    """[C] sizes that a verification model finds to give the most tokens per second (CaDDTree's theta, arXiv:2606.01813).

    tokens_per_round  [N] of trees of 0, 1, .. N - 1 nodes; draft_s  to draft one
    """
    sizes = np.arange(len(tokens_per_round))
    rows = np.stack(np.meshgrid(contexts, sizes, indexing="ij"), axis=-1).reshape(-1, 2)
    verify_s = model.predict(rows)[0].reshape(len(contexts), len(sizes))
    return (tokens_per_round / (draft_s + verify_s)).argmax(1)


def matrix_product(num_columns: int, num_sms: int) -> Form:
    """[m, k] times [k, num_columns], the weights read once. Rows are (m,), the width."""

    def terms(rows: np.ndarray) -> np.ndarray:
        m = rows[:, 0]
        tiles = [np.ceil(m / tile) - 1 for tile in WIDTH_TILES]
        waves = [np.ceil(np.ceil(m / tile) * np.ceil(num_columns / 128) / num_sms) - 1 for tile in WIDTH_TILES]
        ragged = (m > ALIGNED_FROM) & (m % ALIGNMENT > 0)
        return np.stack([np.ones(len(rows)), m, ragged, ragged * m, *tiles, *waves], axis=1)

    return Form(terms, np.log2, PRODUCT_HYPER)


WIDTH_TILES = (64, 128, 256)  # rows of a tile
ALIGNED_FROM, ALIGNMENT = 128, 8  # rows that are loaded together; few rows come with kernels of their own, which do not mind
PRODUCT_HYPER = {"term": (0.1, 0.5), "smooth": (0.03, 0.6), "noise": (0.03, 0.5), "length_0": (2.0, 0.5)}


def rising_widths(model: "KernelTime", widths: np.ndarray, least: float) -> np.ndarray:
    """Those of the widths after which one more row takes longer by at least such a share, as the model of a product has it."""
    here, next_width = (model.predict(widths[:, None] + more)[0] for more in (0, 1))
    return widths[next_width >= (1 + least) * here]


class Law(NamedTuple):
    """Laws of one kernel that differ in the size of the fast memory, and how likely each is."""

    weight: np.ndarray  # [laws]
    edge: np.ndarray  # [laws] bytes up to which reading is as quick as the term says; inf: no such edge
    floor: np.ndarray  # [laws] seconds
    coefficients: np.ndarray  # [laws, F + 1], the last of reading beyond the edge
    counted: np.ndarray  # [laws, m] how much each measured row pulled

    def seconds(self, form: Form, rows: np.ndarray) -> np.ndarray:
        """[n] their weighted geometric mean."""
        terms = form.terms(rows)
        each = [_above(_with_edge(form, terms, edge) @ own, floor) for edge, floor, own in zip(self.edge, self.floor, self.coefficients, strict=True)]
        return np.exp(self.weight @ np.log(np.maximum(each, 1e-12)))


class KernelTime:
    """Times of one kernel, from rows [m, D] and their seconds [m]."""

    def __init__(self, form: Form, rows: np.ndarray, seconds: np.ndarray):
        if not (len(rows) == len(seconds) > 1 and np.all(np.asarray(seconds) > 0) and np.isfinite(seconds).all()):
            raise ValueError(f"a kernel's time is fitted to two or more rows of positive seconds, got {len(rows)} rows and {seconds}")
        self.form, self._rows, self._seconds = form, np.asarray(rows, float), np.asarray(seconds, float)
        self.outliers = np.zeros(len(rows), bool)
        while True:
            self._fit()
            missed, sd = self._left_out()
            suspect = np.where(np.abs(self._residual) > OUTLYING / 2, np.abs(missed), 0.0)  # a corner of the rows is far off only if left out
            worst = int(np.argmax(suspect))
            if self.outliers.sum() >= MOST_OUTLIERS * len(rows) or suspect[worst] < max(OUTLYING, OUTLYING_SD * sd[worst]):
                break
            self.outliers[np.flatnonzero(~self.outliers)[worst]] = True
        squares = np.minimum(np.square(missed / sd), WORST_MISS**2)
        self._widen = float(np.sqrt((squares.sum() + PRIOR_ROWS * PRIOR_WIDTH**2) / (len(squares) + PRIOR_ROWS)))

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] seconds, and the standard deviation of a fresh measurement's logarithm [n]."""
        rows = np.asarray(rows, float)
        cross = self._covariance_of(rows, self._kept)
        return self.law.seconds(self.form, rows) * np.exp(cross @ self._weights), self._widen * np.sqrt(self._variance(rows, cross) + self._noise)

    def next_rows(self, candidates: np.ndarray, count: int) -> list[int]:
        """Which of the candidates [n, D] to time next: each lowers the mean variance of all of them most, given those before it.

        A Gaussian process knows that before it knows the times.
        """
        candidates = np.asarray(candidates, float)
        white = solve_triangular(self._factor[0], self._covariance_of(candidates, self._kept).T, lower=True)
        left = self._covariance_of(candidates, candidates) - white.T @ white  # [n, n]
        free = ~(candidates[:, None] == self._rows).all(2).any(1)
        taken: list[int] = []
        while len(taken) < min(count, int(free.sum())):
            gain = np.square(left).sum(0) / (np.diag(left) + self._noise)
            row = int(np.argmax(np.where(free, gain, -1.0)))
            left -= np.outer(left[row], left[row]) / (left[row, row] + self._noise)
            free[row] = False
            taken.append(row)
        return taken

    @property
    def _kept(self) -> np.ndarray:
        return self._rows[~self.outliers]

    def _fit(self) -> None:
        rows, seconds = self._kept, self._seconds[~self.outliers]
        self.law = _fit_law(self.form, rows, seconds)
        self._most = np.maximum(_shares(self.law, self.form, rows).max(0), 1e-12)  # of a term, in a measured row
        self._residual = np.log(seconds / self.law.seconds(self.form, rows))
        coordinates, shares = self._places(rows)
        far, alike = np.square(coordinates[:, None] - coordinates), shares @ shares.T
        noisy = lambda hyper: _covariance(far, alike, hyper) + hyper["noise"] ** 2 * np.eye(len(rows))
        self._hyper = fit_hyper(noisy, self._residual, self.form.hyper)
        self._noise = self._hyper["noise"] ** 2 + LEAST_SD**2
        self._factor = cho_factor(self._covariance_of(rows, rows) + self._noise * np.eye(len(rows)), lower=True)
        self._weights = cho_solve(self._factor, self._residual)

    def _left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """[kept] each row's log seconds about what the others predict, and the standard deviation of that; law and process fitted without it."""
        rows, seconds = self._kept, self._seconds[~self.outliers]
        covariance = np.tril(self._factor[0]) @ np.tril(self._factor[0]).T
        missed, sd = np.zeros(len(rows)), np.zeros(len(rows))
        for row in range(len(rows)):
            rest = np.arange(len(rows)) != row
            law = _without(self.law, self.form, rows, seconds, row)
            residual = np.log(seconds / law.seconds(self.form, rows))
            factor, cross = cho_factor(covariance[np.ix_(rest, rest)], lower=True), covariance[row, rest]
            missed[row] = residual[row] - cross @ cho_solve(factor, residual[rest])
            sd[row] = np.sqrt(covariance[row, row] - cross @ cho_solve(factor, cross))
        return missed, sd

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [n, C], and each term's share [n, F + 1] over the largest it has of a measured row."""
        return self.form.coordinates(rows), _shares(self.law, self.form, rows) / self._most

    def _covariance_of(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        (at, share), (other, others) = self._places(a), self._places(b)
        return _covariance(np.square(at[:, None] - other), share @ others.T, self._hyper)

    def _variance(self, rows: np.ndarray, cross: np.ndarray) -> np.ndarray:
        """[n] of the logarithm of the time itself, from covariances [n, m]."""
        shares = self._places(rows)[1]
        prior = self._hyper["smooth"] ** 2 + self._hyper["term"] ** 2 * np.square(shares).sum(1)
        return np.maximum(prior - np.square(solve_triangular(self._factor[0], cross.T, lower=True)).sum(0), 0.0)


def first_rows(form: Form, candidates: np.ndarray, count: int, begin: int | None = None) -> list[int]:
    """Which rows to time first: `begin` or the largest, then each the farthest from all before it, in lengths of the form's prior."""
    at = form.coordinates(np.asarray(candidates, float)) / _lengths({name: median for name, (median, _) in form.hyper.items()})
    taken = [int(np.argmax(at.sum(1))) if begin is None else begin]
    while len(taken) < min(count, len(at)):
        far = np.square(at[:, None] - at[taken]).sum(2).min(1)
        taken.append(int(np.argmax(far)))
    return taken


def choose_rows(
    form: Form, candidates: np.ndarray, count: int, time_row: Callable[[int], float], first: Sequence[int]
) -> tuple[list[int], KernelTime]:
    """Time `count` rows of the candidates [n, D]: `first`, and then those that tell most of all. The rows in their order, and the fit to them.

    What tells most is asked anew whenever the rows have grown by half.
    """
    taken, seconds = list(first), [time_row(row) for row in first]
    while True:
        model = KernelTime(form, candidates[taken], np.array(seconds))
        more = model.next_rows(candidates, min(count - len(taken), max(1, len(taken) // 2)))
        if not more:
            return taken, model
        taken += more
        seconds += [time_row(row) for row in more]


def _with_edge(form: Form, terms: np.ndarray, edge: float) -> np.ndarray:
    """[n, F + 1] the terms and what is read beyond the edge, where all of it misses the fast memory: each pass evicts what the next needs."""
    read = terms[:, form.read] if form.read is not None else np.zeros(len(terms))
    return np.concatenate([terms, np.where(read > edge, read, 0.0)[:, None]], axis=1)


def _above(seconds: np.ndarray, floor: float) -> np.ndarray:
    """The larger of both, or a little more where they are alike: what keeps a device waiting ends gradually."""
    return floor * (1 + (seconds / floor) ** FLOOR_NORM) ** (1 / FLOOR_NORM) if floor > 0 else seconds


class _Fit(NamedTuple):
    floor: float
    coefficients: np.ndarray  # [F]
    residual: np.ndarray  # [m] of the logarithm
    counted: np.ndarray  # [m]


def _weighted(terms: np.ndarray, seconds: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """[F] non-negative coefficients by relative errors."""
    unit = np.where(terms.max(0) > 0, terms.max(0), np.inf)
    return nnls(terms / unit * (counted / seconds)[:, None], counted)[0] / unit


def _fit_terms(terms: np.ndarray, seconds: np.ndarray) -> _Fit:
    """Rows that miss by far pull less than in proportion."""
    counted = np.ones(len(seconds))
    for _ in range(ROBUST_ROUNDS):
        residual = np.log(np.maximum(terms @ _weighted(terms, seconds, counted), 1e-12) / seconds)
        usual = 2 * max(1.48 * float(np.median(np.abs(residual))), ROBUST_SD)
        counted = 1 / np.sqrt(np.maximum(1.0, np.abs(residual) / usual))
    coefficients = _weighted(terms, seconds, counted)
    return _Fit(0.0, coefficients, np.log(np.maximum(terms @ coefficients, 1e-12) / seconds), counted)


def _fit_floored(terms: np.ndarray, seconds: np.ndarray) -> _Fit:
    """The quickest rows lie on a floor, as many of them as fits best."""
    order, best = np.argsort(seconds), None
    for count in range(len(seconds) - 1):
        floor = float(np.exp(np.log(seconds[order[:count]]).mean())) if count else 0.0
        slower = seconds[order[count:]]
        alone = np.maximum(slower**FLOOR_NORM - floor**FLOOR_NORM, (LEAST_ALONE * slower) ** FLOOR_NORM) ** (1 / FLOOR_NORM)  # without the floor
        coefficients = _weighted(terms[order[count:]], alone, np.ones(len(alone)))
        residual = np.log(np.maximum(_above(terms @ coefficients, floor), 1e-12) / seconds)
        if best is None or np.abs(residual).sum() < np.abs(best.residual).sum() - 1e-9:
            best = _Fit(floor, coefficients, residual, np.ones(len(seconds)))
    return best


def _fit_law(form: Form, rows: np.ndarray, seconds: np.ndarray) -> Law:
    """Every edge that parts the measured rows otherwise, and none."""
    terms = form.terms(rows)
    edges = [np.inf]
    if form.read is not None:
        sizes = np.unique(terms[:, form.read])
        edges += list(np.sqrt(sizes[:-1] * sizes[1:]))
    fits = [(_fit_floored if form.floored else _fit_terms)(_with_edge(form, terms, edge), seconds) for edge in edges]
    spread = np.array([np.sqrt(np.square(np.minimum(np.abs(fit.residual), CLIFF_CAP)).mean()) for fit in fits])
    cost = len(seconds) * np.log(spread + CLIFF_SD) + np.where(np.isfinite(edges), CLIFF_PRICE, 0.0)
    likely = np.exp(cost.min() - cost)
    kept = np.flatnonzero(likely > LEAST_LIKELY)
    floor, coefficients, _, counted = (np.array(column) for column in zip(*(fits[law] for law in kept), strict=True))
    return Law(likely[kept] / likely[kept].sum(), np.array(edges)[kept], floor, coefficients, counted)


def _without(law: Law, form: Form, rows: np.ndarray, seconds: np.ndarray, left_out: int) -> Law:
    """The law fitted to the other rows, its edges and how likely each is held."""
    rest = np.arange(len(rows)) != left_out
    terms = form.terms(rows[rest])
    if form.floored:
        fits = [_fit_floored(_with_edge(form, terms, edge), seconds[rest]) for edge in law.edge]
        return law._replace(floor=np.array([fit.floor for fit in fits]), coefficients=np.array([fit.coefficients for fit in fits]))
    each = [_weighted(_with_edge(form, terms, edge), seconds[rest], counted[rest]) for edge, counted in zip(law.edge, law.counted, strict=True)]
    return law._replace(coefficients=np.array(each))


def _shares(law: Law, form: Form, rows: np.ndarray) -> np.ndarray:
    """[n, F + 1] the terms over the seconds of the law, the last beyond the likeliest edge."""
    return _with_edge(form, form.terms(rows), law.edge[law.weight.argmax()]) / law.seconds(form, rows)[:, None]


def _lengths(hyper: Hyper) -> np.ndarray:
    return np.array([value for name, value in hyper.items() if name.startswith("length")])


def _covariance(far: np.ndarray, alike: np.ndarray, hyper: Hyper) -> np.ndarray:
    """[a, b] of two logarithms, from squared distances along each coordinate [a, b, C] and products of the terms' shares [a, b]."""
    return hyper["smooth"] ** 2 * np.exp(-0.5 * (far @ _lengths(hyper) ** -2.0)) + hyper["term"] ** 2 * alike
