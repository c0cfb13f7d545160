"""Whole rounds, timed in place: draft, verify and commit as they follow each other in the decode loop.

Cells are measured in passes, a few rounds of every cell in turn, and the passes are spread over the profile, so that a
slow minute hits all cells alike and none alone.

B  streams side by side
"""

from typing import NamedTuple

import msgspec
import torch

from planner.measurements import Failure, RoundSample
from planner.profiler.timer import PhaseTimer
from planner.runtime.decode import decode
from planner.runtime.drafters import make_drafter
from planner.runtime.kv_cache import KVCache
from planner.runtime.model import Transformer
from planner.specs import DraftConfig, Sampler, describe

PASSES, ROUNDS_PER_PASS, WARMUP_ROUNDS = 4, 5, 2  # a graph is captured at the second pass of its shape


class Ground(NamedTuple):
    """A prompt ready to be decoded from again and again, by B streams at once."""

    prompt: list[int]
    cache: KVCache
    first_logits: torch.Tensor  # [B, V]


def measure_pass(
    model: Transformer,
    grounds: dict[int, Ground],  # by context, one stream each
    configs: list[DraftConfig],
    sampler: Sampler,
    *,
    seed: int,
    batch: int = 1,
    role: str = "cell",
    skip: set[str] = frozenset(),  # cells that failed before
) -> tuple[list[RoundSample], list[Failure]]:
    """A few rounds of every configuration at every context; a cell that runs out of memory is reported and passed over.

    A batch is the same prompt in every stream; they go different ways from the first token on, as their generators differ.
    """
    samples, failures = [], []
    for context_len, ground in grounds.items():
        streams = None  # the copies of one context at a time, made inside `try`: the batch may not fit
        for config in configs:
            name = f"{describe(config)} at context {context_len}" + f", batch {batch}" * (batch > 1)
            if name in skip:
                continue
            try:
                streams = streams or side_by_side(model, ground, batch)
                samples.append(_measure_cell(model, streams, context_len, config, sampler, seed, role))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failures.append(Failure(cell=name, reason="out of memory"))
    return samples, failures


def merge_passes(passes: list[list[RoundSample]]) -> list[RoundSample]:
    """One sample per cell, its rounds in the order they ran."""
    merged: dict[tuple, RoundSample] = {}
    for sample in (sample for samples in passes for sample in samples):
        key = (sample.drafter, sample.kv, sample.draft_len, sample.context_len, sample.batch, sample.role)
        if key in merged:
            lists = ("position", "drafted", "draft_s", "verify_s", "commit_s", "warmup_s", "start_s")
            sample = msgspec.structs.replace(sample, **{name: getattr(merged[key], name) + getattr(sample, name) for name in lists})
        merged[key] = sample
    return list(merged.values())


def side_by_side(model: Transformer, ground: Ground, batch: int) -> Ground:
    """The same prompt in `batch` streams of one cache; a batch of one is the ground itself."""
    if batch == 1:
        return ground
    cache = model.new_cache(ground.cache.capacity, batch=batch)
    cache.take(ground.cache, len(ground.prompt))
    return Ground(ground.prompt, cache, ground.first_logits.expand(batch, -1))


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _measure_cell(
    model: Transformer, ground: Ground, context_len: int, config: DraftConfig, sampler: Sampler, seed: int, role: str
) -> RoundSample:  # fmt: skip
    wanted, batch = WARMUP_ROUNDS + ROUNDS_PER_PASS, len(ground.cache.lengths)
    timer = PhaseTimer(model.device)
    ground.cache.truncate(len(ground.prompt))
    rounds = decode(
        model, ground.cache, [ground.prompt] * batch, ground.first_logits, make_drafter(config, model, batch=batch), draft_len=config.draft_len,
        sampler=sampler, generators=[torch.Generator(device=model.device).manual_seed(seed + 1000 * b) for b in range(batch)], mark=timer.mark,
        # room for every draft of every round, so that none is cut short by the end of the output
        max_new_tokens=1 + (wanted + 1) * (config.draft_len + 1),
    )  # fmt: skip
    next(rounds)  # the first token
    position, drafted = [], []
    for _ in range(wanted):
        position.append(round(sum(ground.cache.lengths) / batch))
        drafted.append(max(next(rounds).drafted))
    times = timer.seconds()
    whole = [sum(phases) for phases in zip(times["draft"], times["verify"], times["commit"])]
    return RoundSample(
        drafter=config.drafter,
        kv=config.kv,
        draft_len=config.draft_len,
        context_len=context_len,
        batch=batch,
        role=role,
        position=position[WARMUP_ROUNDS:],
        drafted=drafted[WARMUP_ROUNDS:],
        draft_s=times["draft"][WARMUP_ROUNDS:],
        verify_s=times["verify"][WARMUP_ROUNDS:],
        commit_s=times["commit"][WARMUP_ROUNDS:],
        warmup_s=whole[:WARMUP_ROUNDS],
        start_s=times["select"],
    )


def rounds_room(draft_len: int) -> int:
    """Tokens of cache behind the prompt that measuring a configuration takes."""
    return (WARMUP_ROUNDS + ROUNDS_PER_PASS + 2) * (draft_len + 1) + draft_len
