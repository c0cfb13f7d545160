"""Trees whose acceptance and times are chosen, added to a made profile."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec.structs import replace

from planner.draft_trees import best_first
from planner.measurements import Profile, RoundSample, TreeSample
from planner.specs import DraftConfig

CANDIDATES = 8
ROUNDS = 6


def stepped_s(nodes: int, levels: int, context_len: int) -> tuple[float, float, float]:
    """Seconds of draft, verify and commit: nodes are nearly free up to 16, then cost a step."""
    return 4e-3 * levels + 64e-6 * levels + 2e-4, 11e-3 + 1e-5 * nodes + 8e-3 * (nodes > 16) + 1e-6 * context_len, 2e-4


def with_trees(
    profile: Profile,
    *,
    reported: float = 0.7,  # what the drafter gives to its first candidate; to the others in turn the same share of what is left
    true: float | Callable[[int], float] = 0.7,  # how often the text goes on with the first, likewise; of a text's number
    sizes: Sequence[int] = (1, 4, 16, 64),
    levels: Sequence[int] = (4,),
    tree_s: Callable[[int, int, int], tuple[float, float, float]] = stepped_s,
    seed: int = 0,
) -> Profile:
    """The same profile, in which every drafter that has probabilities was replayed and timed with trees."""
    rng, trees = np.random.default_rng(seed), []
    for sample in profile.acceptance:
        if sample.drafter.kind == "ngram":
            continue
        chance = true(sample.text) if callable(true) else true
        S = profile.texts[sample.text].output_len - 1
        ranks = rng.geometric(chance, (S + max(levels), max(levels))) - 1  # which candidate the text goes on with, at each level of each round
        for K in levels:
            trees.append(made_sample(sample, S, K, max(sizes), reported, ranks))
    timed = {}  # as a profile does, with the smallest cache
    for x in sorted(profile.rounds, key=lambda x: x.kv.read(x.context_len)):
        if x.draft_len and x.drafter.kind != "ngram":
            timed.setdefault((x.drafter, x.context_len, x.batch), x.kv)
    rounds = []
    for (drafter, context_len, batch), kv in timed.items():
        for size in sizes:
            draft_s, verify_s, commit_s = tree_s(size, max(levels), context_len)
            rounds.append(
                RoundSample(
                    drafter=drafter, kv=kv, draft_len=max(levels), tree_size=size, context_len=context_len, batch=batch,
                    position=[context_len + 3 * i for i in range(ROUNDS)], drafted=[size] * ROUNDS, draft_s=[draft_s] * ROUNDS,
                    verify_s=[verify_s] * ROUNDS, commit_s=[commit_s] * ROUNDS, warmup_s=[0.1], start_s=[1e-3] * 3,
                )
            )  # fmt: skip
    return replace(profile, trees=trees, rounds=profile.rounds + rounds)


def made_sample(sample, S: int, K: int, max_size: int, reported: float, ranks: np.ndarray) -> TreeSample:
    sizes, probs = np.zeros((S, K), int), np.zeros((S, max_size))
    grown = {}
    for s in range(S):
        room = min(K, S - 1 - s)
        if room not in grown:
            tree = best_first(np.tile(reported * (1 - reported) ** np.arange(CANDIDATES), (room, 1)), max_size, branching="all")
            paths = []
            for parent, rank in zip(tree.parents, tree.ranks, strict=True):
                paths.append((*(paths[parent] if parent >= 0 else ()), int(rank)))
            grown[room] = tree, {path: number + 1 for number, path in enumerate(paths)}
        tree, place = grown[room]
        probs[s, : len(tree.probs)] = tree.probs
        for depth in range(room):
            sizes[s, depth] = place.get(tuple(int(rank) for rank in ranks[s, : depth + 1]), 0)
    return TreeSample.of(text=sample.text, drafter=sample.drafter, kv=sample.kv, sizes=sizes, probs=probs)


def tree_of(drafter, kv, draft_len: int, tree) -> DraftConfig:
    return DraftConfig(drafter=drafter, kv=kv, draft_len=draft_len, tree=tree)
