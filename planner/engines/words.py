"""What the commands of all engines have in common: finding the program in one, taking flags out of it, and what a drafting must be."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from planner.engine_rules import find_drafting
from planner.engines.contract import Drafting
from planner.errors import BadInput
from planner.exporters.quoting import from_yaml
from planner.exporters.within import describe_steps
from planner.exports import Step
from planner.files import read_bytes
from planner.serving import OFF

MODULES = {"vllm.entrypoints.openai.api_server": "vllm", "sglang.launch_server": "sglang"}
ELSEWHERE = ("--uds", "--api-prefix")
MAX_PORT, MAX_DRAFT_LEN, MAX_RANKS = 65535, 1024, 1024
MAX_WARNINGS, WARNING_LENGTH = 20, 300


class Taken(NamedTuple):
    """A flag that was taken out of a command."""

    name: str
    value: str | None  # None: it has none
    words: list[str]  # as they stood


def recognise(words: Sequence[str]) -> tuple[str, int] | None:
    """The engine that a command starts, and how many words there are up to its program; None where it cannot be told."""
    for i, word in enumerate(words):
        name, after = Path(word).name, words[i + 1] if i + 1 < len(words) else ""
        if name in ("vllm", "sglang") and after == "serve":
            return name, i + 2
        if word == "-m" and after in MODULES:
            return MODULES[after], i + 2
        if re.fullmatch(r"llama-server(-[a-z0-9]+)?(\.exe)?", name):
            return "llama.cpp", i + 1
    return None


def split_program(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The program with what stands before it, and its arguments. BadInput where it would be waited for in vain."""
    elsewhere = (flag for flag in (dashed(word.partition("=")[0]) for word in words) if flag.startswith("--ssl-") or flag in ELSEWHERE)
    if flag := next(elsewhere, None):
        raise BadInput(f"a launched server is measured at http://HOST:PORT, the command says {flag[:80]}; leave it out while it is tuned")
    known = recognise(words)
    begin = 1 if known is None else known[1]
    return list(words[:begin]), list(words[begin:])


def take(words: Sequence[str], named: Callable[[str], str | None], valued: Callable[[str], bool]) -> tuple[list[str], list[Taken]]:
    """Words without the flags that `named` gives a name, and these flags.

    valued  whether a flag of this name is followed by a value, unless one stands behind its =
    """
    kept, found, i = [], [], 0
    while i < len(words):
        head, equals, behind = words[i].partition("=")
        name = named(head) if words[i].startswith("-") else None
        if name is None:
            kept.append(words[i])
            i += 1
            continue
        own = list(words[i : i + (2 if valued(name) and not equals else 1)])
        if valued(name) and not equals and len(own) < 2:
            raise BadInput(f"{head[:80]} is followed by a value, the command ends there")
        found.append(Taken(name, behind if equals else own[1] if len(own) == 2 else None, own))
        i += len(own)
    return kept, found


def take_named(words: Sequence[str], spellings: dict[str, Iterable[str]]) -> tuple[list[str], dict[str, str]]:
    """Words without these flags, and the last value of each by its name. spellings  of each name; all have values"""
    names = {spelling: name for name, own in spellings.items() for spelling in own}
    kept, found = take(words, lambda head: names.get(dashed(head)), lambda name: True)
    return kept, {flag.name: flag.value for flag in found}


def dashed(head: str) -> str:
    """A flag as its engine's help writes it."""
    return head.replace("_", "-") if head.startswith("--") else head


def whole(text: str, flag: str, least: int, most: int) -> int:
    """A whole number out of a command."""
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or not least <= int(text) <= most:
        raise BadInput(f"{flag} is a whole number from {least} to {most}, the command says {text[:80]!r}; correct it")
    return int(text)


def read_config(path: str) -> dict:
    """An engine's YAML file, its keys with dashes."""
    return {
        str(key).replace("_", "-"): value
        for key, value in from_yaml(read_bytes(path, "configuration of the server").decode("utf-8", "replace")).items()
    }


def one_step(draft_len: int) -> tuple[Step, ...]:
    return (Step(batch_from=1, batch_to=1, draft_len=draft_len),)


def check_drafting(engine: str, drafting: Drafting, modelless: Iterable[str]) -> None:
    """BadInput where an engine cannot be told to draft so. Off can always be told."""
    if drafting.method == OFF:
        return
    rules, _ = find_drafting(engine)
    if drafting.method not in rules.methods:
        raise BadInput(f"{engine} drafts with {', '.join(rules.methods)}, got {drafting.method[:80]!r}; give --method")
    if drafting.draft_model is None and drafting.method not in modelless and "--spec-draft-hf" not in drafting.words:
        raise BadInput(f"{drafting.method} loads a checkpoint, got none; give --draft-model")
    if drafting.draft_model is not None and drafting.method in ("ngram", "suffix"):
        raise BadInput(f"{drafting.method} loads no checkpoint, got {drafting.draft_model[:80]!r}; leave --draft-model out")
    steps = drafting.steps
    if not steps or steps[0].batch_from != 1 or any(b.batch_from != a.batch_to + 1 for a, b in pairwise(steps)):
        raise BadInput(f"steps go from batch 1 up without gaps, got {describe_steps(steps) or 'none'}")
    if not 1 <= drafting.draft_len <= MAX_DRAFT_LEN:
        raise BadInput(f"a drafter is launched to draft 1 to {MAX_DRAFT_LEN} tokens somewhere, got {describe_steps(steps)}; not drafting is off")
    if len(steps) > 1 and drafting.method not in rules.scheduled:
        can = f"it takes schedules for {', '.join(rules.scheduled)}" if rules.scheduled else "it has no schedules"
        raise BadInput(f"{engine} drafts the same length with {drafting.method} at every load, {can}, got {describe_steps(steps)}; give one length")


def ending_at(steps: tuple[Step, ...], batch: int) -> tuple[Step, ...]:
    """Steps up to this batch: those behind it left out, the last one made to reach it."""
    kept = [step for step in steps if step.batch_from <= batch]
    return (*kept[:-1], replace(kept[-1], batch_to=batch))


def warnings_of(lines: Iterable[str]) -> list[str]:
    """Lines of a log as warnings, each once and short."""
    found = dict.fromkeys(" ".join(line.split())[:WARNING_LENGTH] for line in lines)
    return list(found)[:MAX_WARNINGS]
