"""Which engine a command starts."""

from collections.abc import Sequence

from planner.engine_rules import find_drafting
from planner.engines import llamacpp, sglang, vllm
from planner.engines.contract import Command, Drafting, Engine
from planner.engines.words import recognise
from planner.errors import BadInput
from planner.exports import Step

LAUNCHERS = {engine.name: engine for engine in (vllm.ENGINE, sglang.ENGINE, llamacpp.ENGINE)}


def find_launcher(words: Sequence[str], named: str | None = None) -> Engine:
    """The engine of a command, or the one that is named as NAME or NAME@VERSION where it cannot be told."""
    known = recognise(words)
    if named is None:
        if known is None:
            begin = " ".join(words[:3])[:80]
            raise BadInput(f"a command starts vllm serve, sglang serve or llama-server, got {begin!r}; say which with --engine NAME")
        return LAUNCHERS[known[0]]
    rules, _ = find_drafting(named)
    if rules.name not in LAUNCHERS:
        raise BadInput(f"an engine that can be launched is one of {', '.join(LAUNCHERS)}, got {named[:80]!r}")
    if known is not None and known[0] != rules.name:
        raise BadInput(f"--engine names the engine that the command starts, that is {known[0]}, got {named[:80]!r}; leave it out")
    return LAUNCHERS[rules.name]


def drafting_like(command: Command, method: str, draft_model: str | None, steps: tuple[Step, ...]) -> Drafting:
    """A drafting with these steps that keeps what the command says of the same drafter beside its length."""
    yours = command.yours_drafting
    if yours is not None and yours.method == method and draft_model in (None, yours.draft_model):
        return yours._replace(steps=steps)
    return Drafting(method, draft_model, steps)
