"""What an engine step takes, as a table that a simulation looks up.

    step = max(round, pass) + max(0, prompts - pass)

round    of the requests that decode, by their number and mean length, linear between the lengths of a grid
prompts  tokens x token_s + (query, key) pairs x pair_s
pass     the least that any pass takes: reading the weights, which prompts and decoding requests share

So prompts are free while a pass waits for its weights, and add up with decoding beyond that.

B  requests that decode    C  mean lengths of the grid    n  steps
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from planner.errors import BadInput
from planner.simulator.engine import StepLoad

SHORTEST, PER_OCTAVE = 64, 2  # tokens; where round times are asked for
MOST_POINTS = 4096  # that are asked for at once
LEAST_S = 1e-9  # of a step


class Prefill(NamedTuple):
    """What reading prompts takes, the drafter's share included."""

    token_s: float
    pair_s: float  # of a query and a key


class StepTable:
    """A StepCost."""

    def __init__(self, round_s: dict[int, np.ndarray], lengths: np.ndarray, pass_s: float, prefill: Prefill):
        """round_s  by draft_len: [B, C] of 1, 2, .. requests"""
        self._lengths, self._pass_s, self._prefill = lengths, max(pass_s, LEAST_S), prefill
        self._round_s = {draft_len: np.maximum(table, LEAST_S) for draft_len, table in round_s.items()}
        self._slope = {draft_len: np.diff(table) / np.diff(lengths) for draft_len, table in self._round_s.items()}

    def step_s(self, load: StepLoad) -> np.ndarray:
        prompts_s = load.prefill_tokens * self._prefill.token_s + load.prefill_pairs * self._prefill.pair_s - self._pass_s
        if np.ndim(load.decode_requests) == 0:
            n = int(load.decode_requests)
            least = max(self._pass_s, float(self._decode_s(n, load.decode_context, load.draft_len))) if n else self._pass_s
            return least + max(0.0, float(prompts_s))
        n = load.decode_requests
        decode_s = np.where(n > 0, self._decode_s(np.maximum(n, 1), load.decode_context, load.draft_len), 0.0)
        return np.maximum(decode_s, self._pass_s) + np.maximum(prompts_s, 0.0)

    def _decode_s(self, n: np.ndarray, context: np.ndarray, draft_len: int) -> np.ndarray:
        """[n]; beyond the longest length of the grid as far as its last stretch leads."""
        mean = np.maximum(context / n, self._lengths[0])
        column = np.minimum(np.searchsorted(self._lengths, mean, side="right") - 1, len(self._lengths) - 2)
        return self._round_s[draft_len][n - 1, column] + self._slope[draft_len][n - 1, column] * (mean - self._lengths[column])


def tabulate(
    rounds: Callable[[int, np.ndarray, np.ndarray], np.ndarray],  # draft_len, requests [n], tokens that each holds [n] -> seconds [n]
    draft_lens: Iterable[int],
    *,
    max_batch: int,
    longest: int,  # text of a request
    pass_s: float,
    prefill: Prefill,
) -> StepTable:
    """The table of some draft lengths, for every batch up to the largest."""
    octaves = max(1.0, np.log2(max(longest, 2 * SHORTEST) / SHORTEST))
    lengths = np.geomspace(SHORTEST, max(longest, 2 * SHORTEST), 1 + int(np.ceil(PER_OCTAVE * octaves)))
    batch, length = (axis.ravel() for axis in np.meshgrid(np.arange(1, max_batch + 1), lengths, indexing="ij"))
    parts = [slice(i, i + MOST_POINTS) for i in range(0, len(batch), MOST_POINTS)]
    found = {k: np.concatenate([rounds(k, batch[part], length[part]) for part in parts]).reshape(max_batch, -1) for k in draft_lens}
    if not all(np.isfinite(table).all() and (table > 0).all() for table in found.values()):
        raise BadInput(f"no round time is known for every batch up to {max_batch} and texts up to {longest} tokens; lower --max-num-seqs")
    return StepTable(found, lengths, pass_s, prefill)
