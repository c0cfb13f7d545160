"""Which kind of file this is, by what it holds; never by its name, and never a guess."""

from planner.errors import BadInput
from planner.importers import sglang_bench, vllm_bench
from planner.importers.bench_table import known_columns, read_table
from planner.importers.consistency import doubts, drafter_reads
from planner.importers.contract import Given, Imported, shown
from planner.importers.json_record import read_records
from planner.importers.prometheus import ENGINES, read_prometheus
from planner.importers.vllm_requests import answer_of, read_requests
from planner.serving import decode_serving_profile


def read_any(content: bytes, name: str, given: Given, since: tuple[bytes, str] | None = None) -> Imported:
    """The cells of a file of any kind that is known here. since  an earlier scrape, for Prometheus text alone"""
    start = content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"#", *(prefix.encode() for prefix in ENGINES))):
        return read_prometheus(content, name, given, since)
    if since is not None:
        raise BadInput(f"--since goes with Prometheus text, {name} is something else; drop it")
    if start.startswith((b"{", b"[")):
        return _read_json(content, name, given)
    if csv_columns(content) & {"tpot_s", "draft_len", "drafter"}:
        return read_table(content, name, given)
    header = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    raise BadInput(
        f"{name} is of no known kind; looked for a CSV header (columns {known_columns()}, separated by commas), JSON of vllm bench serve or "
        f"sglang.bench_serving, answers with vLLM's metrics, a serving profile, and Prometheus text (vllm:, llamacpp:); it begins with {shown(header[:60])}"
    )


def csv_columns(content: bytes) -> set[str]:
    """The columns of a CSV header; of any other file, whatever its first line has between commas."""
    header = content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].decode("utf-8", "replace")
    return {field.strip().strip('"') for field in header.split(",")}


def _read_json(content: bytes, name: str, given: Given) -> Imported:
    records = read_records(content, name)
    keys = records[0].fields.keys()
    if records[0].fields.get("kind") == "serving":
        profile = decode_serving_profile(content, name)
        stale = doubts(
            profile.cells, drafter_reads(profile.drafters, profile.system, profile.cells)
        )  # judged anew, with the cells of the other files
        return Imported(
            profile.cells, [warning for warning in profile.warnings if warning not in stale], profile.source, profile.date, profile=profile
        )
    if all(record.fields.keys() >= set(vllm_bench.MARKS) for record in records):
        return vllm_bench.read_vllm(records, given)
    if all(record.fields.keys() >= set(sglang_bench.MARKS) for record in records):
        return sglang_bench.read_sglang(records, given)
    if any(answer_of(record) is not None for record in records):
        return read_requests(records, name, given)
    raise BadInput(
        f"{name} is JSON of no known kind; looked for {', '.join(vllm_bench.MARKS)} (vLLM), {', '.join(sglang_bench.MARKS)} (SGLang), "
        f"metrics beside usage (a vLLM server's answers), kind (a serving profile); got {shown(list(keys)[:8])}"
    )
