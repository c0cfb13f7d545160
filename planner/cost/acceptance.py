"""How many rounds a text takes, by drafter, kv budget, draft_len, tree, context and sampler: from replayed texts.

The unit is the text. A setting's value is a mean over texts, its uncertainty comes from their scatter, and two
settings are compared on the same texts. Between profiled budgets (log scale) and contexts the rounds per token are
interpolated linearly; outside of them there is no answer.
"""

import math
from collections import Counter, defaultdict
from typing import NamedTuple

import msgspec
import numpy as np

from planner.cost.renewal import expected_rounds
from planner.cost.tree_rounds import TreeText, nodes_of, tree_text, walk_trees
from planner.errors import BadInput
from planner.measurements import MIN_DISTINCT_4GRAMS, Profile, Text, TreeSample
from planner.specs import DraftConfig, DrafterSpec, FullKV, KVPolicy, Tree, Workload, describe, describe_sampler

MIN_TEXTS = 2  # below, there is no scatter between texts to make an interval of
CONTEXT_SLACK = 0.1  # a workload this close to a profiled context uses it as it is, and says so


class Rounds(NamedTuple):
    """Rounds per generated token, text by text, at one profiled context."""

    texts: np.ndarray  # [n] identities, ascending: the same text in two settings has the same number
    by_drafted: np.ndarray  # [n, K+1] rounds per token that draft 0..K; of trees [n, N+1], that verify 0..N nodes
    chance: np.ndarray  # [n] variance of the rounds per token by chance of acceptance


class Stratum(NamedTuple):
    """A profiled context's share in an estimate."""

    weight: float
    context_len: int
    rounds: Rounds


