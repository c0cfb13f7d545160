"""What better choices of draft_len could gain along texts that are already written. Exact: nothing here is sampled.

    fixed     the same draft_len in every round (renewal.py)
    adaptive  a causal rule that picks it from what the rounds before accepted
    oracle    sees what a round would accept before it drafts, and plans ahead with the odds of the rounds to come

Whoever chooses draft_len without seeing the round's outcome pays the oracle's cost at least. What lies between the best
fixed length and the oracle is all that any such rule can win. Costs are in any unit; a round costs round_cost[k] when it
drafts k tokens. A rule has finitely many states, so its cost follows from a recursion over (start, state).

N  texts     S  starts of the longest     K  longest draft     Z  states of a rule
"""

from typing import NamedTuple

import numpy as np

LEVELS = 21  # of an estimated acceptance; between two levels it is rounded by chance, so that small steps are not lost
WEIGHTS = (0.03, 0.1, 0.3)  # of the latest token in an estimated acceptance
STEPS = ((1, 1), (2, 1), (1, 2))  # up when all was accepted, down when not; (2, 1) is transformers' "heuristic" schedule
PAIRED = (0, 1, 2, 4, 8, 16, 32, 64)  # lengths that a rule of two alternates between
BEGIN = 0.7  # acceptance that an estimate begins at


class Texts(NamedTuple):
    """Texts of different lengths side by side, aligned at their ends."""

    survival: np.ndarray  # [N, S, K+1] P(at least n drafts of a round are accepted)
    room: np.ndarray  # [N, S] tokens that a round can draft there
    begin: np.ndarray  # [N] where each text begins


class Rule(NamedTuple):
    """A state machine: what to draft, and where an outcome leads."""

    name: str
    draft_len: np.ndarray  # [Z]
    low: np.ndarray  # [Z, K+1, K+1] next state when `drafted` tokens were drafted and `accepted` of them kept
    share: np.ndarray  # [Z, K+1, K+1] chance that it is the state above instead
    start: int


class Adaptive(NamedTuple):
    """The best rule of the families below, each text judged under the one that was tuned on the other half of the texts."""

    name: str  # of the rule that is best on all texts
    cost: np.ndarray  # [N]


def align(accept_prob: list[np.ndarray], drafted: list[np.ndarray]) -> Texts:
    """From accept_prob [starts, K] and drafted [starts] of each text."""
    N, S, K = len(drafted), max(map(len, drafted)), accept_prob[0].shape[1]
    survival, room, begin = np.zeros((N, S, K + 1)), np.zeros((N, S), dtype=np.int64), np.zeros(N, dtype=np.int64)
    survival[..., 0] = 1.0
    for row, (w, offered) in enumerate(zip(accept_prob, drafted, strict=True)):
        begin[row] = S - len(offered)
        survival[row, begin[row] :, 1:] = np.cumprod(w, axis=1)
        room[row, begin[row] :] = offered
    return Texts(survival, np.minimum(np.minimum(room, K), S - 1 - np.arange(S)), begin)


def oracle_cost(
    texts: Texts,
    round_cost: np.ndarray,  # [N, K+1]
) -> np.ndarray:  # [N]
    """Expected cost of a text when each round sees how much it would accept, and drafts what is cheapest in the long run."""
    N, S, K = _shape(texts)
    n = k = np.arange(K + 1)
    kept = np.minimum.outer(n, k)  # [n, k] of k drafted, where n would be accepted
    later, found = np.zeros((N, K + 1)), np.zeros(N)  # later[:, n]: the cost behind token s + n + 1
    for s in range(S - 1, -1, -1):
        room = texts.room[:, s, None]
        choices = np.where(k <= room[..., None], round_cost[:, None, :] + later[:, kept], np.inf)
        now = (_ended(texts.survival[:, s], room[:, 0]) * choices.min(2)).sum(1)
        later = np.column_stack([now, later[:, :-1]])
        found = np.where(texts.begin == s, now, found)
    return found


def rule_costs(
    texts: Texts,
    rules: list[Rule],
    round_cost: np.ndarray,  # [N, K+1]
) -> np.ndarray:  # [N, rules]
    """Expected cost of a text under each rule. All states of all rules go through one recursion."""
    N, S, K = _shape(texts)
    offsets = np.cumsum([0, *(len(rule.draft_len) for rule in rules)])
    Z, starts = offsets[-1], offsets[:-1] + [rule.start for rule in rules]
    draft_len = np.concatenate([rule.draft_len for rule in rules])
    low = np.concatenate([rule.low + offset for rule, offset in zip(rules, offsets)])
    shares = np.concatenate([rule.share for rule in rules])

    z, n = np.arange(Z)[:, None], np.arange(K + 1)
    outcomes = []  # by room: what each state drafts; and, flat, the places in `later` it may lead to, with the chance of the second
    for room in range(K + 1):
        drafted = np.minimum(room, draft_len)
        outcome = z, drafted[:, None], n
        place = n * Z + low[outcome]
        outcomes.append((drafted, place, np.minimum(place + 1, (K + 1) * Z - 1), shares[outcome]))  # where a rule ends there, the chance is 0
    later, found = np.zeros((N, K + 1, Z)), np.zeros((N, len(rules)))
    for s in range(S - 1, -1, -1):
        ended = _ended(texts.survival[:, s, None], np.minimum(texts.room[:, s, None], n))  # [N, drafted, K+1]
        now = np.empty((N, Z))
        for room in np.unique(texts.room[:, s]):
            own = np.flatnonzero(texts.room[:, s] == room)
            drafted, place, above, share = outcomes[room]
            flat = later[own].reshape(len(own), -1)
            behind = flat.take(place, axis=1)
            behind += share * (flat.take(above, axis=1) - behind)
            now[own] = round_cost[own[:, None], drafted] + np.einsum("azn,azn->az", ended[own][:, drafted], behind)
        later = np.concatenate([now[:, None], later[:, :-1]], axis=1)
        found = np.where((texts.begin == s)[:, None], now[:, starts], found)
    return found


