"""What a row of a table claims about speculation, and which rows cannot all be true: laws that hold for every drafter and device.

With A(K) tokens accepted of K drafted, a round emits 1 + A(K) tokens, and a chain is accepted from its front, so on the same texts
A(K) / K cannot rise with K and A(K) cannot fall. A round verifies in at least one plain step, so a speedup is at most 1 + A(K).
What is left of rounds at two K is the cost of drafting a token: not negative, not below reading the weights of a drafter that
drafts token by token, and not smaller at a longer context. Times that include the prefill make it look larger, never smaller.

A speedup that is off by exactly the ratio of two contexts' baselines was divided by the other one: that is said, with the context.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from planner.audits import Fault
from planner.serving import OFF

NOISE = 0.05  # two roads to one number may differ by so much
REPEATS = 0.10  # and two runs of one cell by so much
ROUND_NOISE = 0.03  # and the time of a round by so much
SAME_RATIO = 0.03  # a speedup's excess and the ratio of two baselines, each printed with three digits
ROUNDING = 0.002  # of an acceptance printed in percent with a decimal
ONE_PASS = (
    "dflash",
    "dspark",
    "pard",
    "parallel",
    "medusa",
    "ngram",
    "suffix",
)  # in names of drafters that read their weights once a round, or have none
EASY = 0.9  # an acceptance from which an almost flat one is believable


class Row(NamedTuple):
    """A row's claims; None: not said. Rows are compared within a series: the drafter, the texts and all else that was held fixed."""

    source: str  # file and line
    drafter: str
    series: tuple  # without the drafter, its KV budget and the sampler: what baselines are looked up by
    context_len: int
    draft_len: int
    sampler: float | None = None
    kv_budget: int | None = None
    table: str = ""
    batch: float | None = None  # requests that ran at once
    tokens_per_round: float | None = None
    speedup: float | None = None  # over off at the same context and load
    tpot_s: float | None = None
    round_s: float | None = None

    @property
    def own(self) -> tuple:
        return self.drafter, self.sampler, *self.series

    @property
    def accepted(self) -> float | None:
        """Share of the drafted tokens."""
        return None if self.tokens_per_round is None or not self.draft_len else (self.tokens_per_round - 1) / self.draft_len


class Reads(NamedTuple):
    """Seconds that reading weights takes at the maker's bandwidth. None, or a drafter's name that is missing: not known."""

    target_s: float | None = None
    drafter_s: dict[str, float] = {}


class _Finding(NamedTuple):
    kind: str
    what: str
    rows: Sequence[Row]
    example: str
    remedy: str


def find_faults(rows: Sequence[Row], reads: Reads, *, strict: bool) -> list[Fault]:
    """Contradictions among rows, those of one kind together.

    strict  the acceptance is a mean over given texts: over twice the length it has to fall, by however little
    """
    baselines = _Baselines(rows)
    drafting = [row for row in rows if row.drafter != OFF and row.draft_len > 0]
    found = [
        *_outside(drafting), *_rising(drafting, strict), *_too_fast(drafting, baselines), *_misdivided(drafting, baselines),
        *_unequal(drafting, baselines), *_draft_costs(drafting, baselines, reads), *_below_target(rows, baselines, reads),
        *(_unequal_baselines(rows) if strict else ()),  # of served cells: consistency.py, among all repeats
    ]  # fmt: skip
    merged: dict[tuple, list[_Finding]] = defaultdict(list)
    for finding in found:
        merged[finding.kind, finding.what, finding.remedy].append(finding)
    order = {row.source: i for i, row in enumerate(rows)}
    return [
        Fault(
            kind=kind, what=what, remedy=remedy, examples=list(dict.fromkeys(finding.example for finding in findings)),
            rows=sorted({row.source for finding in findings for row in finding.rows}, key=order.__getitem__),
        )
        for (kind, what, remedy), findings in merged.items()
    ]  # fmt: skip