class AcceptanceModel:
    def __init__(self, profile: Profile):
        self._profile = profile
        self._cells: dict[tuple, dict[int, list]] = defaultdict(lambda: defaultdict(list))  # curve -> budget -> samples
        for sample in profile.acceptance:
            self._cells[_curve(sample.drafter, sample.kv, None, profile.texts[sample.text])][_budget(sample.kv)].append(sample)
        for sample in profile.trees:
            self._cells[_curve(sample.drafter, sample.kv, sample.draft_len, profile.texts[sample.text])][_budget(sample.kv)].append(sample)
        self._num_texts = Counter((text.context_len, text.sampler) for text in profile.texts)
        self._walks: dict[tuple, dict[int, Rounds]] = {}  # by curve, draft_len or tree, and output_len

    @property
    def drafters(self) -> list[DrafterSpec]:
        """The drafters that were replayed, in the order of the profile."""
        return list(dict.fromkeys(sample.drafter for sample in self._profile.acceptance))

    def policies(self, drafter: DrafterSpec) -> list[KVPolicy]:
        """The KV policies that were replayed with a drafter."""
        return list(dict.fromkeys(sample.kv for sample in self._profile.acceptance if sample.drafter == drafter))

    @property
    def trees(self) -> list[tuple[DrafterSpec, KVPolicy, int, int]]:
        """Drafter, policy, levels and most nodes of the trees that were replayed."""
        return list(dict.fromkeys((sample.drafter, sample.kv, sample.draft_len, sample.max_size) for sample in self._profile.trees))

    def tree_texts(self, config: DraftConfig, workload: Workload) -> list[tuple[float, TreeText]]:
        """Replayed trees and the weight of each, for the profiled contexts and budgets around a chain's; BadInput where there are none."""
        self._check(config, workload)
        contexts, _ = context_weights(self._profile.contexts, workload.context_len)
        found = []
        for context_len, share in contexts.items():
            budgets = self._budgets(config, config.draft_len, context_len, workload)
            for budget, weight in budget_weights(sorted(budgets), _budget(config.kv))[0].items():
                samples = budgets[budget]
                found += [(share * weight / len(samples), tree_text(sample, workload.output_len)) for sample in samples]
        return found

    def strata(self, config: DraftConfig, workload: Workload) -> tuple[list[Stratum], list[str]]:
        """Rounds per token at the profiled contexts around the workload's, and notes on what was assumed.

        BadInput where the profile says nothing: another sampler, drafter, context, budget or draft_len.
        """
        self._check(config, workload)
        weights, notes = context_weights(self._profile.contexts, workload.context_len)
        strata = []
        for context_len, weight in weights.items():
            rounds, more = self._rounds(config, context_len, workload)
            strata.append(Stratum(weight, context_len, rounds))
            notes += [note for note in more if note not in notes]
        return strata, notes

    def _check(self, config: DraftConfig, workload: Workload) -> None:
        """BadInput for a sampler or a draft_len that was not profiled."""
        profile = self._profile
        if workload.sampler not in profile.samplers:
            known = "; ".join(describe_sampler(sampler) for sampler in profile.samplers)
            raise BadInput(
                f"acceptance was profiled for {known}, not for {describe_sampler(workload.sampler)}; profile it, acceptance does not carry over"
            )
        if config.draft_len > profile.max_draft_len:
            raise BadInput(
                f"draft_len must be at most {profile.max_draft_len}, the longest profiled, got {config.draft_len}; profile with --max-draft-len"
            )

    def _budgets(self, config: DraftConfig, levels: int | None, context_len: int, workload: Workload) -> dict[int, list]:
        """What was replayed at a context, by budget. levels  of trees; None: chains"""
        found = self._cells.get((config.drafter, _family(config.kv), levels, context_len, workload.sampler))
        if found:
            return found
        what = f"{describe(config)} at context {context_len}, {describe_sampler(workload.sampler)}"
        if levels is None:
            raise BadInput(f"the profile holds no acceptance of {what}")
        own = sorted({key[2] for key in self._cells if key[0] == config.drafter and key[2] is not None})
        known = f"trees of this drafter of {' and '.join(map(str, own))} levels" if own else "no trees of this drafter"
        raise BadInput(f"the profile holds {known}, got {what}; profile with --tree-sizes and --tree-levels")

    def _rounds(self, config: DraftConfig, context_len: int, workload: Workload) -> tuple[Rounds, list[str]]:
        budgets = self._budgets(config, None if config.tree is None else config.draft_len, context_len, workload)
        weights, notes = budget_weights(sorted(budgets), _budget(config.kv))
        walks = self._walk(budgets, config.draft_len, workload) if config.tree is None else self._walk_trees(budgets, config.tree, workload)
        parts = [(weight, walks[budget]) for budget, weight in weights.items()]
        shared = sorted(set.intersection(*(set(rounds.texts) for _, rounds in parts)))
        written = self._num_texts[context_len, workload.sampler]
        if len(shared) < min(MIN_TEXTS, written):
            raise BadInput(
                f"{describe(config)} was replayed on {len(shared)} of {written} texts at context {context_len}, an interval needs at least {MIN_TEXTS}; "
                "see the profile's failures"
            )
        if len(shared) < written:
            notes.append(f"{describe(config)} was replayed on {len(shared)} of {written} texts at context {context_len}: see the profile's failures")
        picks = [(weight, rounds, np.searchsorted(rounds.texts, shared)) for weight, rounds in parts]
        by_drafted = sum(weight * rounds.by_drafted[pick] for weight, rounds, pick in picks)
        chance = sum(weight * rounds.chance[pick] for weight, rounds, pick in picks)
        texts = [self._profile.texts[index] for index in shared]
        repetitive = sum(text.distinct_4grams < MIN_DISTINCT_4GRAMS for text in texts)
        if repetitive:
            notes.append(
                f"{repetitive} of {len(texts)} texts at context {context_len} repeat themselves (distinct 4-grams below {MIN_DISTINCT_4GRAMS}): acceptance is inflated"
            )
        longest = max(text.output_len for text in texts)
        if workload.output_len > longest:
            notes.append(f"acceptance beyond the first {longest} tokens of an output is assumed to stay the same")
        return Rounds(np.array(shared), by_drafted, chance), notes

    def _walk(self, budgets: dict[int, list], draft_len: int, workload: Workload) -> dict[int, Rounds]:
        """The rounds of all budgets of one curve: they are walked together, which takes hardly longer than one of them."""
        key = (id(budgets), draft_len, workload.output_len)
        if key not in self._walks:
            by_length = defaultdict(list)  # texts of one length
            for budget, samples in budgets.items():
                for sample in samples:
                    accept_prob, drafted = _unpacked(sample, workload.output_len)
                    by_length[len(drafted)].append((budget, sample.text, accept_prob, drafted))
            pieces = defaultdict(list)
            for tokens, rows in by_length.items():
                owners, texts, accept_prob, drafted = zip(*rows, strict=True)
                walk = expected_rounds(np.stack(accept_prob), np.stack(drafted), draft_len)
                for row, budget in enumerate(owners):
                    pieces[budget].append((texts[row], walk.by_drafted[row] / tokens, walk.variance[row] / tokens**2))
            self._walks[key] = {
                budget: Rounds(*(np.array(column) for column in zip(*sorted(own, key=lambda piece: piece[0]), strict=True)))
                for budget, own in pieces.items()
            }
        return self._walks[key]

    def _walk_trees(self, budgets: dict[int, list], tree: Tree, workload: Workload) -> dict[int, Rounds]:
        """The same of trees, whose rounds leave nothing to chance once the text is known."""
        key = (id(budgets), tree, workload.output_len)
        if key not in self._walks:
            self._walks[key] = {budget: _tree_rounds(samples, tree, workload.output_len) for budget, samples in budgets.items()}
        return self._walks[key]


