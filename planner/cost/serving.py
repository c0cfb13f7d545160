"""How fast an engine serves at a load: from a dozen measured cells per drafter to every (draft_len, concurrency, context).

    tpot_s  = round_s / tokens_per_round           output_tokens_per_s = running / tpot_s

round_s           step_law.py, corrected by step_time.py
tokens_per_round  engine_acceptance.py
running           requests that decode at once, running_batch.py

Times depend on the running batch, and the running batch on times, so the two are found together. Intervals are those of a
fresh measurement: what the fits do not know, and what two runs of one cell differ by.

n  cells asked for      m  cells measured
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from planner.cost.engine_acceptance import LEAST_NOISE, USUAL_NOISE, AcceptanceCurve, Row
from planner.cost.running_batch import LEAST_CAPACITY, RunningBatch
from planner.cost.step_time import StepTime
from planner.errors import BadInput
from planner.serving import OFF, ServedCell, ServingProfile

MAX_CELLS = 1000  # that a fit takes in; of more, as many are drawn, spread evenly
FIXED_POINT_STEPS = 5  # each leaves about a fifth of the error


class Cells(NamedTuple):
    """What is asked for, as arrays of one length, or single numbers."""

    drafter: np.ndarray  # [n] index into ServingModel.drafters
    draft_len: np.ndarray  # [n]
    concurrency: np.ndarray  # [n] requests in the system
    context_len: np.ndarray  # [n] prompt tokens
    output_len: np.ndarray  # [n]


class Served(NamedTuple):
    """What a cell should do. sd_*: standard deviations of logarithms; a 90 % interval is value * exp(+-1.645 sd)."""

    round_s: np.ndarray  # [n]
    tokens_per_round: np.ndarray  # [n]
    tpot_s: np.ndarray  # [n] queueing excluded
    running: np.ndarray  # [n] requests that decode at once
    output_tokens_per_s: np.ndarray  # [n] of all requests together
    ttft_s: np.ndarray  # [n] queueing included; nan where none was measured
    sd_round: np.ndarray  # [n]
    sd_tokens: np.ndarray  # [n] 0 where no acceptance was measured: how a time per token splits into rounds and tokens is assumed there
    sd_tpot: np.ndarray  # [n]
    sd_throughput: np.ndarray  # [n]
    fits: np.ndarray  # [n] bool: memory holds at least one request beside the drafter
    extrapolated: np.ndarray  # [n] bool: a draft_len, concurrency or context beyond what was measured, or an idle drafter nobody measured


class ServingModel:
    """Everything that the cells of one engine say, at one degree of tensor parallelism."""

    def __init__(self, profile: ServingProfile, cells: list[ServedCell]):
        self.drafters = [OFF, *dict.fromkeys(cell.drafter for cell in cells if cell.drafter != OFF)]
        self.max_draft_len = {name: max((c.draft_len for c in cells if c.drafter == name), default=0) for name in self.drafters}
        self.draft_lens = {name: sorted({c.draft_len for c in cells if c.drafter == name and c.draft_len > 0}) for name in self.drafters}
        self.idle_measured = {cell.drafter for cell in cells if cell.drafter != OFF and cell.draft_len == 0}
        self.acceptance_measured = {c.drafter for c in cells if c.draft_len > 0 and _tokens_per_round(c) is not None}
        self.off_measured = any(cell.drafter == OFF for cell in cells)
        self.contexts = sorted({cell.context_len for cell in cells})
        self.max_concurrency = {name: max((c.concurrency for c in cells if c.drafter == name), default=0) for name in self.drafters}
        self._curves = {name: _curve([c for c in cells if c.drafter == name and c.draft_len > 0]) for name in self.drafters[1:]}

        at = _cells_of(cells, self.drafters)
        self._output_len = float(np.median(at.output_len))
        tpot_s = np.array([cell.tpot_s for cell in cells])
        fitted, _ = self._tokens_per_round(at)
        tokens = np.array([_tokens_per_round(cell) or own for cell, own in zip(cells, fitted, strict=True)])
        round_s = np.array([cell.itl_s or cell.tpot_s * own for cell, own in zip(cells, tokens, strict=True)])
        throughput = np.array([cell.output_tokens_per_s or np.nan for cell in cells])
        ttft_s = np.array([cell.ttft_s or np.nan for cell in cells])
        self._running = RunningBatch(profile, self.drafters, at, tpot_s, throughput, ttft_s, cells[0].tensor_parallel)
        counted = self._running.running(at, tpot_s, self._running.capacity(at))
        running = np.where(np.isnan(throughput), counted, np.minimum(throughput * tpot_s, at.concurrency))
        self._steps = StepTime(at, running, tokens, round_s, len(self.drafters))

    def capacity(self, cells: Cells) -> np.ndarray:
        """[n] requests that memory holds side by side."""
        return self._running.capacity(_broadcast(cells))

    def predict(self, cells: Cells) -> Served:
        """Every cell at once; 100,000 take less than a second."""
        cells = _broadcast(cells)
        tokens, sd_tokens, capacity, running = self._settled(cells)
        round_s, sd_round = self._steps.predict(cells, running, tokens)
        tpot_s = round_s / tokens
        load = self._running.predict(cells, tpot_s, capacity)
        growth = self._steps.law.elasticity(cells, running, tokens)
        return Served(
            round_s=round_s, tokens_per_round=tokens, tpot_s=tpot_s, running=load.running, output_tokens_per_s=load.running / tpot_s,
            ttft_s=load.ttft_s, sd_round=np.hypot(sd_round, growth * load.sd), sd_tokens=sd_tokens,
            sd_tpot=np.sqrt(sd_round**2 + sd_tokens**2 + (growth * load.sd) ** 2),
            sd_throughput=np.sqrt(sd_round**2 + sd_tokens**2 + ((1 - growth) * load.sd) ** 2),
            fits=capacity >= LEAST_CAPACITY, extrapolated=self._extrapolated(cells),
        )  # fmt: skip

    def rounds(self, drafter: str, draft_len: int, running: np.ndarray, held: np.ndarray) -> np.ndarray:
        """[n] seconds of a round of so many requests that decode, each of which holds so many tokens, while nobody's prompt is read."""
        place = np.full(len(running), self.drafters.index(drafter))
        cells = Cells(place, np.full_like(place, draft_len), running, np.zeros(len(running)), 2.0 * held)  # all of it output: no prompts
        return self._steps.predict(cells, running, np.ones(len(running)))[0]

    def tokens_per_round(self, drafter: str, draft_lens: list[int], context_len: int) -> list[float]:
        """By draft_len."""
        place = np.full(len(draft_lens), self.drafters.index(drafter))
        return self._tokens_per_round(_broadcast(Cells(place, np.array(draft_lens), 1, context_len, self._output_len)))[0].tolist()

    def pool_correction(self, drafter: str) -> float:
        """What measured running batches make of the byte count of a KV pool: a factor."""
        return self._running.correction(self.drafters.index(drafter))

    def ratio_sd(self, a: Cells, b: Cells, of: str = "throughput") -> np.ndarray:
        """[n] standard deviation of the logarithm of the ratio of two cells' `of` (tpot or throughput): what both share cancels."""
        a, b = _broadcast(a), _broadcast(b)
        at, sd_tokens, moved = [], [], []
        for cells in (a, b):
            tokens, sd, capacity, running = self._settled(cells)
            growth = self._steps.law.elasticity(cells, running, tokens)
            load = self._running.predict(cells, self._steps.law.seconds(cells, running, tokens) / tokens, capacity)
            at.append((cells, running, tokens))
            sd_tokens.append(sd)
            moved.append((growth if of == "tpot" else 1 - growth) * load.sd)
        variance = self._steps.difference_sd(*at) ** 2 + self._tokens_difference_variance(a, b, *sd_tokens)
        return np.sqrt(variance + np.where(a.drafter == b.drafter, np.abs(moved[0] - moved[1]), np.hypot(*moved)) ** 2)

    def _settled(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """[n] each: tokens per round and their deviation, the requests that memory holds, and those that run."""
        tokens, sd_tokens = self._tokens_per_round(cells)
        capacity = self._running.capacity(cells)
        running = np.minimum(cells.concurrency, np.maximum(capacity, LEAST_CAPACITY)).astype(float)
        for _ in range(FIXED_POINT_STEPS):  # the law of times alone, without its correction: it is all that moves the batch
            running = self._running.running(cells, self._steps.law.seconds(cells, running, tokens) / tokens, capacity)
        return tokens, sd_tokens, capacity, running

    def _tokens_per_round(self, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
        """[n] and the standard deviation of their logarithm [n]; exactly 1 where nothing is drafted."""
        tokens, sd = np.ones(len(cells.drafter)), np.zeros(len(cells.drafter))
        for index, name in enumerate(self.drafters):
            pick = (cells.drafter == index) & (cells.draft_len > 0)
            if pick.any() and self._curves.get(name) is not None:
                tokens[pick], sd[pick] = self._curves[name].predict(cells.draft_len[pick], cells.context_len[pick])
        return tokens, sd

    def _tokens_difference_variance(self, a: Cells, b: Cells, sd_a: np.ndarray, sd_b: np.ndarray) -> np.ndarray:
        variance = sd_a**2 + sd_b**2
        for index, name in enumerate(self.drafters):
            pick = (a.drafter == index) & (b.drafter == index) & (a.draft_len > 0) & (b.draft_len > 0)
            if pick.any() and self._curves.get(name) is not None:
                curve = self._curves[name]
                variance[pick] -= 2 * curve.covariance(a.draft_len[pick], a.context_len[pick], b.draft_len[pick], b.context_len[pick])
        return np.maximum(variance, 0.0)

    def _extrapolated(self, cells: Cells) -> np.ndarray:
        longest, most = (np.array([largest[name] for name in self.drafters]) for largest in (self.max_draft_len, self.max_concurrency))
        idle = np.array([name in self.idle_measured or (name == OFF and self.off_measured) for name in self.drafters])
        return (
            (cells.draft_len > longest[cells.drafter])
            | (cells.concurrency > most[cells.drafter])
            | (cells.context_len < self.contexts[0])
            | (cells.context_len > self.contexts[-1])
            | (cells.draft_len == 0) & ~idle[cells.drafter]
        )


def fit_serving(profile: ServingProfile, tensor_parallel: int | None = None) -> ServingModel:
    """The model of a profile's cells at one degree of tensor parallelism, by default the only one measured.

    BadInput where several were measured and none is named, or none of the named one.
    """
    degrees = sorted({cell.tensor_parallel for cell in profile.cells})
    if tensor_parallel is None and len(degrees) > 1:
        raise BadInput(f"the profile holds tensor parallelism {', '.join(map(str, degrees))}; choose one with --tp")
    cells = [cell for cell in profile.cells if tensor_parallel in (None, cell.tensor_parallel)]
    if not cells:
        raise BadInput(f"the profile holds tensor parallelism {', '.join(map(str, degrees))}, got --tp {tensor_parallel}")
    if len(cells) > MAX_CELLS:
        cells = [cells[i] for i in np.linspace(0, len(cells) - 1, MAX_CELLS).astype(int)]
    return ServingModel(profile, cells)


def _curve(cells: list[ServedCell]) -> AcceptanceCurve | None:
    """What one drafter's cells say about its acceptance; None where it never drafted."""
    groups = defaultdict(list)
    for cell in cells:
        if (tokens := _tokens_per_round(cell)) is not None:
            groups[cell.draft_len, cell.context_len].append((tokens, cell.acceptance))
    if not cells:
        return None
    rows, scatter, freedom = [], 0.0, 0
    for (draft_len, context_len), own in groups.items():
        logs = np.log([tokens for tokens, _ in own])
        scatter, freedom = scatter + float(np.square(logs - logs.mean()).sum()), freedom + len(own) - 1
        positions = [acceptance for _, acceptance in own if len(acceptance) == draft_len]
        mean = tuple(np.mean(positions, axis=0)) if positions else ()
        rows.append(Row(draft_len, context_len, float(np.exp(logs.mean())), mean, len(own)))
    prior = 4  # as good as so many repetitions
    noise = np.sqrt((scatter + prior * USUAL_NOISE**2) / (freedom + prior))
    told = [cell.tokens_sd for cell in cells if cell.tokens_sd is not None]
    texts = float(np.sqrt(np.mean(np.square(told)))) if told else 0.0
    return AcceptanceCurve(rows, max(float(noise), LEAST_NOISE, texts), texts)


def _tokens_per_round(cell: ServedCell) -> float | None:
    """What a cell says itself: counted, or a round's time over a token's, or by positions."""
    if cell.draft_len == 0:
        return 1.0
    if cell.tokens_per_round is not None:
        return cell.tokens_per_round
    if cell.itl_s is not None:
        return float(np.clip(cell.itl_s / cell.tpot_s, 1.0, cell.draft_len + 1))
    if len(cell.acceptance) == cell.draft_len:
        return 1.0 + float(np.cumprod(cell.acceptance).sum())
    return None


def _cells_of(cells: list[ServedCell], drafters: list[str]) -> Cells:
    rows = [(drafters.index(c.drafter), c.draft_len, c.concurrency, c.context_len, c.output_len) for c in cells]
    return Cells(*(np.array(column) for column in zip(*rows, strict=True)))


def _broadcast(cells: Cells) -> Cells:
    return Cells(*np.broadcast_arrays(*map(np.atleast_1d, cells)))
