"""Decoding runs and their distributions, for tests that every drafter takes."""

import itertools

import numpy as np
import torch
from scipy import stats
from tiny import prefilled, random_prompt

from planner.profiler.acceptance import write_texts
from planner.profiler.texts import Prompt
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.protocol import TargetText
from planner.runtime.sampling import probabilities
from planner.specs import PLAIN, Sampler

GREEDY = Sampler()


def run(model, prompts, config=PLAIN, drafter=None, sampler=GREEDY, seed=0, new_tokens=40, stop_tokens=()):
    cache, logits = prefilled(model, prompts, cache_capacity(max(map(len, prompts)), new_tokens, config.verified or 6))
    drafter = drafter or make_drafter(config, model, batch=len(prompts))
    generators = [torch.Generator(device=model.device).manual_seed(seed + b) for b in range(len(prompts))]
    rounds = list(
        decode(model, cache, prompts, logits, drafter, draft_len=config.draft_len or 4, sampler=sampler, generators=generators,
               max_new_tokens=new_tokens, stop_tokens=stop_tokens)
    )  # fmt: skip
    return [[t for r in rounds for t in r.tokens[b]] for b in range(len(prompts))], rounds


def written(model, prompt, sampler, count=1, output_len=24, seed=0, stop_tokens=()) -> list[TargetText]:
    """Continuations of one prompt by plain decoding."""
    one, logits = prefilled(model, [prompt], len(prompt))
    cache = model.new_cache(len(prompt) + output_len, batch=count)
    cache.take(one, len(prompt))
    texts = write_texts(
        model, cache, [Prompt("kind", "source", 0, len(prompt), prompt)] * count, len(prompt), logits.expand(count, -1), sampler,
        output_len=output_len, stop_tokens=stop_tokens, seeds=[seed + b for b in range(count)],
    )  # fmt: skip
    return [text.target_text for text in texts]


def joint_frequencies(model, config, sampler, drafter=None, runs=4000, batch=100, prompt=random_prompt(30, seed=3)):
    """How often each pair (token 2, token 3) was written, given that token 1 is free."""
    one, logits = prefilled(model, [prompt], 60)
    cache = model.new_cache(60 + config.verified, batch=batch)
    cache.take(one, len(prompt))
    counts = np.zeros((61, 61))
    for run_index in range(runs // batch):
        cache.lengths = [len(prompt)] * batch
        rounds = decode(
            model, cache, [prompt] * batch, logits.expand(batch, -1), drafter or make_drafter(config, model, batch=batch),
            draft_len=config.draft_len or 2, sampler=sampler, max_new_tokens=4,
            generators=[torch.Generator().manual_seed(run_index * batch + b) for b in range(batch)],
        )  # fmt: skip
        three = itertools.islice(rounds, 3)  # the first token's and two more: each emits one token or more
        for pieces in zip(*(r.tokens for r in three)):
            text = list(itertools.chain.from_iterable(pieces))
            counts[text[1], text[2]] += 1
    return counts


def exact_pairs(model, sampler, prompt=random_prompt(30, seed=3)):
    """The same by enumeration of the target's distribution."""
    cache, logits = prefilled(model, [prompt], 60)
    first = probabilities(logits, sampler)[0]

    def after(tokens):
        cache.truncate(len(prompt))
        positions = torch.arange(len(prompt), len(prompt) + tokens.shape[1])[None]
        view_cache, _ = prefilled(model, [prompt], 60)
        big = model.new_cache(60, batch=len(tokens))
        big.take(view_cache, len(prompt))
        hidden = model(tokens, positions.expand(len(tokens), -1), big, big.causal_mask(tokens.shape[1])).hidden
        return probabilities(model.logits(hidden[:, -1]), sampler)

    with torch.inference_mode():
        second = after(torch.arange(61)[:, None])  # [x0, x1]
        pair = first[:, None] * second
        grid = torch.cartesian_prod(torch.arange(61), torch.arange(61))
        third = after(grid).view(61, 61, 61)  # [x0, x1, x2]
    return torch.einsum("ab,abc->bc", pair, third).numpy()


def p_value(counts, expected):
    """Chi-square over the cells that expect at least 5, the rest pooled."""
    expected = expected / expected.sum() * counts.sum()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    predicted = np.append(expected[large], expected[~large].sum())
    return stats.chisquare(observed, predicted * observed.sum() / predicted.sum()).pvalue
