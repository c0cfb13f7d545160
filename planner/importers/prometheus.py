"""Prometheus text of a server's /metrics: one cell, of all that vLLM or llama.cpp served since its start or between two scrapes.

Names: vLLM 0.33.0, vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py; llama.cpp's server has the same counters of
speculation under its own prefix. SGLang's text is read for what watches a server; it counts no drafts, so it makes no cell.
The format is read here, strictly: prometheus-client would be a dependency for thirty lines.

tpot_s   vLLM: the mean over requests of request_time_per_output_token_seconds, from the first token on, so without queueing.
         llama.cpp: tokens_predicted_seconds_total / tokens_predicted_total.
itl_s    inter_token_latency_seconds, which the engine observes once per round and request.
output_tokens_per_s   no scrape says how long it took. Where the server timed whole requests it follows from Little's law, concurrency
         over the mean time of a request, if `concurrency` requests were in the system all the time, as a cell says.
"""

import math
import re
from typing import NamedTuple

from planner.errors import BadInput
from planner.importers.contract import SLACK, Given, Imported, conditional, decoded, make_cell, settle, shown
from planner.serving import OFF, ServedCell

MAX_METRICS_BYTES = 32 * 2**20
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+([^ \t]+)(?:[ \t]+-?[0-9]+)?")
LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"\s*(?:,|$)')
ENGINES = {"vllm:": "vLLM", "llamacpp:": "llama.cpp", "sglang:": "SGLang"}
GAUGES = ("num_requests_running", "num_requests_waiting", "num_running_reqs", "num_queue_reqs", "requests_processing", "requests_deferred",
          "spec_accept_length")  # fmt: skip
POSITIONS = "spec_decode_num_accepted_tokens_per_pos_total"
STARTED = "process_start_time_seconds"

Counters = dict[tuple[str, int | None], float]  # (name without prefix, position) -> sum over engines


class Scrape(NamedTuple):
    """What one text says, names without the engine's prefix."""

    prefix: str
    counters: Counters  # and histograms' totals
    gauges: dict[str, list[float]]  # those of GAUGES that are numbers now, one per engine or rank


def read_prometheus(content: bytes, name: str, given: Given, since: tuple[bytes, str] | None = None) -> Imported:
    """The cell of a scrape, or of what lies between `since`, an earlier one as (content, name), and this one."""
    after = read_scrape(content, name)
    if after.prefix == "sglang:":
        raise BadInput(f"{name} is of SGLang, whose metrics count no drafts; import what sglang.bench_serving writes")
    counters = after.counters if since is None else difference(after, read_scrape(*since), name, since[1])
    return Imported([_cell(Totals(counters, name), after.prefix, given)], [], ENGINES[after.prefix])


class Totals:
    """Counters by name, and what follows from them. BadInput names the text."""

    def __init__(self, counters: Counters, name: str):
        self.counters, self.name = counters, name

    def get(self, metric: str) -> float | None:
        return self.counters.get((metric, None))

    def mean(self, histogram: str) -> float | None:
        """Sum over count; None where nothing was observed."""
        total, count = self.get(f"{histogram}_sum"), self.get(f"{histogram}_count")
        return total / count if total and count else None

    def positions(self) -> list[float]:
        found = {position: value for (metric, position), value in self.counters.items() if metric == POSITIONS}
        if found.keys() != set(range(len(found))):  # None: a sample without the label
            raise BadInput(f"{self.name}: positions of {POSITIONS} must be 0, 1, .., got {shown(list(found))}")
        return [found[position] for position in range(len(found))]


def _cell(totals: Totals, prefix: str, given: Given) -> ServedCell:
    name, generated = totals.name, None
    if prefix == "vllm:":
        generated, itl = totals.mean("request_generation_tokens"), totals.mean("inter_token_latency_seconds")
        tpot, ttft = totals.mean("request_time_per_output_token_seconds"), totals.mean("time_to_first_token_seconds")
        needed = "vllm:request_time_per_output_token_seconds"
    else:
        tokens, seconds = totals.get("tokens_predicted_total"), totals.get("tokens_predicted_seconds_total")
        tpot, itl, ttft, needed = seconds / tokens if seconds and tokens else None, None, None, "llamacpp:tokens_predicted_seconds_total"
    if tpot is None:
        raise BadInput(f"{name} must hold {needed} of at least one request, nothing was observed; scrape after the load ran")
    prompt, whole = totals.mean("request_prompt_tokens"), totals.mean("e2e_request_latency_seconds")
    concurrency = settle(name, "concurrency", None, given)
    drafter, draft_len, per_round, acceptance = _speculation(totals, given)
    return make_cell(
        name, name, drafter=drafter, draft_len=draft_len, tokens_per_round=per_round, acceptance=acceptance, tpot_s=tpot, itl_s=itl, ttft_s=ttft,
        output_tokens_per_s=concurrency * generated / whole if generated and whole else None, concurrency=concurrency,
        context_len=settle(name, "context_len", max(1, round(prompt)) if prompt else None, given, slack=SLACK),
        output_len=settle(name, "output_len", max(1, round(generated)) if generated else None, given, slack=SLACK),
        tensor_parallel=settle(name, "tensor_parallel", None, given, default=1),
    )  # fmt: skip


