"""What a running server counted: /metrics of vLLM, SGLang or llama.cpp, scraped every few seconds, as stretches between two scrapes.

Texts are read by importers/prometheus.py. What engines count differs:

vLLM       inter_token_latency_seconds, once per round and request: its sum is request-seconds of decoding, its count rounds
SGLang     inter_token_latency_seconds, once per token; drafts are not counted, spec_accept_length is a gauge
llama.cpp  tokens_predicted_seconds_total, request-seconds of decoding, written as requests end; finished requests are not counted
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from planner.engines.http import Client
from planner.errors import BadInput, PlannerError, ServerError
from planner.importers.prometheus import ENGINES, Scrape, Totals, difference, read_scrape, restarted

RUNNING = ("num_requests_running", "num_running_reqs", "requests_processing")
WAITING = ("num_requests_waiting", "num_queue_reqs", "requests_deferred")


class Stretch(NamedTuple):
    """What was served between two scrapes."""

    seconds: float | None  # between them; None where nobody took the time
    tokens: float  # generated, first tokens of requests left out
    decode_s: float  # request-seconds that these took
    rounds: float | None  # of all requests; None where they are not counted
    drafts: float  # rounds that drafted
    drafted: float  # tokens
    accepted: float
    survived: list[float]  # [i] rounds in which draft i was accepted
    accept_length: float | None  # tokens per round as the engine says, where it counts no drafts
    requests: float | None  # finished
    prompt_tokens: float  # of those
    concurrency: float | None  # requests in the system, mean of both scrapes; None where neither says
    running: float | None  # of them, not waiting


class Watched(NamedTuple):
    """What was seen of a server."""

    engine: str
    stretches: list[Stretch]  # in which something was generated
    seconds: float | None  # of all, restarts left out; None where nobody took the time
    num_scrapes: int
    num_restarts: int  # a stretch with one in it is left out
    num_failed: int  # scrapes that were not answered


def stretch(after: Scrape, before: Scrape, seconds: float | None, name: str, before_name: str) -> Stretch:
    """What lies between two scrapes of one run of a server. BadInput where they are not, or count what cannot be."""
    totals = Totals(difference(after, before, name, before_name), name)

    def count(metric: str) -> float:
        return totals.get(metric) or 0.0

    drafts, drafted, accepted = (count(f"spec_decode_num_{what}_total") for what in ("drafts", "draft_tokens", "accepted_tokens"))
    if accepted > drafted * (1 + 1e-9):
        raise BadInput(f"{name} must count no more accepted tokens ({accepted:g}) than drafted ones ({drafted:g}); it is not an engine's")
    decode_s, rounds = count("inter_token_latency_seconds_sum"), count("inter_token_latency_seconds_count") or None
    if after.prefix == "llamacpp:":
        tokens, decode_s, rounds = count("tokens_predicted_total"), count("tokens_predicted_seconds_total"), None
    elif after.prefix == "sglang:":
        tokens, rounds = rounds or 0.0, None
    else:
        tokens = max(0.0, count("generation_tokens_total") - count("time_to_first_token_seconds_count"))
    requests = totals.get("request_generation_tokens_count") or totals.get("num_requests_total")
    lengths = [length for scrape in (before, after) for length in scrape.gauges.get("spec_accept_length", []) if length > 0]
    running, waiting = (_gauge(before, after, names) for names in (RUNNING, WAITING))
    return Stretch(
        seconds, tokens, decode_s, rounds, drafts, drafted, accepted, totals.positions(), sum(lengths) / len(lengths) if lengths else None,
        requests, count("request_prompt_tokens_sum"), None if running is None else running + (waiting or 0.0), running,
    )  # fmt: skip


def watch(
    client: Client,
    *,
    window_s: float,
    interval_s: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    advance: Callable[[], None] = lambda: None,
) -> Watched:
    """Scrape now, every interval, and when the window ends. A server that is away for a while is scraped again; the first scrape must be answered."""
    begin, found, failed = clock(), [(clock(), scrape(client))], 0
    last: ServerError | None = None
    while (now := clock()) < begin + window_s:
        sleep(min(interval_s, begin + window_s - now))
        try:
            found.append((clock(), scrape(client)))
        except ServerError as error:
            failed, last = failed + 1, error
        advance()
    if len(found) < 2:
        raise ServerError(f"a window needs two scrapes, only the first was answered; then: {last}")
    stretches, restarts = [], 0
    for (at, before), (then, after) in pairwise(found):
        if before.prefix != after.prefix or restarted(after, before):
            restarts += 1
            continue
        stretches.append(stretch(after, before, then - at, client.name, "an earlier scrape"))
    seconds = sum(own.seconds for own in stretches)
    return Watched(ENGINES[found[0][1].prefix], [own for own in stretches if own.tokens > 0], seconds, len(found), restarts, failed)


def compare_files(before: tuple[bytes, str], after: tuple[bytes, str], seconds: float | None) -> Watched:
    """What two scrapes on disk, each as (content, name), say; a restart between them is refused."""
    earlier, later = read_scrape(*before), read_scrape(*after)
    own = stretch(later, earlier, seconds, after[1], before[1])
    return Watched(ENGINES[later.prefix], [own] if own.tokens > 0 else [], seconds, 2, 0, 0)


def scrape(client: Client, path: str = "") -> Scrape:
    """What a server counts now."""
    content = client.get(path)
    try:
        return read_scrape(content, client.name)
    except PlannerError as error:  # it quotes what the server said
        raise BadInput(client.hidden(str(error))) from None


def _gauge(before: Scrape, after: Scrape, names: tuple[str, ...]) -> float | None:
    """Mean of the two scrapes, summed over engines or ranks that serve different requests."""
    found = [sum(scrape.gauges[name]) for scrape in (before, after) for name in names if name in scrape.gauges]
    return sum(found) / len(found) if found else None
