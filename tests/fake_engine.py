"""An engine in this process: it answers over HTTP with chosen delays, and counts what it served as a law of load says.

FakeEngine    completions, chats, models and /metrics, in the words of vLLM, llama.cpp or SGLang
misbehave     a server that answers every request with given bytes, in given pieces
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, SO_REUSEADDR, SOL_SOCKET, socket

import numpy as np
from made_load import LawLoads, roofline

from planner.search.grid import Question
from planner.search.schedule import make_schedule

GAIN = 0.8
ABOUT = {"profile_sha256": "0" * 64, "model": "made", "system": "a device", "source": "an engine"}


class TokenLoads(LawLoads):
    """LawLoads whose rounds hold as many tokens as the law's acceptance says."""

    def predict(self, setting, concurrency, context_len):
        found = super().predict(setting, concurrency, context_len)
        tokens = np.array([sum(GAIN**i for i in range(self.settings[s].draft_len + 1)) for s in setting])
        return found._replace(tokens_per_round=tokens, round_s=found.tpot_s * tokens)


def law(drafter, draft_len, concurrency, context_len):
    return roofline(drafter, draft_len, concurrency, context_len, gain=GAIN)


def made_schedule(first=1, last=256, contexts=(1000,), objective="tpot", sd=0.01):
    return make_schedule(TokenLoads(law, {"eagle3": 5}, sd=sd, ttft_s=None), Question(first, last, list(contexts), objective), **ABOUT)


def tpot_s(draft_len, concurrency, context_len=1000, *, idle=False):
    """By the law; without drafts of off, or of the idle drafter."""
    return float(law("eagle3" if draft_len or idle else "none", draft_len, np.array([concurrency]), context_len)[0][0])


