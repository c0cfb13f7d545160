"""The KV pool that a server says it has made, beside what is computed for it. Does not need torch."""

from typing import NamedTuple

from planner.cost.capacity import Settings, bytes_per_token, kv_pool
from planner.engines.contract import Startup
from planner.serving import ModelSize, SystemSpec
from planner.tunings import Pool
from planner.units import format_bytes

SAID = 0.03  # of the expected size; a difference above it is said


class ComparedPool(NamedTuple):
    pool: Pool
    difference: str  # a sentence; empty where there is none worth saying, or nothing to compare


def compare_pool(
    startup: Startup,
    *,
    settings: Settings,
    model: ModelSize | None = None,
    drafter: ModelSize | None = None,
    system: SystemSpec | None = None,
    method: str = "draft_model",
) -> ComparedPool | None:
    """What the server said, and what was expected; None where it said nothing.

    model, drafter  None: not known, or no drafter is loaded
    system          None: a CPU, or not known. Then how many tokens fit is taken from the server, and what they take is compared
    """
    said = Pool(tokens=startup.kv_tokens, bytes=startup.kv_bytes)
    if said.tokens is None and said.bytes is None:
        return None
    if model is None:
        return ComparedPool(said, "")
    # vLLM keeps a drafter's keys in the same pool; SGLang and llama.cpp make another for it and speak of the target's first
    within = drafter if settings.engine.name == "vllm" else None
    each = bytes_per_token(model, within, settings.tensor_parallel)
    if system is not None and settings.engine.name != "llama.cpp":  # whose context is what it was told
        expected = kv_pool(model, drafter, system, settings, method)
        pool = Pool(tokens=said.tokens, bytes=said.bytes, expected_tokens=expected.tokens, expected_bytes=int(expected.tokens * each))
    else:
        pool = Pool(tokens=said.tokens, bytes=said.bytes, expected_bytes=None if said.tokens is None else int(said.tokens * each))
    return ComparedPool(pool, _difference(pool))


def _difference(pool: Pool) -> str:
    if pool.tokens is not None and pool.expected_tokens is not None:
        more = _more(pool.tokens, pool.expected_tokens)
        if more:
            return (
                f"the server's KV pool holds {pool.tokens:,} tokens, {more} than the {pool.expected_tokens:,} computed for it; "
                "planner capacity shows what the rest of the memory was taken for"
            )
        return ""
    if pool.bytes is not None and pool.expected_bytes is not None and (more := _more(pool.bytes, pool.expected_bytes)):
        return (
            f"the server's KV pool takes {format_bytes(pool.bytes)}, {more} than the {format_bytes(pool.expected_bytes)} computed for "
            f"its {pool.tokens:,} tokens; its keys have another type or shape than was assumed"
        )
    return ""


def _more(said: int, expected: int) -> str:
    share = said / expected - 1 if expected else float("inf")
    return "" if abs(share) <= SAID else f"{abs(share):.0%} {'more' if share > 0 else 'less'}"
