"""Does drift see it? A real llama.cpp server, its acceptance set by hand: as planned, lower, and falling within the window.

SmolLM2-135M, unpacked to 16 bits (a CPU reads 4-bit weights too fast for drafts to pay), drafts with its own first layer;
synthetic acceptance decides what is accepted, so the text is noise and the times are real. One request at a time, one thread: off
and K = 1 to 4 are measured twice, imported, planned for; then the planned server is watched three times:

planned   the acceptance that was planned with: exit 0
lower     another, by a restart on the same port before the window: exit 3
falling   the planned one at first, the lower one from the middle of the window on, by a restart within it

Needs pip install xllamacpp==2026.10.11549, here or in the Python that --server-python names. About four and a half minutes.
"""

import csv
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import gguf
from common import make_parser, progress, report_tables
from gguf.quants import dequantize, quantize

from planner.engines.http import Client
from planner.engines.metrics import Stretch, watch
from planner.errors import MissingExtra, ServerError
from planner.runtime.weights import default_model_path

SETTINGS = (("", 0), ("one_layer", 1), ("one_layer", 2), ("one_layer", 3), ("one_layer", 4))  # idle: this server aborts at n_max 0
RATES = (0.95, 0.90, 0.85, 0.80)  # share of rounds that accept draft 1, 2, ..
LOWER = (0.30, 0.10, 0.03, 0.01)
OUTPUT_LEN, PROMPT_LEN = 32, 16  # tokens; the prompt's about
MEASURE_S, WINDOW_S, INTERVAL_S = 7.0, 40.0, 4.0
WARMUP_S = 2.0  # of load before anything is counted
HERE = Path(__file__).resolve().parent
REMEDY = "pip install xllamacpp==2026.10.11549, or name with --server-python a Python that has it"


