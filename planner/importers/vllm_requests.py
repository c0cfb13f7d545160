"""Answers of a vLLM server that carry per-request metrics, one JSON object a line: one cell of all the requests in a file.

The server writes `metrics` into an answer with --enable-per-request-metrics (times) and --per-request-spec-decode-metrics summary or
detailed (speculation). Field names: vLLM 0.33.0, vllm/entrypoints/generate/base/protocol.py (`PerRequestMetrics`,
`SpeculativeDecodingMetrics`); a captured line may be the answer itself or hold it under "data" or "response".

tpot_s and itl_s are the server's own generation time per token and per verify step, so neither client nor queue is in them.
acceptance_histogram[j] counts the steps that accepted exactly j drafts; at the level `detailed` the tokens drafted in each step are
known too, and a draft that ended early is not taken for a rejection.
"""

import numpy as np

from planner.errors import BadInput
from planner.importers.contract import Given, Imported, make_cell, settle
from planner.importers.json_record import Record
from planner.serving import OFF

MAX_DRAFT_LEN = 1024


def answer_of(record: Record) -> Record | None:
    """The answer with its metrics that a line is or holds; None if it has none."""
    for key in ("data", "response", None):
        fields = record.fields if key is None else record.fields.get(key)
        if isinstance(fields, dict) and isinstance(fields.get("metrics"), dict) and isinstance(fields.get("usage"), dict):
            return Record(record.place, record.source, fields)
    return None


def read_requests(records: list[Record], name: str, given: Given) -> Imported:
    """The one cell of a file."""
    answers = [answer for record in records if (answer := answer_of(record)) is not None]
    warnings = [f"{name}: {len(records) - len(answers)} of {len(records)} lines are left out, they hold no metrics"] * (len(answers) < len(records))
    tokens = prompt = steps = drafted = 0
    seconds, firsts, widths, survived, reached = 0.0, [], set(), np.zeros(MAX_DRAFT_LEN), np.zeros(MAX_DRAFT_LEN)
    for answer in answers:
        usage, metrics = answer.below("usage"), answer.below("metrics")
        prompt += int(usage.needed("prompt_tokens"))
        tokens += int(usage.needed("completion_tokens"))
        seconds += metrics.needed("generation_time_ms") / 1e3
        if (first := metrics.number("time_to_first_token_ms")) is not None:
            firsts.append((first + (metrics.number("queue_time_ms") or 0.0)) / 1e3)
        if (speculation := metrics.below("speculative_decoding")) is not None:
            widths.add(int(speculation.needed("num_spec_tokens")))
            steps += int(speculation.needed("num_spec_steps"))
            drafted += int(speculation.needed("num_draft_tokens"))
            _count(speculation, survived, reached)
    if len(widths) > 1 or max(widths, default=0) > MAX_DRAFT_LEN:
        raise BadInput(f"{name} must hold requests of one draft_len up to {MAX_DRAFT_LEN}, got {sorted(widths)}; a file is one cell: split it")
    if tokens <= len(answers):
        raise BadInput(f"{name} must hold requests of at least two output tokens, for the time between them; got {tokens} of {len(answers)} requests")
    draft_len = settle(name, "draft_len", widths.pop() if widths else None, given, default=0)
    if draft_len and given.drafter in (None, OFF):
        raise BadInput(f"{name} drafted tokens and does not name the drafter; give --drafter, with any name you like")
    known = int((reached[:draft_len] > 0).cumprod().sum())
    cell = make_cell(
        name, name, drafter=(given.drafter if draft_len or given.draft_len == 0 else None) or OFF, draft_len=draft_len,
        tpot_s=seconds / (tokens - len(answers)), itl_s=seconds / steps if steps else None, ttft_s=sum(firsts) / len(firsts) if firsts else None,
        tokens_per_round=1 + float(survived.sum()) / steps if steps else None,
        acceptance=[float(share) for share in survived[:known] / reached[:known]],
        concurrency=settle(name, "concurrency", None, given), context_len=max(1, round(prompt / len(answers))),
        output_len=max(1, round(tokens / len(answers))), tensor_parallel=settle(name, "tensor_parallel", None, given, default=1),
    )  # fmt: skip
    return Imported([cell], warnings, "vLLM")


def _count(speculation: Record, survived: np.ndarray, reached: np.ndarray) -> None:
    """survived[i] += steps that accepted draft i; reached[i] += steps that drafted it and accepted those before."""
    accepted, drafted = speculation.numbers("per_step_accepted"), speculation.numbers("per_step_drafted")
    if not accepted or len(accepted) != len(drafted):
        histogram = speculation.numbers("acceptance_histogram")
        width = int(speculation.needed("num_spec_tokens"))
        if len(histogram) != width + 1 or width > MAX_DRAFT_LEN or min(histogram) < 0:
            raise BadInput(f"{speculation.place}: acceptance_histogram must have num_spec_tokens + 1 counts, got {len(histogram)}")
        at_least = np.cumsum(histogram[::-1])[::-1]  # [j] steps that accepted j or more
        survived[:width] += at_least[1:]
        reached[:width] += at_least[:-1]
        return
    for ours, theirs in zip(accepted, drafted, strict=True):
        if not 0 <= ours <= theirs <= MAX_DRAFT_LEN:
            raise BadInput(f"{speculation.place}: a step must accept at most what it drafted ({theirs:g}), got {ours:g}")
        survived[: int(ours)] += 1
        reached[: min(int(ours) + 1, int(theirs))] += 1
