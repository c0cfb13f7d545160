"""Whole rounds, timed in place: draft, verify and commit as they follow each other in the decode loop.

Of a tree, shaping it counts as drafting; its mask, the pass as wide as it has nodes, and the copy to the host as
verification; compacting what was accepted as commit. Cells that differ by the size of a fixed tree say what a node costs.

Cells are measured in passes, a few rounds of every cell in turn, and the passes are spread over the profile, so that a
slow minute hits all cells alike and none alone. Energy takes longer to show, and has a pass of its own.

B  streams side by side
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import msgspec
import torch

from planner.errors import BadInput, OutOfMemory
from planner.measurements import EnergySample, Failure, RoundSample
from planner.profiler.energy import Counter, measure_energy
from planner.profiler.timer import PhaseTimer, synchronize
from planner.runtime.decode import Round, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.protocol import Drafter
from planner.runtime.kv_cache import KVCache
from planner.runtime.model import Transformer
from planner.specs import DraftConfig, Sampler, describe

Sample = TypeVar("Sample")

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

    Of several ranks, one alone cannot pass over what the others have begun: there it ends the run.

    A batch is the same prompt in every stream; they go different ways from the first token on, as their generators differ.
    """

    def timed(streams: Ground, context_len: int, config: DraftConfig) -> RoundSample:
        return _measure_cell(model, streams, context_len, config, sampler, seed, role)

    return _over_cells(model, grounds, configs, batch, skip, timed)


def energy_pass(
    model: Transformer,
    grounds: dict[int, Ground],  # by context, one stream each
    configs: list[DraftConfig],
    sampler: Sampler,
    counter: Counter,
    *,
    seed: int,
    batch: int,
    skip: set[str] = frozenset(),  # cells that failed before
) -> list[EnergySample]:
    """What rounds of every configuration use, each for a second or longer; none of a cell at which the counter stands still."""

    def counted(streams: Ground, context_len: int, config: DraftConfig) -> EnergySample | None:
        return _energy_of(model, streams, context_len, config, sampler, seed, counter)

    return [sample for sample in _over_cells(model, grounds, configs, batch, skip, counted)[0] if sample]


def _over_cells(
    model: Transformer,
    grounds: dict[int, Ground],
    configs: list[DraftConfig],
    batch: int,
    skip: set[str],
    measure: Callable[[Ground, int, DraftConfig], Sample],
) -> tuple[list[Sample], list[Failure]]:
    samples, failures = [], []
    for context_len, ground in grounds.items():
        streams = None  # the copies of one context at a time, made inside `try`: the batch may not fit
        for config in configs:
            name = f"{describe(config)} at context {context_len}" + f", batch {batch}" * (batch > 1)
            if name in skip:
                continue
            try:
                streams = streams or side_by_side(model, ground, batch)
                samples.append(measure(streams, context_len, config))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if (ranks := model.kernels.num_ranks) > 1:
                    raise BadInput(
                        f"{name} must fit on every device, one of {ranks} ran out of memory and the others wait for it; lower --batches or --contexts"
                    ) from None
                failures.append(Failure(cell=name, reason="out of memory"))
    return samples, failures


def merge_passes(passes: list[list[RoundSample]]) -> list[RoundSample]:
    """One sample per cell, its rounds in the order they ran."""
    merged: dict[tuple, RoundSample] = {}
    for sample in (sample for samples in passes for sample in samples):
        key = (sample.drafter, sample.kv, sample.draft_len, sample.tree_size, sample.context_len, sample.batch, sample.role)
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


@contextmanager
def needs_memory(what: str, remedy: str) -> Iterator[None]:
    """OutOfMemory, with what can be done, where the memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the memory does not suffice for {what}; {remedy}") from None


def _measure_cell(
    model: Transformer, ground: Ground, context_len: int, config: DraftConfig, sampler: Sampler, seed: int, role: str
) -> RoundSample:  # fmt: skip
    wanted, batch = WARMUP_ROUNDS + ROUNDS_PER_PASS, len(ground.cache.lengths)
    timer = PhaseTimer(model.device)
    rounds = _decode(model, ground, config, make_drafter(config, model, batch=batch), sampler, seed, timer.mark)
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
        tree_size=0 if config.tree is None else config.tree.max_size,
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


def _energy_of(
    model: Transformer, ground: Ground, context_len: int, config: DraftConfig, sampler: Sampler, seed: int, counter: Counter
) -> EnergySample | None:  # fmt: skip
    """The same rounds as are timed, from the prompt again whenever they are over."""
    batch = len(ground.cache.lengths)
    drafter = make_drafter(config, model, batch=batch)

    def forever() -> Iterator[Round]:
        for again in itertools.count():
            rounds = _decode(model, ground, config, drafter, sampler, seed + again, lambda phase: None)
            next(rounds)  # the first token
            yield from itertools.islice(rounds, WARMUP_ROUNDS + ROUNDS_PER_PASS)

    rounds = forever()
    used = measure_energy(counter, lambda: next(rounds), lambda: synchronize(model.device))
    if used is None:
        return None
    return EnergySample(drafter=config.drafter, kv=config.kv, draft_len=config.draft_len, context_len=context_len, batch=batch, **used._asdict())


def _decode(
    model: Transformer, ground: Ground, config: DraftConfig, drafter: Drafter, sampler: Sampler, seed: int, mark: Callable[[str], None]
) -> Iterator[Round]:  # fmt: skip
    """The rounds of a cell from its prompt on: the first token, then as many as a pass runs."""
    batch = len(ground.cache.lengths)
    ground.cache.truncate(len(ground.prompt))
    return decode(
        model, ground.cache, [ground.prompt] * batch, ground.first_logits, drafter, draft_len=config.draft_len,
        sampler=sampler, generators=[torch.Generator(device=model.device).manual_seed(seed + 1000 * b) for b in range(batch)], mark=mark,
        # room for every draft of every round, so that none is cut short by the end of the output
        max_new_tokens=1 + (WARMUP_ROUNDS + ROUNDS_PER_PASS + 1) * (config.draft_len + 1),
    )  # fmt: skip


def rounds_room(draft_len: int, tree_size: int = 0) -> int:
    """Tokens of cache behind the prompt that measuring configurations takes, chains and trees of at most so many levels and nodes."""
    return (WARMUP_ROUNDS + ROUNDS_PER_PASS + 2) * (draft_len + 1) + max(draft_len, tree_size)
