"""How long a round takes at a running batch, and how sure that is; and how long the first token takes.

Every profiled batch has a fit of its own (round_fit.py), to its own cells: kernels change with the batch, so one law for
all of them would have to know the device. Between two profiled batches a round's time is interpolated linearly; outside
of them there is no answer. Each pass over the cells has a pace of its own, whatever the batch, which is divided out: a slow
minute is the machine's, not a cell's.

A round of a batch is that of all its streams. J  cells that can be left out, of every batch that an answer is made of
"""

import numpy as np

from planner.cost.round_fit import RoundFits, points_of
from planner.cost.tree_fit import TreeCell, TreeFit, fit_trees
from planner.errors import BadInput
from planner.measurements import Profile, RoundSample
from planner.specs import NO_DRAFTER, DraftConfig, DrafterSpec, describe, describe_drafter, selection_of


class LatencyModel:
    """Round times of everything a profile timed."""

    def __init__(self, profile: Profile):
        samples = [sample for sample in profile.rounds if sample.role == "cell"]
        pace = _pace(samples)
        self.drift = _drift(profile)
        self.unsteadiness = max(abs(self.drift), float(np.std(pace, ddof=1)) if len(pace) > 1 else 0.0)  # relative, common to all rounds of a moment
        self._prefill = {sample.context_len: np.array(sample.seconds) for sample in profile.prefill}
        chains = [sample for sample in samples if not sample.tree_size]
        self.max_draft_len = {drafter: max(x.draft_len for x in chains if x.drafter == drafter) for drafter in {x.drafter for x in chains}}
        self._start_s = {drafter: _start_s([x for x in samples if x.drafter == drafter]) for drafter in self.max_draft_len}  # by context
        ways = {(x.drafter, selection_of(x.kv)) for x in samples}
        self._start_s |= {way: _start_s([x for x in samples if (x.drafter, selection_of(x.kv)) == way]) for way in ways}

        by_batch = {batch: [x for x in samples if x.batch == batch] for batch in sorted({x.batch for x in samples if x.draft_len == 0})}
        self._fits, self._longest, self._trees = {}, {}, {}  # by batch; a batch at which plain decoding failed has no baseline and is left out
        for batch, own in by_batch.items():
            trees, own = ([x for x in own if (x.tree_size > 0) == tree] for tree in (True, False))
            longest = {drafter: max(x.draft_len for x in own if x.drafter == drafter) for drafter in {x.drafter for x in own}}
            points = [point for cell, sample in enumerate(own) for point in points_of(cell, sample, pace)]
            self._fits[batch], self._longest[batch] = RoundFits(points, max(longest.values())), longest
            cells = [TreeCell(x.draft_len, point) for x in trees if x.drafter in longest for point in points_of(0, x, pace) if point.drafted]
            self._trees[batch] = fit_trees(cells, self._fits[batch])

    def round_s(self, config: DraftConfig, context_len: int, position: float, batch: int = 1) -> np.ndarray:
        """Seconds of a round of `batch` streams that verifies 0..config.verified tokens with `position` tokens committed in each.

        [1 + J, verified + 1]: the fit to all cells first, then the J fits with a cell left out, the same cells for every
        configuration of a batch. `context_len` is the prompt's, which decides what a sparse cache holds. BadInput where
        the profile timed nothing to go by.
        """
        weights, _ = self._weights(batch)
        parts = []
        for timed, weight in weights.items():
            self._check(config, timed)
            fit = self._fits[timed] if config.tree is None else self._tree_fit(config, timed)
            parts.append((weight, fit.round_s(config, context_len, position)))
        whole = sum(weight * seconds[0] for weight, seconds in parts)
        moved = [weight * (seconds[1:] - seconds[0]) for weight, seconds in parts]  # a cell left out moves the fit of its own batch only
        return whole + np.concatenate([np.zeros((1, len(whole))), *moved])

    def tree_costs(self, config: DraftConfig, context_len: int, position: float, batch: int = 1) -> tuple[float, np.ndarray]:
        """Seconds to draft an adaptive tree, and [max_size + 1] to verify 0.. nodes of it. BadInput where the profile timed none."""
        draft_s, verify_s = 0.0, np.zeros(config.verified + 1)
        for timed, weight in self._weights(batch)[0].items():
            self._check(config, timed)
            own_draft_s, own_verify_s = self._tree_fit(config, timed).costs(config, context_len, position)
            draft_s, verify_s = draft_s + weight * own_draft_s, verify_s + weight * own_verify_s
        return draft_s, verify_s

    def tree_sizes(self, drafter: DrafterSpec, batch: int = 1) -> list[int]:
        """Sizes of trees that were timed at a batch, or at both around it."""
        around = [set(own.sizes) if (own := self._trees[timed].get(drafter)) else set() for timed in self._weights(batch)[0]]
        return sorted(set.intersection(*around))

    def notes(self, batch: int = 1) -> list[str]:
        """What was assumed about a batch."""
        return self._weights(batch)[1]

    def error(self, batch: int = 1, tree_of: DrafterSpec | None = None) -> float:
        """Relative error of a round in a cell not measured; between two batches, the larger one's. tree_of  with a tree of this drafter"""
        timed = self._weights(batch)[0]
        return max([self._fits[own].error for own in timed] + [self._trees[own][tree_of].error for own in timed if tree_of in self._trees[own]])

    def plain_error(self, batch: int = 1) -> float:
        """Relative standard error of a round of plain decoding."""
        return max(self._fits[timed].plain_error for timed in self._weights(batch)[0])

    def form(self, batch: int = 1) -> str:
        """The form of the fit in words."""
        return " and ".join(dict.fromkeys(self._fits[timed].form for timed in self._weights(batch)[0]))

    def ttft_s(self, config: DraftConfig, context_len: int) -> tuple[float, float]:
        """Prefill, selection and the first token: seconds and their standard deviation between prompts."""
        nearest = min(max(context_len, min(self._prefill)), max(self._prefill))  # in proportion outside of the contexts
        prefill = _at_context({c: float(seconds.mean()) for c, seconds in self._prefill.items()}, nearest) * context_len / nearest
        spread = max(float(np.std(seconds / seconds.mean())) for seconds in self._prefill.values())
        return prefill + self._start(config, context_len), prefill * spread

    def choice_s(self, config: DraftConfig, context_len: int) -> float | None:
        """Seconds to choose once what a sparse cache keeps, which a refresh does again; None where it was not timed by itself.

        A draft model reads the prompt before it chooses, and both were timed together.
        """
        if config.drafter.kind != "self_sparse":
            return None
        return max(0.0, self._start(config, context_len) - _at_context(self._start_s[NO_DRAFTER], context_len))

    def _start(self, config: DraftConfig, context_len: int) -> float:
        """A drafter's own prefill, its choice and the first token; of its other selections where this one was not timed."""
        return _at_context(self._start_s.get((config.drafter, selection_of(config.kv)), self._start_s[config.drafter]), context_len)

    def _weights(self, batch: int) -> tuple[dict[int, float], list[str]]:
        return batch_weights(list(self._fits), batch)

    def _tree_fit(self, config: DraftConfig, batch: int) -> TreeFit:
        if config.drafter not in self._trees[batch]:
            at = f" at batch {batch}" if len(self._fits) > 1 else ""
            raise BadInput(
                f"the profile timed no trees of drafter {describe_drafter(config.drafter)}{at}, got {describe(config)}; profile with --tree-sizes"
            )
        return self._trees[batch][config.drafter]

    def _check(self, config: DraftConfig, batch: int) -> None:
        """BadInput for a drafter or a draft_len that was not timed at a profiled batch."""
        longest = self._longest[batch].get(config.drafter)
        at = f" at batch {batch}" if len(self._fits) > 1 else ""
        if longest is None:
            timed = ", ".join(describe_drafter(drafter) for drafter in self._longest[batch] if drafter != NO_DRAFTER)
            others = f", only of {timed}" if timed else ""
            raise BadInput(f"the profile timed no round of {describe(config)}{at}{others}; profile with this drafter")
        if config.draft_len > longest:
            raise BadInput(f"rounds were timed up to draft_len {longest}{at}, got {config.draft_len}; profile with --max-draft-len")


