"""The HTTP client: what well-behaved servers say is read and timed, everything else ends in one line, soon, and without the key."""

import re
import socket
import threading
import time
import traceback
import zlib

import pytest
from fake_engine import FakeEngine, misbehave

from planner.engines.completions import Asked, Prompt, complete, served_models
from planner.engines.http import Bounds, Client, Key, read_key
from planner.errors import BadInput, PlannerError, ServerError

SECRET = "sk-unmistakable-0123456789"
QUICK = Bounds(connect_s=1.0, read_s=0.4, total_s=0.8)
OK, STREAM = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
ASKED = Asked("made", 16, 0.0)


def message_of(call) -> str:
    """The one line that a call ends in, within three seconds."""
    began = time.perf_counter()
    with pytest.raises(PlannerError) as caught:
        call()
    assert time.perf_counter() - began < 3
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    assert SECRET not in message + "".join(traceback.format_exception(caught.value)), "the key is in an error"
    return message


HOSTILE = {
    "silent": ([], {"close": False}, "did not answer in time"),
    "hangs up": ([], {}, "does not speak HTTP"),
    "not HTTP": ([b"SSH-2.0-OpenSSH_9.9\r\n"], {}, "does not speak HTTP"),
    "drips headers": ([b"X"], {"forever": True, "delay_s": 0.02}, "did not answer in time"),
    "endless header line": ([OK + b"X-A: ", *[b"a" * 65536] * 4], {}, "does not speak HTTP"),
    "endless headers": ([OK, b"X-A: b\r\n" * 1000], {}, "does not speak HTTP"),
    "endless continue": ([b"HTTP/1.1 100 Continue\r\n\r\n" * 1000], {"forever": True}, "did not answer in time"),
    "drips a body": ([OK + b"\r\n", *[b"a"] * 1000], {"delay_s": 0.02}, "did not answer in time"),
    "stalls in a body": ([OK + b"Content-Length: 9\r\n\r\nabc"], {"close": False}, "did not answer in time"),
    "ends early": ([OK + b"Content-Length: 9\r\n\r\nabc"], {}, "ended 6 bytes early"),
    "a huge length": ([OK + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\nabc"], {}, "bytes early"),
    "endless body": ([OK + b"\r\n", *[b"a" * 2**20] * 40], {}, "takes at most|in time"),
    "endless chunks": ([OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"100000\r\n" + b"a" * 2**20 + b"\r\n"] * 40], {}, "takes at most|in time"),
    "a chunk of no size": ([OK + b"Transfer-Encoding: chunked\r\n\r\nmany\r\nabc"], {}, "does not speak HTTP"),
    "chunks that stop": ([OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc"], {}, "does not speak HTTP"),
    "compressed": ([OK + b"Content-Encoding: gzip\r\n\r\n" + zlib.compress(b"0" * 2**24)], {}, "compresses its answer"),
    "an error": ([b'HTTP/1.1 500 X\r\n\r\n{"error": {"message": "bad ' + SECRET.encode() + b'"}}'], {}, r"status 500: 'bad \*\*\*'"),
    "an escaped key": ([b'HTTP/1.1 400 X\r\n\r\n{"error": "\\u0073k-unmistakable-0123456789"}'], {}, r"status 400: '\*\*\*'"),
    "an error that is none": ([b"HTTP/1.1 503 X\r\n\r\n" + b"[" * 60_000], {}, "status 503$"),
    "a wrong key": ([b"HTTP/1.1 401 X\r\n\r\n" + SECRET.encode()], {}, "the API key was not accepted"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_servers_end_in_one_line(case):
    pieces, how, says = HOSTILE[case]
    with misbehave(pieces, **how) as (url, _):
        said = message_of(lambda: Client(url, Key(SECRET, "the test"), QUICK).get("/metrics"))
        assert re.search(says, said), said


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_stays(status):
    with misbehave([OK + b"\r\n"]) as (other, reached):
        with misbehave([f"HTTP/1.1 {status} X\r\nLocation: {other}/{SECRET}\r\n\r\n".encode()]) as (url, _):
            assert "redirects" in message_of(lambda: Client(url, Key(SECRET, "the test"), QUICK).get("/"))
        assert reached == []


STREAMS = {
    "cut": ([STREAM + b'data: {"choices": [{"text": "a"}]}\n\n'], "ended before it was done"),
    "endless event": ([STREAM + b"data: ", *[b"a" * 65536] * 32], "an event takes at most"),
    "endless comments": ([STREAM, *[b": on\n" * 2**17] * 60], "takes at most|in time"),
    "not JSON": ([STREAM + b"data: {]\n\n"], "its JSON"),
    "a nest": ([STREAM + b"data: " + b"[" * 200_000 + b"\n\n"], "its JSON"),
    "another shape": ([STREAM + b'data: {"choices": 7}\n\n'], "its JSON"),
    "half a character": ([STREAM + b'data: {"choices": [{"text": "\xff"}]}\n\n'], "its JSON"),
    "not a stream": ([OK + b"Content-Type: application/json\r\n\r\n{}"], "a stream of events was asked for"),
    "an error in it": ([STREAM + b'data: {"error": {"message": "\\u0073k-unmistakable-0123456789"}}\n\n'], r"broke off with an error: .*\*\*\*"),
    "no usage": ([STREAM + b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'], "counts no tokens"),
    "huge usage": (
        [STREAM + b'data: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1' + b"0" * 15 + b', "prompt_tokens": 1}}\n\ndata: [DONE]\n\n'],
        "no more than were asked for",
    ),
    "usage beyond numbers": ([STREAM + b'data: {"usage": {"completion_tokens": 1' + b"0" * 400 + b"}}\n\n"], "its JSON"),
    "no tokens": ([STREAM + b'data: {"usage": {"completion_tokens": 0, "prompt_tokens": 1}}\n\ndata: [DONE]\n\n'], "needs 2 tokens"),
    "one piece": (
        [STREAM + b'data: {"choices": [{"text": "a b c"}], "usage": {"completion_tokens": 3, "prompt_tokens": 1}}\n\ndata: [DONE]\n\n'],
        "came in one piece",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STREAMS)
def test_broken_streams_end_in_one_line(case):
    pieces, says = STREAMS[case]
    with misbehave(pieces) as (url, _):
        said = message_of(lambda: complete(Client(url, Key(SECRET, "the test"), QUICK), Prompt(text="a"), ASKED, 0.8))
        assert re.search(says, said), said


def test_a_stream_of_single_bytes_is_read_whole():
    body = b': hello\n\ndata: {"choices": [{"text": "a"}]}\r\n\r\ndata:{"choices": [{"text": "b"}], "usage": {"completion_tokens": 2, "prompt_tokens": 1}}\n\ndata: [DONE]\n\n'
    with misbehave([STREAM, *(bytes([byte]) for byte in body)], delay_s=0.0005) as (url, _):
        answer = complete(Client(url), Prompt(text="a"), ASKED, 5.0)
    assert (answer.output_tokens, answer.chunks) == (2, 2) and answer.decode_s > 0


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "cannot be talked to" in message_of(lambda: Client(url, Key(SECRET, "x"), QUICK).get("/"))
    assert "cannot be talked to" in message_of(lambda: Client("http://no-such-host.invalid", None, QUICK).get("/"))


def test_what_is_asked_can_be_ended_from_elsewhere():
    with misbehave([], close=False) as (url, taken):
        client = Client(url, None, Bounds(1.0, 30.0, 30.0))

        def abort():
            while not taken:
                time.sleep(0.01)
            client.abort()

        threading.Thread(target=abort).start()
        message_of(lambda: client.get("/metrics"))


def test_a_plain_server_is_no_https_server():
    engine = FakeEngine()
    with engine.running() as url:
        assert "cannot be talked to" in message_of(lambda: Client(url.replace("http", "https"), Key(SECRET, "x"), QUICK).get("/"))
        assert engine.seen == []


@pytest.mark.parametrize("chat", [False, True])
def test_times_are_those_of_the_server(chat):
    engine = FakeEngine(draft_len=3, key=SECRET)
    engine.tpot_s = 0.004
    with engine.running() as url:
        client = Client(url, Key(SECRET, "the test"))
        assert served_models(client) == ["made"]
        prompt = Prompt(messages=(("user", "hello"),)) if chat else Prompt(text="hello")
        answer = complete(client, prompt, Asked("made", 41, 0.0), 10.0)
    assert (answer.output_tokens, answer.prompt_tokens, answer.chunks) == (41, 1000, 11)  # one token, and ten rounds of four
    assert answer.tpot_s >= 0.98 * 0.004 and answer.longest_gap_s >= 0.9 * 0.016 and answer.ttft_s < answer.decode_s
    assert {sent for _, sent in engine.seen} == {f"Bearer {SECRET}"}


def test_keys_come_from_the_environment_or_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_key() is None
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    (tmp_path / "key").write_text(f"{SECRET}2\n")
    assert read_key().header() == f"Bearer {SECRET}" and read_key(tmp_path / "key").header() == f"Bearer {SECRET}2"
    assert SECRET not in repr(read_key()) + str(read_key()) + repr(Client("http://h", read_key()))
    for bad in (f"{SECRET}\r\nX-Evil: 1", f"{SECRET} x", f"{SECRET}é", SECRET * 1000):
        (tmp_path / "key").write_text(bad)
        assert "printable ASCII" in message_of(lambda: read_key(tmp_path / "key"))
    (tmp_path / "key").write_text("\n")
    for path in (tmp_path / "key", tmp_path / "none"):
        with pytest.raises(BadInput):
            read_key(path)


@pytest.mark.parametrize(
    "url",
    ["", "host:8000", "ftp://h", "file:///etc/passwd", "http://", "http://h:0", "http://h:99999", "http://h:x", "http://h/a b", "http://h/\nx", "http://[::1",
     f"http://user:{SECRET}@h", f"http://{SECRET}@h", f"http://h/?key={SECRET}", f"http://h/#{SECRET}", "http://ü", "http://h/" + "a" * 3000],
)  # fmt: skip
def test_addresses_that_are_none_are_refused_without_their_secrets(url):
    assert "the address of a server" in message_of(lambda: Client(url))


def test_addresses_are_put_together():
    assert Client("https://h/v/").name == "https://h:443/v" and Client("http://[::1]:80").name == "http://[::1]:80"
    with FakeEngine().running() as url, pytest.raises(ServerError, match="status 404"):
        Client(f"{url}/v").get("/v1/models")
