"""Run configurations for real, side by side on the same prompts: what check and sweep are made of.

B  streams side by side
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from planner.plans import Trial
from planner.profiler.device import PeakMemory
from planner.profiler.energy import Counter
from planner.profiler.texts import Prompt
from planner.profiler.timer import PhaseTimer, synchronize
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.kv_cache import KVCache
from planner.runtime.model import Transformer, prefill
from planner.specs import DraftConfig, Sampler

WARMUP_TOKENS = 8  # decoded with every configuration before the first timing


def run_trials(
    model: Transformer,
    prompts: list[Prompt],
    arms: list[DraftConfig],
    sampler: Sampler,
    *,
    output_len: int,
    stop_tokens: tuple[int, ...],
    seed: int,
    batch: int = 1,
    skip: set[tuple[str, DraftConfig]] = frozenset(),  # (prompt key, arm) that are known already
    warm: bool = True,
    counter: Counter | None = None,  # of energy
    prefilled: dict[str, "Ground"] | None = None,  # where groups stay for the next call with the same prompts, by the key of their first
    longest: int | None = None,  # drafted tokens of a round that a prefilled cache is to have room for; None: those of these arms
) -> Iterator[Trial]:
    """Decode every prompt with every arm, `batch` prompts side by side, one trial for each prompt and arm.

    All arms of a group of prompts run in a row, each group beginning with another arm. A group of which only some
    trials are known runs again; what is known is not yielded twice.
    """
    if len(prompts) % batch:
        raise ValueError(f"prompts are run in groups of {batch}, got {len(prompts)}; give a multiple")
    longest = max(config.verified for config in arms) if longest is None else longest
    for number, first in enumerate(range(0, len(prompts), batch)):
        group = prompts[first : first + batch]
        todo = [config for config in arms if any((prompt.key, config) not in skip for prompt in group)]
        if not todo:
            continue
        if (ground := (prefilled or {}).get(group[0].key)) is None:
            ground = _prefilled(model, group, cache_capacity(max(len(prompt.tokens) for prompt in group), output_len, longest))
        if prefilled is not None:
            prefilled[group[0].key] = ground
        if warm:
            for config in arms:
                _decode(model, ground, config, sampler, min(WARMUP_TOKENS, output_len), (), seed)
            warm = False
        shift = number % len(todo)
        for config in todo[shift:] + todo[:shift]:
            trials = _decode(model, ground, config, sampler, output_len, stop_tokens, seed + first, counter)
            yield from (trial for trial in trials if (trial.text, config) not in skip)


class Ground(NamedTuple):
    """A group of prompts ready to be decoded from again and again."""

    prompts: list[Prompt]
    cache: KVCache
    first_logits: torch.Tensor  # [B, V]
    prefill_s: list[float]  # of each prompt


def _prefilled(model: Transformer, prompts: list[Prompt], capacity: int) -> Ground:
    """The prompts one after the other in the streams of one cache: each prefill is timed by itself, as a server meets it."""
    cache = model.new_cache(capacity, batch=len(prompts))
    logits, prefill_s = [], []
    for b, prompt in enumerate(prompts):
        before = synchronize(model.device)
        logits.append(prefill(model, torch.tensor([prompt.tokens], device=model.device), cache.stream(b)))
        prefill_s.append(synchronize(model.device) - before)
    return Ground(prompts, cache, torch.cat(logits), prefill_s)


def _decode(
    model: Transformer, ground: Ground, config: DraftConfig, sampler: Sampler, output_len: int, stop_tokens: tuple[int, ...], seed: int,
    counter: Counter | None = None,
) -> list[Trial]:  # fmt: skip
    """One decode of all prompts of a group: a trial for each.

    Streams end at different times, and one that has ended goes on as padding: a round costs what the whole batch
    costs, as long as any stream runs. So a stream is charged for every round until its own end, and for none after.
    """
    B, cache = len(ground.prompts), ground.cache
    cache.lengths = [len(prompt.tokens) for prompt in ground.prompts]
    memory = PeakMemory(model.device)
    memory.reset()
    drafter = make_drafter(config, model, batch=B)
    timer = PhaseTimer(model.device)
    begin = synchronize(model.device)
    rounds = decode(
        model, cache, [prompt.tokens for prompt in ground.prompts], ground.first_logits, drafter, draft_len=config.draft_len, sampler=sampler,
        max_new_tokens=output_len, generators=[torch.Generator(device=model.device).manual_seed(seed + b) for b in range(B)],
        stop_tokens=stop_tokens, mark=timer.mark,
    )  # fmt: skip
    next(rounds)  # the first token
    first = synchronize(model.device)
    joules_before = counter.read() if counter else 0.0
    resumed = synchronize(model.device)
    done = list(rounds)
    decode_s = synchronize(model.device) - resumed
    joules = counter.read() - joules_before if counter else None
    phases = timer.seconds()
    round_s = [sum(parts) for parts in zip(*(phases.get(phase, []) for phase in ("draft", "verify", "commit")))]
    peak_bytes = memory.read()
    trials = []
    for b, prompt in enumerate(ground.prompts):
        own = [round_ for round_ in done if round_.tokens[b]]  # a running stream emits in every round
        # what lies between rounds is shared out over them; a stream that runs to the end has all of it
        share = sum(round_s[: len(own)]) / sum(round_s) if own else 0.0
        trials.append(
            Trial(
                config=config,
                text=prompt.key,
                batch=B,
                output_len=1 + sum(len(round_.tokens[b]) for round_ in own),
                prefill_s=ground.prefill_s[b],
                start_s=(first - begin) / B,  # drafters look at one prompt after the other
                decode_s=decode_s * share,
                decode_joules=None if joules is None or joules < 0 else joules * share / B,
                drafted=[round_.drafted[b] for round_ in own],
                accepted=[round_.accepted[b] for round_ in own],
                round_s=round_s[: len(own)],
                cache_bytes=cache.nbytes + drafter.nbytes,
                peak_bytes=peak_bytes,
            )
        )
    return trials
