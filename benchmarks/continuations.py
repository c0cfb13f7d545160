"""What the target writes behind prompts, context by context and temperature by temperature: the texts that drafters are replayed along."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import progress

from planner.measurements import Text
from planner.profiler.acceptance import write_texts
from planner.profiler.texts import Prompt
from planner.runtime.drafters.protocol import TargetText
from planner.runtime.model import Transformer, prefill
from planner.specs import Sampler


class Continuation(NamedTuple):
    number: int  # of the prompt
    context_len: int
    temperature: float
    text: Text
    target_text: TargetText  # whose cache is overwritten by the next one


def continuations(
    model: Transformer,
    prompts: list[Prompt],  # as long as the longest context
    contexts: list[int],  # rising
    temperatures: list[float],
    *,
    output_len: int,
    group: int,  # prompts that are written side by side
    wanted: Callable[[int, int, float], bool] = lambda number, context_len, temperature: True,
) -> Iterator[Continuation]:
    """Each prompt is processed once: a shorter context is the beginning of a longer one. Groups with nothing wanted are passed over."""
    for first in range(0, len(prompts), group):
        numbers, part = range(first, min(first + group, len(prompts))), prompts[first : first + group]
        cells = {(c, t): [n for n in numbers if wanted(n, c, t)] for c in contexts for t in temperatures}
        if not any(cells.values()):
            continue
        cache = model.new_cache(contexts[-1] + output_len, batch=len(part))
        for begin, context_len in zip([0, *contexts], contexts):
            cache.truncate(begin)
            logits = torch.cat([prefill(model, torch.tensor([prompt.tokens[begin:context_len]]), cache.stream(b)) for b, prompt in enumerate(part)])
            for index, temperature in enumerate(temperatures):
                if not cells[context_len, temperature]:
                    continue
                cache.lengths = [context_len] * len(part)
                written = write_texts(
                    model, cache, part, context_len, logits, Sampler(temperature=temperature), output_len=output_len, stop_tokens=(),
                    seeds=[1000 * index + n for n in numbers],
                )  # fmt: skip
                for number in cells[context_len, temperature]:
                    text, target_text = written[number - first]
                    yield Continuation(number, context_len, temperature, text, target_text)
                    target_text.prompt_caches.clear()
                    progress(f"text {number + 1} of {len(prompts)}, context {context_len}, temperature {temperature:g}")
            cache.lengths = [context_len] * len(part)