class _Baselines:
    """Plain decoding, by context, of each series."""

    def __init__(self, rows: Sequence[Row]):
        self._tpot_s: dict[tuple, dict[int, float]] = defaultdict(dict)
        self._batch: dict[tuple, float | None] = {}
        for row in rows:
            if row.drafter == OFF and row.tpot_s is not None:
                self._tpot_s[row.series].setdefault(row.context_len, row.tpot_s)
                self._batch.setdefault((row.series, row.context_len), row.batch)

    def tpot_s(self, row: Row) -> float | None:
        return self._tpot_s.get(row.series, {}).get(row.context_len)

    def speedup(self, row: Row) -> float | None:
        """As printed, else by the times; None where another number of requests ran at once than in the baseline."""
        if row.speedup is not None:
            return row.speedup
        plain, ran = self.tpot_s(row), self._batch.get((row.series, row.context_len))
        return plain / row.tpot_s if plain and row.tpot_s and _same_batch(row.batch, ran) else None

    def round_s(self, row: Row) -> float | None:
        """Measured, else what the speedup implies."""
        if row.round_s is not None:
            return row.round_s
        plain = self.tpot_s(row)
        return row.tokens_per_round / row.speedup * plain if row.tokens_per_round and row.speedup and plain else None

    def mistaken(self, row: Row, excess: float) -> int | None:
        """The context whose baseline makes a speedup `excess` times what it is."""
        if not differ(excess, 1.0, REPEATS):
            return None
        own = self.tpot_s(row)
        far = {
            context: abs(other / own / excess - 1)
            for context, other in self._tpot_s.get(row.series, {}).items()
            if own and context != row.context_len
        }
        best = min(far, key=far.__getitem__, default=None)
        return best if best is not None and far[best] <= SAME_RATIO else None

    def others(self, row: Row) -> Iterator[tuple[int, float]]:
        """Other contexts, with what a speedup would have to be divided by, had it been taken over their baselines."""
        own = self.tpot_s(row)
        for context, other in self._tpot_s.get(row.series, {}).items():
            if own and context != row.context_len and differ(other, own, REPEATS):
                yield context, other / own


def differ(a: float, b: float, share: float) -> bool:
    return abs(a - b) > share * min(a, b)


def _same_batch(a: float | None, b: float | None) -> bool:
    return a == b or a is not None and b is not None and not differ(a, b, REPEATS)


def _outside(rows: Sequence[Row]) -> Iterator[_Finding]:
    for row in rows:
        if row.tokens_per_round is not None and not 1 <= row.tokens_per_round <= (row.draft_len + 1) * (1 + ROUNDING):
            yield _Finding(
                "tokens", "tokens_per_round is not between 1 and draft_len + 1", [row], f"{row.source} ({row.tokens_per_round:.3g} at K = {row.draft_len})",
                "the acceptance is of another K, or counts something else",
            )  # fmt: skip


def _rising(rows: Sequence[Row], strict: bool) -> Iterator[_Finding]:
    for line in _by_draft_len(rows, lambda row: row.accepted is not None, lambda row: (*row.own, row.context_len, row.kv_budget)):
        for few, many in pairwise(line):
            flat = strict and many.draft_len >= 2 * few.draft_len and few.accepted < EASY
            if few.draft_len < many.draft_len and many.accepted > few.accepted * (1 + (ROUNDING if flat else NOISE)):
                most = 1 + few.accepted * many.draft_len
                yield _Finding(
                    "acceptance", "the acceptance rises with K", [few, many],
                    f"{many.source} ({many.accepted:.2%} at K = {many.draft_len}, {few.accepted:.2%} at K = {few.draft_len} in {few.source}; "
                    f"{many.tokens_per_round:.3g} tokens per round where at most {most:.3g} can be)",
                    "a chain is accepted from its front, so the two are not one quantity on the same texts; distrust both",
                )  # fmt: skip
            if few.draft_len < many.draft_len and many.tokens_per_round < few.tokens_per_round * (1 - NOISE):
                yield _Finding(
                    "acceptance", "a round emits fewer tokens with more drafted", [few, many],
                    f"{many.source} ({many.tokens_per_round:.3g} at K = {many.draft_len}, {few.tokens_per_round:.3g} at K = {few.draft_len} in {few.source})",
                    "the texts were others, or the longer draft ends early; measure both on the same texts",
                )  # fmt: skip


