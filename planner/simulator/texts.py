"""What drafts would be accepted along every request's text, drawn before anything runs.

A text is easy or hard as a whole: its level z is normal, and draft i (from 0) of a round is accepted with probability
expit(base_i + spread z), given that those before it were. base_i is solved for so that tokens over rounds, all requests
together as an engine counts them, is what was asked for at every draft_len. Hard texts have more rounds, so that is the
harmonic mean of the requests' own tokens per round where they generate alike.

Draws belong to a request and a position of its text, not to a round: a run that drafts more, less or nothing, in whatever
order, meets the same texts.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtri

from planner.errors import BadInput

LEVELS = ndtri((np.arange(256) + 0.5) / 256)  # of equal weight; stand for a normal distribution
SURE = 40.0  # logit of what always happens
SPREADS = np.linspace(0.0, 5.0, 51)  # that are tried for a measured deviation
MAX_TOKENS = 2**28  # of all requests together


class Walk(NamedTuple):
    """Rounds of one draft_len along all texts, each from behind its first token to its end.

    A place is one among the tokens of all texts, where a round starts.
    """

    places: np.ndarray  # [rounds + requests] text by text; the last of a text is its end
    index: np.ndarray  # [tokens + 1] where a place stands in `places`; -1: the walk passes over it
    last: np.ndarray  # [requests] where a text's end stands in `places`


class Texts:
    """The outputs of all requests, one behind the other."""

    def __init__(self, output_len: np.ndarray, accepted: np.ndarray):
        """accepted [tokens + 1]: how many drafts a round that starts there would accept, up to the longest draft_len"""
        self.start = np.cumsum(output_len) - output_len  # [requests]
        self.accepted = accepted
        self._output_len, self._walks = output_len, {}

    def walk(self, draft_len: int) -> Walk:
        if draft_len not in self._walks:
            self._walks[draft_len] = self._all_rounds(draft_len)
        return self._walks[draft_len]

    def _all_rounds(self, draft_len: int) -> Walk:
        end = self.start + self._output_len
        text, place = np.arange(len(end)), self.start + 1
        texts, places = [text], [place]
        while len(text := text[(going := place < end[text])]):
            place = place[going]
            place = np.minimum(place + 1 + np.minimum(self.accepted[place], draft_len), end[text])
            texts.append(text)
            places.append(place)
        order = np.argsort(np.concatenate(texts), kind="stable")
        walked = np.concatenate(places)[order]
        index = np.full(len(self.accepted), -1)
        index[walked] = np.arange(len(walked))
        return Walk(walked, index, np.cumsum(np.bincount(np.concatenate(texts), minlength=len(end))) - 1)


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Of one drafter."""

    tokens_per_round: tuple[tuple[float, ...], ...]  # [context][K - 1], of draft_len K = 1, 2, ...: tokens over rounds
    contexts: tuple[int, ...] = (1,)  # ascending; between them logits are interpolated in the logarithm, beyond them they stay
    spread: float = 0.5  # standard deviation between texts, of the logit of acceptance; 0: all alike

    def __post_init__(self):
        rows = self.tokens_per_round
        if not rows or len(rows) != len(self.contexts) or len({len(row) for row in rows}) != 1 or not 1 <= len(rows[0]) <= 255:
            raise BadInput(f"tokens per round need one row per context ({len(self.contexts)}), each of the same 1 to 255 draft lengths, got {rows}")
        if any(a >= b for a, b in zip((0, *self.contexts), self.contexts, strict=False)):
            raise BadInput(f"contexts must ascend from 1, got {self.contexts}")
        if not (0 <= self.spread <= SPREADS[-1]):
            raise BadInput(f"the spread of acceptance between texts must lie in [0, {SPREADS[-1]:g}], got {self.spread}")
        _ = self._bases  # refuses what no drafter can do

    @classmethod
    def with_sd(cls, *, tokens_per_round: tuple[tuple[float, ...], ...], contexts: tuple[int, ...] = (1,), relative_sd: float, draft_len: int):
        """Of texts whose own tokens per round, at one draft_len and the first context, have a standard deviation of so much of their mean."""
        below = cls(tokens_per_round=tokens_per_round, contexts=contexts, spread=0.0)
        for spread in SPREADS[1:]:
            try:
                above = cls(tokens_per_round=tokens_per_round, contexts=contexts, spread=float(spread))
            except BadInput:  # texts that differ this much cannot have all these means
                break
            least, most = below.relative_sd(draft_len), above.relative_sd(draft_len)
            if most >= relative_sd:
                return replace(above, spread=float(np.interp(relative_sd, [least, most], [below.spread, above.spread])))
            below = above
        raise BadInput(
            f"texts with these tokens per round differ by at most {below.relative_sd(draft_len):.3g} relatively at draft_len {draft_len}, "
            f"got {relative_sd:.3g}; it is the deviation between requests, that of a mean over many is smaller"
        )

    def relative_sd(self, draft_len: int) -> float:
        """Of long texts' own tokens per round at the first context: standard deviation over mean."""
        tokens = 1 + np.cumprod(expit(self._bases[0, :draft_len, None] + self.spread * LEVELS), axis=0).sum(0)
        return float(tokens.std() / tokens.mean())

    @property
    def max_draft_len(self) -> int:
        return len(self.tokens_per_round[0])

    def draw(self, input_len: np.ndarray, output_len: np.ndarray, draft_len: int, seed: int) -> Texts:
        """The texts of requests, with rounds of up to draft_len drafts each."""
        if draft_len > self.max_draft_len:
            raise BadInput(f"acceptance is known up to a draft_len of {self.max_draft_len}, got {draft_len}")
        total = int(np.sum(output_len))
        if total > MAX_TOKENS:
            raise BadInput(f"all requests together generate at most {MAX_TOKENS} tokens, got {total}; take a part of the trace")
        level = self.spread * np.random.default_rng([seed, 0]).standard_normal(len(output_len))
        chance = np.random.default_rng([seed, 1]).random(total + draft_len, dtype=np.float32)
        accepted, alive = np.zeros(total + 1, dtype=np.uint8), np.ones(total, dtype=bool)
        log_contexts = np.log(self.contexts)
        for i in range(draft_len):
            base = np.interp(np.log(input_len), log_contexts, self._bases[:, i])
            alive &= chance[i : i + total] < np.repeat(expit(base + level).astype(np.float32), output_len)
            accepted[:-1] += alive
        return Texts(output_len, accepted)

    @cached_property
    def _bases(self) -> np.ndarray:
        """[context, draft] logits at level 0."""
        return np.array([self._solve(row, context) for row, context in zip(self.tokens_per_round, self.contexts, strict=True)])

    def _solve(self, asked: tuple[float, ...], context: int) -> list[float]:
        rounds_of, alive, bases = np.ones_like(LEVELS), np.ones_like(LEVELS), []  # rounds_of: tokens per round by level
        for draft_len, tokens in enumerate(asked, 1):

            def excess(base: float) -> float:
                return 1 / np.mean(1 / (rounds_of + alive * expit(base + self.spread * LEVELS))) - tokens  # noqa: B023 - called before it changes

            least, most = tokens + excess(-SURE), tokens + excess(SURE)
            if not (least - 1e-9 <= tokens <= most + 1e-9):
                raise BadInput(
                    f"at draft_len {draft_len} and context {context}, tokens per round must lie in [{least:.4g}, {most:.4g}], "
                    f"as those of shorter drafts are, got {tokens:.4g}"
                )
            base = -SURE if excess(-SURE) >= 0 else SURE if excess(SURE) <= 0 else brentq(excess, -SURE, SURE, xtol=1e-12)
            bases.append(base)
            alive = alive * expit(base + self.spread * LEVELS)
            rounds_of = rounds_of + alive
        return bases
