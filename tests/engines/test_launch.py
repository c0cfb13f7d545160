"""Servers that are launched: those that behave, and those that do not. The real one is llama.cpp's."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from llama import gguf_file, llama_server

from planner.cli.stopping import Stopped, stoppable
from planner.engines import launch
from planner.engines.http import KEY_VARIABLE
from planner.engines.launch import address, check_free, free_port, last_words, recorded, running, secrets
from planner.errors import BadInput, PlannerError, ServerError

ROOT = Path(__file__).parents[2]
HEALTHY = """
import http.server, os, signal, subprocess, sys, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *what): pass
{before}
server = http.server.HTTPServer(("127.0.0.1", {port}), Answer)
print("up", flush=True)
server.serve_forever()
"""
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session={new}); "


@contextmanager
def served(tmp_path, before="", stop_s=5.0, **given):
    """A small healthy server."""
    port = free_port()
    words = [sys.executable, "-c", HEALTHY.format(before=before, port=port)]
    with running(words, log=tmp_path / "log", url=address("127.0.0.1", port), ready_s=20, stop_s=stop_s, **given) as server:
        yield server


def started(tmp_path, script, ready_s=10.0, **given):
    """Waits for a server that does not get healthy."""
    port = free_port()
    with running([sys.executable, "-c", script], log=tmp_path / "log", url=address("127.0.0.1", port), ready_s=ready_s, stop_s=1.0, **given):
        raise AssertionError("it is not healthy")


def below(pid: int) -> set[int]:
    """Living processes of its session, and their children."""
    table = launch._processes()
    own = {one for one, (_, _, session, _) in table.items() if session == pid}
    return own | {one for one, (parent, *_) in table.items() if parent in own}


def lives(pid: int) -> bool:
    return pid in launch._processes()


def gone_soon(pids, seconds=5.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(lives, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_server_is_healthy_inside_and_gone_afterwards_with_its_children(tmp_path):
    before = CHILD.format(new=False) + CHILD.format(new=True)
    looks = []
    with served(tmp_path, before, advance=lambda: looks.append(1)) as server:
        family = below(server.pid)
        assert server.pid in family and len(family) == 3, "two children, one of which leads a session of its own"
        server.check()
        assert server.log_text() == "up\n" and 0 < server.ready_s < 20 and looks
    assert not any(map(lives, family))


def test_a_server_that_ignores_sigterm_is_killed_after_a_while(tmp_path):
    with served(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + CHILD.format(new=False), stop_s=0.5) as server:
        family, entered = below(server.pid), time.monotonic()
    assert not any(map(lives, family)) and 0.5 <= time.monotonic() - entered < 5


def test_a_server_that_ends_politely_is_given_the_time(tmp_path):
    mark = tmp_path / "polite"
    before = f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open({str(mark)!r}, 'w').close(), os._exit(0)))"
    with served(tmp_path, before):
        pass
    assert mark.exists()


def test_children_of_a_server_that_fell_are_ended(tmp_path):
    with served(tmp_path, CHILD.format(new=False)) as server:
        family = below(server.pid) - {server.pid}
        os.kill(server.pid, signal.SIGKILL)
        assert gone_soon([server.pid])
        with pytest.raises(ServerError, match=r"must keep running, .* was ended by signal 9 after [0-9.]+ s: 'up'; see .*log"):
            server.check()
        assert family and all(map(lives, family))
    assert not any(map(lives, family))


def test_a_command_that_exits_is_quoted_with_its_last_meaningful_line(tmp_path):
    script = "import sys; print('loading'); print('ValueError: no such model'); print('Traceback, see root cause above'); sys.exit(3)"
    with pytest.raises(ServerError, match=r"ended by itself with status 3 after [0-9.]+ s: 'ValueError: no such model'; see ") as error:
        started(tmp_path, script)
    assert "\n" not in str(error.value)


def test_a_command_that_exits_without_a_word_says_so(tmp_path):
    with pytest.raises(ServerError, match=r"status 0 after [0-9.]+ s without a word"):
        started(tmp_path, "pass")


def test_a_command_that_hangs_is_waited_for_in_bounds_and_ended(tmp_path):
    begin = time.monotonic()
    with pytest.raises(ServerError, match=r"healthy within 0.5 s.*its log ends with 'hm'.*give it longer"):
        started(tmp_path, "import time; print('hm', flush=True); time.sleep(600)", ready_s=0.5)
    assert time.monotonic() - begin < 5


def test_an_endless_log_is_read_in_bounds(tmp_path, monkeypatch):
    script = "import sys, time\nprint('version 1.2')\nwhile True: sys.stdout.write('noise ' * 20000 + chr(10)); time.sleep(0.002)"
    with pytest.raises(ServerError, match=r"healthy within 0.6 s.*'noise") as error:
        started(tmp_path, script, ready_s=0.6)
    assert len(str(error.value)) < 1000
    size = (tmp_path / "log").stat().st_size
    text = launch._read_log(tmp_path / "log")
    assert text.startswith("version 1.2") and len(text) <= min(size, launch.LOG_BYTES + 1) and size > launch.LOG_BYTES
    monkeypatch.setattr(launch, "MAX_LOG", 2**20)
    with pytest.raises(ServerError, match="log takes at most 1048576 bytes"):
        started(tmp_path, script)


def test_a_port_in_use_is_refused_before_anything_is_started(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(BadInput, match=f"127.0.0.1:{port} somebody listens already; stop that one, or give another --port"),
            running(["touch", str(tmp_path / "ran")], log=tmp_path / "log", url=address("127.0.0.1", port), ready_s=1),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
    check_free("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused(tmp_path):
    with pytest.raises(BadInput, match="free port of this machine"):
        check_free("192.0.2.1", 8000)  # of the documentation's network


@pytest.mark.parametrize(
    ("words", "told"), [([], "begins with a program"), (["no-such-program-here"], "not one that is found"), ([sys.executable, "a\0b"], "NUL")]
)
def test_a_command_that_cannot_be_run_is_bad_input(words, told, tmp_path):
    with pytest.raises(BadInput, match=told), running(words, log=tmp_path / "log", url=address("", free_port()), ready_s=1):
        pass
    assert not (tmp_path / "log").exists()


def test_an_exception_inside_ends_the_server(tmp_path):
    with pytest.raises(ZeroDivisionError), served(tmp_path) as server:
        _ = 1 / 0
    assert not lives(server.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_ends_the_server(number, tmp_path):
    """As the command line handles them: Stopped, raised in the main thread."""
    if signal.getsignal(number) == signal.SIG_IGN:  # as a shell starts what it runs in the background
        pytest.skip("whoever started the tests has them ignore this signal, and so does the command line")
    mark = tmp_path / "pid"
    script = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    def send():
        until = time.monotonic() + 10
        while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped), stoppable():
        started(tmp_path, script, ready_s=20)
    assert not lives(int(mark.read_text()))


def test_a_second_signal_while_it_stops_kills_at_once(tmp_path):
    begin = 0.0
    with pytest.raises(Stopped), stoppable(), served(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", stop_s=60.0) as server:
        begin = time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert not lives(server.pid) and time.monotonic() - begin < 5


def test_a_signal_while_a_process_is_started_is_handled_afterwards():
    order = []
    with pytest.raises(Stopped), stoppable(), launch._undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        order.append("started")
    assert order == ["started"]


def test_the_server_ends_when_the_planner_is_killed(tmp_path):
    mark = tmp_path / "pid"
    script = (
        "from planner.engines.launch import *; import sys, time; from pathlib import Path\n"
        f"with running([sys.executable, '-c', {HEALTHY.format(before='', port=(port := free_port()))!r}], log=Path({str(tmp_path / 'log')!r}),"
        f" url={address('127.0.0.1', port)!r}, ready_s=20, stop_s=1) as server:\n"
        f"    Path({str(mark)!r}).write_text(str(server.pid)); time.sleep(600)"
    )
    planner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        until = time.monotonic() + 20
        while not (mark.exists() and mark.read_text()):
            assert time.monotonic() < until and planner.poll() is None
            time.sleep(0.02)
        pid = int(mark.read_text())
        assert lives(pid)
        planner.kill()
        assert gone_soon([pid])
    finally:
        planner.kill()
        planner.wait()


def test_our_key_stays_with_us_and_the_commands_own_is_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "sk-ours")
    script = "import os, sys; sys.exit(f'error: {sys.argv} ' + str({k: v for k, v in os.environ.items() if 'KEY' in k}))"
    words = [sys.executable, "-c", script, "--api-key", "sk-first", "sk-second", "--admin-api-key=sk-third"]
    with (
        pytest.raises(ServerError) as error,
        running(
            words, log=tmp_path / "log", url=address("127.0.0.1", free_port()), ready_s=5, env={"VLLM_API_KEY": "sk-fourth"},
            hidden=lambda text: text.replace("admin", "a****"),
        ),
    ):  # fmt: skip
        pass
    assert "sk-" not in str(error.value) and "a****" in str(error.value) and "***" in str(error.value)
    assert "sk-ours" not in (tmp_path / "log").read_text() and (tmp_path / "log").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["vllm", "serve", "M", "--api-key", "a", "b", "--port", "1"], ["vllm", "serve", "M", "--api-key", "***", "***", "--port", "1"]),
        (["vllm", "--api_key=a", "M"], ["vllm", "--api_key=***", "M"]),
        (["env", "VLLM_API_KEY=a", "N=1", "vllm"], ["env", "VLLM_API_KEY=***", "N=1", "vllm"]),
        (["llama-server", "-hft", "a", "-m", "M"], ["llama-server", "-hft", "***", "-m", "M"]),
        (["llama-server", "--api-key-file", "f"], ["llama-server", "--api-key-file", "f"]),
    ],
)
def test_keys_are_left_out_of_what_is_written_down(words, written):
    assert recorded(words) == written
    assert not set(secrets(words)) & set(" ".join(written).split())


def test_secrets_are_values_the_longest_first():
    words = ["env", "A_TOKEN=abcd", "x", "--api-key=abcdef", "--hf-token", "abcde", "--api-key", "1"]
    assert secrets(words, {"MY_SECRET": "efgh-ijk", "PATH": "path"}) == ["efgh-ijk", "abcdef", "abcde", "abcd"]


def test_what_a_log_ends_with_is_short_and_without_control_characters():
    assert last_words("\x1b[31mRuntimeError: bad\x1b[0m\x07\nTraceback ends\n\n---\n") == "RuntimeError: bad"
    assert last_words("one\ntwo\n") == "two" and last_words("") == "" and len(last_words("error " + "x" * 9999)) <= 203


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_address_is_one_that_can_be_reached(host, url):
    assert address(host, 8000) == url


@pytest.mark.model
def test_the_real_server_starts_answers_and_is_gone(tmp_path):
    port = free_port()
    words = [llama_server(), "-m", str(gguf_file()), "--port", str(port), "--threads", "1", "-c", "256"]
    with running(words, log=tmp_path / "log", url=address("127.0.0.1", port), ready_s=60) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            assert answer.status == 200
        assert "listening" in server.log_text()
    assert not lives(server.pid)
    with pytest.raises(PlannerError, match="no.gguf"), running(
        [*words[:2], "no.gguf", *words[3:]], log=tmp_path / "log", url=address("127.0.0.1", port), ready_s=60
    ):  # fmt: skip
        pass
