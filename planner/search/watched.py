"""A plan's predictions at the loads and draft lengths that a server was seen with, beside what it did.

Three causes are told apart. Acceptance: tokens per round beside the prediction. Latency: seconds per round beside the prediction for
the same setting at the same load. Load: where it lies beside the plan's rows. Whether the plan pays now follows from measured time
per token and the time off would take. Off does not run, so its time is the plan's; where rounds take another time than planned, off may
as well, by as much or not at all: the interval covers both, and so a machine that became slower is never taken for a plan that lost.

Predictions are interpolated: between loads on logarithms of load and value, between two draft lengths in proportion to rounds.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from planner.drifts import Choice, Position, Shift
from planner.engines.metrics import Stretch
from planner.errors import BadInput
from planner.plans import CONFIDENCE, Interval
from planner.schedules import LoadCurve, Setting
from planner.search.loads import HALF_WIDTH, log_interval
from planner.serving import OFF

TOLERANCE = 0.05  # relative, by which a quantity must be shown to differ to have moved
FEW = 4  # stretches below which rounds say more of the spread of tokens per round than they do
ROUNDS_ALIKE = 32  # rounds that count as one where finished requests are not counted: those of one text are alike


class Point(NamedTuple):
    """A prediction; standard deviations are of logarithms."""

    running: float
    tokens_per_round: float
    round_s: float
    tpot_s: float
    sd_tokens: float
    sd_round: float
    sd_tpot: float


class Curves:
    """Predictions of off, and of one drafter at each of its draft lengths, at one context."""

    def __init__(self, off: LoadCurve, drafting: Sequence[LoadCurve], *, idle: bool = False):
        """drafting  of one drafter, idle included if it is known
        idle  a server that drafts nothing has it loaded
        """
        self._off, self._idle = off, idle
        self._by_len = {curve.setting.draft_len: curve for curve in drafting}

    @property
    def settings(self) -> list[Setting]:
        return [self._off.setting, *(self._by_len[k].setting for k in sorted(self._by_len))]

    def at(self, setting: Setting, concurrency: float) -> Point:
        """At a load. Outside of the predicted ones the nearest, its times as unsure as they would be if they grew in proportion to load."""
        curve = self._off if setting == self._off.setting else self._by_len[setting.draft_len]
        x, known = np.log(max(concurrency, 1e-9)), np.log(curve.concurrency)
        values = (curve.running_batch, curve.tokens_per_round, curve.round_s, curve.tpot_s)
        tokens, *times = (float(np.interp(x, known, own)) for own in (curve.sd_tokens, curve.sd_round, curve.sd_tpot))
        beyond = max(0.0, x - known[-1], known[0] - x) / HALF_WIDTH
        return Point(*(float(np.exp(np.interp(x, known, np.log(own)))) for own in values), tokens, *(math.hypot(sd, beyond) for sd in times))

    def off(self, concurrency: float) -> Point:
        return self.at(self._off.setting, concurrency)

    def between(self, draft_len: float, concurrency: float) -> Point:
        """Of rounds that draft so many tokens on average: a mixture of the two draft lengths around."""
        if draft_len == 0:
            return self.at(self._by_len[0].setting, concurrency) if self._idle and 0 in self._by_len else self.off(concurrency)
        below, above = math.floor(draft_len + 1e-9), math.ceil(draft_len - 1e-9)
        lengths = sorted(k for k in self._by_len if k > 0)
        if not lengths or above > lengths[-1]:
            raise BadInput(
                f"the server drafts {draft_len:.3g} tokens per round, the plan predicts {f'up to {lengths[-1]}' if lengths else 'no drafter'}; "
                "measure that setting and plan again"
            )
        below, above = max([k for k in lengths if k <= below], default=lengths[0]), min(k for k in lengths if k >= above)
        a, b = (self.at(self._by_len[k].setting, concurrency) for k in (below, above))
        share = 0.0 if above == below else min(1.0, max(0.0, (draft_len - below) / (above - below)))
        mixed = Point(*((1 - share) * u + share * v for u, v in zip(a, b, strict=True)))
        return mixed._replace(tpot_s=mixed.tpot_s if below == above else mixed.round_s / mixed.tokens_per_round * _glue(a, b))

    def survival(self, position: int, concurrency: float) -> float | None:
        """Share of rounds that accept the draft at this place (0, 1, ..): what one more drafted token adds to a round."""
        if position + 1 not in self._by_len or position > 0 and position not in self._by_len:
            return None
        less = 1.0 if position == 0 else self.at(self._by_len[position].setting, concurrency).tokens_per_round
        return max(0.0, self.at(self._by_len[position + 1].setting, concurrency).tokens_per_round - less)


class Seen(NamedTuple):
    """What a server did over all stretches, beside the prediction for the very loads and draft lengths."""

    draft_len: float
    survived: list[float]  # [i] share of rounds in which draft i was accepted
    counted: bool  # else these are the plan's, made to fit the tokens per round that the engine says
    tokens_per_round: Shift
    round_s: Shift
    tpot_s: Shift
    off: Point  # predicted
    setting: Point  # predicted, of what ran
    concurrency: float
    concurrency_low: float
    concurrency_high: float
    approximate: bool  # a single stretch, which says nothing about the spread of the measured times
    changed: tuple[float, float] | None  # tokens per round over the predicted in both halves of the window, where these are shown to differ


def look(stretches: Sequence[Stretch], curves: Curves, planned_len: Callable[[float], int]) -> Seen:
    """Sum up what was seen; each stretch is compared at its own load and draft length, and counts by its tokens, or by its rounds.

    planned_len  load -> draft_len, for an engine that does not count drafts
    """
    loads = [load_of(own) for own in stretches]
    drafts, tokens = (np.array([getattr(own, name) for own in stretches]) for name in ("drafts", "tokens"))
    decode_s = np.array([own.decode_s for own in stretches])
    if not np.all(decode_s > 0):
        raise BadInput("the metrics count generated tokens and no time for them; switch the server's metrics on whole")
    per_draft = [_draft_len(own, planned_len(load)) for own, load in zip(stretches, loads, strict=True)]
    points = [curves.between(k, load) for k, load in zip(per_draft, loads, strict=True)]
    off = _average([curves.off(load) for load in loads], tokens)
    by_tokens = _average(points, tokens)
    counted = drafts.sum() > 0
    rounds = np.array([own.rounds or own.tokens / (_emitted(own) or 1.0) for own in stretches])
    by_rounds = _average(points, rounds)
    emitted = np.array([_emitted(own) or 1.0 for own in stretches])
    weights = drafts if counted else rounds
    values = np.average(emitted, weights=weights)
    sd_tokens = _sd(weights * emitted, weights)
    if counted and len(stretches) < FEW:
        sd_tokens = _sd_of_rounds(stretches)
    sd_round, sd_tpot = _sd(decode_s, rounds), _sd(decode_s, tokens)
    predicted_tokens = _average(points, weights)
    draft_len, load = float(np.average(per_draft, weights=weights)), float(np.average(loads, weights=tokens))
    return Seen(
        draft_len=draft_len,
        survived=_survived(stretches) if counted else _fitted(curves, round(draft_len), load, float(values)),
        counted=counted,
        tokens_per_round=_shift(values, sd_tokens or 0.0, predicted_tokens.tokens_per_round, predicted_tokens.sd_tokens if any(per_draft) else 0.0),
        round_s=_shift(decode_s.sum() / rounds.sum(), sd_round or 0.0, by_rounds.round_s, by_rounds.sd_round),
        tpot_s=_shift(decode_s.sum() / tokens.sum(), sd_tpot or 0.0, by_tokens.tpot_s, by_tokens.sd_tpot),
        off=off,
        setting=by_tokens,
        concurrency=load,
        concurrency_low=min(loads),
        concurrency_high=max(loads),
        approximate=sd_tpot is None,
        changed=_changed(weights, emitted / [point.tokens_per_round for point in points]) if counted else None,
    )


def speedup(seen: Seen, objective: str) -> tuple[Interval, float]:
    """Of the objective over off: now, and as planned for this load. Where off itself would be at another speed now, see the module."""
    share = 1.0 if objective == "tpot" else seen.setting.running / seen.off.running  # throughput counts requests that run at once
    measured = seen.tpot_s.measured
    sd = math.hypot(seen.off.sd_tpot, math.log(measured.high / measured.low) / 2 / HALF_WIDTH)
    now = log_interval(math.log(share * seen.off.tpot_s / measured.value), sd)
    factor = seen.round_s.ratio.value if seen.round_s.moved else 1.0
    return Interval(value=now.value, low=now.low * min(1.0, factor), high=now.high * max(1.0, factor)), share * seen.off.tpot_s / seen.setting.tpot_s


def choices(seen: Seen, curves: Curves, running: Setting, objective: str, *, fixed: bool = False) -> list[Choice]:
    """Every setting with acceptance as measured and rounds as predicted, the best first; what runs as it was measured.

    Rounds that moved did so for all, off included; others differ from their prediction by its own error, which the rest does not share.
    fixed  the engine takes another draft_len at its start only
    """
    factor = seen.round_s.ratio.value if seen.round_s.moved else 1.0
    own, measured, found = curves.between(seen.draft_len, seen.concurrency), seen.tpot_s.measured, []
    sd = math.log(measured.high / measured.low) / 2 / HALF_WIDTH
    for setting in curves.settings:
        if fixed and setting.idle and setting != running:
            continue  # who restarts need not load what is idle
        point = curves.at(setting, seen.concurrency)
        tokens, extrapolated = _tokens_now(seen, curves, setting.draft_len)
        tpot_s = measured.value if setting == running else point.round_s * factor / tokens
        share = 1.0 if objective == "tpot" else point.running / own.running
        same = setting == running
        gain = share * measured.value / tpot_s
        interval = log_interval(math.log(gain), math.hypot(point.sd_round, own.sd_round if seen.round_s.moved else sd))
        if setting.drafter == OFF:  # as fast as planned or slower as well: the interval of the speedup, seen from off
            now, _ = speedup(seen, objective)
            interval = Interval(value=gain, low=min(gain, 1 / now.high), high=max(gain, 1 / now.low))
        found.append(
            Choice(
                setting=setting,
                tpot_s=tpot_s,
                gain=Interval(value=0.0, low=0.0, high=0.0) if same else Interval(value=gain - 1, low=interval.low - 1, high=interval.high - 1),
                restart=not same and (fixed or setting.drafter != running.drafter),
                extrapolated=extrapolated,
            )
        )
    return sorted(found, key=lambda choice: -choice.gain.value)


def positions(seen: Seen, curves: Curves) -> list[Position]:
    if not seen.counted:
        return []
    return [Position(measured=share, predicted=curves.survival(i, seen.concurrency)) for i, share in enumerate(seen.survived)]


def load_of(own: Stretch) -> float:
    """Requests in the system. At least one, since something was generated: gauges are looked at between requests, too."""
    busy = own.decode_s / own.seconds if own.seconds else 1.0
    return max(1.0, own.concurrency or busy)


def _average(points: Sequence[Point], weights: np.ndarray) -> Point:
    return Point(*np.average(np.array(points), axis=0, weights=weights).tolist())


def _draft_len(own: Stretch, planned: int) -> float:
    if own.drafts:
        return own.drafted / own.drafts
    return float(planned) if own.accept_length and own.accept_length > 1 else 0.0


def _emitted(own: Stretch) -> float | None:
    return 1 + own.accepted / own.drafts if own.drafts else own.accept_length


def _survived(stretches: Sequence[Stretch]) -> list[float]:
    longest, drafts = max(len(own.survived) for own in stretches), sum(own.drafts for own in stretches)
    return [sum(own.survived[i] for own in stretches if i < len(own.survived)) / drafts for i in range(longest)] if drafts else []


def _fitted(curves: Curves, draft_len: int, concurrency: float, tokens_per_round: float) -> list[float]:
    """The plan's shares by position, every conditional acceptance scaled alike so that rounds hold so many tokens."""
    planned = [curves.survival(i, concurrency) for i in range(draft_len)]
    if not planned or not all(planned):
        return []
    conditional = np.array(planned) / np.array([1.0, *planned[:-1]])

    def shares(scale: float) -> np.ndarray:
        return np.cumprod(np.minimum(1.0, scale * conditional))

    most = 1 / conditional.min()
    if tokens_per_round >= 1 + shares(most).sum():
        return [1.0] * draft_len
    return shares(brentq(lambda scale: 1 + shares(scale).sum() - tokens_per_round, 0.0, most)).tolist()


