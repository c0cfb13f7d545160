"""Result files of `vllm bench serve --save-result`, and of --append-result, one JSON object a line.

Field names: vLLM 0.33.0, vllm/benchmarks/serve.py (`benchmark`, `calculate_metrics`, the end of `main_async`). What is taken, and why:

tpot_s   mean_tpot_ms: (latency - ttft) / (tokens - 1) of each request, so waiting for admission is in ttft and not in it. The mean,
         not the median: tokens per second times the mean is the running batch.
itl_s    mean_itl_ms counts streamed chunks, and the engine streams one per round: under speculation that is a round, not a token.
         Where chunks were merged on the way, it is too long, and the comparison with tpot_s says so.
tokens_per_round, acceptance   spec_decode_acceptance_length (the bonus token included), and
         spec_decode_per_position_acceptance_rates, which are shares of all rounds and become conditional here. vLLM writes them when the
         server drafted during the run. A file without them is off, unless --draft-len says otherwise.

A file does not name the drafter: --drafter does, or `--metadata drafter=eagle3 draft_len=3 tp=2` of the benchmark itself.
"""

from datetime import datetime

from planner.errors import BadInput
from planner.importers.contract import SLACK, Given, Imported, conditional, make_cell, settle
from planner.importers.json_record import Record
from planner.serving import OFF, ServedCell

MARKS = ("total_input_tokens", "total_output_tokens", "output_throughput", "tokenizer_id", "burstiness")  # keys it is known by
DRAFTED = "spec_decode_num_drafts"


def read_vllm(records: list[Record], given: Given) -> Imported:
    """The cells of a file."""
    cells, warnings, dates = [], [], []
    for record in records:
        if not record.whole("completed"):
            warnings.append(f"{record.place}: left out, no request was completed")
            continue
        cells.append(_cell(record, given, warnings))
        dates.append(record.text("date") or "")
    assumed = any(cell.draft_len and cell.tokens_per_round is None for cell in cells)
    return Imported(cells, warnings, "vLLM", _iso(max(dates, default="")), assumed)


def _cell(record: Record, given: Given, warnings: list[str]) -> ServedCell:
    place, completed = record.place, record.whole("completed")
    if failed := record.whole("failed"):
        warnings.append(f"{place}: {failed} of {completed + failed} requests failed; the load was lower than it seems")
    if record.fields.get("request_rate") not in (None, "inf"):
        warnings.append(f"{place}: requests came at a rate ({record.fields['request_rate']} per s), so fewer than max_concurrency may have run")
    drafter, draft_len, per_round, acceptance = _speculation(record, given, warnings)
    itl, ttft = record.number("mean_itl_ms"), record.number("mean_ttft_ms")
    return make_cell(
        place, record.source, drafter=drafter, draft_len=draft_len, tokens_per_round=per_round, acceptance=acceptance,
        tpot_s=record.needed("mean_tpot_ms") / 1e3, itl_s=itl / 1e3 if itl else None, ttft_s=ttft / 1e3 if ttft else None,
        output_tokens_per_s=record.number("output_throughput"),
        concurrency=settle(place, "concurrency", record.whole("max_concurrency"), given),
        context_len=settle(place, "context_len", record.mean("total_input_tokens", completed), given, slack=SLACK),
        output_len=settle(place, "output_len", record.mean("total_output_tokens", completed), given, slack=SLACK),
        tensor_parallel=settle(place, "tensor_parallel", record.whole("tp"), given, default=1),
    )  # fmt: skip


def _speculation(record: Record, given: Given, warnings: list[str]) -> tuple[str, int, float | None, list[float]]:
    """Drafter, draft_len, tokens per round and conditional acceptance."""
    place, named, asked_len = record.place, record.text("drafter") or given.drafter, record.whole("draft_len")
    if record.fields.get(DRAFTED) is None:
        draft_len = settle(place, "draft_len", asked_len, given, default=0)
        if draft_len and named in (None, OFF):
            raise BadInput(f"{place}: a run with draft_len {draft_len} needs the drafter's name; give --drafter")
        if draft_len:
            warnings.append(f"{place}: taken as {named} K={draft_len} as was said, though it lacks the counters that vLLM writes when it drafts")
        idle = asked_len == 0 or given.draft_len == 0 or record.text("drafter") is not None
        if named not in (None, OFF) and not draft_len and not idle:
            warnings.append(f"{place}: nothing was drafted, taken as off and not as {named} loaded and idle; if it was, say --draft-len 0")
        return (named if draft_len or idle else OFF) or OFF, draft_len, None, []
    if named in (None, OFF):
        raise BadInput(f"{place} drafted tokens and does not name the drafter; give --drafter, with any name you like")
    drafts, drafted = record.needed(DRAFTED), record.needed("spec_decode_draft_tokens")
    shares = record.numbers("spec_decode_per_position_acceptance_rates")
    draft_len = settle(place, "draft_len", asked_len or len(shares) or round(drafted / drafts), given)
    if shares and len(shares) != draft_len:
        raise BadInput(f"{place}: draft_len is {draft_len}, but there are acceptance rates of {len(shares)} positions; correct the metadata")
    if drafted < 0.95 * draft_len * drafts:
        warnings.append(
            f"{place}: {drafted / drafts:.2f} tokens were drafted per round, not {draft_len}: acceptance includes drafts that ended early"
        )
    return named, draft_len, record.needed("spec_decode_acceptance_length"), conditional(place, shares)


def _iso(date: str) -> str:
    """ISO 8601 of 20261122-111108; in local time, the file does not say which."""
    try:
        return datetime.strptime(date, "%Y%m%d-%H%M%S").isoformat()
    except ValueError:
        return ""
