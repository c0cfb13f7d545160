"""Datasets as files on disk: raw text and chats, before any tokenizer."""

import itertools
from pathlib import Path
from typing import TypeVar

import msgspec

from planner.errors import BadInput

MAX_CHATS = 1_000_000

T = TypeVar("T")


def expand(paths: list[str]) -> list[Path]:
    """Files behind paths; a folder stands for the .txt and .jsonl files in it and below."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise BadInput(f"a dataset must exist, {path} does not; check --dataset")
    if wrong := [file for file in files if file.suffix not in (".txt", ".jsonl")]:
        raise BadInput(f"a dataset is a .txt file (raw text) or a .jsonl file (a chat or prompt as JSON in each line), got {wrong[0]}; convert it")
    return files


def as_text(content: bytes) -> str:
    """The text of a file of a dataset."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # every byte is a character there; old book files are


def read_chats(path: Path, text: str) -> list[list[dict]]:
    """The messages (role, content) of each line of a .jsonl file."""
    chats = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(chats) >= MAX_CHATS:
            raise BadInput(f"a dataset holds at most {MAX_CHATS} chats, {path} has more; split it")
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadInput(f"{path} line {number} is not JSON: {error}") from None
        chats.append(_messages(record, f"{path} line {number}"))
    return chats


def _messages(record, where: str) -> list[dict]:
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("messages", record.get("conversations")) if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where} must be an object with `messages` (role, content), `conversations` or `prompt`")
    roles = {"human": "user", "gpt": "assistant"}  # ShareGPT's words
    found = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadInput(f"{where}: each message needs a role and a content, both text")
        found.append({"role": roles.get(role, role), "content": content})
    return found


def kinds_of(files: list[Path]) -> list[str]:
    """The kind of text of each: its folder's name where files come from several, else its own."""
    folders = [file.resolve().parent.name for file in files]
    return folders if len(set(folders)) > 1 else [file.stem for file in files]


def in_turn(queues: list[list[T]], count: int) -> list[T]:
    """Up to `count` prompts, one of each queue in turn."""
    rows = itertools.zip_longest(*queues)
    return list(itertools.islice((prompt for row in rows for prompt in row if prompt is not None), count))