def best_adaptive(
    texts: Texts,  # at least 2
    round_cost: np.ndarray,  # [N, K+1]
) -> Adaptive:
    """The rule with the least cost, tuned on every other text and judged on those between, and the other way round."""
    rules = _family(round_cost.mean(0))
    cost = rule_costs(texts, rules, round_cost)
    odd = np.arange(len(cost)) % 2 == 1
    tuned_on_odd, tuned_on_even = (int(np.argmin(cost[half].sum(0))) for half in (odd, ~odd))
    return Adaptive(rules[int(np.argmin(cost.sum(0)))].name, np.where(odd, cost[:, tuned_on_even], cost[:, tuned_on_odd]))


def estimate_rule(weight: float, acceptance: float, round_cost: np.ndarray) -> Rule:
    """Drafts what would be best if every token were accepted with the running estimate, an exponentially weighted mean.

    The estimate begins at `acceptance` and moves by `weight` with every token that was kept or rejected. Where it says
    that drafting does not pay there is nothing to learn from, and it drifts back to where it began.
    """
    K = len(round_cost) - 1
    level = np.linspace(0, 1, LEVELS)
    tokens = np.cumsum(level[:, None] ** np.arange(K + 1), axis=1)  # [Z, K+1] of a round, arXiv:2211.17192 equation 1
    draft_len = np.argmin(round_cost / tokens, axis=1)
    drafted, accepted = np.arange(K + 1)[:, None], np.arange(K + 1)
    seen = accepted + (accepted < drafted)  # tokens that were kept, and the one that was not
    memory = (1 - weight) ** seen
    moved = memory * level[:, None, None] + (1 - memory) * accepted / np.maximum(seen, 1)
    drifted = level + weight * (acceptance - level)
    moved[:, 0, :] = np.where(draft_len == 0, drifted, level)[:, None]
    place = moved.clip(0, 1) * (LEVELS - 1)
    low = np.minimum(place.astype(np.int64), LEVELS - 2)
    return Rule(f"estimate {weight:g}", draft_len, low, place - low, round(acceptance * (LEVELS - 1)))


def additive_rule(up: int, down: int, begin: int, K: int) -> Rule:
    """Drafts `up` tokens more after a round that kept all it drafted, `down` fewer after one that did not, at least one."""
    state = np.arange(K + 1)[:, None, None]
    drafted, accepted = np.arange(K + 1)[:, None], np.arange(K + 1)
    moved = np.where(accepted >= drafted, np.minimum(state + up, K), np.maximum(state - down, 1))
    low = np.where(drafted > 0, moved, np.maximum(state, 1))  # a round that could not draft says nothing
    return Rule(f"up {up} down {down}", np.arange(K + 1), low, np.zeros(low.shape), begin)


def pair_rule(first: int, second: int, K: int) -> Rule:
    """Drafts `second` tokens after a round that kept all it drafted, `first` after one that did not."""
    drafted, accepted = np.arange(K + 1)[:, None], np.arange(K + 1)
    low = np.broadcast_to((accepted >= drafted).astype(np.int64), (2, K + 1, K + 1))
    return Rule(f"{first}, then {second}", np.array([first, second]), low, np.zeros(low.shape), 1)


def fixed_rule(draft_len: int, K: int) -> Rule:
    return Rule(f"always {draft_len}", np.array([draft_len]), np.zeros((1, K + 1, K + 1), dtype=np.int64), np.zeros((1, K + 1, K + 1)), 0)


def _family(round_cost: np.ndarray) -> list[Rule]:
    """Fixed lengths are members, and first: a rule that adapts has to beat them."""
    K = len(round_cost) - 1
    return [
        *(fixed_rule(k, K) for k in range(K + 1)),
        *(pair_rule(first, second, K) for second in PAIRED if second <= K for first in PAIRED if first < second),
        *(additive_rule(up, down, (K + 1) // 2, K) for up, down in STEPS),
        *(estimate_rule(weight, BEGIN, round_cost) for weight in WEIGHTS),
    ]


def _ended(survival: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """[..., K+1] P(exactly n accepted) of rounds that draft so many tokens."""
    n = np.arange(survival.shape[-1])
    reached = np.where(n <= drafted[..., None], survival, 0.0)
    return reached - np.concatenate([reached[..., 1:], np.zeros((*reached.shape[:-1], 1))], axis=-1)


def _shape(texts: Texts) -> tuple[int, int, int]:
    N, S, width = texts.survival.shape
    return N, S, width - 1
