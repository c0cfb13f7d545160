"""An engine to launch that is none: it takes vLLM's command or llama.cpp's, and serves by a law of load in a few milliseconds a token.

    python tests/fake_server.py serve MODEL --port P [--speculative-config JSON] [--max-num-seqs N] [--fake SWITCH ...]     as vLLM
    python tests/fake_server.py -m MODEL --port P [--spec-type T --spec-draft-n-max K] [-np N] [--metrics] [--fake ...]     as llama.cpp

One step serves all running requests at once, as engines do: it takes `round_s`, and leaves each with what was accepted of K drafts and
one token more. K follows the schedule for the requests that run at that moment. What an answer holds depends on the seeds and the
prompt alone. Only the standard library: it answers 0.2 s after it was started.

--fake  step=S           seconds of a step at load 1 (0.004)         gain=A            acceptance of each draft, given those before it (0.8)
        pool=N           tokens that the KV cache holds (400000)     version=V         what it calls itself (0.33.0; b10434)
        slow-start=S     listens only after S seconds                die-after=N       exits with 1 once N answers are whole
        ignore-schedule  drafts num_speculative_tokens at any load   collapse=B        steps take 3 times as long where a schedule runs B or more
        idle-cost=X      of a step that drafts nothing (0)           never=I           draft I (0, 1, ..) and those behind it are never accepted
        degenerate=P     share of answers that repeat themselves     short=P           share of answers that end with their first token
        warn=TEXT        a line of its log
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

WORDS = [f"word{i}" for i in range(500)]
PER_SEQUENCE = 0.01  # of a step: what one more token in it costs at least
FULL = 100  # tokens in a step from which on it is compute-bound
DRAFT = 0.08  # of a step, for each drafted token
PREFILL_S = 2e-6  # a prompt token
POSITIONS = 64
KV_BYTES = 23040  # a token


@contextmanager
def launched(*words):
    """Address of a server in a process of its own, started with these words."""
    process = subprocess.Popen([sys.executable, __file__, *words, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "listening on " in line:
                break
        else:
            raise RuntimeError("".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()  # it must not wait for a full pipe
        yield line.split("listening on ")[1].strip()
    finally:
        process.kill()
        process.wait()


class Told:
    """The command."""

    def __init__(self, words):
        fake, words = {}, list(words)
        while "--fake" in words:
            at = words.index("--fake")
            name, _, value = words[at + 1].partition("=")
            fake[name] = value or "1"
            del words[at : at + 2]
        known = [
            "step",
            "gain",
            "pool",
            "version",
            "slow-start",
            "die-after",
            "ignore-schedule",
            "collapse",
            "idle-cost",
            "never",
            "degenerate",
            "short",
            "warn",
        ]
        if unknown := fake.keys() - set(known):
            sys.exit(f"--fake: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
        self.fake = lambda name, usual=0.0: float(fake.get(name, usual))
        self.vllm = bool(words) and words[0] == "serve"
        self.version, self.warning = fake.get("version", "0.33.0" if self.vllm else "b10434"), fake.get("warn")
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--port", type=int, default=8000 if self.vllm else 8080)
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--max-num-seqs", "-np", "--parallel", dest="parallel", type=int, default=256)
        parser.add_argument("--max-model-len", "-c", "--ctx-size", dest="max_len", type=int, default=8192)
        if self.vllm:
            parser.add_argument("serve")
            parser.add_argument("model")
            parser.add_argument("--served-model-name", default=None)
            parser.add_argument("--speculative-config", "-sc", dest="spec", type=json.loads, default=None)
        else:
            parser.add_argument("-m", "--model", dest="model", required=True)
            parser.add_argument("--alias", dest="served_model_name", default=None)
            parser.add_argument("--spec-type", default="none")
            parser.add_argument("--spec-draft-n-max", type=int, default=3)
            parser.add_argument("--metrics", action="store_true")
        args, _ = parser.parse_known_args(words)
        self.host, self.port, self.seed, self.parallel, self.max_len = args.host, args.port, args.seed, args.parallel, args.max_len
        self.model, self.name, self.steps = args.model, args.served_model_name or args.model, None
        if self.vllm:
            self.metrics, self.method, spec = True, args.spec and args.spec.get("method", "draft_model"), args.spec or {}
            self.most = spec.get("num_speculative_tokens", 0)
            if args.spec is not None and not self.most > 0:
                sys.exit("num_speculative_tokens must be above 0")
            self.steps = spec.get("num_speculative_tokens_per_batch_size")
        else:
            self.metrics, self.method = args.metrics, None if args.spec_type == "none" else args.spec_type
            self.most = args.spec_draft_n_max if self.method else 0

    def draft_len(self, running):
        """As vLLM reads a schedule: gaps and the tail go on with what was before."""
        if not self.steps or self.fake("ignore-schedule"):
            return self.most
        return min(self.most, next((k for first, _, k in reversed(self.steps) if first <= running), self.most))

    def round_s(self, running, k):
        step = self.fake("step", 0.004)
        tokens = running * (k + 1)
        times = max(1 + PER_SEQUENCE * tokens, tokens * (1 / FULL + PER_SEQUENCE)) + DRAFT * k
        if self.method and not k:
            times *= 1 + self.fake("idle-cost")
        if self.steps and 0 < self.fake("collapse") <= running:
            times *= 3
        return step * times


class Request:
    def __init__(self, told, asked, writer):
        self.writer, self.chat, self.left, self.sent, self.begun = writer, "messages" in asked, int(asked.get("max_tokens") or 16), 0, None
        text = asked["messages"][-1]["content"] if self.chat else asked["prompt"]
        self.prompt_len = max(1, len(text) // 4)
        self.rng = random.Random(f"{told.seed} {asked.get('seed', 0)} {text}")
        self.left = min(self.left, max(1, told.max_len - self.prompt_len))
        self.loops = self.rng.random() < told.fake("degenerate")
        if self.rng.random() < told.fake("short"):
            self.left = 1
        self.usage = (asked.get("stream_options") or {}).get("include_usage", False)
        self.drafted = self.accepted = 0

    def event(self, **values):
        self.writer.write(b"data: " + json.dumps(values).encode() + b"\n\n")

    def words(self, n):
        text = "".join(" again" if self.loops else f" {self.rng.choice(WORDS)}" for _ in range(n))
        self.event(choices=[{"index": 0, **({"delta": {"content": text}} if self.chat else {"text": text})}])
        self.sent += n
        self.left -= n

    def end(self, told):
        timings = {}
        if not told.vllm:
            drafts = {"draft_n": self.drafted, "draft_n_accepted": self.accepted} if self.drafted else {}
            timings = {"timings": {"prompt_n": self.prompt_len, "predicted_n": self.sent, **drafts}}
        self.event(choices=[{"index": 0, **({"delta": {}} if self.chat else {"text": ""}), "finish_reason": "length"}])
        if self.usage:
            usage = {"prompt_tokens": self.prompt_len, "completion_tokens": self.sent, "total_tokens": self.prompt_len + self.sent}
            self.event(choices=[], usage=usage, **timings)
        self.writer.write(b"data: [DONE]\n\n")
        self.writer.close()


class Engine:
    def __init__(self, told):
        self.told, self.waiting, self.running, self.more, self.finished = told, [], [], asyncio.Event(), 0
        self.started = time.time()
        self.counts = dict.fromkeys(["tokens", "rounds", "decode_s", "drafts", "drafted", "accepted", "first", "requests", "prompt"], 0.0)
        self.survived, self.pool = [0] * POSITIONS, int(told.fake("pool", 400_000))

    async def run(self):
        at = time.perf_counter()
        while True:
            if not (self.waiting or self.running):
                self.more.clear()
                await self.more.wait()
                at = time.perf_counter()
            new = []
            while self.waiting and len(self.running) + len(new) < self.told.parallel:
                taken = sum(r.prompt_len + r.sent + r.left for r in (*self.running, *new, self.waiting[0]))
                if taken > self.pool and self.running + new:
                    break
                new.append(self.waiting.pop(0))
            k = self.told.draft_len(len(self.running)) if self.running else 0
            took_s = (self.told.round_s(len(self.running), k) if self.running else 0.0) + PREFILL_S * sum(r.prompt_len for r in new)
            at = max(at + took_s, time.perf_counter() - 0.05)  # a stall of the machine is not made up for
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            for request in self.running:
                self.decode(request, k, took_s)
            for request in new:
                request.words(1)
                self.counts["first"] += 1
                self.counts["prompt"] += request.prompt_len
                self.counts["tokens"] += 1
            self.running += new
            for request in [r for r in self.running if r.left <= 0]:
                self.counts["requests"] += 1
                self.finished += 1
                request.end(self.told)
                if 0 < self.told.fake("die-after") <= self.finished:
                    os._exit(1)
            self.running = [r for r in self.running if r.left > 0 and not r.writer.is_closing()]
            self.waiting = [r for r in self.waiting if not r.writer.is_closing()]

    def decode(self, request, k, took_s):
        n, k = 0, k if self.told.vllm else min(k, request.left - 1)  # llama.cpp drafts no further than the end
        never = self.told.fake("never", POSITIONS)
        while n < min(k, never) and request.rng.random() < self.told.fake("gain", 0.8):
            self.survived[n] += 1
            n += 1
        sent = min(n + 1, request.left)
        request.drafted, request.accepted = request.drafted + k, request.accepted + n
        for name, value in {"tokens": sent, "rounds": 1, "decode_s": took_s, "drafts": k > 0, "drafted": k, "accepted": n}.items():
            self.counts[name] += value
        request.words(sent)

    def metrics(self):
        c, prefix = self.counts, "vllm:" if self.told.vllm else "llamacpp:"
        values = {
            f"spec_decode_num_{what}_total": c[name]
            for what, name in (("drafts", "drafts"), ("draft_tokens", "drafted"), ("accepted_tokens", "accepted"))
            if self.told.method
        }
        if self.told.vllm:
            values |= {
                "generation_tokens_total": c["tokens"], "time_to_first_token_seconds_count": c["first"],
                "inter_token_latency_seconds_sum": c["decode_s"], "inter_token_latency_seconds_count": c["rounds"],
                "request_prompt_tokens_sum": c["prompt"], "request_prompt_tokens_count": c["first"], "request_generation_tokens_count": c["requests"],
                "num_requests_running": len(self.running), "num_requests_waiting": len(self.waiting),
            }  # fmt: skip
        else:
            values |= {
                "tokens_predicted_total": c["tokens"], "tokens_predicted_seconds_total": c["decode_s"], "requests_processing": len(self.running),
                "requests_deferred": len(self.waiting),
            }  # fmt: skip
        label = f'engine="0",model_name="{self.told.name}"'
        lines = [f"process_start_time_seconds {self.started}", *(f"{prefix}{name}{{{label}}} {value}" for name, value in values.items())]
        lines += [
            f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{{label},position="{i}"}} {self.survived[i]}'
            for i in range(self.told.most if self.told.method and c["drafts"] else 0)
        ]
        return "\n".join(lines) + "\n"

    async def talk(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            method, path, _ = head.split(" ", 2)
            if method == "POST" and path in ("/v1/completions", "/v1/chat/completions"):
                asked = json.loads(body)
                if not asked.get("stream"):
                    return self.answer(writer, {"error": {"message": "only streams are served here"}}, 400)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
                request = Request(self.told, asked, writer)
                if request.chat:
                    request.event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
                self.waiting.append(request)
                self.more.set()
                await reader.read()  # until the client leaves, or its answer is whole
                return writer.close()
            if path == "/metrics" and self.told.metrics:
                return self.answer(writer, self.metrics())
            found = {
                "/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [{"id": self.told.name, "max_model_len": self.told.max_len}]},
                "/version": {"version": self.told.version},
            }  # fmt: skip
            self.answer(writer, found.get(path, {"error": {"message": "not found"}}), 200 if path in found else 404)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, KeyError):
            writer.close()

    def answer(self, writer, content, status=200):
        kind, body = ("text/plain", content.encode()) if isinstance(content, str) else ("application/json", json.dumps(content).encode())
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        writer.close()


def log(told, line):
    prefix = f"(EngineCore pid={os.getpid()}) INFO 11-22 00:00:00 [fake_server.py:1] " if told.vllm else "0.00.100.000 I "
    print(prefix + line, file=sys.stderr, flush=True)


async def serve(told):
    engine = Engine(told)
    if told.vllm:
        log(told, f"vLLM API server version {told.version}")
        log(told, f"Available KV cache memory: {engine.pool * KV_BYTES / 2**30:.2f} GiB")
        log(told, f"GPU KV cache size: {engine.pool:,} tokens")
        log(told, f"Maximum concurrency for {told.max_len:,} tokens per request: {engine.pool / told.max_len:.2f}x")
    else:
        log(told, f"build: {told.version.removeprefix('b')} (7e4c0a9) with made for x86_64")
        size = engine.pool * KV_BYTES / 2**20
        log(
            told,
            f"llama_kv_cache: size = {size:8.2f} MiB ({engine.pool:6d} cells,  30 layers, {told.parallel:2d}/1 seqs), K (f16): {size / 2:7.2f} MiB",
        )
    if told.warning:
        log(told, told.warning)
    await asyncio.sleep(told.fake("slow-start"))
    server = await asyncio.start_server(engine.talk, told.host, told.port, backlog=1024)
    log(told, f"listening on http://{told.host}:{server.sockets[0].getsockname()[1]}")
    async with server:
        await engine.run()


if __name__ == "__main__":
    try:
        asyncio.run(serve(Told(sys.argv[1:])))
    except KeyboardInterrupt:
        pass
