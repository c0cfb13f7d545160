"""Expected rounds along a written text, from accept probabilities. Exact: nothing here is fitted or sampled.

A round behind token s drafts up to K tokens, keeps n of them, adds one of the target's own, and the next round starts
behind token s + n + 1. So rounds start where the last one ended, and averaging survival over all places of a text,
as if they started anywhere, is 1 to 9 % too optimistic. The walk is a renewal process on the text; its forward
recursion gives the chance that a round starts at s.

N  texts (or configurations)     S  starts, one behind each token but the last     K  draft_len
"""

from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
    """What decoding a text costs, in rounds. Prefill's token is not counted."""

    rounds: np.ndarray  # [N] expected number of rounds
    variance: np.ndarray  # [N] of that number, by chance of acceptance alone
    by_drafted: np.ndarray  # [N, K+1] expected rounds that draft 0, 1, .. K tokens; sums to `rounds`


def expected_rounds(
    accept_prob: np.ndarray,  # [N, S, >= K]: P(draft i of a round behind token s is accepted | those before were)
    drafted: np.ndarray,  # [N, S]: tokens the drafter has to offer there
    draft_len: int,  # K
) -> Walk:
    """Rounds until S tokens are written. A round never drafts beyond the last token but one, which leaves room for its own."""
    N, S = drafted.shape
    K = draft_len
    w = accept_prob[:, :, :K]
    survival = np.concatenate([np.ones((N, S, 1)), np.cumprod(w, axis=2)], axis=2)  # [N, S, K+1], P(at least n accepted)
    room = np.minimum(np.minimum(drafted, K), S - 1 - np.arange(S))  # [N, S]
    n = np.arange(K + 1)
    reached = np.where(n <= room[..., None], survival, 0.0)
    ended = reached - np.concatenate([reached[..., 1:], np.zeros((N, S, 1))], axis=2)  # [N, S, K+1], P(exactly n accepted)

    start_prob = np.zeros((N, S + K + 1))
    start_prob[:, 0] = 1.0
    for s in range(S):
        start_prob[:, s + 1 : s + K + 2] += start_prob[:, s, None] * ended[:, s]
    start_prob = start_prob[:, :S]

    mean, variance = np.zeros((N, S + K + 1)), np.zeros((N, S + K + 1))  # of the rounds still to come from s
    for s in range(S - 1, -1, -1):
        later, p = mean[:, s + 1 : s + K + 2], ended[:, s]
        expected = (p * later).sum(1)
        mean[:, s] = 1.0 + expected
        variance[:, s] = (p * (variance[:, s + 1 : s + K + 2] + (later - expected[:, None]) ** 2)).sum(1)

    by_drafted = np.stack([np.where(room == k, start_prob, 0.0).sum(1) for k in n], axis=1)
    return Walk(mean[:, 0], variance[:, 0], by_drafted)
