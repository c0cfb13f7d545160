"""Serving profiles whose law is known: cells of a made engine, exact unless noise is asked for."""

from collections.abc import Callable, Iterable

import numpy as np

from planner.serving import OFF, ModelSize, ServedCell, ServingProfile, SystemSpec

MODEL = ModelSize(name="target", num_layers=32, num_kv_heads=8, head_dim=128, weights_bytes=16 * 10**9)
SYSTEM = SystemSpec(name="card", memory_bytes=80 * 2**30, fraction=0.9)
CONTEXT, OUTPUT = 1000, 200

# Drafter, draft_len, concurrency.
OFF_CELLS = [(OFF, 0, c) for c in (1, 4, 16, 64, 128, 256)]
DOZEN = [(1, 1), (3, 1), (5, 1), (8, 1), (1, 16), (4, 8), (8, 32), (2, 64), (5, 64), (1, 256), (3, 256), (0, 32)]


def tokens_of(accept: float, draft_len: int) -> float:
    """Tokens per round where every draft is accepted alike."""
    return float(sum(accept**i for i in range(draft_len + 1)))


def plain_round_s(running: float, draft_len: int) -> float:
    """A device that reads weights, then computes."""
    return 10e-3 + 20e-6 * running * (draft_len + 1) + 50e-6 * running + draft_len * 1e-3


def served_profile(
    *,
    round_s: Callable[[float, int], float] = plain_round_s,  # (running, draft_len)
    accept: dict[str, float] | None = None,  # drafter -> probability of each draft
    capacity: dict[str, float] | None = None,  # drafter -> requests that run; none missing: no end
    cells: Iterable[tuple[str, int, int]] | None = None,  # default: six without a drafter and a dozen of each
    idle_tax: float = 0.1,
    noise: float = 0.0,
    seed: int = 0,
    throughput: bool = True,
    acceptance: bool = True,
    contexts: Iterable[int] = (CONTEXT,),
    drafters: dict[str, ModelSize] | None = None,
    **changes,  # any field of ServedCell
) -> ServingProfile:
    accept = {"eagle3": 0.75} if accept is None else accept
    cells = [*OFF_CELLS, *((name, k, c) for name in accept for k, c in DOZEN)] if cells is None else cells
    rng = np.random.default_rng(seed)

    def measured(name: str, k: int, concurrency: int, context: int) -> ServedCell:
        running = min(concurrency, (capacity or {}).get(name, np.inf))
        tokens = tokens_of(accept[name], k) if k else 1.0
        itl = round_s(running, k) * (1 + idle_tax * (name != OFF and k == 0)) * float(np.exp(noise * rng.standard_normal()))
        own = {"itl_s": itl, "tokens_per_round": tokens if k else None, "acceptance": [accept.get(name, 0.0)] * k} if acceptance else {}
        return ServedCell(
            drafter=name, draft_len=k, concurrency=concurrency, context_len=context, output_len=OUTPUT, tpot_s=itl / tokens,
            output_tokens_per_s=running * tokens / itl if throughput else None, **(own | changes),
        )  # fmt: skip

    return ServingProfile(
        source="made", date="2026-11-22", planner_version="0", model=MODEL, drafters=drafters or {}, system=SYSTEM,
        cells=[measured(*cell, context) for context in contexts for cell in cells],
    )  # fmt: skip
