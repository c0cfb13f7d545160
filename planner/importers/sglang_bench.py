"""Result files of `python -m sglang.bench_serving --output-file`, one JSON object a line.

Field names: SGLang 0.5.23, sglang/benchmark/serving.py (`benchmark`, `calculate_metrics`); server_info is the server's answer to
/server_info: its arguments and internal state. What is taken, and why:

tpot_s   mean_tpot_ms, as in vllm_bench.py.
itl_s    only where nothing was drafted: under speculation the client divides the time between two chunks by their tokens, so that
         mean_itl_ms is another time per token and not a round.
tokens_per_round   accept_length, the bonus token included. The server averages it since it started or was flushed: run the benchmark
         with --flush-cache. Acceptance by position is not in the file.
drafter, draft_len, tp   from server_info where it is there, else from flags. One draft token fewer than speculative_num_draft_tokens,
         which counts the root. Runs that verified trees are left out.
"""

from planner.errors import BadInput
from planner.importers.contract import SLACK, Given, Imported, make_cell, settle
from planner.importers.json_record import Record
from planner.serving import OFF, ServedCell

MARKS = ("total_input_tokens", "total_output_tokens", "output_throughput", "total_output_tokens_retokenized", "accept_length")
NAMES = {"nextn": "mtp", "standalone": "draft_model"}  # their algorithm -> our word


def read_sglang(records: list[Record], given: Given) -> Imported:
    """The cells of a file."""
    cells, warnings, engine = [], [], "SGLang"
    for record in records:
        server = record.below("server_info")
        if server is not None and server.text("version"):
            engine = f"SGLang {server.text('version')}"
        if not record.whole("completed"):
            warnings.append(f"{record.place}: left out, no request was completed")
        elif server is not None and (server.whole("speculative_eagle_topk") or 1) > 1:
            warnings.append(f"{record.place}: left out, it verified trees (speculative_eagle_topk {server.whole('speculative_eagle_topk')})")
        else:
            cells.append(_cell(record, server, given))
    return Imported(cells, warnings, engine)


def _cell(record: Record, server: Record | None, given: Given) -> ServedCell:
    place, completed = record.place, record.whole("completed")
    drafter, draft_len = _drafter(record, server, given)
    itl, ttft = record.number("mean_itl_ms"), record.number("mean_ttft_ms")
    return make_cell(
        place, record.source, drafter=drafter, draft_len=draft_len, tpot_s=record.needed("mean_tpot_ms") / 1e3,
        tokens_per_round=record.number("accept_length") or None if draft_len else None,
        itl_s=itl / 1e3 if itl and not draft_len else None, ttft_s=ttft / 1e3 if ttft else None,
        output_tokens_per_s=record.number("output_throughput"),
        concurrency=settle(place, "concurrency", record.whole("max_concurrency"), given),
        context_len=settle(place, "context_len", record.mean("total_input_tokens", completed), given, slack=SLACK),
        output_len=settle(place, "output_len", record.mean("total_output_tokens", completed), given, slack=SLACK),
        tensor_parallel=settle(place, "tensor_parallel", server.whole("tp_size") if server else None, given, default=1),
    )  # fmt: skip


def _drafter(record: Record, server: Record | None, given: Given) -> tuple[str, int]:
    place = record.place
    if server is not None and "speculative_algorithm" in server.fields:
        algorithm = (server.text("speculative_algorithm") or "none").lower()
        if algorithm == "none":
            return OFF, settle(place, "draft_len", 0, Given())
        rows, steps = server.whole("speculative_num_draft_tokens"), server.whole("speculative_num_steps")
        draft_len = settle(place, "draft_len", rows - 1 if rows else steps, given)
        return given.drafter or NAMES.get(algorithm, algorithm), draft_len
    accepted = record.number("accept_length")
    draft_len = settle(place, "draft_len", None, given, default=None if accepted else 0)
    if (accepted or draft_len) and given.drafter in (None, OFF):
        raise BadInput(f"{place} drafted tokens and does not name the drafter; give --drafter, with any name you like")
    if accepted and not draft_len:
        raise BadInput(f"{place} has an accept_length ({accepted:g}), so it drafted, and --draft-len says 0; give its draft_len")
    return (given.drafter if draft_len or given.draft_len == 0 else None) or OFF, draft_len