def fit_latency(profile: Profile) -> LatencyModel:
    """Round times of everything a profile timed."""
    return LatencyModel(profile)


def batch_weights(batches: list[int], batch: int) -> tuple[dict[int, float], list[str]]:
    """Linear interpolation weights over the profiled batches. BadInput outside of them: cost beyond them is not known."""
    if batch in batches:
        return {batch: 1.0}, []
    above = min((b for b in batches if b > batch), default=None)
    below = max((b for b in batches if b < batch), default=None)
    if above is None or below is None:
        known, wanted = ", ".join(map(str, batches)) or "nothing", ",".join(map(str, sorted({*batches, batch})))
        raise BadInput(f"the profile timed rounds at batch {known}, got {batch}; profile with `planner profile --batches {wanted}`")
    share = (batch - below) / (above - below)
    note = f"round time at batch {batch} is interpolated between {below} and {above}; profile with --batches {batch} if steps between them matter"
    return {below: 1 - share, above: share}, [note]


def _start_s(samples: list[RoundSample]) -> dict[int, float]:
    """A drafter's own prefill, selection and the first token, by context: at its smallest batch, for a request arrives by itself."""
    batch = min(sample.batch for sample in samples)
    own = [sample for sample in samples if sample.batch == batch]
    contexts = {sample.context_len for sample in own}
    return {c: float(np.median([seconds for sample in own if sample.context_len == c for seconds in sample.start_s])) for c in contexts}


def _at_context(seconds: dict[int, float], context_len: int) -> float:
    """Interpolated between the contexts."""
    contexts = sorted(seconds)
    return float(np.interp(context_len, contexts, [seconds[c] for c in contexts]))


def _pace(samples: list[RoundSample]) -> np.ndarray:
    """How slow each pass was, mean 1: the median over cells of a pass's rounds against the cell's own mean. One pace where passes do not match.

    Every pass holds every cell, so what all of them share is the machine's and not theirs.
    """
    counts = {len(sample.start_s) for sample in samples}
    if len(counts) != 1 or min(len(sample.draft_s) for sample in samples) < max(counts):
        return np.ones(1)
    rounds = np.array(
        [[np.median(part) for part in np.array_split(np.maximum(sample.round_s, 1e-9), len(sample.start_s))] for sample in samples]
    )  # [cells, passes]
    pace = np.median(rounds / rounds.mean(1, keepdims=True), axis=0)
    return pace / pace.mean()


def _drift(profile: Profile) -> float:
    """Relative change of the first cell between the beginning and the end of the profile."""
    again = next((sample for sample in profile.rounds if sample.role == "drift"), None)
    if again is None:
        return 0.0
    key = (again.drafter, again.kv, again.draft_len, again.tree_size, again.context_len, again.batch)
    cells = [sample for sample in profile.rounds if sample.role == "cell"]
    first = next((x for x in cells if (x.drafter, x.kv, x.draft_len, x.tree_size, x.context_len, x.batch) == key), None)
    if first is None:
        raise BadInput(
            f"a drift sample repeats a cell, the profile has none of draft_len {again.draft_len} at context {again.context_len}; profile again"
        )
    return float(np.median(again.round_s) / np.median(first.round_s) - 1)