def cut(source: Path, out: Path, num_layers: int, dtype: gguf.GGMLQuantizationType | None) -> None:
    """A Llama's GGUF file with its first layers only, its weights unpacked to dtype; None: as they are."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = num_layers if name == "llama.block_count" else field.contents()
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= num_layers:
            continue
        if dtype is None or tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), dtype), raw_dtype=dtype)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


class Server:
    """The synthetic server in a process of its own, which ends with this one, or when told to."""

    def __init__(self, python: str, folder: Path, port: int, drafter: str, draft_len: int, rates: Sequence[float]):
        asked = {"model": str(folder / "target.gguf"), "port": port, "threads": 1, "draft_len": draft_len, "rates": list(rates[:draft_len])}
        asked["drafter"] = str(folder / "drafter.gguf") if drafter else ""
        self.log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            [python, str(HERE / "synthetic_server.py"), json.dumps(asked)], stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT
        )
        client, end = Client(f"http://127.0.0.1:{port}"), time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            with suppress(ServerError):
                client.get("/health")
                return
            time.sleep(0.2)
        self.stop()
        self.log.seek(0)
        raise SystemExit(f"the server did not come up; it said: ..{self.log.read()[-500:]}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self.log.close()


@contextmanager
def load(port: int) -> Iterator[None]:
    """One request after another, also when the server was away."""
    client, ended = Client(f"http://127.0.0.1:{port}"), threading.Event()

    def work() -> None:
        for number in itertools.count():
            body = {"prompt": f"Chapter {number}. Once upon a time there was a small", "max_tokens": OUTPUT_LEN, "temperature": 0,
                    "ignore_eos": True, "stream": True, "cache_prompt": False}  # fmt: skip
            try:
                for _ in client.events("/v1/completions", body):
                    pass
            except ServerError:
                ended.wait(0.2)
            if ended.is_set():
                return

    stream = threading.Thread(target=work)
    stream.start()
    try:
        time.sleep(WARMUP_S)
        yield
    finally:
        ended.set()
        client.abort()
        stream.join()


def measure(port: int, drafter: str, draft_len: int) -> dict[str, float | str]:
    """A row of the table that planner imports."""
    with load(port):
        seen = watch(Client(f"http://127.0.0.1:{port}/metrics"), window_s=MEASURE_S, interval_s=MEASURE_S)
    own: Stretch = seen.stretches[0]
    tpot_s, tokens = own.decode_s / own.tokens, 1 + own.accepted / own.drafts if own.drafts else 1.0
    row = {"drafter": drafter, "draft_len": draft_len, "concurrency": 1, "context_len": PROMPT_LEN, "output_len": OUTPUT_LEN, "tpot_s": tpot_s,
           "itl_s": tpot_s * tokens, "tokens_per_round": tokens if draft_len else "", "output_tokens_per_s": own.tokens / own.seconds}  # fmt: skip
    reached = own.drafts
    for position in range(len(RATES)):
        survived = own.survived[position] if position < draft_len else 0.0
        row[f"acceptance_{position + 1}"] = survived / reached if position < draft_len and reached else ""
        reached = survived
    return row


def planner(*words: object) -> tuple[int, str]:
    """Exit status and standard output of the command line."""
    done = subprocess.run([sys.executable, "-m", "planner.cli", *map(str, words)], check=False, capture_output=True, text=True, cwd=HERE.parent)
    return done.returncode, done.stdout + done.stderr


def watch_case(name: str, python: str, folder: Path, port: int, draft_len: int) -> tuple[int, dict, str]:
    """Exit status, the drift and what was shown of it."""
    first = LOWER if name == "lower" else RATES
    server = Server(python, folder, port, "one_layer", draft_len, first)
    ended, out = [], folder / f"{name}.json"
    words = ("drift", folder / "plan.json", "--metrics", f"http://127.0.0.1:{port}", "--window", f"{WINDOW_S:g}s",
             "--interval", f"{INTERVAL_S:g}s", "-q", "-o", out)  # fmt: skip
    try:
        with load(port):
            watching = threading.Thread(target=lambda: ended.append(planner(*words)))
            watching.start()
            if name == "falling":
                time.sleep(WINDOW_S / 2)
                server.stop()
                server = Server(python, folder, port, "one_layer", draft_len, LOWER)
            watching.join()
    finally:
        server.stop()
    (code, shown) = ended[0]
    if not out.exists():
        raise SystemExit(f"{name}: drift ended with {code}: {shown}")
    return code, json.loads(out.read_text()), shown


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--server-python", default=sys.executable, metavar="PATH", help="the Python that has xllamacpp (default: this one)")
    parser.add_argument("--port", type=int, default=18400)
    args = parser.parse_args()
    if subprocess.run([args.server_python, "-c", "import xllamacpp"], check=False, capture_output=True).returncode:
        print(f"skipped: xllamacpp is not installed; {REMEDY}", file=sys.stderr)
        raise SystemExit(0)
    try:
        source = default_model_path()
    except MissingExtra as error:
        raise SystemExit(f"skipped: {error}") from None
    with tempfile.TemporaryDirectory() as made:
        compare(source, Path(made), args)


def compare(source: Path, folder: Path, args) -> None:
    cut(source, folder / "target.gguf", 30, gguf.GGMLQuantizationType.F16)
    cut(source, folder / "drafter.gguf", 1, None)
    rows = []
    for drafter, draft_len in (*SETTINGS, *reversed(SETTINGS)):  # there and back: a machine that gets slower meanwhile favours none
        with Server(args.server_python, folder, args.port, drafter, draft_len, RATES):
            rows.append(measure(args.port, drafter, draft_len))
        progress(f"{drafter or 'off'} K={draft_len}: {1e3 * rows[-1]['tpot_s']:.1f} ms per token")
    with (folder / "cells.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader(), table.writerows(rows)
    size = "num_layers=30,num_kv_heads=3,head_dim=64,weights_gib=0.25"
    code, said = planner(
        "import", "bench", folder / "cells.csv", "--model", size, "--system", "memory_gib=4,fraction=0.9", "-o", folder / "profile.json"
    )
    if not code:
        code, said = planner("plan", folder / "profile.json", "--max-concurrency", 1, "--objective", "tpot", "-o", folder / "plan.json")
    if code:
        raise SystemExit(said)
    progress(said)
    draft_len = json.loads((folder / "plan.json").read_text())["schedule"][0]["draft_len"]
    if not draft_len:
        raise SystemExit(f"drafting does not pay on this machine, so there is nothing to lose:\n{said}")
    found, figures = [], {}
    for name in ("planned", "lower", "falling"):
        code, drift, shown = watch_case(name, args.server_python, folder, args.port, draft_len)
        progress(f"\n{name}: exit {code}\n\n{shown}")
        speedup, tokens = drift["speedup"], drift["tokens_per_round"]
        found.append({
            "case": name, "exit": code, "pays": drift["pays"], "tokens per round": f"{tokens['measured']['value']:.2f}",
            "planned": f"{tokens['predicted']['value']:.2f}", "over off": f"{speedup['value']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]",
            "round over planned": f"{drift['round_s']['ratio']['value']:.2f}", "restarts": drift["num_restarts"],
            "do": drift["advice"][0],
        })  # fmt: skip
        figures |= {f"{name}/exit": float(code), f"{name}/speedup": speedup["value"], f"{name}/tokens_per_round": tokens["measured"]["value"],
                    f"{name}/round_over_planned": drift["round_s"]["ratio"]["value"]}  # fmt: skip
    cells = [{"drafter": row["drafter"] or "off", "K": row["draft_len"], "TPOT ms": f"{1e3 * row['tpot_s']:.1f}",
              "tokens per round": f"{row['tokens_per_round']:.2f}" if row["draft_len"] else ""} for row in rows]  # fmt: skip
    report_tables({"Measured": cells, f"Watched, K={draft_len} planned": found}, figures, args.json)


if __name__ == "__main__":
    main()
