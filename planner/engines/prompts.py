"""Prompts for a served model from the user's files, without a tokenizer: chats go through the server's template, raw text as it is."""

from collections import defaultdict

import numpy as np

from planner.datasets import as_text, expand, in_turn, kinds_of, read_chats
from planner.engines.completions import Prompt
from planner.errors import BadInput
from planner.files import read_bytes

CHARS_PER_TOKEN = 4  # of English text, roughly; what a prompt really holds is the server's count


def read_prompts(paths: list[str], *, count: int, context_len: int, seed: int, least: int | None = None) -> list[Prompt]:
    """`count` prompts of files in turn, kind by kind. BadInput if there are not enough.

    context_len  tokens to cut raw text to; chats and prompts of a .jsonl file are sent as they are
    least        so many are enough, and no more than there are come
    """
    files = expand(paths)
    if not files:
        raise BadInput("prompts come from files: give --dataset FILE[,FILE...] (.txt raw, .jsonl chats or prompts)")
    rng, by_kind = np.random.default_rng(seed), defaultdict(list)
    for path, kind in zip(files, kinds_of(files), strict=True):
        text = as_text(read_bytes(path, "dataset"))
        prompts = _pieces(text, context_len * CHARS_PER_TOKEN) if path.suffix == ".txt" else [_chat(own) for own in read_chats(path, text)]
        by_kind[kind].append([prompts[i] for i in rng.permutation(len(prompts))])
    available = sum(len(prompts) for own in by_kind.values() for prompts in own)
    if available < (count if least is None else least):
        raise BadInput(
            f"{count if least is None else least} prompts are needed, the dataset holds {available} (raw text counts by pieces of {context_len} tokens); "
            "add files or lower --texts"
        )
    return in_turn([in_turn(own, available) for own in by_kind.values()], min(count, available))


def _pieces(text: str, size: int) -> list[Prompt]:
    return [Prompt(text=text[at : at + size]) for at in range(0, len(text) - size + 1, size)]


def _chat(messages: list[dict]) -> Prompt:
    """Up to the last message of the user, which is to be answered."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise BadInput("a chat needs a message with role user, one has none; leave it out")
    return Prompt(messages=tuple((message["role"], message["content"]) for message in messages[: last + 1]))
