"""A closed loop of streamed requests against one server: `concurrency` of them in the system all the time.

Every prompt is sent once and counted. Where none is left to send, requests that do not count (prompts again, with other seeds) keep the
load up until the last counted answer is whole, and are then dropped. So throughput follows from the counted answers alone
(tunings.Run.output_tokens_per_s), and what the server counts meanwhile, requests that do not count among them, is of the same load.
Answers left out are among what it counts as well, unless it says with each answer what it drafted, as llama.cpp does.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from planner.canaries import Answer
from planner.engines import metrics as counters
from planner.engines.completions import Asked, Prompt, Written, write
from planner.engines.http import Client
from planner.engines.repetition import repeats_itself
from planner.errors import BadInput, PlannerError
from planner.importers.prometheus import Scrape
from planner.tunings import Counted

METRICS = "/metrics"
LOOK_S = 1.0  # between two looks at a gauge
OTHER_SEED = 10**6  # from here on, seeds of what is not counted


class Load(NamedTuple):
    """What became of a load; tunings.Run holds it beside what was asked."""

    answers: list[Answer]  # counted and good for figures
    prompts: list[int]  # [i] place of the prompt that answers[i] answers
    wall_s: float  # until the last counted one was whole
    sent: int  # requests, those that are not counted among them
    degenerate: int  # answers left out: they repeat themselves
    short: int  # answers left out: too few tokens to be timed
    counted: Counted | None  # None: the server counts nothing


def run_load(
    client: Client,
    asked: Asked,
    prompts: list[Prompt],
    *,
    concurrency: int,
    metrics: bool,
    total_s: float,
    judge: bool = True,
    advance: Callable[[], None] = lambda: None,
    deadline: float | None = None,
) -> Load:
    """Send the prompts, so many at once. ServerError as soon as one request fails; BadInput where no answer is good for figures.

    metrics  what the server counts is read once the load is whole, and before it ends: it has /metrics
    total_s  that one request may take
    judge  answers that repeat themselves are left out
    advance  called once for each counted answer, in this thread
    deadline  time.monotonic() after which no prompt is sent any more, but for the first of each worker
    """
    if not prompts or concurrency < 1:
        raise ValueError(f"a load needs a prompt and a concurrency of at least 1, got {len(prompts)} and {concurrency}")
    own, loop = client.another(), _Loop(asked, prompts, concurrency, total_s, deadline)
    before, begun = None, 0
    lengths: list[float] = []  # SGLang's tokens per round, of late
    with threads(concurrency, [own]) as pool:
        begin = looked = time.perf_counter()
        for _ in range(concurrency):
            pool.submit(loop.work, own)
        found: dict[int, Written] = {}
        while len(found) < loop.to_come():
            done = loop.done.get()
            if isinstance(done, BaseException):
                raise done
            if done is not None:
                found[done[0]] = done[1]
                advance()
            begun += done is None
            if metrics and before is None and (begun >= concurrency or found):
                before = counters.scrape(client, METRICS)  # now the load is whole
            if before is not None and before.prefix == "sglang:" and time.perf_counter() > looked + LOOK_S:
                lengths += counters.scrape(client, METRICS).gauges.get("spec_accept_length", [])
                looked = time.perf_counter()
        wall_s = time.perf_counter() - begin
        after = counters.scrape(client, METRICS) if metrics else None  # before the rest is dropped, so that it is of a full load
        loop.over.set()
        own.abort()
    return _sum_up(found, judge, wall_s, loop.sent, _count(client, before, after, lengths))


@contextmanager
def threads(number: int, clients: list[Client]) -> Iterator[ThreadPoolExecutor]:
    """Where something fails, or Ctrl-C ends it, nobody waits for answers that are under way."""
    with ThreadPoolExecutor(number) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for client in clients:
                client.abort()
            raise


class _Loop:
    """What the workers share."""

    def __init__(self, asked: Asked, prompts: list[Prompt], concurrency: int, total_s: float, deadline: float | None):
        self._asked, self._prompts, self._concurrency, self._total_s, self._deadline = asked, prompts, concurrency, total_s, deadline
        self._lock, self._next, self._others, self._closed = threading.Lock(), 0, count(), False
        self.done: queue.SimpleQueue[tuple[int, Written] | BaseException | None] = queue.SimpleQueue()  # None: an answer has begun
        self.over, self.sent = threading.Event(), 0

    def to_come(self) -> int:
        """Counted answers there will be."""
        with self._lock:
            return self._next if self._closed else len(self._prompts)

    def work(self, client: Client) -> None:
        while not self.over.is_set():
            place, prompt, asked = self._take()
            try:
                written = write(client, prompt, asked, self._total_s, lambda: self.done.put(None))
            except BaseException as error:  # noqa: BLE001  raised in the thread that waits, which would wait forever
                if not self.over.is_set():
                    self.done.put(error)
                return
            if place is not None:
                self.done.put((place, written))

    def _take(self) -> tuple[int | None, Prompt, Asked]:
        """The next prompt that counts and its place, else one that does not."""
        with self._lock:
            self.sent += 1
            late = self._deadline is not None and time.monotonic() > self._deadline and self._next >= self._concurrency
            self._closed |= late
            if self._next < len(self._prompts) and not self._closed:
                place = self._next
                self._next += 1
                return place, self._prompts[place], self._asked
            other = next(self._others)
        return None, self._prompts[other % len(self._prompts)], self._asked._replace(seed=self._asked.seed + OTHER_SEED + other)


def _sum_up(found: dict[int, Written], judge: bool, wall_s: float, sent: int, counted: Counted | None) -> Load:
    answers, places, degenerate, short, kept = [], [], 0, 0, []
    for place in sorted(found):
        written = found[place]
        if written.answer is None:
            short += 1
        elif judge and repeats_itself(written.text):
            degenerate += 1
        else:
            answers.append(written.answer)
            places.append(place)
            kept.append(written)
    if not answers:
        raise BadInput(
            f"a load needs an answer of several tokens that does not repeat itself, of {len(found)} there are {short} too short and "
            f"{degenerate} that repeat themselves; use other prompts, a longer output, a temperature above 0, or --keep-repetitive"
        )
    return Load(answers, places, wall_s, sent, degenerate, short, _of_answers(kept, counted))


def _count(client: Client, before: Scrape | None, after: Scrape | None, lengths: list[float]) -> Counted | None:
    """What lies between two scrapes."""
    if before is None or after is None:
        return None
    try:
        own = counters.stretch(after, before, None, client.name, "an earlier scrape")
    except PlannerError as error:  # it may quote what the server said
        raise BadInput(client.hidden(str(error))) from None
    if own.tokens <= 0:
        return None
    accepted, tokens = own.accepted, own.tokens
    if after.prefix == "sglang:":  # drafts are not counted; the gauge before is of another load
        lengths = [length for length in [*lengths, *after.gauges.get("spec_accept_length", [])] if length >= 1]
        accepted = tokens * (1 - len(lengths) / sum(lengths)) if lengths else 0.0
    elif own.rounds is not None:
        tokens = own.rounds + own.accepted  # with those behind a request's end, which are accepted and not sent
    return Counted(tokens=tokens, drafts=own.drafts, drafted=own.drafted, accepted=min(accepted, tokens), survived=own.survived)


def _of_answers(kept: list[Written], counted: Counted | None) -> Counted | None:
    """Where the server says with each answer what it drafted, that says how much, of these answers alone; counters say at which position."""
    if all(written.drafted is None for written in kept):
        return counted  # llama.cpp is silent on answers for which it drafted nothing
    drafted, accepted = (float(sum(getattr(written, what) or 0 for written in kept)) for what in ("drafted", "accepted"))
    tokens = float(sum(written.answer.output_tokens - 1 for written in kept if written.answer is not None))
    if counted is None or not counted.drafted or not counted.accepted:
        return Counted(tokens=tokens, drafted=drafted, accepted=accepted, drafts=counted.drafts if counted else 0.0)
    share = accepted / counted.accepted
    return Counted(
        tokens=tokens, drafts=counted.drafts * drafted / counted.drafted, drafted=drafted, accepted=accepted,
        survived=[value * share for value in counted.survived],
    )  # fmt: skip