def _speculation(totals: Totals, given: Given) -> tuple[str, int, float | None, list[float]]:
    """Drafter, draft_len, tokens per round and conditional acceptance."""
    name = totals.name
    drafts, drafted, accepted = (totals.get(f"spec_decode_num_{what}_total") for what in ("drafts", "draft_tokens", "accepted_tokens"))
    if not drafts:
        settle(name, "draft_len", 0, given)
        return (given.drafter if given.draft_len == 0 else None) or OFF, 0, None, []
    if given.drafter in (None, OFF):
        raise BadInput(f"{name} counts {drafts:.0f} drafts and does not name the drafter; give --drafter, with any name you like")
    if drafted is None or accepted is None:
        raise BadInput(f"{name} must count drafted and accepted tokens beside drafts, they are missing; scrape it whole")
    survived = totals.positions()
    draft_len = settle(name, "draft_len", len(survived) or max(1, round(drafted / drafts)), given)
    return given.drafter, draft_len, 1 + accepted / drafts, conditional(name, [value / drafts for value in survived])


def difference(after: Scrape, before: Scrape, name: str, before_name: str) -> Counters:
    """What was counted between two scrapes. BadInput where the server was restarted in between."""
    if before.prefix != after.prefix:
        raise BadInput(
            f"{before_name} must be of the same server as {name}, one is of {ENGINES[before.prefix]}, the other of {ENGINES[after.prefix]}"
        )
    if _started(before) != _started(after) and None not in (_started(before), _started(after)):
        raise BadInput(f"{name} must be of the same run of the server as {before_name}, it was restarted in between; scrape again")
    for key, value in before.counters.items():
        if value > after.counters.get(key, 0.0):
            raise BadInput(
                f"{name}: {key[0]} must not be below that of {before_name} ({value:g}), got {after.counters.get(key, 0.0):g}; "
                "the server was restarted, or the files are the wrong way round"
            )
    return {key: value - before.counters.get(key, 0.0) for key, value in after.counters.items()}


def restarted(after: Scrape, before: Scrape) -> bool:
    """Whether another process of the server counted the later scrape: it began at another time, or a counter fell."""
    fell = any(value > after.counters.get(key, 0.0) for key, value in before.counters.items())
    return fell or None not in (_started(before), _started(after)) and _started(before) != _started(after)


def _started(scrape: Scrape) -> float | None:
    return scrape.counters.get((STARTED, None))


def read_scrape(content: bytes, name: str) -> Scrape:
    """One scrape, counters summed over the server's engines. BadInput names the line."""
    if len(content) > MAX_METRICS_BYTES:
        raise BadInput(f"metrics take at most {MAX_METRICS_BYTES} bytes, {name} has {len(content)}")
    counters: Counters = {}
    gauges: dict[str, list[float]] = {}
    prefixes, models = set(), set()
    for number, line in enumerate(decoded(content, name).split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = SAMPLE.fullmatch(line)
        labels = None if match is None else _labels(match[2] or "")
        if labels is None:
            raise BadInput(f"{name}, line {number} is not Prometheus text: {shown(line)}")
        prefix = next((prefix for prefix in ENGINES if match[1].startswith(prefix)), "")
        plain = match[1].removeprefix(prefix)
        if not plain.endswith(("_total", "_sum", "_count")) and plain not in GAUGES and match[1] != STARTED or not prefix and match[1] != STARTED:
            continue
        try:
            value = float(match[3])
        except ValueError:
            value = math.nan
        if math.isnan(value) and plain in GAUGES:
            continue  # not known yet
        if not 0 <= value < 1e18:
            raise BadInput(f"{name}, line {number}: {shown(match[1])} must be a finite number of at least 0, got {shown(match[3])}")
        position = labels.get("position")
        if position is not None and not re.fullmatch("[0-9]{1,4}", position):
            raise BadInput(f"{name}, line {number}: position must be a whole number, got {shown(position)}")
        prefixes.add(prefix)
        models.add(labels.get("model_name", ""))
        if plain in GAUGES:
            gauges.setdefault(plain, []).append(value)
            continue
        key = plain, None if position is None else int(position)
        counters[key] = counters.get(key, 0.0) + value
    if len(prefixes - {""}) != 1:
        raise BadInput(f"{name} must hold metrics of one engine, with the prefix {', '.join(ENGINES)}, got {sorted(prefixes - {''}) or 'none'}")
    if len(models - {""}) > 1:
        raise BadInput(f"{name} must hold metrics of one model, got {shown(sorted(models - {''}))}; scrape one server")
    return Scrape((prefixes - {""}).pop(), counters, gauges)


def _labels(text: str) -> dict[str, str] | None:
    found, at = {}, 0
    while at < len(text):
        match = LABEL.match(text, at)
        if match is None:
            return None
        found[match[1]], at = match[2], match.end()
    return found