def _tokens_now(seen: Seen, curves: Curves, draft_len: int) -> tuple[float, bool]:
    """Tokens per round at another draft_len: measured positions as far as they were drafted, behind them in the plan's proportion."""
    drafted = min(draft_len, len(seen.survived), max(1, round(seen.draft_len)))
    tokens, last = 1.0 + sum(seen.survived[:drafted]), 1.0 if drafted == 0 else seen.survived[drafted - 1]
    for position in range(drafted, draft_len):
        planned, before = curves.survival(position, seen.concurrency), curves.survival(position - 1, seen.concurrency) if position else 1.0
        last *= min(1.0, planned / before) if planned and before else 0.0
        tokens += last
    return tokens, draft_len > drafted


def _shift(value: float, sd: float, predicted: float, sd_predicted: float) -> Shift:
    """sd  both of logarithms"""
    value, predicted = float(value), float(predicted)
    ratio = log_interval(math.log(value / predicted), math.hypot(sd, sd_predicted))
    return Shift(
        measured=log_interval(math.log(value), sd),
        predicted=log_interval(math.log(predicted), sd_predicted),
        ratio=ratio,
        moved=ratio.low > 1 + TOLERANCE or ratio.high < 1 - TOLERANCE,
    )


def _sd(above: np.ndarray, below: np.ndarray) -> float | None:
    """Of the logarithm of sum(above) / sum(below), from how stretches differ (Cochran 1977, eq. 6.13), as wide as Student's; None of one."""
    n, ratio = len(above), above.sum() / below.sum()
    if n < 2:
        return None
    rest = above - ratio * below
    return float(np.sqrt(n / (n - 1) * (rest**2).sum()) / above.sum() * stdtrit(n - 1, (1 + CONFIDENCE) / 2) / HALF_WIDTH)