class FakeEngine:
    """Counters move by `serve`; requests that come over HTTP are streamed at `tpot_s`, `draft_len` + 1 tokens at a time, and not counted."""

    def __init__(self, *, draft_len=3, concurrency=4, gain=GAIN, slower=1.0, engine="vllm", key=None, context_len=1000, noise=0.02, seed=0):
        self.draft_len, self.concurrency, self.gain, self.slower, self.engine, self.key = draft_len, concurrency, gain, slower, engine, key
        self.context_len, self.tpot_s, self.seen, self.failing, self.gauges = context_len, 0.0, [], 0, True
        self.spread, self.usage, self.cut, self.accept_length = 0.0, True, None, 0.0
        self._rng, self._noise, self._lock = np.random.default_rng(seed), noise, threading.Lock()
        self.restart()

    def restart(self):
        self.started = getattr(self, "started", 1.7e9) + 1
        self.counts = {name: 0.0 for name in ("tokens", "decode_s", "rounds", "drafts", "drafted", "requests")} | {"survived": np.zeros(5)}

    def serve(self, seconds):
        """What so many seconds of this load add to the counters."""
        with self._lock:
            K, n = self.draft_len, self.concurrency
            rounds_before = sum(GAIN**i for i in range(K + 1)) * tpot_s(K, n, self.context_len)  # of the law: acceptance does not change them
            rounds = n * seconds / (rounds_before * self.slower * float(np.exp(self._noise * self._rng.standard_normal())))
            alive, survived = rounds, np.zeros(5)
            for i in range(K):
                alive *= min(1.0, self.gain * float(np.exp(self._noise * self._rng.standard_normal())))
                survived[i] = alive
            tokens = rounds + survived.sum()
            self.accept_length = tokens / rounds  # of late, as the gauge says
            for name, value in {
                "tokens": tokens,
                "decode_s": n * seconds,
                "rounds": rounds,
                "drafts": rounds if K else 0.0,
                "drafted": rounds * K,
                "requests": tokens / 128,
                "survived": survived,
            }.items():
                self.counts[name] = self.counts[name] + value

    def metrics(self) -> str:
        with self._lock:
            c, K = dict(self.counts), self.draft_len
        labels = 'engine="0",model_name="made"'
        lines = [f"process_start_time_seconds {self.started}"]
        if self.engine == "sglang":
            values = {
                "inter_token_latency_seconds_sum": c["decode_s"], "inter_token_latency_seconds_count": c["tokens"],
                "num_requests_total": c["requests"], "num_running_reqs": self.concurrency, "num_queue_reqs": 0, "spec_accept_length": self.accept_length if K else 0.0,
            }  # fmt: skip
            return "\n".join([*lines, *(f'sglang:{name}{{tp_rank="0"}} {value}' for name, value in values.items())]) + "\n"
        prefix = "llamacpp:" if self.engine == "llamacpp" else "vllm:"
        values = {
            "spec_decode_num_drafts_total": c["drafts"], "spec_decode_num_draft_tokens_total": c["drafted"],
            "spec_decode_num_accepted_tokens_total": c["survived"].sum(),
        }  # fmt: skip
        if prefix == "llamacpp:":
            values |= {
                "tokens_predicted_total": c["tokens"],
                "tokens_predicted_seconds_total": c["decode_s"],
                "requests_processing": self.concurrency,
            }
        else:
            values |= {
                "generation_tokens_total": c["tokens"] + c["requests"], "time_to_first_token_seconds_count": c["requests"],
                "inter_token_latency_seconds_sum": c["decode_s"], "inter_token_latency_seconds_count": c["rounds"],
                "request_prompt_tokens_sum": self.context_len * c["requests"], "request_prompt_tokens_count": c["requests"],
                "request_generation_tokens_count": c["requests"],
            }  # fmt: skip
            if self.gauges:
                values |= {"num_requests_running": self.concurrency, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.3}
        lines += [f"{prefix}{name}{{{labels}}} {value}" for name, value in values.items()]
        lines += [
            f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{i}"}} {c["survived"][i]}'
            for i in range(5)
            if c["survived"][i] or i < K
        ]
        return "\n".join(lines) + "\n"

    @contextmanager
    def running(self):
        """Its address."""
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _send(self, content, kind="application/json", status=200):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _refused(self):
                engine.seen.append((self.path, self.headers.get("Authorization")))
                if engine.key is not None and self.headers.get("Authorization") != f"Bearer {engine.key}":
                    self._send(json.dumps({"error": {"message": f"no such key: {self.headers.get('Authorization')}"}}).encode(), status=401)
                    return True
                return False

            def do_GET(self):
                if self._refused():
                    return
                if engine.failing:
                    engine.failing -= 1
                    self._send(b"starting", status=503)
                elif self.path == "/v1/models":
                    self._send(json.dumps({"object": "list", "data": [{"id": "made"}]}).encode())
                elif self.path == "/metrics":
                    self._send(engine.metrics().encode(), "text/plain")
                else:
                    self._send(b"{}", status=404)

            def do_POST(self):
                if self._refused():
                    return
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                chat, left, at = "messages" in asked, asked["max_tokens"], time.perf_counter()
                per_token = engine.tpot_s * (1 + engine.spread * (len(str(asked.get("prompt", asked.get("messages")))) % 7) / 7)

                def event(**values):
                    self.wfile.write(b"data: " + json.dumps(values).encode() + b"\n\n")
                    self.wfile.flush()

                sent = 0
                if chat:
                    event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
                while sent < left:
                    now = 1 if sent == 0 else min(engine.draft_len + 1, left - sent)
                    sent += now
                    if (wait := at + (sent - 1) * per_token - time.perf_counter()) > 0:
                        time.sleep(wait)
                    event(choices=[{"index": 0, **({"delta": {"content": "a " * now}} if chat else {"text": "a " * now})}])
                    if engine.cut is not None and sent >= engine.cut:
                        return
                event(choices=[{"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "length"}])
                if engine.usage:
                    event(
                        choices=[], usage={"prompt_tokens": engine.context_len, "completion_tokens": left, "total_tokens": engine.context_len + left}
                    )
                self.wfile.write(b"data: [DONE]\n\n")

        server = _Quiet(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


class _Quiet(ThreadingHTTPServer):
    """Says nothing of clients that leave: what it wrote would stand among what a later test reads from stderr."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _length(request: bytes) -> int:
    return next((int(line.split(b":")[1]) for line in request.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)


@contextmanager
def misbehave(pieces, *, delay_s=0.0, forever=False, close=True):
    """The address of a server that reads a request, answers with these pieces, and then closes, or keeps the connection open."""
    listener, stop, taken = socket(), threading.Event(), []
    listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()

    def talk(connection):
        try:
            request = b""
            while b"\r\n\r\n" not in request or len(request.partition(b"\r\n\r\n")[2]) < _length(request):
                if not (piece := connection.recv(65536)):
                    return  # who asked has left
                request += piece  # whole: closing on what is unread would reset the connection
            taken.append(request)
            while True:
                for piece in pieces:
                    connection.sendall(piece)
                    if stop.wait(delay_s) if delay_s else stop.is_set():
                        return
                if not forever:
                    break
            if not close:
                stop.wait(30)
        except OSError:
            pass
        finally:
            connection.close()

    def accept():
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            talk(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
    finally:
        stop.set()
        listener.shutdown(SHUT_RDWR)  # wakes accept
        listener.close()
        thread.join(5)
