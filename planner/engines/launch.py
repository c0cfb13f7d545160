"""Starting a user's own server, waiting until it is healthy, and stopping it with all that it started. POSIX only.

The server leads a session of its own, and every process of that session, or below it, is what is stopped: SIGTERM, a while, SIGKILL.
Nothing is ever looked for by name. The leader is reaped last, so that its number cannot pass to another process meanwhile. Should the
planner itself be killed, a shell that waits at the other end of a pipe ends the server's group.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from planner.engines.http import KEY_VARIABLE, Bounds, Client
from planner.errors import BadInput, ServerError, Unfinished

STOP_S = 20.0  # from SIGTERM to SIGKILL: engines free their devices meanwhile
KILL_S = 10.0  # for the kernel to take away what was killed
POLL_S = 0.2
PROBE = Bounds(1.0, 2.0, 3.0)
MAX_LOG = 2**30  # bytes, more is taken for a server that has run wild
LOG_BYTES = 4 * 2**20  # read of a log, half at its beginning and half at its end
QUOTED = 200  # characters of a log in a message
SECRET_FLAGS = ("--api-key", "--admin-api-key", "--hf-token", "-hft", "--ssl-keyfile-password", "--ssl-key-password")
SECRET_NAMES = re.compile(r"\w*(KEY|TOKEN|SECRET|PASSWORD)", re.IGNORECASE)
TELLING = re.compile(r"error|exception|failed|invalid|cannot|not found|denied|refused", re.IGNORECASE)
EMPTY = re.compile(r"traceback|root cause|exiting|cleaning up|usage", re.IGNORECASE)  # lines that only point to others
WATCHER = 'read -r done || { kill -s TERM -- "-$1"; sleep "$2"; kill -s KILL -- "-$1"; }'

PROCESSES = Path("/proc")

Hide = Callable[[str], str]
Members = dict[int, str]  # process -> when it began, since numbers are used again


class Server:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen, words: list[str], log: Path, hide: Hide):
        self._process, self._words, self._log, self._hide = process, words, log, hide
        self._began = time.monotonic()
        self.ready_s = 0.0  # from its start until it answered

    @property
    def pid(self) -> int:
        return self._process.pid

    def log_text(self) -> str:
        """What it wrote: all of it, or the beginning and the end of very much. Without keys."""
        return self._hide(_read_log(self._log))

    def check(self) -> None:
        """ServerError where it has ended by itself, or fills the disk."""
        status = _status(self._process)
        if status is not None:
            how = f"was ended by signal {-status}" if status < 0 else f"ended by itself with status {status}"
            said = last_words(self.log_text())
            raise ServerError(
                f"the server must keep running, {self._words[0]} {how} after {time.monotonic() - self._began:.1f} s"
                f"{f': {said!r}' if said else ' without a word'}; see {self._log}"
            )
        if self._log.exists() and self._log.stat().st_size > MAX_LOG:
            raise ServerError(f"a server's log takes at most {MAX_LOG} bytes, {self._words[0]} writes more; see {self._log}, and lower its verbosity")


@contextmanager
def running(
    words: Sequence[str],
    *,
    log: Path,
    url: str,
    ready_s: float,
    health: str = "/health",
    env: Mapping[str, str] | None = None,
    hidden: Hide = lambda text: text,
    advance: Callable[[], None] = lambda: None,
    stop_s: float = STOP_S,
) -> Iterator[Server]:
    """A server started with these words, from when it is healthy at `url` to when it and all its children are gone.

    env      added to this process's own, which goes without our API key
    hidden   takes secrets out of a text, beside those that `words` and `env` hold
    advance  called at each look, for whoever shows progress

    BadInput where the words or the address cannot be used, ServerError where the server ends, or is not healthy within ready_s.
    """
    if not hasattr(os, "killpg"):
        raise BadInput("a server is launched on Linux or macOS, this is neither; start it by hand and give --base-url")
    words, env = list(words), dict(env or {})
    if not words or shutil.which(words[0], path=env.get("PATH", os.environ.get("PATH"))) is None:
        raise BadInput(f"a command begins with a program, {words[0][:80] if words else ''!r} is not one that is found; install it, or give its path")
    if bad := next((word for word in words if "\0" in word), None):
        raise BadInput(f"a command line cannot hold a NUL character, got {bad[:80]!r}")
    client = Client(url, None, PROBE)
    check_free(client.host, client.port)
    held = secrets(words, env)

    def hide(text: str) -> str:
        for secret in held:
            text = text.replace(secret, "***")
        return hidden(text)

    inherited = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    process, watcher, members = None, None, {}
    try:
        with _undisturbed():
            process = _start(words, log, inherited | env)
            watcher = _watch_over(process.pid, stop_s)
        server = Server(process, words, log, hide)
        _wait_healthy(server, client, health, ready_s, advance)
        _living(process, members)  # for those that will have lost their parents
        yield server
    finally:
        if process is not None:
            _stop(process, watcher, members, stop_s)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return listener.getsockname()[1]


def check_free(host: str, port: int) -> None:
    """BadInput where somebody listens there: it is them who would be measured."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            taken = True
    except OSError:
        taken = False
    if not taken:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not hold it
            try:
                listener.bind((host, port))
            except OSError as error:
                raise BadInput(
                    f"a server is launched at a free port of this machine, {host}:{port} is not ({error.strerror or error}); give another --host or --port"
                ) from None
    if taken:
        raise BadInput(f"a server is launched at a free port, at {host}:{port} somebody listens already; stop that one, or give another --port")