def _tree_rounds(samples: list[TreeSample], tree: Tree, output_len: int) -> Rounds:
    least = min(sample.max_size for sample in samples)
    if tree.max_size > least:
        raise BadInput(f"trees were replayed up to {least} nodes, got one of {tree.max_size}; profile with --tree-sizes {tree.max_size}")
    samples = sorted(samples, key=lambda sample: sample.text)
    rows = []
    for sample in samples:
        text = tree_text(sample, output_len)
        rows.append(walk_trees(text, nodes_of(tree, text)).by_nodes[: tree.max_size + 1] / len(text.sizes))
    return Rounds(np.array([sample.text for sample in samples]), np.array(rows), np.zeros(len(rows)))


def fit_acceptance(profile: Profile) -> AcceptanceModel:
    """The acceptance of everything a profile replayed; milliseconds, nothing is stored."""
    return AcceptanceModel(profile)


def context_weights(contexts: list[int], context_len: int) -> tuple[dict[int, float], list[str]]:
    """Linear interpolation weights over the profiled contexts. BadInput outside of them, beyond a slack of 10 %."""
    contexts = sorted(contexts)
    if context_len in contexts:
        return {context_len: 1.0}, []
    nearest = contexts[0] if context_len < contexts[0] else contexts[-1]
    if contexts[0] < context_len < contexts[-1]:
        above = next(c for c in contexts if c > context_len)
        below = max(c for c in contexts if c < context_len)
        share = (context_len - below) / (above - below)
        return {below: 1 - share, above: share}, [f"context {context_len} is interpolated between {below} and {above}"]
    if abs(context_len - nearest) <= CONTEXT_SLACK * nearest:
        return {nearest: 1.0}, [f"acceptance at context {context_len} is taken from {nearest}"]
    known = ", ".join(map(str, contexts))
    raise BadInput(f"the profile covers contexts {known} (and 10 % beyond), got {context_len}; profile with --contexts {context_len}")


def budget_weights(budgets: list[int], budget: int) -> tuple[dict[int, float], list[str]]:
    """Interpolation weights over the profiled budgets, on a log scale. BadInput outside of them."""
    if budget in budgets:
        return {budget: 1.0}, []
    if not min(budgets) < budget < max(budgets):
        raise BadInput(f"the profile covers kv budgets {', '.join(map(str, budgets))}, got {budget}; profile with --kv-budgets {budget}")
    above = min(b for b in budgets if b > budget)
    below = max(b for b in budgets if b < budget)
    share = math.log(budget / below) / math.log(above / below)
    return {below: 1 - share, above: share}, [f"acceptance at kv budget {budget} is interpolated between {below} and {above}"]


def _unpacked(sample, output_len: int) -> tuple[np.ndarray, np.ndarray]:
    """accept_prob [S, K] and drafted [S] of the part of a text that a request of output_len tokens would write."""
    starts = min(sample.drafted.shape[0], output_len - 1)
    return sample.accept_prob.unpack()[:starts] / 255.0, sample.drafted.unpack()[:starts].astype(np.int64)


def _curve(drafter: DrafterSpec, kv: KVPolicy, levels: int | None, text: Text) -> tuple:
    """What must agree for two budgets to be points of one curve. levels  of trees; None: chains"""
    return drafter, _family(kv), levels, text.context_len, text.sampler


def _family(kv: KVPolicy) -> KVPolicy:
    """A policy without its budget: what must agree for two budgets to be points of one curve."""
    if isinstance(kv, FullKV):
        return kv
    return msgspec.structs.replace(kv, budget=2**30)


def _budget(kv: KVPolicy) -> int:
    return 0 if isinstance(kv, FullKV) else kv.budget