def _too_fast(rows: Sequence[Row], baselines: _Baselines) -> Iterator[_Finding]:
    for row in rows:
        speedup = baselines.speedup(row)
        if speedup is not None and row.tokens_per_round is not None and speedup > row.tokens_per_round * (1 + NOISE):
            yield _Finding(
                "speedup", "the speedup is above the tokens per round", [row], f"{row.source} ({speedup:.3g} with {row.tokens_per_round:.3g})",
                "a round takes at least one plain step; the baseline is another one's, or the acceptance is",
            )  # fmt: skip


def _misdivided(rows: Sequence[Row], baselines: _Baselines) -> Iterator[_Finding]:
    """Speedups that are not the ratio of the times beside them."""
    for row in rows:
        plain = baselines.tpot_s(row)
        if row.speedup is None or row.tpot_s is None or plain is None or not differ(row.speedup, plain / row.tpot_s, NOISE):
            continue
        context = baselines.mistaken(row, row.speedup * row.tpot_s / plain)
        example = f"{row.source} ({row.speedup:.3g}, by the times {plain / row.tpot_s:.3g})"
        if context is not None:
            yield _other_baseline(row, context, example)
        else:
            yield _Finding("speedup", "the speedup is not the ratio of the times", [row], example, "one of the three is of another run")


def _unequal(rows: Sequence[Row], baselines: _Baselines) -> Iterator[_Finding]:
    """Cells that are printed twice. A row without a KV budget is a mean over budgets: it lies between those of any one table."""
    cells: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row.speedup is not None:
            cells[*row.own, row.context_len, row.draft_len].append(row)
    for group in cells.values():
        budgets: dict[int | None, list[Row]] = defaultdict(list)
        for row in group:
            budgets[row.kv_budget].append(row)
        for same in budgets.values():
            least = min(row.speedup for row in same)
            low = [row for row in same if not differ(row.speedup, least, REPEATS)]
            high = [row for row in same if differ(row.speedup, least, REPEATS)]
            if high:
                yield from _contradicting(low, high, baselines)
        if None not in budgets or len(budgets) == 1:
            continue
        mean = fmean(row.speedup for row in budgets[None])
        tables: dict[str, list[Row]] = defaultdict(list)
        for row in group:
            if row.kv_budget is not None:
                tables[row.table].append(row)
        for others in tables.values():
            least, most = min(row.speedup for row in others), max(row.speedup for row in others)
            if mean < least and differ(mean, least, REPEATS):
                yield from _contradicting(budgets[None], others, baselines)
            elif mean > most and differ(mean, most, REPEATS):
                yield from _contradicting(others, budgets[None], baselines)


def _unequal_baselines(rows: Sequence[Row]) -> Iterator[_Finding]:
    first: dict[tuple, Row] = {}
    for row in rows:
        if row.drafter == OFF and row.tpot_s is not None:
            known = first.setdefault((row.series, row.context_len), row)
            if differ(row.tpot_s, known.tpot_s, REPEATS):
                example = f"{row.source} and {known.source} ({row.tpot_s * 1e3:.4g} and {known.tpot_s * 1e3:.4g} ms a token)"
                yield _Finding(
                    "repeats", "plain decoding of one context is given twice and differs", [known, row], example, "every speedup depends on it; keep the right one"
                )  # fmt: skip


def _contradicting(low: list[Row], high: list[Row], baselines: _Baselines) -> Iterator[_Finding]:
    """Equal cells, of which some are much faster: those over another context's baseline, where one explains it; else all."""
    excess = median(row.speedup for row in high) / median(row.speedup for row in low)
    slower, faster = baselines.mistaken(high[0], excess), baselines.mistaken(low[0], 1 / excess)
    if (slower is None) != (faster is None):
        context, wrong, right = (slower, high, low) if faster is None else (faster, low, high)
        for row in wrong:
            yield _other_baseline(
                row, context, f"{row.source} ({row.speedup:.3g} where {right[0].source} has {right[0].speedup:.3g} of the same cell)"
            )
        return
    example = f"{high[0].source} and {low[0].source} ({high[0].speedup:.3g} and {low[0].speedup:.3g})"
    yield _Finding("repeats", "equal cells have different speedups", [*low, *high], example, "distrust both until one is measured again")


class _Cost(NamedTuple):
    """Of drafting a token, from the rounds of two rows; error as a half width."""

    few: Row
    many: Row
    seconds: float
    error: float

    def without(self, baselines: _Baselines, factor: float) -> float:
        """Seconds, were the longer draft's speedup too large by the factor."""
        rounds = baselines.round_s(self.few), factor * baselines.round_s(self.many)
        return (rounds[1] - rounds[0]) / (self.many.draft_len - self.few.draft_len)


