"""Damaged files of every kind that is read from outside. Each must be read or refused in one line: no other exception, no hang,
no flood of memory.

    python tests/fuzz.py [--mutations 1000] [--seed 0] [KIND ...]     prints, by kind, what was read, refused, and why not

Kinds of damage: to bytes (flips, cuts, insertions, repeated stretches, extreme integers), to fields of tables, and to JSON values (wrong types,
extreme numbers, long strings, deep nests, missing, repeated and unknown keys). In a process of its own, with limited memory.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from benches import MODEL, SYSTEM, metrics, sglang, table, vllm
from fake_engine import FakeEngine, made_schedule, misbehave
from gguf import GGUFWriter
from made import made_profile
from safetensors.torch import save_file
from tiny import tiny_checkpoint, tiny_spec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import planner
from planner.commands.import_bench import summarise
from planner.commands.sizes import model_size
from planner.datasets import expand
from planner.engines.completions import Asked, Prompt, complete
from planner.engines.http import Bounds, Client
from planner.errors import PlannerError
from planner.importers.layer_tables import read_layer_tables
from planner.measurements import load_profile, save_profile
from planner.plans import load_plan, save_plan
from planner.profiler.texts import draw_prompts
from planner.runtime.gguf_file import read_gguf
from planner.runtime.model import build_model, prefill
from planner.runtime.tokenizer import load_tokenizer
from planner.runtime.weights import default_model_path, load_checkpoint, read_spec
from planner.schedules import save_schedule
from planner.serving import ServingProfile, load_any_profile, save_serving_profile

SECONDS, MEMORY = 5.0, 2**30  # that one file may take
CPU = torch.device("cpu")


class Kind(NamedTuple):
    """One kind of file: a good one, how it is read, and whether its damage is to JSON as well."""

    good: Callable[[Path], Path]  # writes it into a folder; its path
    read: Callable[[Path], object]
    damage: str  # bytes, json, lines, table or safetensors


class Failed(NamedTuple):
    case: int
    error: str


# ------------------------------------------------------------------ good files


def write_profile(folder: Path) -> Path:
    save_profile(made_profile(contexts=(1024,)), folder / "profile.json")
    return folder / "profile.json"


def write_plan(folder: Path) -> Path:
    save_plan(planner.plan(write_profile(folder)), folder / "plan.json")
    return folder / "plan.json"


def write_model(folder: Path) -> Path:
    """A model folder in the published layout: config.json, model.safetensors, tokenizer.json and their like."""
    vocabulary = write_tokenizer(folder).get_vocab_size()
    spec = tiny_spec(vocab_size=vocabulary, num_layers=1)
    tensors = tiny_checkpoint(vocab_size=vocabulary, num_layers=1).tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "hidden_size": spec.hidden_size, "vocab_size": vocabulary,
        "intermediate_size": spec.intermediate_size, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": [1, 2],
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog on the log"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}))
    return tokenizer


def write_gguf(folder: Path) -> Path:
    """A model and its tokenizer in one file."""
    tokenizer = write_tokenizer(folder)
    checkpoint = tiny_checkpoint(vocab_size=tokenizer.get_vocab_size(), num_layers=1)
    spec, stored = checkpoint.spec, json.loads(tokenizer.to_str())["model"]
    writer = GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_block_count(1), writer.add_context_length(spec.max_context_len), writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size), writer.add_head_count(spec.num_heads), writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim), writer.add_value_length(spec.head_dim), writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_rope_freq_base(spec.rope_theta), writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(stored["vocab"], key=stored["vocab"].get)), writer.add_token_types([3] * 3 + [1] * (spec.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in stored["merges"]]), writer.add_bos_token_id(0), writer.add_eos_token_id(1)
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    names = {f"model.layers.0.{ours}.weight": f"blk.0.{theirs}.weight" for ours, theirs in parts.items()}
    names |= {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in checkpoint.tensors.items():
        writer.add_tensor(names[name], tensor.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return folder / "model.gguf"


def copy_real_profile(folder: Path) -> Path:
    profile = min((Path(__file__).parents[1] / "profiles").rglob("*.json"))
    return Path(shutil.copy(profile, folder / "profile.json"))


def copy_real_header(folder: Path) -> Path:
    """The default model without its weights: the header, and the name of a file that is read from a copy of the right size."""
    model = default_model_path()
    with model.open("rb") as file:
        (folder / "model.gguf").write_bytes(file.read(read_gguf(model).header_bytes))
    return folder / "model.gguf"


def write_dataset(folder: Path) -> Path:
    write_tokenizer(folder)
    chats = [{"messages": [{"role": "user", "content": f"the cat sat on {i} mats"}, {"role": "assistant", "content": "did it?"}]} for i in range(6)]
    lines = [*chats, {"prompt": "the dog on the log"}, {"conversations": [{"from": "human", "value": "hello"}]}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "chats.jsonl"


def write_bench(content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "bench").write_text(content)
        return folder / "bench"

    return write


def write_serving_profile(folder: Path) -> Path:
    save_serving_profile(read_bench(write_bench(table())(folder)), folder / "serving.json")
    return folder / "serving.json"


def write_schedule(folder: Path) -> Path:
    save_schedule(made_schedule(last=64), folder / "schedule.json")
    write_scrapes(folder)
    return folder / "schedule.json"


def write_scrapes(folder: Path) -> Path:
    """Two scrapes of a server that ran the schedule for an hour, the later of which is damaged."""
    engine = FakeEngine(draft_len=5, concurrency=4)
    for name in ("before", "after"):
        (folder / name).write_text(engine.metrics())
        engine.serve(3600)
    return folder / "after"


def write_stream(folder: Path) -> Path:
    """An answer to a completion, as it goes over the wire."""
    events = [{"choices": [{"index": 0, "text": word}]} for word in ("the", " cat", " sat")]
    events.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [body[at : at + 40] for at in range(0, len(body), 40)]
    (folder / "stream").write_text(head + "".join(f"{len(piece):x}\r\n{piece}\r\n" for piece in pieces) + "0\r\n\r\n", newline="")
    return folder / "stream"


# ------------------------------------------------------------------ reading them, as the commands do


def read_profile(path: Path) -> object:
    profile = load_profile(path)
    return planner.plan(path, context_len=profile.contexts[0], temperature=profile.samplers[0].temperature)


def run_model(path: Path) -> object:
    """Load, and write one token."""
    model = build_model(load_checkpoint(path if path.suffix == ".gguf" else path.parent, torch.float32, CPU))
    return prefill(model, torch.zeros(1, 4, dtype=torch.long), model.new_cache(8))


def run_tokenizer(path: Path) -> object:
    tokenizer = load_tokenizer(path if path.suffix == ".gguf" else path.parent)
    tokens = tokenizer.encode("the cat sat")
    return tokens, tokenizer.decode(tokens), tokenizer.encode_chat([{"role": "user", "content": "the cat"}])


def read_dataset(path: Path) -> object:
    return draw_prompts(load_tokenizer(path.parent), expand([str(path)]), length=8, count=2, seed=0)


def read_bench(path: Path) -> ServingProfile:
    profile = planner.import_bench([path], model=MODEL, system=SYSTEM, drafter="eagle3", concurrency=None if path.read_bytes()[:1] != b"#" else 8)
    summarise(profile, path)
    return profile


def write_layer_tables(folder: Path) -> Path:
    """Of which the dense one is damaged."""
    (folder / "attention.csv").write_text("prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9.5\n16,0,0,0,20\n")
    (folder / "per_sequence.csv").write_text("layer,sequences,time_us\nlm_head,1,1000\n")
    (folder / "dense.csv").write_text("layer,tokens,time_us\nqkv_proj,1,40.5\nqkv_proj,2,50\no_proj,1,30\no_proj,16,37.25\n")
    return folder / "dense.csv"


def read_layer_table(path: Path) -> object:
    return read_layer_tables(path.parent)


def read_schedule(path: Path) -> object:
    return planner.drift(path, once=(path.parent / "before", path.parent / "after"))


def read_scrapes(path: Path) -> object:
    schedule = path.parent / "schedule.json"
    if not schedule.exists():
        save_schedule(made_schedule(last=64), schedule)
    return planner.drift(schedule, once=(path.parent / "before", path))


def read_stream(path: Path) -> object:
    """In pieces, so that the answer does not come at once."""
    data = path.read_bytes()
    with misbehave([data[:200], data[200:]], delay_s=1e-3) as (url, _):
        return complete(Client(url, bounds=Bounds(1.0, 0.2, 0.5)), Prompt(text="a"), Asked("made", 16, 0.0), 0.5)


def read_header(path: Path) -> object:
    os.truncate(path, default_model_path().stat().st_size)  # the weights become zeros that take no room
    return read_spec(path), load_tokenizer(path)


def in_folder(name: str) -> Callable[[Path], Path]:
    return lambda folder: write_model(folder) / name


KINDS = {
    "profile": Kind(write_profile, read_profile, "json"),
    "plan": Kind(write_plan, load_plan, "json"),
    "gguf": Kind(write_gguf, lambda path: (run_model(path), run_tokenizer(path)), "bytes"),
    "safetensors": Kind(in_folder("model.safetensors"), run_model, "safetensors"),
    "config.json": Kind(in_folder("config.json"), run_model, "json"),
    "model size": Kind(in_folder("config.json"), lambda path: model_size(str(path.parent)), "json"),
    "tokenizer.json": Kind(in_folder("tokenizer.json"), run_tokenizer, "json"),
    "tokenizer_config.json": Kind(in_folder("tokenizer_config.json"), run_tokenizer, "json"),
    "dataset": Kind(write_dataset, read_dataset, "lines"),
    "bench table": Kind(write_bench(table()), read_bench, "table"),
    "claims": Kind(write_bench((Path(__file__).parent / "published/budgetdraft.csv").read_text()), planner.audit, "table"),
    "layer table": Kind(write_layer_tables, read_layer_table, "table"),
    "vllm bench": Kind(write_bench("".join(json.dumps(vllm(max_concurrency=n)) + "\n" for n in (1, 8))), read_bench, "lines"),
    "sglang bench": Kind(write_bench("".join(json.dumps(sglang(max_concurrency=n)) + "\n" for n in (1, 8))), read_bench, "lines"),
    "metrics": Kind(write_bench(metrics()), read_bench, "bytes"),
    "serving profile": Kind(write_serving_profile, load_any_profile, "json"),
    "schedule": Kind(write_schedule, read_schedule, "json"),
    "scrapes": Kind(write_scrapes, read_scrapes, "bytes"),
    "stream": Kind(write_stream, read_stream, "bytes"),
    "real profile": Kind(copy_real_profile, read_profile, "json"),
    "real gguf": Kind(copy_real_header, read_header, "bytes"),
}

# ------------------------------------------------------------------ damage

EXTREMES = [
    None, True, -1, 0, 1, 2, 7, 255, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-320, 1e308, "", "0", "a", "\x00", "\ud83d", "é" * 50, "x" * 100_000,
    "../../etc/passwd", "{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "<script>", [], [[]], {}, {"": None}, [0] * 1000,
]  # fmt: skip


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        # headers, at the beginning, decide how the rest is read
        at = rng.randrange(min(len(data), rng.choice([16, 256, 4096, len(data)])) or 1)
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 2:
                del data[at : at + rng.choice([1, 2, 4, 8, 100])]
            case 3:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 8, 64]))
            case 4:
                size = rng.choice([1, 2, 4, 8])
                extreme = rng.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1])
                data[at : at + size] = extreme.to_bytes(size, "little")
            case 5:
                data[at:at] = data[at : at + rng.choice([8, 64, 1024])]
            case 6:
                del data[at:]
    return bytes(data)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """Mostly a changed value of the document, else changed bytes of its text."""
    if rng.random() < 0.2:
        return damaged_bytes(data, rng)
    document = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(document))
        holder, key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1 | 2:
                holder[key] = _extreme(rng)
            case 3:
                del holder[key]
            case 4:
                other, name = rng.choice(places)
                holder[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) and name < len(other) else None
            case 5 if isinstance(holder, dict):
                holder[rng.choice(["", "surprise", "kind", "__class__", "x" * 1000])] = _extreme(rng)
            case _:
                value = holder[key]
                holder[key] = {
                    int: lambda v: v * rng.choice([-1, 2, 1000, 10**12]), float: lambda v: v * rng.choice([-1, 1e9, 1e-9]), str: lambda v: v[: len(v) // 2],
                    list: lambda v: v * 2 if len(v) < 10_000 else v[:1], dict: lambda v: list(v.items())[:5],
                }.get(type(value), lambda v: v)(value)  # fmt: skip
        if not isinstance(document, dict | list) or not document:
            break
    text = json.dumps(document)
    match rng.randrange(20):
        case 0:
            text = text.replace("1", "NaN", 1)
        case 1:
            text = text.replace("0", "1e999", 1)
        case 2:
            text = "[" * 100_000 + text
        case 3:
            text = text.replace("{", '{"schema_version": 1, "schema_version": 2,', 1)
    return text.encode("utf-8", "surrogatepass")


def _extreme(rng: random.Random) -> object:
    return copy.deepcopy(rng.choice(EXTREMES))  # the next change must not change what others got


def _places(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """Every value of a document, as the holder and the key it lies at; of a long list the first few."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 20)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(lines[at], rng) + b"\n" * rng.choice([0, 1, 1, 1])
    return b"".join(lines) if rng.random() < 0.8 else damaged_bytes(data, rng)


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The JSON header with its length made right again, or bytes."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = damaged_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damaged_table(data: bytes, rng: random.Random) -> bytes:
    """Fields of a CSV table with other values, or bytes."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice([1, 1, 2, 4])):
        row = rng.choice(rows[rng.choice([0, 1, 1, 1]) :])
        row[rng.randrange(len(row))] = rng.choice(
            ["", "0", "1", "-1", "0.5", "1e400", "1e-400", "nan", "7", "eagle3", "none", '"', "9" * 500, " 3 ", "1_0", "٣"]
        )
    return "\r\n".join(map(",".join, rows)).encode()


DAMAGE = {"table": damaged_table, "bytes": damaged_bytes, "json": damaged_json, "lines": damaged_lines, "safetensors": damaged_safetensors}


# ------------------------------------------------------------------ the run


class TooSlow(BaseException):
    """Not an Exception: no handler of ours may take it for a damaged file."""


@contextmanager
def bounded(seconds: float):
    """Raise TooSlow behind so many seconds of processor time."""

    def ring(*_):
        raise TooSlow(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(kind: Kind, count: int, seed: int) -> tuple[Counter, list[Failed]]:
    """Read `count` damaged files: how many were read and refused, and those that ended otherwise."""
    outcomes, failed = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        path = kind.good(Path(folder))
        good = path.read_bytes()
        kind.read(path)  # the undamaged one must be read, or nothing is tested
        for case in range(count):
            path.write_bytes(DAMAGE[kind.damage](good, random.Random(f"{seed} {case}")))
            try:
                with bounded(SECONDS):
                    kind.read(path)
                outcomes["read"] += 1
            except PlannerError as error:
                outcomes["refused"] += 1
                if wrong := _bad_message(str(error), path):
                    failed.append(Failed(case, f"{wrong}: {str(error)[:300]!r}"))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed.append(Failed(case, f"{type(error).__name__}: {str(error)[:300]}"))
    return outcomes, failed


def _bad_message(message: str, path: Path) -> str | None:
    if not message.strip() or "\n" in message.strip():
        return "not one line"
    if not any(
        name in message
        for name in (path.name, path.parent.name, "profile", "dataset", "the model", "schedule", "the server", "the metrics", "http://127.0.0.1:")
    ):
        return "does not say what is wrong"
    return "too long" if len(message) > 1000 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    any_failed = False
    for name in arguments.kinds or KINDS:
        began = time.perf_counter()
        outcomes, failed = fuzz(KINDS[name], arguments.mutations, arguments.seed)
        any_failed |= bool(failed)
        seconds = time.perf_counter() - began
        print(
            f"{name}: {arguments.mutations} damaged files, {outcomes['read']} read, {outcomes['refused']} refused, {len(failed)} failed, {seconds:.0f} s",
            flush=True,
        )
        for case, error in failed[:20]:
            print(f"    case {case}: {error}")
    return 1 if any_failed else 0


if __name__ == "__main__":
    sys.exit(main())