def address(host: str, port: int) -> str:
    """The URL of a server that was told to listen there."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


def secrets(words: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
    """Values of keys and tokens in a command and its environment, the longest first. Shorter ones than 4 characters hide nothing, and would blot logs."""
    found = [word for word, shown in zip(words, recorded(words), strict=True) if word != shown]
    found = [word.partition("=")[2] if word.startswith("--") or SECRET_NAMES.fullmatch(word.partition("=")[0]) else word for word in found]
    found += [value for name, value in (env or {}).items() if SECRET_NAMES.fullmatch(name)]
    return sorted({value for value in found if len(value) >= 4}, key=len, reverse=True)


def recorded(words: Sequence[str]) -> list[str]:
    """A command as it may be written down: keys and tokens left out."""
    found, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        flag = name.replace("_", "-") if name.startswith("--") else name
        if word.startswith("-"):
            secret = flag in SECRET_FLAGS and not equals
            found.append(f"{name}=***" if flag in SECRET_FLAGS and equals else word)
        elif secret:  # engines take several keys
            found.append("***")
        else:
            found.append(f"{name}=***" if equals and SECRET_NAMES.fullmatch(name) else word)
    return found


def last_words(text: str) -> str:
    """The last line of a log that says what is wrong, else the last that says anything; short, without control characters."""
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line) for line in text.splitlines()[-400:]]
    lines = [" ".join("".join(char if char.isprintable() else " " for char in line).split()) for line in lines]
    lines = [line for line in lines if re.search(r"[A-Za-z]", line)]
    telling = [line for line in lines if TELLING.search(line) and not EMPTY.search(line)]
    line = (telling or lines or [""])[-1]
    return line if len(line) <= QUOTED else f"{line[:QUOTED]}..."


def _start(words: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # a server may write its key into it
    except OSError as error:
        raise Unfinished(f"the log {log} cannot be written: {error.strerror or error}") from None
    with os.fdopen(handle, "wb") as output:
        try:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True)
        except OSError as error:
            raise BadInput(f"{words[0][:80]!r} cannot be started: {error.strerror or error}; give a program") from None


def _watch_over(group: int, stop_s: float) -> subprocess.Popen:
    """A shell that ends the group when this process is gone, in whatever way: then the pipe that it reads from ends."""
    return subprocess.Popen(
        ["/bin/sh", "-c", WATCHER, "planner-watcher", str(group), f"{stop_s:g}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _wait_healthy(server: Server, client: Client, health: str, ready_s: float, advance: Callable[[], None]) -> None:
    begin = time.monotonic()
    while True:
        server.check()
        try:
            client.get(health)
        except ServerError as error:
            last = error
        else:
            server.check()  # it was this one that answered
            server.ready_s = time.monotonic() - begin
            return
        if time.monotonic() - begin > ready_s:
            said = last_words(server.log_text())
            raise ServerError(
                f"a server must be healthy within {ready_s:g} s, {server._words[0]} is not ({last})"
                f"{f'; its log ends with {said!r}' if said else ' and wrote nothing'}; give it longer, or see {server._log}"
            )
        advance()
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen, watcher: subprocess.Popen | None, members: Members, stop_s: float) -> None:
    """Ends every process of the server; one more signal to this process while it waits, and it waits no longer."""
    try:
        _send(signal.SIGTERM, _living(process, members))
        _wait_gone(process, members, stop_s)
    finally:
        with _undisturbed():
            left = not _wait_gone(process, members, KILL_S, signal.SIGKILL)
            if not left:
                process.wait()
            if watcher is not None:
                with suppress(OSError):
                    watcher.stdin.write(b"\n")
                    watcher.stdin.close()
                watcher.wait()
    if left:
        pids = ", ".join(map(str, _living(process, members)))
        raise ServerError(f"a server must end when it is killed, process {pids} of it did not; end it by hand")


def _wait_gone(process: subprocess.Popen, members: Members, seconds: float, number: int | None = None) -> bool:
    """Whether all are gone in time. number  sent to those that are left, again and again: they may have children meanwhile"""
    until, pause = time.monotonic() + seconds, 0.01
    while living := _living(process, members):
        if number is not None:
            _send(number, living)
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    return True


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _living(process: subprocess.Popen, members: Members) -> list[int]:
    """Processes of the server that live: of its session or group, below it, or among `members`, which grows.

    Without /proc (macOS) its group stands for them, as kill takes it: the number with a minus.
    """
    if not PROCESSES.joinpath("self", "stat").exists():
        try:
            os.killpg(process.pid, 0)
        except (ProcessLookupError, PermissionError):  # what is dead and not reaped may not be asked
            return []
        return [-process.pid]
    table = _processes()
    own = {pid for pid, (_, group, session, began) in table.items() if process.pid in (pid, group, session) or members.get(pid) == began}
    grown = True
    while grown:  # children of those, whatever session they made for themselves
        below = {pid for pid, (parent, *_) in table.items() if parent in own} - own
        own |= below
        grown = bool(below)
    members.update({pid: table[pid][3] for pid in own})
    return sorted(own)


def _processes() -> dict[int, tuple[int, int, int, str]]:
    """Parent, group, session and start of every process that is not dead already."""
    found = {}
    for name in os.listdir(PROCESSES):
        if name.isdigit():
            with suppress(OSError):
                fields = PROCESSES.joinpath(name, "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(name)] = (int(fields[1]), int(fields[2]), int(fields[3]), fields[19])
    return found


def _status(process: subprocess.Popen) -> int | None:
    """The exit status of a process that has ended, as Popen counts it; it stays to be reaped."""
    if process.returncode is not None:
        return process.returncode
    if not hasattr(os, "waitid"):
        return process.poll()
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # whoever started this process ignores SIGCHLD
        return process.poll()
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _read_log(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size <= LOG_BYTES:
                return file.read(LOG_BYTES).decode("utf-8", "replace")
            first = file.read(LOG_BYTES // 2)
            file.seek(size - LOG_BYTES // 2)
            return (first + b"\n" + file.read(LOG_BYTES // 2)).decode("utf-8", "replace")
    except OSError as error:
        raise Unfinished(f"the log {path} cannot be read: {error.strerror or error}") from None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come meanwhile are handled afterwards: a process that was started must not be lost sight of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda *what: came.append(what))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            before[came[0][0]](*came[0])
