"""Prompts of an exact length from the user's files: raw text cut into slots, chats joined through the template.

A slot is a stretch of a file that no other prompt overlaps, so that a check can take slots that a profile did not see.
Files are taken in turn, kind by kind, so that every kind of text weighs the same.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from planner.datasets import as_text, in_turn, kinds_of, read_chats
from planner.errors import BadInput
from planner.files import read_bytes
from planner.runtime.tokenizer import Tokenizer


class Prompt(NamedTuple):
    kind: str  # stratum: the folder's name where files come from several, else the file's
    source: str  # file name and the beginning of its sha256
    offset: int  # the first token (raw text) or chat in the file
    extent: int  # how many of them it takes
    tokens: list[int]

    @property
    def key(self) -> str:
        """Names the stretch, so that other prompts can be kept off it."""
        return f"{self.source}@{self.offset}+{self.extent}"


def draw_prompts(
    tokenizer: Tokenizer,
    files: list[Path],
    *,
    length: int,
    count: int,
    seed: int,
    seen: list[str] = (),  # keys of prompts not to overlap with
    remedy: str = "lower --texts",
) -> list[Prompt]:
    """`count` prompts of exactly `length` tokens, stratified over kinds and files. BadInput if there are not enough."""
    if not files:
        raise BadInput("prompts come from files: give --dataset FILE[,FILE...] (.txt raw, .jsonl chats or prompts)")
    if length < 2:
        raise BadInput(f"a prompt needs at least 2 tokens, got a context of {length}; raise it")
    rng = np.random.default_rng(seed)
    taken = _taken(seen)
    by_kind = defaultdict(list)  # kind -> prompts of each of its files, shuffled
    for path, kind in zip(files, kinds_of(files), strict=True):
        prompts = _prompts(tokenizer, path, kind, length)
        prompts = [prompt for prompt in prompts if not _overlaps(prompt, taken[prompt.source])]
        by_kind[kind].append([prompts[i] for i in rng.permutation(len(prompts))])
    available = sum(len(prompts) for files_of_kind in by_kind.values() for prompts in files_of_kind)
    if available < count:
        unseen = " that the profile did not see" if seen else ""
        raise BadInput(f"{count} prompts of {length} tokens{unseen} are needed, the dataset holds {available}; add files or {remedy}")
    return in_turn([in_turn(files_of_kind, available) for files_of_kind in by_kind.values()], count)


def all_prompts(tokenizer: Tokenizer, files: list[Path], *, length: int) -> list[Prompt]:
    """Every stretch of exactly `length` tokens that the files hold, file by file."""
    return [prompt for path, kind in zip(files, kinds_of(files), strict=True) for prompt in _prompts(tokenizer, path, kind, length)]


def digest(prompts: list[Prompt]) -> str:
    """Of all their tokens: another tokenizer or chat template makes other prompts of the same stretches."""
    return hashlib.sha256(repr([prompt.tokens for prompt in prompts]).encode()).hexdigest()[:16]


def distinct_4grams(tokens: list[int]) -> float:
    """Share of distinct 4-grams; 1 for a text without any. Below 0.6 a text is repeating itself."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _prompts(tokenizer: Tokenizer, path: Path, kind: str, length: int) -> list[Prompt]:
    content = read_bytes(path, "dataset")
    source = f"{path.name}#{hashlib.sha256(content).hexdigest()[:8]}"  # the same file elsewhere is still the same
    return [Prompt(kind, source, *slot) for slot in _slots(tokenizer, path, content, length)]


def _slots(tokenizer: Tokenizer, path: Path, content: bytes, length: int) -> Iterator[tuple[int, int, list[int]]]:
    """Offset, extent and tokens of the stretches of a file that make one prompt each."""
    text = as_text(content)
    if path.suffix == ".txt":
        bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
        tokens = tokenizer.encode(text)
        step = length - len(bos)
        for offset in range(0, len(tokens) - step + 1, step):
            yield offset, step, bos + tokens[offset : offset + step]
    else:
        yield from _chat_slots(tokenizer, path, read_chats(path, text), length)


def _chat_slots(tokenizer: Tokenizer, path: Path, chats: list[list[dict]], length: int) -> Iterator[tuple[int, int, list[int]]]:
    """Chats joined as turns of one conversation until they fill `length`; the oldest tokens are cut, as a full context cuts them."""
    first, turns, size = 0, [], 0
    for index, messages in enumerate(chats):
        turns += messages
        size += sum(len(tokenizer.encode(message["content"])) for message in messages)
        if size < length:
            continue
        last_user = max((i for i, message in enumerate(turns) if message["role"] == "user"), default=None)
        if last_user is None:
            raise BadInput(f"{path}: a chat needs a message with role user, chats {first + 1} to {index + 1} have none; leave them out")
        tokens = tokenizer.encode_chat(turns[: last_user + 1])  # the model is to answer the last user message
        if len(tokens) >= length:
            yield first, index + 1 - first, tokens[-length:]
            first, turns, size = index + 1, [], 0


def _taken(seen: list[str]) -> dict[str, list[tuple[int, int]]]:
    taken = defaultdict(list)
    for key in seen:
        source, _, rest = key.rpartition("@")
        offset, _, length = rest.partition("+")
        if not (offset.isdecimal() and length.isdecimal() and len(offset + length) < 30):
            raise BadInput(f"a text is named source@offset+length, got {key[:100]!r}")
        taken[source].append((int(offset), int(offset) + int(length)))
    return taken


def _overlaps(prompt: Prompt, taken: list[tuple[int, int]]) -> bool:
    return any(begin < prompt.offset + prompt.extent and prompt.offset < end for begin, end in taken)
