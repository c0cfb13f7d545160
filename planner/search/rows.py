"""The fewest rows in which no load loses more than allowed. Exact: a dynamic programme over loads (Viterbi 1967).

S settings    C loads, in order
"""

from itertools import pairwise

import numpy as np


def fewest_rows(
    loss: np.ndarray,  # [S, C] relative, at least 0
    allowed: np.ndarray,  # [S, C] bool; at least one setting at each load
) -> np.ndarray:
    """[C] the setting at each load: as few changes along the loads as can be, and of those paths the one that loses least."""
    S, C = loss.shape
    step = np.where(allowed, loss, np.inf).T.copy()  # [C, S]
    step /= 1 + np.where(allowed, loss, 0.0).max(0).sum()  # a whole path loses less than one change
    came_from, stay = np.zeros((C, S), dtype=int), np.arange(S)
    best = step[0]
    for c in range(1, C):
        cheapest = int(best.argmin())
        change = best > best[cheapest] + 1
        came_from[c] = np.where(change, cheapest, stay)
        best = np.where(change, best[cheapest] + 1, best) + step[c]
    path = np.empty(C, dtype=int)
    path[-1] = best.argmin()
    for c in range(C - 1, 0, -1):
        path[c - 1] = came_from[c, path[c]]
    return path


def runs(path: np.ndarray) -> list[tuple[int, int]]:
    """First and last place of each stretch of equal rows or values; path is [C] or [C, k]."""
    flat = path.reshape(len(path), -1)
    cuts = [0, *(1 + np.flatnonzero((flat[1:] != flat[:-1]).any(1))), len(path)]
    return [(int(first), int(end) - 1) for first, end in pairwise(cuts)]
