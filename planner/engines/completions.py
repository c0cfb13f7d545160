"""Streamed completions of an OpenAI-compatible server, and when each piece of them came in.

A piece of a stream may hold several tokens where drafts are accepted, so tokens are the server's own count (usage), never pieces.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from planner.canaries import Answer
from planner.engines.http import Bounds, Client, Key
from planner.errors import BadInput, ServerError

MAX_TOKENS = 2**20  # of a request
NOT_STREAMED = "the whole answer came in one piece, so it is not streamed; a proxy between may hold it back"
ONE_PIECE = 32  # tokens that may come as one: a whole round of drafts, and the end of the text


class Prompt(NamedTuple):
    """Either a text to go on with, or the messages of a chat, for the server's own template."""

    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()  # role, content


class Asked(NamedTuple):
    """How an answer is written."""

    model: str
    output_len: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0


class Written(NamedTuple):
    """An answer, and what is not kept of it."""

    answer: Answer | None  # None: it is too short to time tokens by
    text: str
    tokens: int
    drafted: int | None  # tokens; None where the server does not say (llama.cpp does)
    accepted: int | None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def written(self) -> str:
        return self.text or self.delta and (self.delta.content or self.delta.reasoning_content or self.delta.reasoning) or ""


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int


class _Timings(msgspec.Struct):
    """llama.cpp's, of what has a drafter."""

    draft_n: int | None = None
    draft_n_accepted: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def served_models(client: Client) -> list[str]:
    """The names a server answers to."""
    return [model.id for model in client.get_json("/v1/models", _Models).data]


def api_client(url: str, key: Key | None, bounds: Bounds) -> Client:
    """A client of a server's root, also where its address was given with the /v1 that OpenAI's clients want."""
    return Client(url.rstrip("/").removesuffix("/v1"), key, bounds)


def find_model(client: Client, named: str | None, planned: str | None = None) -> str:
    """The name to ask for: the one that was named, else the planned one where it is served, else the only one."""
    known = served_models(client)
    if named is not None and named not in known:
        raise BadInput(f"{client.name} serves {client.quoted(', '.join(known))}, got --served-model {named}; choose one of them")
    if named is None and planned not in known and len(known) != 1:
        raise ServerError(f"{client.name} serves {client.quoted(', '.join(known) or 'nothing')}; say with --served-model which one is asked")
    return named or (planned if planned in known else known[0])


def complete(client: Client, prompt: Prompt, asked: Asked, total_s: float) -> Answer:
    """Send one request and read its stream, in at most so many seconds. ServerError where it breaks off, or is too short to be timed."""
    written = write(client, prompt, asked, total_s)
    if written.answer is None:
        raise client.trouble(_path(prompt), NOT_STREAMED if written.tokens >= 2 else f"an answer needs 2 tokens or more, it counts {written.tokens}")
    return written.answer


def write(client: Client, prompt: Prompt, asked: Asked, total_s: float, begun: Callable[[], None] = lambda: None) -> Written:
    """Send one request and read its stream, in at most so many seconds. ServerError where it breaks off, or counts no tokens.

    begun  called with the first piece
    """
    path = _path(prompt)
    about = (
        {"prompt": prompt.text}
        if prompt.text is not None
        else {"messages": [{"role": role, "content": content} for role, content in prompt.messages]}
    )
    payload = about | {
        "model": asked.model, "max_tokens": asked.output_len, "temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begin, times, pieces, usage, timings = time.perf_counter(), [], [], None, _Timings()
    for at, data in client.events(path, payload, total_s):
        event = client.decode(data, _Event, path)
        if event.error is not None:
            raise client.trouble(path, f"it broke off with an error: {client.quoted(str(event.error))}")
        if piece := "".join(choice.written for choice in event.choices):
            if not times:
                begun()
            times.append(at)
            pieces.append(piece)
        usage, timings = event.usage or usage, event.timings or timings
    if usage is None:
        raise client.trouble(path, "it counts no tokens: a stream must end with usage (stream_options include_usage)")
    tokens, drafted, accepted = usage.completion_tokens, timings.draft_n, timings.draft_n_accepted
    if not (0 <= tokens <= asked.output_len and 0 <= usage.prompt_tokens <= MAX_TOKENS * 16):
        told = client.quoted(f"{tokens} of {asked.output_len} in {len(times)} pieces")
        raise client.trouble(path, f"an answer holds no more than were asked for, it counts {told}")
    if not 0 <= (accepted or 0) <= (drafted or 0) <= MAX_TOKENS:
        raise client.trouble(path, f"no more can be accepted than was drafted, it counts {client.quoted(f'{accepted} of {drafted}')}")
    gaps = [b - a for a, b in pairwise(times)]
    if tokens > ONE_PIECE and (not gaps or times[-1] <= times[0]):
        raise client.trouble(path, NOT_STREAMED)
    answer = None
    if gaps and tokens >= 2 and times[-1] > times[0]:
        answer = Answer(
            ttft_s=times[0] - begin, decode_s=times[-1] - times[0], output_tokens=tokens, prompt_tokens=usage.prompt_tokens, chunks=len(times),
            longest_gap_s=max(gaps),
        )  # fmt: skip
    return Written(answer, "".join(pieces), tokens, drafted, accepted)


def _path(prompt: Prompt) -> str:
    return "/v1/completions" if prompt.text is not None else "/v1/chat/completions"
