"""Run configurations for real, side by side on the same prompts: what check and sweep are made of."""

from collections.abc import Iterator

import torch

from planner.plans import Trial
from planner.profiler.device import PeakMemory
from planner.profiler.texts import Prompt
from planner.profiler.timer import PhaseTimer, synchronize
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
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
    skip: set[tuple[str, DraftConfig]] = frozenset(),  # (prompt key, arm) that are known already
    warm: bool = True,
) -> Iterator[Trial]:
    """Decode every prompt with every arm, all arms of a prompt in a row, each prompt beginning with another arm."""
    longest = max(config.draft_len for config in arms)
    for number, prompt in enumerate(prompts):
        todo = [config for config in arms if (prompt.key, config) not in skip]
        if not todo:
            continue
        capacity = cache_capacity(len(prompt.tokens), output_len, longest)
        cache = model.new_cache(capacity)
        before = synchronize(model.device)
        logits = prefill(model, torch.tensor([prompt.tokens], device=model.device), cache)
        prefill_s = synchronize(model.device) - before
        if warm:
            for config in arms:
                _decode(model, cache, prompt, logits, config, sampler, min(WARMUP_TOKENS, output_len), (), seed)
            warm = False
        shift = number % len(todo)
        for config in todo[shift:] + todo[:shift]:
            yield _decode(model, cache, prompt, logits, config, sampler, output_len, stop_tokens, seed + number, prefill_s)


def _decode(
    model: Transformer, cache, prompt: Prompt, logits, config: DraftConfig, sampler: Sampler, output_len: int, stop_tokens, seed: int, prefill_s: float = 0.0
) -> Trial:  # fmt: skip
    cache.truncate(len(prompt.tokens))
    memory = PeakMemory(model.device)
    memory.reset()
    drafter = make_drafter(config, model)
    timer = PhaseTimer(model.device)
    begin = synchronize(model.device)
    rounds = decode(
        model, cache, [prompt.tokens], logits, drafter, draft_len=config.draft_len, sampler=sampler, max_new_tokens=output_len,
        generators=[torch.Generator(device=model.device).manual_seed(seed)], stop_tokens=stop_tokens, mark=timer.mark,
    )  # fmt: skip
    output = list(next(rounds).tokens[0])
    first = synchronize(model.device)
    drafted, accepted = [], []
    for round_ in rounds:
        output += round_.tokens[0]
        drafted.append(round_.drafted[0])
        accepted.append(round_.accepted[0])
    end = synchronize(model.device)
    phases = timer.seconds()
    return Trial(
        config=config,
        text=prompt.key,
        output_len=len(output),
        prefill_s=prefill_s,
        start_s=first - begin,
        decode_s=end - first,
        drafted=drafted,
        accepted=accepted,
        round_s=[sum(parts) for parts in zip(*(phases.get(phase, []) for phase in ("draft", "verify", "commit")))],
        cache_bytes=cache.nbytes + drafter.nbytes,
        peak_bytes=memory.read(),
    )
