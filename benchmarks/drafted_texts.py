"""How many drafted tokens a target accepts, token by token along texts that differ. Nothing here is a curve.

R  requests of a data set        T  tokens of each        K  tokens drafted a round

Every token of a text has its own probability of being drafted right: requests differ, each text passes through stretches of
two or three difficulties, and tokens differ inside a stretch. A round starts where the last one ended, after a rejected token or
after the bonus token, so counters at one K are not those at another.
"""

from typing import NamedTuple

import numpy as np

NUM_REQUESTS, NUM_TOKENS, MAX_DRAFT_LEN = 512, 128, 8


class Drafted(NamedTuple):
    """One drafter on one data set."""

    accept: np.ndarray  # [R, T] P(token t is accepted where it is the first of a draft)
    decay: np.ndarray  # [MAX_DRAFT_LEN] factor on it by offset in the draft
    found: np.ndarray  # [R, T] whether a round that starts here drafts at all (an n-gram often has nothing to copy)


class Counters(NamedTuple):
    """What a benchmark would count, of one cell."""

    tokens_per_round: float
    acceptance: tuple[float, ...]  # [i] accepted at i / drafted at i after i accepted ones; rounds that draft nothing do not count
    drafting: float  # share of rounds that draft


class Texts(NamedTuple):
    """What the drafters of one engine share: the texts."""

    stretch: np.ndarray  # [R, T] int: 0 easy, 1 hard, 2 copied from the prompt
    request: np.ndarray  # [R] standard normal
    token: np.ndarray  # [R, T] standard normal


def draw_texts(rng: np.random.Generator) -> Texts:
    lengths = np.array([rng.uniform(15, 60), rng.uniform(6, 25), rng.uniform(10, 40)])  # mean tokens of a stretch
    weight = np.array([0.5, 0.5, rng.choice([0.0, 0.05, 0.2])])
    stretch = np.empty((NUM_REQUESTS, NUM_TOKENS), dtype=np.int64)
    now = rng.choice(3, size=NUM_REQUESTS, p=weight / weight.sum())
    for t in range(NUM_TOKENS):
        ends = rng.random(NUM_REQUESTS) < 1 / lengths[now]
        now = np.where(ends, rng.choice(3, size=NUM_REQUESTS, p=weight / weight.sum()), now)
        stretch[:, t] = now
    return Texts(stretch, rng.standard_normal(NUM_REQUESTS), rng.standard_normal((NUM_REQUESTS, NUM_TOKENS)))


def draw_drafted(texts: Texts, method: str, rng: np.random.Generator) -> Drafted:
    """One drafter: how well it drafts these texts depends on what it is."""
    shape = (NUM_REQUESTS, NUM_TOKENS)
    if method == "ngram":
        chance = np.array([rng.uniform(0.1, 0.3), rng.uniform(0.03, 0.12), rng.uniform(0.6, 0.9)])
        right = np.array([rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.3), rng.uniform(0.85, 0.97)])
        found = rng.random(shape) < chance[texts.stretch]
        return Drafted(right[texts.stretch], np.ones(MAX_DRAFT_LEN), found)
    mean, slope = {
        "draft_model": (rng.uniform(0.4, 2.0), 1.0),
        "eagle3": (rng.uniform(0.4, 2.0), rng.uniform(0.92, 0.985)),
        "mtp": (rng.uniform(1.2, 2.8), rng.uniform(0.8, 0.93)),
        "dflash": (rng.uniform(0.6, 2.2), rng.uniform(0.93, 0.99)),
    }[method]
    easy = rng.uniform(0.4, 1.4)
    between, within = rng.uniform(0.2, 0.6), rng.uniform(0.5, 2.0)
    logit = mean + np.array([easy, -easy, 1.5 * easy])[texts.stretch]
    logit += between * (0.8 * texts.request + 0.6 * rng.standard_normal(NUM_REQUESTS))[:, None]
    logit += within * (0.8 * texts.token + 0.6 * rng.standard_normal(shape))
    return Drafted(1 / (1 + np.exp(-logit)), slope ** np.arange(MAX_DRAFT_LEN), np.ones(shape, dtype=bool))


def expected(drafted: Drafted, draft_len: int) -> Counters:
    """The mean over all requests: the distribution of the offset inside a round, carried from token to token."""
    started, tried, kept, drafting = 0.0, np.zeros(draft_len), np.zeros(draft_len), 0.0
    offset = np.zeros((NUM_REQUESTS, draft_len + 1))  # [R, K+1] P(the next token is the one at this offset); the last is the bonus
    offset[:, 0] = 1.0
    for t in range(NUM_TOKENS):
        started += offset[:, 0].sum()
        trying = offset[:, :draft_len].copy()
        trying[:, 0] *= drafted.found[:, t]
        drafting += trying[:, 0].sum()
        keeping = trying * np.outer(drafted.accept[:, t], drafted.decay[:draft_len])
        tried += trying.sum(axis=0)
        kept += keeping.sum(axis=0)
        offset[:, 1:] = keeping
        offset[:, 0] = 1.0 - keeping.sum(axis=1)
    return Counters(float(NUM_REQUESTS * NUM_TOKENS / started), tuple((kept / tried).tolist()), float(drafting / started))


def simulate(drafted: Drafted, draft_len: np.ndarray, num_requests: np.ndarray, rng: np.random.Generator) -> list[Counters]:
    """One benchmark run per cell, as drawn: draft_len [n], num_requests [n] requests taken from the data set."""
    cell = np.repeat(np.arange(len(draft_len)), num_requests)  # [rows] one row per request
    request = rng.integers(NUM_REQUESTS, size=len(cell))
    limit, offset = draft_len[cell], np.zeros(len(cell), dtype=np.int64)
    size, width = len(draft_len), MAX_DRAFT_LEN + 1
    counts = np.zeros(size * width * 3, dtype=np.int64)  # of tokens by cell, offset and what became of them
    accept, found = np.ascontiguousarray(drafted.accept.T, dtype=np.float32), np.ascontiguousarray(drafted.found.T)  # [T, R]
    decay, place = np.append(drafted.decay, 0.0).astype(np.float32), cell * width
    for t in range(NUM_TOKENS):
        trying = (offset < limit) & (found[t, request] | (offset > 0))
        keeping = trying & (rng.random(len(cell), dtype=np.float32) < accept[t, request] * decay[offset])
        counts += np.bincount((place + offset) * 3 + trying + keeping, minlength=len(counts))
        offset = (offset + 1) * keeping
    counts = counts.reshape(size, width, 3)
    started, tried, kept = counts[:, 0].sum(axis=1), counts[:, :, 1:].sum(axis=2), counts[:, :, 2]
    out = []
    for i, k in enumerate(draft_len):
        seen = int((np.append(tried[i, :k], 0) == 0).argmax())  # positions that were tried at least once
        acceptance = tuple((kept[i, :seen] / tried[i, :seen]).tolist())
        out.append(Counters(float(num_requests[i] * NUM_TOKENS / started[i]), acceptance, float(tried[i, 0] / started[i]) if k else 0.0))
    return out
