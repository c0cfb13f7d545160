"""The one HTTP client: for servers that may be broken or hostile. The standard library's, with a bound on everything.

A deadline holds for a whole request, whatever the server does meanwhile: it is kept below http.client, at each read of the socket, so
that headers which drip in and answers which never end run into it as well. Redirects are refused, since an API key must not travel;
so are compressed answers, since none was asked for. What a server says is quoted short, and never with the key.
Proxies are not used.
"""

import http.client
import io
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from planner.errors import BadInput, ServerError
from planner.files import read_bytes
from planner.importers.contract import shown

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_KEY = 4096  # characters
MAX_BODY = 32 * 2**20  # bytes of an answer
MAX_LINE = 2**20  # bytes of one event of a stream
PIECE = 64 * 2**10  # bytes read at once

T = TypeVar("T")


class Bounds(NamedTuple):
    """Seconds that a server may take."""

    connect_s: float = 5.0
    read_s: float = 30.0  # without a byte
    total_s: float = 60.0  # for a whole request


class Key:
    """An API key, which no message, repr or file shows."""

    def __init__(self, secret: str, origin: str):
        """origin  where it comes from, for the message should it be none"""
        if not (0 < len(secret) <= MAX_KEY and secret.isascii() and secret.isprintable() and " " not in secret):
            raise BadInput(f"an API key is 1 to {MAX_KEY} printable ASCII characters without spaces, {origin} holds something else; correct it")
        self._secret = secret

    def header(self) -> str:
        return f"Bearer {self._secret}"

    def hidden(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._secret, "***")


def read_key(path: str | Path | None = None) -> Key | None:
    """The key in a file, else the one in the environment, else none."""
    if path is None:
        secret = os.environ.get(KEY_VARIABLE, "").strip()
        return Key(secret, f"the environment variable {KEY_VARIABLE}") if secret else None
    content = read_bytes(path, "file with the API key")
    return Key(content.decode("latin-1").strip(), f"the file {path}")


