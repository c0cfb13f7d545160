"""The fewest rows in which no load loses more than allowed. Exact: a dynamic programme over loads (Viterbi 1967).

X independent schedules    S settings    C loads, in order
"""

from itertools import pairwise

import numpy as np


def fewest_rows(
    loss: np.ndarray,  # [X, S, C] relative, at least 0
    allowed: np.ndarray,  # [X, S, C] bool; at least one setting at each load
) -> np.ndarray:
    """[X, C] the setting at each load: as few changes along the loads as can be, and of those paths the one that loses least."""
    X, S, C = loss.shape
    step = np.where(allowed, loss, np.inf).transpose(2, 0, 1).copy()  # [C, X, S]
    step /= 1 + np.where(allowed, loss, 0.0).max(1).sum(1)[:, None]  # a whole path loses less than one change
    came_from, stay, each = np.zeros((C, X, S), dtype=int), np.arange(S), np.arange(X)
    best = step[0]
    for c in range(1, C):
        cheapest = best.argmin(1)
        changed = best[each, cheapest][:, None] + 1
        change = best > changed
        came_from[c] = np.where(change, cheapest[:, None], stay)
        best = np.where(change, changed, best) + step[c]
    path = np.empty((X, C), dtype=int)
    path[:, -1] = best.argmin(1)
    for c in range(C - 1, 0, -1):
        path[:, c - 1] = came_from[c, each, path[:, c]]
    return path


def runs(path: np.ndarray) -> list[tuple[int, int]]:
    """First and last place of each stretch of equal rows or values; path is [C] or [C, k]."""
    flat = path.reshape(len(path), -1)
    cuts = [0, *(1 + np.flatnonzero((flat[1:] != flat[:-1]).any(1))), len(path)]
    return [(int(first), int(end) - 1) for first, end in pairwise(cuts)]
