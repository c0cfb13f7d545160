"""Requests through engines: when each gets its first and last token. A clock that jumps from engine step to engine step.

    outcome = simulate(requests, Server(cost=..., room=KVRoom(...), policy=Policy.fixed(3), acceptance=Acceptance(...)), seed=0)

While nobody is admitted, finishes or is preempted, steps differ only in how long texts have become: as many of them as possible
are taken at once, with the very same result as one by one.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import numpy as np

from planner.errors import BadInput
from planner.simulator.scheduler import Batching, Chunk, KVRoom, Scheduler, Sequence
from planner.simulator.texts import Acceptance, Texts
from planner.simulator.workload import Request

MAX_JUMP = 256  # steps at once
Router = Literal["round_robin", "least_loaded"]


class StepLoad(NamedTuple):
    """What an engine step computes: numbers, or arrays of one shape, one entry per step."""

    prefill_tokens: np.ndarray  # of all prompts in it
    prefill_requests: np.ndarray  # prompts it computes a part of
    prefill_pairs: np.ndarray  # (query, key) pairs of their attention: for a chunk of n tokens behind p, n p + n (n + 1) / 2
    decode_requests: np.ndarray  # each computes draft_len + 1 tokens
    decode_context: np.ndarray  # tokens that all of these have so far together, prompt and output
    draft_len: int


class StepCost(Protocol):
    def step_s(self, load: StepLoad) -> np.ndarray:
        """Seconds of steps, all above 0: a number for numbers, else an array of their shape. Deterministic, and the hot path."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """draft_len by the requests that decode at once and their mean length so far, prompt and output."""

    draft_len: tuple[tuple[int, ...], ...]  # [batch][context]
    batches: tuple[int, ...] = (1,)  # ascending from 1: where each row begins
    contexts: tuple[int, ...] = (1,)  # ascending from 1: where each column begins

    def __post_init__(self):
        for edges in (self.batches, self.contexts):
            if not edges or edges[0] != 1 or any(a >= b for a, b in pairwise(edges)):
                raise BadInput(f"a policy's batches and contexts must ascend from 1, got {edges}")
        if len(self.draft_len) != len(self.batches) or any(len(row) != len(self.contexts) for row in self.draft_len):
            raise BadInput(
                f"a policy needs a draft_len for each of {len(self.batches)} batches and {len(self.contexts)} contexts, got {self.draft_len}"
            )
        if min(map(min, self.draft_len)) < 0 or self.max_draft_len > 255:
            raise BadInput(f"a draft_len must lie in [0, 255], got {self.draft_len}")

    @classmethod
    def fixed(cls, draft_len: int) -> "Policy":
        return cls(draft_len=((draft_len,),))

    @property
    def max_draft_len(self) -> int:
        return max(map(max, self.draft_len))

    def choose(self, running: int, context: int) -> tuple[int, float]:
        """The draft_len for requests of so many tokens together, and how many together are the first with another one.

        Contexts only grow between arrivals, so the policy need not be asked before.
        """
        row = self.draft_len[bisect_right(self.batches, max(running, 1)) - 1]
        if len(row) == 1:
            return row[0], np.inf
        column = max(bisect_right(self.contexts, context / max(running, 1)), 1) - 1
        edge = next((self.contexts[i] * running for i in range(column + 1, len(row)) if row[i] != row[column]), np.inf)
        return row[column], edge


@dataclass(frozen=True, kw_only=True)
class Server:
    """An engine, and how many of it stand behind a router."""

    cost: StepCost
    room: KVRoom  # of each replica
    batching: Batching = field(default_factory=Batching)
    policy: Policy = field(default_factory=lambda: Policy.fixed(0))
    acceptance: Acceptance | None = None  # None: nothing is ever drafted
    replicas: int = 1
    router: Router = "round_robin"  # least_loaded: fewest requests in the system, the first of those

    def __post_init__(self):
        if not (1 <= self.replicas <= 4096):
            raise BadInput(f"the number of replicas must lie in [1, 4096], got {self.replicas}")
        if self.router not in ("round_robin", "least_loaded"):
            raise BadInput(f"a router is round_robin or least_loaded, got {self.router!r}")
        draft_len = self.policy.max_draft_len
        if draft_len and (self.acceptance is None or self.acceptance.max_draft_len < draft_len):
            raise BadInput(f"a policy that drafts {draft_len} tokens needs the acceptance of as many; give it, or draft less")
        if self.batching.max_num_batched_tokens < draft_len + 1:
            raise BadInput(f"a step must hold the {draft_len + 1} tokens of one round, got {self.batching.max_num_batched_tokens}")


class Series(NamedTuple):
    """What replicas did over time: a row for each stretch of like steps, arrays of one length, by replica and then by time."""

    replica: np.ndarray
    start_s: np.ndarray
    end_s: np.ndarray
    steps: np.ndarray
    draft_len: np.ndarray
    decoding: np.ndarray  # requests that decode
    running: np.ndarray  # they and those whose prompt is computed
    waiting: np.ndarray  # requests in the queue; mean over the stretch
    prefill_tokens: np.ndarray
    kv_share: np.ndarray  # of the blocks that requests use, in [0, 1], after the last of the steps


class Outcome(NamedTuple):
    """What came of each request, in the order they were given (arrays [requests]), and of the replicas."""

    arrival_s: np.ndarray
    input_len: np.ndarray
    output_len: np.ndarray
    first_token_s: np.ndarray  # on the clock; nan for a request that was refused, as all times of it are
    finish_s: np.ndarray
    replica: np.ndarray
    rejected: np.ndarray  # bool: could not run to its end on an empty replica
    preemptions: np.ndarray
    reused_tokens: np.ndarray  # of its prompt (and of what was computed before a preemption), found in the cache
    rounds: np.ndarray  # steps in which it decoded
    round_tokens: np.ndarray  # that came of them: all but the first, and one after each preemption
    drafted: np.ndarray  # tokens
    series: Series

    @property
    def ttft_s(self) -> np.ndarray:
        """[requests] queueing and prefill included."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> np.ndarray:
        """[requests] mean time of a token after the first; nan where there is none."""
        with np.errstate(invalid="ignore"):
            return np.where(self.output_len > 1, (self.finish_s - self.first_token_s) / np.maximum(self.output_len - 1, 1), np.nan)

    @property
    def e2e_s(self) -> np.ndarray:
        return self.finish_s - self.arrival_s

    @property
    def tokens_per_round(self) -> float:
        """Of all requests together, as an engine counts it; nan without rounds."""
        rounds = self.rounds.sum()
        return float(self.round_tokens.sum() / rounds) if rounds else float("nan")

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last token."""
        return float(np.nanmax(self.finish_s, initial=0.0) - self.arrival_s.min()) if len(self.arrival_s) else 0.0


def simulate(requests: Many[Request], server: Server, *, seed: int = 0, max_jump: int = MAX_JUMP) -> Outcome:
    """Serve the requests, each to its end. The same seed gives requests the same texts, whatever the server.

    max_jump  steps taken at once at most; changes nothing but the time it takes and the rows of the series
    """
    n = len(requests)
    if not n:
        raise BadInput("a simulation needs a request, got none")
    arrival_s, input_len, output_len = (
        np.array([getattr(request, name) for request in requests]) for name in ("arrival_s", "input_len", "output_len")
    )
    draft_len = server.policy.max_draft_len
    texts = server.acceptance.draw(input_len, output_len, draft_len, seed) if draft_len else None
    record = Record(n)
    replicas = [Replica(server, texts, record, max_jump) for _ in range(server.replicas)]
    rejected, placed = np.zeros(n, dtype=bool), np.zeros(n, dtype=int)
    turn = 0
    for i in np.argsort(arrival_s, kind="stable"):
        request, at = requests[i], float(arrival_s[i])
        if not replicas[0].scheduler.fits(request.input_len, request.output_len, draft_len):
            rejected[i] = True
            continue
        if server.router == "least_loaded" and server.replicas > 1:
            for replica in replicas:
                replica.advance(at)
            chosen = min(range(server.replicas), key=lambda r: replicas[r].in_system(at))
        else:
            chosen, turn = turn, (turn + 1) % server.replicas
        placed[i] = chosen
        replicas[chosen].push(at, Sequence(int(i), request.input_len, request.output_len, request.blocks, int(texts.start[i]) if texts else 0))
    for replica in replicas:
        replica.advance(np.inf)
    series = Series(*(np.concatenate(column) for column in zip(*(replica.series(r) for r, replica in enumerate(replicas)), strict=True)))
    return Outcome(
        arrival_s=arrival_s, input_len=input_len, output_len=output_len, first_token_s=record.first_token_s, finish_s=record.finish_s,
        replica=placed, rejected=rejected, preemptions=record.preemptions, reused_tokens=record.reused, rounds=record.rounds,
        round_tokens=record.round_tokens, drafted=record.drafted, series=series,
    )  # fmt: skip


COUNTED = ("preemptions", "reused", "rounds", "round_tokens", "drafted")  # by sequences


class Record:
    """What happened to the requests of all replicas; arrays [requests]."""

    def __init__(self, n: int):
        self.first_token_s, self.finish_s = np.full(n, np.nan), np.full(n, np.nan)
        self.preemptions, self.reused, self.rounds, self.round_tokens, self.drafted = (np.zeros(n, dtype=np.int64) for _ in COUNTED)


class Replica:
    """One engine with its clock."""

    def __init__(self, server: Server, texts: Texts | None, record: Record, max_jump: int = MAX_JUMP):
        self.scheduler = Scheduler(server.room, server.batching)
        self.clock_s = 0.0
        self._cost, self._policy, self._texts, self._record, self._max_jump = server.cost, server.policy, texts, record, max_jump
        self._arriving: deque[tuple[float, Sequence]] = deque()
        self._pushed, self._finishes_s = 0, deque()  # finish times ascend
        self._rows: list[list] = []  # columns of Series but the first, with request seconds in place of `waiting`
        self._last_step_s = 0.0

    def push(self, arrival_s: float, sequence: Sequence) -> None:
        """One more request, not before those pushed earlier."""
        self._arriving.append((arrival_s, sequence))
        self._pushed += 1

    def in_system(self, at_s: float) -> int:
        """Requests pushed and not finished by a time, up to which the replica has advanced; times may not go back."""
        while self._finishes_s and self._finishes_s[0] <= at_s:
            self._finishes_s.popleft()
            self._pushed -= 1
        return self._pushed

    def advance(self, until_s: float) -> None:
        """Take all steps that start before a time."""
        while self.clock_s < until_s and self.step(until_s):
            pass

    def step(self, until_s: float = np.inf) -> bool:
        """One step or a stretch of like ones; False, and the clock as it is, where nothing is to be done before a time."""
        scheduler = self.scheduler
        if not scheduler.num_running and not scheduler.waiting:
            if not self._arriving or self._arriving[0][0] >= until_s:
                return False
            self.clock_s = max(self.clock_s, self._arriving[0][0])
        while self._arriving and self._arriving[0][0] <= self.clock_s:
            arrival_s, sequence = self._arriving.popleft()
            scheduler.add(sequence)
            if self._rows:  # it came during the last steps; if not, it has not waited
                self._rows[-1][6] += self.clock_s - arrival_s
        decoding = scheduler.decoding
        draft_len, edge = self._policy.choose(len(decoding.sequences), int(decoding.length.sum()))
        plan = scheduler.schedule(draft_len)
        steps = 1
        if not plan.chunks and not plan.preempted:
            steps = self._quiet_steps(until_s)
        lengths = self._generate(plan.num_decoding, draft_len, steps)
        ends_s = self._ends(plan, lengths, draft_len)
        if len(ends_s) > 1:
            ends_s = ends_s[: self._cut(ends_s, lengths, plan.num_decoding, draft_len, edge, until_s)]
        self._commit(plan, lengths, ends_s, draft_len)
        return True

    def _quiet_steps(self, until_s: float) -> int:
        """How many steps may matter: those until the next arrival, about."""
        if self.scheduler.waiting:  # blocked, and until somebody finishes it stays so
            next_s = until_s
        else:
            next_s = min(until_s, self._arriving[0][0] if self._arriving else np.inf)
        if not np.isfinite(next_s) or not self._last_step_s:
            return self._max_jump
        return int(min(self._max_jump, (next_s - self.clock_s) / self._last_step_s + 2))

    def _generate(self, n: int, draft_len: int, steps: int) -> np.ndarray:
        """[steps + 1, n] lengths of the texts that decode, before each step and at the end; the first to reach its goal ends it."""
        decoding = self.scheduler.decoding
        length, goal = decoding.length[:n], decoding.goal[:n]
        if draft_len == 0 or n == 0:
            steps = min(steps, int((goal - length).min())) if n else 1
            return length + np.arange(steps + 1)[:, None]
        text, accepted, walk = decoding.text[:n], self._texts.accepted, self._texts.walk(draft_len)
        end, rows = goal + text, [length + text]
        while len(rows) <= steps:
            index = walk.index[rows[-1]]
            if index.min() >= 0:
                more = min(steps + 1 - len(rows), int((walk.last[decoding.index[:n]] - index).min()))
                rows += [*walk.places[index + np.arange(1, more + 1)[:, None]]]
                break
            rows.append(np.minimum(rows[-1] + 1 + np.minimum(accepted[rows[-1]], draft_len), end))
            if (rows[-1] == end).any():
                break
        return np.array(rows) - text

    def _ends(self, plan, lengths: np.ndarray, draft_len: int) -> np.ndarray:
        """[steps] when each ends."""
        context = lengths[:-1].sum(1)
        if plan.chunks:
            tokens = sum(chunk.tokens for chunk in plan.chunks)
            load = StepLoad(tokens, len(plan.chunks), sum(map(_pairs, plan.chunks)), plan.num_decoding, int(context[0]), draft_len)
            return np.array([self.clock_s + float(self._cost.step_s(load))])
        nothing = np.zeros(len(context), dtype=np.int64)
        step_s = self._cost.step_s(StepLoad(nothing, nothing, nothing, np.full(len(context), plan.num_decoding), context, draft_len))
        self._last_step_s = float(step_s[-1])
        return np.cumsum(np.concatenate([[self.clock_s], step_s]))[1:]  # one after the other, as single steps would be added

    def _cut(self, ends_s: np.ndarray, lengths: np.ndarray, n: int, draft_len: int, edge: float, until_s: float) -> int:
        """How many of the steps are like the first: nobody arrives who might be admitted, the policy holds, and blocks suffice."""
        next_s = until_s
        if not self.scheduler.waiting and self._arriving:
            next_s = min(next_s, self._arriving[0][0])
        steps = min(len(ends_s), int(ends_s.searchsorted(next_s)) + 1)
        if edge < np.inf:
            rest = int(self.scheduler.decoding.length[n:].sum())
            steps = min(steps, max(1, int(np.searchsorted(lengths[:-1].sum(1) + rest, edge))))
        scheduler, enough, short = self.scheduler, 0, steps  # before step `enough` there are blocks
        if scheduler.growth(lengths[steps - 1], draft_len).sum() <= scheduler.available_blocks:
            return steps
        while short - enough > 1:
            middle = (enough + short) // 2
            if scheduler.growth(lengths[middle], draft_len).sum() <= scheduler.available_blocks:
                enough = middle
            else:
                short = middle
        return enough + 1

    def _commit(self, plan, lengths: np.ndarray, ends_s: np.ndarray, draft_len: int) -> None:
        scheduler, record, steps, n = self.scheduler, self._record, len(ends_s), plan.num_decoding
        start_s, end_s = self.clock_s, float(ends_s[-1])
        decoding = scheduler.decoding
        running = len(decoding.sequences) + max(len(plan.chunks), scheduler.partial is not None)
        if n:
            if steps > 1:
                scheduler.grow(scheduler.growth(lengths[steps - 1], draft_len))
            decoding.length[:n] = lengths[steps]
            decoding.rounds[:n] += steps
            decoding.drafted[:n] += steps * draft_len
        self._rows.append([start_s, end_s, steps, draft_len, n, running, len(scheduler.waiting) * (end_s - start_s),
                           sum(chunk.tokens for chunk in plan.chunks), scheduler.used_blocks / scheduler.room.blocks])  # fmt: skip
        self.clock_s = end_s
        done = scheduler.finish() if n and (decoding.length[:n] >= decoding.goal[:n]).any() else []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.computed == sequence.length == sequence.input_len:
                record.first_token_s[sequence.index] = end_s
        for sequence in [*done, *scheduler.complete(plan)]:
            record.finish_s[sequence.index] = end_s
            for name in COUNTED:
                getattr(record, name)[sequence.index] = getattr(sequence, name)
            self._finishes_s.append(end_s)

    def series(self, replica: int) -> Series:
        columns = np.array(self._rows, dtype=float).reshape(-1, 9).T
        whole = [columns[i].astype(np.int64) for i in (2, 3, 4, 5)]
        return Series(
            np.full(len(self._rows), replica),
            columns[0],
            columns[1],
            *whole,
            columns[6] / (columns[1] - columns[0]),
            columns[7].astype(np.int64),
            columns[8],
        )


def _pairs(chunk: Chunk) -> float:
    return chunk.tokens * chunk.before + chunk.tokens * (chunk.tokens + 1) / 2
