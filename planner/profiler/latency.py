"""Whole rounds, timed in place: draft, verify and commit as they follow each other in the decode loop.

Cells are measured in passes, a few rounds of every cell in turn, so that a slow minute hits all of them alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from planner.measurements import Failure, RoundSample
from planner.profiler.timer import PhaseTimer
from planner.runtime.decode import decode
from planner.runtime.drafters import make_drafter
from planner.runtime.kv_cache import KVCache
from planner.runtime.model import Transformer
from planner.specs import DraftConfig, Sampler, describe

PASSES, ROUNDS_PER_PASS, WARMUP_ROUNDS = 3, 4, 1


class Ground(NamedTuple):
    """A prompt ready to be decoded from again and again."""

    prompt: list[int]
    cache: KVCache
    first_logits: torch.Tensor


def measure_rounds(
    model: Transformer,
    grounds: dict[int, Ground],  # by context
    configs: list[DraftConfig],
    sampler: Sampler,
    *,
    seed: int,
    role: str = "cell",
    passes: int = PASSES,
    on_pass: Callable[[], None] = lambda: None,
) -> tuple[list[RoundSample], list[Failure]]:
    """One sample per context and configuration; a cell that runs out of memory is reported and passed over."""
    cells = {(context_len, config): _Cell() for context_len in grounds for config in configs}
    failures = []
    for number in range(passes):
        for (context_len, config), cell in list(cells.items()):
            try:
                _measure_pass(model, grounds[context_len], config, sampler, seed + number, cell)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                del cells[context_len, config]
                failures.append(Failure(cell=f"{describe(config)} at context {context_len}", reason="out of memory"))
            on_pass()
    samples = [
        RoundSample(
            drafter=config.drafter, kv=config.kv, draft_len=config.draft_len, context_len=context_len, role=role, position=cell.position,
            drafted=cell.drafted, draft_s=cell.draft_s, verify_s=cell.verify_s, commit_s=cell.commit_s, warmup_s=cell.warmup_s, start_s=cell.start_s,
        )
        for (context_len, config), cell in cells.items()
    ]  # fmt: skip
    return samples, failures


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


class _Cell:
    def __init__(self):
        self.position, self.drafted, self.draft_s, self.verify_s, self.commit_s, self.warmup_s, self.start_s = [], [], [], [], [], [], []


def _measure_pass(model: Transformer, ground: Ground, config: DraftConfig, sampler: Sampler, seed: int, cell: _Cell) -> None:
    wanted = WARMUP_ROUNDS + ROUNDS_PER_PASS
    timer = PhaseTimer(model.device)
    ground.cache.truncate(len(ground.prompt))
    rounds = decode(
        model, ground.cache, [ground.prompt], ground.first_logits, make_drafter(config, model), draft_len=config.draft_len, sampler=sampler,
        generators=[torch.Generator(device=model.device).manual_seed(seed)], mark=timer.mark,
        # room for every draft of every round, so that none is cut short by the end of the output
        max_new_tokens=1 + (wanted + 1) * (config.draft_len + 1),
    )  # fmt: skip
    next(rounds)  # the first token
    positions, drafted = [], []
    for _ in range(wanted):
        positions.append(ground.cache.lengths[0])
        drafted.append(next(rounds).drafted[0])
    times = timer.seconds()
    phases = [times["draft"][:wanted], times["verify"][:wanted], times["commit"][:wanted]]
    cell.start_s += times["select"]
    cell.warmup_s += [sum(parts) for parts in zip(*phases)][:WARMUP_ROUNDS]
    cell.position += positions[WARMUP_ROUNDS:]
    cell.drafted += drafted[WARMUP_ROUNDS:]
    for kept, seconds in zip((cell.draft_s, cell.verify_s, cell.commit_s), phases):
        kept += seconds[WARMUP_ROUNDS:]


def rounds_room(draft_len: int) -> int:
    """Tokens of cache behind the prompt that measuring a configuration takes."""
    return (WARMUP_ROUNDS + ROUNDS_PER_PASS + 2) * (draft_len + 1) + draft_len