def _draft_costs(rows: Sequence[Row], baselines: _Baselines, reads: Reads) -> Iterator[_Finding]:
    """What drafting a token costs by two rows that differ in K: below zero, below the weights, below itself at a shorter context."""
    known: dict[tuple, list[_Cost]] = defaultdict(list)
    for line in _by_draft_len(rows, lambda row: baselines.round_s(row) is not None, lambda row: (*row.own, row.kv_budget, row.context_len)):
        few, many = line[0], line[-1]
        if few.draft_len == many.draft_len or not _same_batch(few.batch, many.batch):
            continue
        span, rounds = many.draft_len - few.draft_len, (baselines.round_s(few), baselines.round_s(many))
        cost = _Cost(few, many, (rounds[1] - rounds[0]) / span, ROUND_NOISE * sum(rounds) / span)
        known[*few.own, few.kv_budget].append(cost)
        one_pass = any(part in few.drafter.lower() for part in ONE_PASS)
        least = 0.0 if one_pass else reads.drafter_s.get(few.drafter, 0.0)
        if cost.seconds + cost.error < least:
            bound = f", its weights take {least * 1e3:.3g} ms to read" if least else ""
            example = f"{many.source} with {few.source} ({cost.seconds * 1e3:.3g} ms a token{bound})"
            below = "below zero" if cost.seconds + cost.error < 0 else "below the reading of its weights"
            yield _blamed(cost, least, baselines, example, f"the implied cost of drafting a token is {below}")
    for costs in known.values():
        costs.sort(key=lambda cost: cost.few.context_len)
        floor, at = 0.0, None
        for cost in costs:
            if at is not None and cost.seconds + cost.error < floor:
                example = (
                    f"{cost.many.source} ({cost.seconds * 1e3:.3g} ms a token at {cost.few.context_len} tokens of context, "
                    f"{at.seconds * 1e3:.3g} ms at {at.few.context_len})"
                )
                yield _blamed(cost, floor, baselines, example, "the implied cost of drafting a token falls as the context grows")
            elif cost.seconds - cost.error > floor:
                floor, at = cost.seconds - cost.error, cost


def _blamed(cost: _Cost, least_s: float, baselines: _Baselines, example: str, what: str) -> _Finding:
    """Another context's baseline under the longer draft, where that and no other explains the cost; else both rows."""
    if cost.many.speedup is not None and cost.many.round_s is None:
        able = [context for context, factor in baselines.others(cost.many) if cost.without(baselines, factor) + cost.error >= least_s]
        if len(able) == 1:
            return _other_baseline(cost.many, able[0], example)
    return _Finding("draft_cost", what, [cost.few, cost.many], example, "one of the two rows is of another run, baseline or drafter")


def _below_target(rows: Sequence[Row], baselines: _Baselines, reads: Reads) -> Iterator[_Finding]:
    for row in rows if reads.target_s else ():
        seconds = baselines.round_s(row) if row.draft_len else row.round_s or row.tpot_s
        if seconds is not None and seconds < reads.target_s * (1 - ROUND_NOISE):
            yield _Finding(
                "weight_read", "a step takes less time than reading the target's weights", [row],
                f"{row.source} ({seconds * 1e3:.3g} ms of {reads.target_s * 1e3:.3g})", "a size, the device or the number of devices is another",
            )  # fmt: skip


def _other_baseline(row: Row, context: int, example: str) -> _Finding:
    return _Finding(
        "baseline", f"the speedup looks divided by the baseline at {context} tokens of context, not {row.context_len}", [row], example,
        "distrust it; divide by plain decoding at the row's own context",
    )  # fmt: skip


def _by_draft_len(rows: Sequence[Row], usable: Callable[[Row], bool], key: Callable[[Row], tuple]) -> Iterator[list[Row]]:
    """Rows that differ in K alone, ordered by it; where one K stands there twice, the first."""
    lines: dict[tuple, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if usable(row):
            lines[key(row)].setdefault(row.draft_len, row)
    for line in lines.values():
        yield [line[draft_len] for draft_len in sorted(line)]