class Client:
    """Requests to one server. Every failure is a ServerError of one line that names the address; nothing is tried twice."""

    def __init__(self, url: str, key: Key | None = None, bounds: Bounds = Bounds()):
        """url  http:// or https://, a host, maybe a port and a path that is put before every other"""
        self.scheme, self.host, self.port, self.path = _address(url)
        self.bounds, self._key, self._open = bounds, key, set()
        self._aborted = False
        self.name = f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}{self.path}"  # as messages call it

    def another(self) -> "Client":
        """A client of the same server, which is aborted on its own."""
        return Client(self.name, self._key, self.bounds)

    def get(self, path: str = "") -> bytes:
        """The whole answer."""
        with self._asked("GET", path, None, self.bounds) as answer:
            return b"".join(self._pieces(answer, path))

    def get_json(self, path: str, kind: type[T]) -> T:
        return self.decode(self.get(path), kind, path)

    def events(self, path: str, payload: object, total_s: float | None = None) -> Iterator[tuple[float, bytes]]:
        """Server-sent events that answer a POST: the data of each, and when it came in (time.perf_counter).

        Ends with the server's [DONE], which is not among them; ServerError where the stream ends without it.
        """
        bounds = self.bounds if total_s is None else self.bounds._replace(total_s=total_s)
        with self._asked("POST", path, msgspec.json.encode(payload), bounds) as answer:
            kind = answer.headers.get("Content-Type", "")
            if not kind.lower().startswith("text/event-stream"):
                raise self.trouble(path, f"a stream of events was asked for, it answers with {self.quoted(kind or 'nothing named')}")
            left = bytearray()
            for piece in self._pieces(answer, path):
                at, searched = time.perf_counter(), len(left)
                left += piece
                end = left.rfind(b"\n", searched)
                lines = bytes(left[: max(end, 0)]).split(b"\n")
                del left[: end + 1]
                if max(len(left), *map(len, lines)) > MAX_LINE:
                    raise self.trouble(path, f"an event takes at most {MAX_LINE} bytes, it sends more")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue  # comments that keep a connection open, names of events, blank lines
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield at, data
        raise self.trouble(path, "the stream ended before it was done; the server closed it, or fell")

    def decode(self, content: bytes, kind: type[T], path: str) -> T:
        """A value of `kind` from JSON."""
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self.trouble(path, f"its JSON is not what was expected: {self.quoted(str(error))}") from None

    def abort(self) -> None:
        """End whatever other threads are asking or about to; they get a ServerError now, not when their time is up."""
        self._aborted = True  # first: who connects meanwhile looks at it
        for connected in list(self._open):
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def trouble(self, path: str, what: str) -> ServerError:
        return ServerError(f"{self.name}{path}: {what}")

    def quoted(self, text: str) -> str:
        """What a server said, short, and without the key."""
        return shown(text if self._key is None else self._key.hidden(text))

    def hidden(self, text: str) -> str:
        """A message that quotes what a server said, without the key."""
        return text if self._key is None else self._key.hidden(text)

    @contextmanager
    def _asked(self, method: str, path: str, body: bytes | None, bounds: Bounds) -> Iterator[http.client.HTTPResponse]:
        """The answer, its status and headers checked, its body yet to be read."""
        headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "planner"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = self._key.header()
        connection, connected = http.client.HTTPConnection(self.host, self.port), None
        try:
            connected = self._connect(bounds)
            self._open.add(connected)
            if self._aborted:
                raise self.trouble(path, "nothing is asked of it any more")
            connection.sock = _Timed(connected, bounds)
            connection.request(method, (self.path + path) or "/", body, headers)
            with connection.getresponse() as answer:
                self._check(answer, path)
                yield answer
        except TimeoutError:
            raise self.trouble(path, f"it did not answer in time ({bounds.read_s:g} s without a byte, {bounds.total_s:g} s in all)") from None
        except http.client.HTTPException as error:  # before ValueError and OSError: RemoteDisconnected is both of ours and an OSError
            raise self.trouble(path, f"it does not speak HTTP as it should ({type(error).__name__})") from None
        except (OSError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__
            raise self.trouble(path, f"cannot be talked to: {reason}; does the server run there?") from None
        finally:
            self._open.discard(connected)
            connection.close()

    def _connect(self, bounds: Bounds) -> socket.socket:
        connected = socket.create_connection((self.host, self.port), timeout=bounds.connect_s)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.scheme == "https":
                return ssl.create_default_context().wrap_socket(connected, server_hostname=self.host)
        except BaseException:
            connected.close()
            raise
        return connected

    def _check(self, answer: http.client.HTTPResponse, path: str) -> None:
        if 300 <= answer.status < 400:
            raise self.trouble(path, f"it redirects (status {answer.status}), which is not followed; give the address that it leads to")
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self.trouble(path, "it compresses its answer unasked, which is not read; switch that off")
        if answer.status in (401, 403):
            wanted = "the API key was not accepted" if self._key else f"it wants an API key; set {KEY_VARIABLE}, or give --api-key-file"
            raise self.trouble(path, f"status {answer.status}: {wanted}")
        if answer.status != 200:
            raise self.trouble(path, f"status {answer.status}{self._complaint(answer)}")

    def _complaint(self, answer: http.client.HTTPResponse) -> str:
        """What an OpenAI server says is wrong, else nothing."""
        try:
            error = msgspec.json.decode(answer.read1(PIECE)).get("error")
            message = error.get("message") if isinstance(error, dict) else error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError):
            return ""
        return f": {self.quoted(message)}" if isinstance(message, str) else ""

    def _pieces(self, answer: http.client.HTTPResponse, path: str) -> Iterator[bytes]:
        size = 0
        while piece := answer.read1(PIECE):
            size += len(piece)
            if size > MAX_BODY:
                raise self.trouble(path, f"an answer takes at most {MAX_BODY} bytes, it sends more")
            yield piece
        if answer.length:
            raise self.trouble(path, f"the answer ended {answer.length} bytes early")


class _Timed(io.RawIOBase):
    """A socket whose every read ends by the deadline, and as much of one as http.client needs."""

    def __init__(self, connected: socket.socket, bounds: Bounds):
        self._socket, self._read_s = connected, bounds.read_s
        self._deadline = time.monotonic() + bounds.total_s
        self._users = 1  # the connection, and the answer's file: http.client closes the one while the other is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._set_timeout()
        return self._socket.recv_into(buffer)

    def sendall(self, data) -> None:
        self._set_timeout()
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        self._users += 1
        return io.BufferedReader(self, PIECE)

    def close(self) -> None:
        self._users -= 1
        if self._users <= 0 and not self.closed:
            super().close()
            self._socket.close()

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(min(left, self._read_s))


def _address(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path. BadInput, which quotes no more than the host, for what is not an address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    clean = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not host or port == 0 or not clean or len(url) > 2000:
        raise BadInput("the address of a server is http://HOST:PORT or https://HOST, got something else; check the URL")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise BadInput(
            f"the address of a server holds no credentials, query or fragment, that at {shown(host)} does; a key comes from {KEY_VARIABLE} or --api-key-file"
        )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")