def _changed(rounds: np.ndarray, ratio: np.ndarray) -> tuple[float, float] | None:
    """Mean of the ratios before and after the middle, where their 90 % intervals leave more than the tolerance between them."""
    middle = len(rounds) // 2
    halves = []
    for own in (slice(None, middle), slice(len(rounds) - middle, None)):
        if middle < 2 or not rounds[own].sum() > 0:
            return None
        value = float(np.average(ratio[own], weights=rounds[own]))
        halves.append(log_interval(math.log(value), _sd(rounds[own] * ratio[own], rounds[own])))
    before, after = halves
    apart = max(before.low / after.high, after.low / before.high)
    return (before.value, after.value) if apart > 1 + TOLERANCE else None


def _sd_of_rounds(stretches: Sequence[Stretch]) -> float:
    """Of the logarithm of tokens per round, where stretches are too few: from the spread of rounds, those of one request taken as one."""
    drafts, shares = sum(own.drafts for own in stretches), np.array(_survived(stretches))
    places = np.arange(1, len(shares) + 1)
    variance = max(0.0, float(((2 * places - 1) * shares).sum() - shares.sum() ** 2))
    requests = sum(own.requests or 0 for own in stretches)
    alike = max(2.0, min(drafts, requests or drafts / ROUNDS_ALIKE))
    return math.sqrt(variance / alike) / (1 + float(shares.sum()))


def _glue(a: Point, b: Point) -> float:
    """Time per token over round / tokens, which a measured profile need not make 1."""
    return math.sqrt(a.tpot_s * a.tokens_per_round / a.round_s * b.tpot_s * b.tokens_per_round / b.round_s)
