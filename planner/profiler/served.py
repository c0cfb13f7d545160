"""A log of served traffic, one JSON object per line: prompt, output and sampler become token ids.

    prompt    `prompt_tokens` (ids), `messages` (role, content; through the chat template) or `prompt` (raw text)
    output    `output_tokens` (ids) or `output` (text)
    sampler   `temperature`, `top_p`, `top_k`, beside them or inside an object `sampler`

Ids win where both are given: an output that is tokenised again need not give the ids that the server produced, and its
stop token is missing. Other fields are passed over, except settings of samplers that this runtime does not have: lines
with those were not drawn from what it would call p, and are skipped with the reason.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from planner.errors import BadInput
from planner.files import read_bytes
from planner.specs import Sampler, checked

MAX_LINE_BYTES = 16 * 2**20  # a million tokens of text
NEUTRAL = {"min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0}


class ServedLine(NamedTuple):
    number: int  # in the file, from 1
    prompt: list[int]
    output: list[int]  # at least 2
    sampler: Sampler


class Log(NamedTuple):
    """A file whose every line was found well-formed, before any model is loaded."""

    name: str
    source: str  # name and the beginning of the sha256
    records: list["Record"]


class Drawn(NamedTuple):
    lines: list[ServedLine]  # in the order of the file
    skipped: dict[str, int]  # reason -> lines


def read_log(
    path: str | Path,
    default: Sampler | None,  # fills what a line does not say about its sampler; without it a line must give its temperature
) -> Log:
    """All lines of a log; BadInput names the one that is malformed."""
    content, name = read_bytes(path, "log"), Path(path).name
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            records.append(Record(number, *_parsed(line, default, f"{name}:{number}")))
    if not records:
        raise BadInput(f"a log holds one JSON object per line, {path} holds none; write lines with prompt, output and temperature")
    return Log(name, f"{name}#{hashlib.sha256(content).hexdigest()[:8]}", records)


def draw_lines(
    log: Log,
    tokenizer: "Tokenizer",  # noqa: F821  planner.runtime.tokenizer
    *,
    count: int,
    seed: int,
    vocab_size: int,
    max_context_len: int,
) -> Drawn:
    """Up to `count` lines that can be replayed, drawn from all. BadInput names a line whose tokens are not the model's."""
    skipped, lines = Counter(), []
    for index in np.random.default_rng(seed).permutation(len(log.records)):
        record = log.records[index]
        if record.unknown is not None:
            skipped[f"sampled with {record.unknown}, which this runtime does not have"] += 1
            continue
        prompt, output = _tokens(tokenizer, record, vocab_size, f"{log.name}:{record.number}")
        if len(prompt) + len(output) > max_context_len:
            skipped[f"prompt + output beyond the model's {max_context_len} tokens"] += 1
        elif len(output) < 2:
            skipped["output of fewer than 2 tokens: the first is prefill's, so nothing was left to draft"] += 1
        else:
            lines.append(ServedLine(record.number, prompt, output, record.sampler))
        if len(lines) == count:
            break
    return Drawn(sorted(lines), dict(sorted(skipped.items())))


Text = Annotated[str, Meta(max_length=MAX_LINE_BYTES)]
TokenIds = list[Annotated[int, Meta(ge=0, lt=2**31)]]


class _Message(msgspec.Struct):
    role: str
    content: str


class _Sampler(msgspec.Struct, kw_only=True):
    """What a line says about its sampler; ranges are checked by `_sampler`, which names the field."""

    temperature: object = None
    top_p: object = None
    top_k: object = None
    min_p: object = None
    repetition_penalty: object = None
    frequency_penalty: object = None
    presence_penalty: object = None
    logit_bias: object = None


class _Line(_Sampler, kw_only=True):
    prompt: Text | None = None
    messages: list[_Message] | None = None
    prompt_tokens: TokenIds | None = None
    output: Text | None = None
    output_tokens: TokenIds | None = None
    sampler: _Sampler | None = None


class Record(NamedTuple):
    number: int
    line: _Line
    sampler: Sampler
    unknown: str | None  # the setting that this runtime lacks


def _parsed(line: bytes, default: Sampler | None, where: str) -> tuple[_Line, Sampler, str | None]:
    if len(line) > MAX_LINE_BYTES:
        raise BadInput(f"{where}: a line holds at most {MAX_LINE_BYTES} bytes, got {len(line)}; drop fields that a replay does not need")
    try:
        found = msgspec.json.decode(line, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{where}: {error}; a line is a JSON object with prompt, output and temperature") from None
    if found.prompt_tokens is None and found.messages is None and found.prompt is None:
        raise BadInput(f"{where}: a line needs a prompt; give prompt_tokens, messages or prompt")
    if found.output_tokens is None and found.output is None:
        raise BadInput(f"{where}: a line needs an output; give output_tokens or output")
    given = {}
    for part in (found, found.sampler or _Sampler()):
        for field in _Sampler.__struct_fields__:
            value = getattr(part, field)
            if value is not None and given.setdefault(field, value) != value:
                raise BadInput(f"{where}: {field} stands in the line and in its sampler with different values; keep one")
    unknown = next((field for field, neutral in NEUTRAL.items() if given.get(field, neutral) != neutral), None)
    return found, _sampler(given, default, where), "logit_bias" if given.get("logit_bias") else unknown


def _sampler(given: dict, default: Sampler | None, where: str) -> Sampler:
    if "temperature" not in given and default is None:
        raise BadInput(f"{where}: temperature must be given; add it to the line, or give --temperature for lines without one")
    default = default or Sampler()
    rules = {
        "temperature": (lambda x: x == 0 or 0.01 <= x <= 100, "0 (greedy) or lie in 0.01..100"),
        "top_p": (lambda x: 0 < x <= 1, "lie above 0 and up to 1"),
        "top_k": (lambda x: isinstance(x, int) and -1 <= x <= 2**30, "a whole number, 0 or -1 for all tokens"),
    }
    for field, (holds, rule) in rules.items():
        value = given.get(field, getattr(default, field))
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            raise BadInput(f"{where}: {field} must be {rule}, got {str(value)[:80]!r}; correct the line")
    temperature, top_p, top_k = (given.get(field, getattr(default, field)) for field in rules)
    if temperature == 0:
        return Sampler()  # greedy, whatever the cuts are
    return checked(Sampler(temperature=float(temperature), top_p=float(top_p), top_k=max(0, top_k)))  # vLLM writes -1 for all


def _tokens(tokenizer, record: Record, vocab_size: int, where: str) -> tuple[list[int], list[int]]:
    line = record.line
    try:
        if line.prompt_tokens is not None:
            prompt = line.prompt_tokens
        elif line.messages is not None:
            prompt = tokenizer.encode_chat([{"role": message.role, "content": message.content} for message in line.messages])
        else:
            bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
            prompt = bos + tokenizer.encode(line.prompt)
        output = line.output_tokens if line.output_tokens is not None else tokenizer.encode(line.output)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    if not prompt:
        raise BadInput(f"{where}: a prompt needs at least one token, got none; drop the line")
    if (largest := max([*prompt, *output])) >= vocab_size:
        raise BadInput(f"{where}: token ids must be below {vocab_size}, the model's vocabulary, got {largest}; is this the model that served it?")
    return prompt, output
