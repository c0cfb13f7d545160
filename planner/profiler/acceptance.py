"""Acceptance by replay: the target writes texts once, every drafter and budget is judged along them.

The output of speculative decoding follows the target's p, and P(a draft is accepted and is x) = min(p, q)(x). So given
that the text says x, the draft was accepted with probability min(1, q(x) / p(x)), p and q after the sampler. Each
sampler needs texts of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from planner.measurements import AcceptanceSample, Packed, Text, TreeSample
from planner.profiler.texts import Prompt, distinct_4grams
from planner.runtime.decode import decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.none import NoDrafter
from planner.runtime.drafters.protocol import TargetText
from planner.runtime.kv_cache import KVCache
from planner.runtime.model import PREFILL_CHUNK, Transformer
from planner.runtime.sampling import probability_of
from planner.specs import DraftConfig, Sampler


class WrittenText(NamedTuple):
    text: Text
    target_text: TargetText


def write_texts(
    model: Transformer,
    cache: KVCache,  # B prompts of one length committed, room for output_len more
    prompts: list[Prompt],  # B
    context_len: int,  # tokens of each prompt that are committed
    first_logits: torch.Tensor,  # [B, V]
    sampler: Sampler,
    *,
    output_len: int,
    stop_tokens: tuple[int, ...],
    seeds: list[int],
) -> list[WrittenText | None]:
    """Let the target continue all prompts at once; None for one that ended with its first token, which leaves nothing to draft.

    Afterwards each stream's cache holds its text.
    """
    histories = [prompt.tokens[:context_len] for prompt in prompts]
    generators = [torch.Generator(device=model.device).manual_seed(seed) for seed in seeds]
    rounds = decode(
        model, cache, histories, first_logits, NoDrafter(model.spec.vocab_size, model.device), draft_len=0, sampler=sampler,
        generators=generators, max_new_tokens=output_len, stop_tokens=stop_tokens,
    )  # fmt: skip
    outputs = [[] for _ in prompts]
    for round_ in rounds:
        for output, tokens in zip(outputs, round_.tokens, strict=True):
            output += tokens
    written = []
    for b, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if len(output) < 2:
            written.append(None)
            continue
        text = Text(
            kind=prompt.kind, source=prompt.source, offset=prompt.offset, extent=prompt.extent, context_len=context_len, sampler=sampler,
            output_len=len(output), distinct_4grams=distinct_4grams(output),
        )  # fmt: skip
        written.append(WrittenText(text, judge(model, cache.stream(b), histories[b], output, sampler).target_text))
    return written


def replay(model: Transformer, written: TargetText, config: DraftConfig, text_index: int) -> AcceptanceSample:
    """One drafter along one text; draft_len of the configuration is the longest of interest."""
    result = make_drafter(config, model).replay(written, config.draft_len)
    return AcceptanceSample(
        text=text_index,
        drafter=config.drafter,
        kv=config.kv,
        accept_prob=Packed.pack((result.accept_prob * 255).round()),
        drafted=Packed.pack(result.drafted),
    )


def replay_trees(
    model: Transformer, written: TargetText, config: DraftConfig, draft_lens: Sequence[int], max_size: int, text_index: int
) -> list[TreeSample]:
    """Trees of one drafter along one text, for each number of levels, from one pass; draft_len of the configuration is the largest."""
    found = make_drafter(config, model).replay_trees(written, draft_lens, max_size)
    return [TreeSample.of(text=text_index, drafter=config.drafter, kv=config.kv, sizes=trees.sizes, probs=trees.probs) for trees in found]


class Judged(NamedTuple):
    target_text: TargetText
    own_probs: torch.Tensor  # [T-1] of token t+1 in this pass; 0 where the sampler, greedy too, could not have drawn it


@torch.inference_mode()
def judge(model: Transformer, cache: KVCache, prompt: list[int], output: list[int], sampler: Sampler) -> Judged:
    """The probability of each token in wide passes, as verification would see it; rewrites what the cache holds of the text.

    cache  one stream that holds the prompt, with room for the output
    """
    L, T = len(prompt), len(output)
    cache.truncate(L)
    tokens = torch.tensor(output, device=model.device)
    own_probs = []
    for first in range(0, T - 1, PREFILL_CHUNK):
        read = tokens[first : min(first + PREFILL_CHUNK, T - 1)]
        positions = torch.arange(L + first, L + first + len(read), device=model.device)[None]
        hidden = model(read[None], positions, cache, taps=cache.taps).hidden[0]
        cache.commit([len(read)])
        own_probs.append(probability_of(model.logits(hidden), tokens[first + 1 : first + 1 + len(read)], sampler))
    own_probs = torch.cat(own_probs)
    # Greedy: the text is the argmax by construction; a wide pass in bfloat16 disagrees with the narrow one at near-ties.
    probs = torch.ones_like(own_probs) if sampler.greedy else own_probs
    return Judged(TargetText(prompt, output, probs, cache, sampler, {}), own_probs)
