"""Streamed completions of an OpenAI-compatible server, and when each piece of them came in.

A piece of a stream may hold several tokens where drafts are accepted, so tokens are the server's own count (usage), never pieces.
"""

import time
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from planner.canaries import Answer
from planner.engines.http import Client

MAX_TOKENS = 2**20  # of a request


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


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def holds_text(self) -> bool:
        return bool(self.text or self.delta and (self.delta.content or self.delta.reasoning_content or self.delta.reasoning))


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def served_models(client: Client) -> list[str]:
    """The names a server answers to."""
    return [model.id for model in client.get_json("/v1/models", _Models).data]


def complete(client: Client, prompt: Prompt, asked: Asked, total_s: float) -> Answer:
    """Send one request and read its stream, in at most so many seconds. ServerError where it breaks off, or counts no tokens."""
    path = "/v1/completions" if prompt.text is not None else "/v1/chat/completions"
    about = (
        {"prompt": prompt.text}
        if prompt.text is not None
        else {"messages": [{"role": role, "content": content} for role, content in prompt.messages]}
    )
    payload = about | {
        "model": asked.model, "max_tokens": asked.output_len, "temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begin, times, usage = time.perf_counter(), [], None
    for at, data in client.events(path, payload, total_s):
        event = client.decode(data, _Event, path)
        if event.error is not None:
            raise client.trouble(path, f"it broke off with an error: {client.quoted(str(event.error))}")
        if any(choice.holds_text for choice in event.choices):
            times.append(at)
        usage = event.usage or usage
    if usage is None:
        raise client.trouble(path, "it counts no tokens: a stream must end with usage (stream_options include_usage)")
    if not (times and 2 <= usage.completion_tokens <= asked.output_len and 0 <= usage.prompt_tokens <= MAX_TOKENS * 16):
        told = client.quoted(f"{usage.completion_tokens} of {asked.output_len} in {len(times)} pieces")
        raise client.trouble(path, f"an answer needs 2 tokens or more, and no more than were asked for, it counts {told}")
    gaps = [b - a for a, b in pairwise(times)]
    if not gaps or times[-1] <= times[0]:
        raise client.trouble(path, "the whole answer came in one piece, so it is not streamed; a proxy between may hold it back")
    return Answer(
        ttft_s=times[0] - begin, decode_s=times[-1] - times[0], output_tokens=usage.completion_tokens, prompt_tokens=usage.prompt_tokens,
        chunks=len(times), longest_gap_s=max(gaps),
    )  # fmt: skip
