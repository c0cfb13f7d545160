"""What a device draws while it runs a configuration: the mean power of its rounds, fitted to the energy of whole cells.

    watts(drafter, k, L)  = a + b k + c L        at one batch

`a` is each drafter's own, plain decoding's among them; `b`, shared, is what wider rounds draw more of, and `c` what
longer contexts do. Power is fitted and not energy: it changes little where round times change much, and those have a
fit of their own. What a drafter keeps of its cache is left to `a`. Energy is power times time.

k  draft_len     L  context_len, in thousands; both are counted from the mean of what was measured, so that what one cell
                 alone says about a drafter holds for all of its lengths
"""

from typing import NamedTuple

import numpy as np

from planner.cost.latency import batch_weights
from planner.errors import BadInput
from planner.measurements import EnergySample, Profile
from planner.specs import DraftConfig, DrafterSpec

COUNTER_ERROR = 0.03  # standard deviation: NVML's manual states 5 % of the power, here taken as 90 % bounds; common to all configurations


class Power(NamedTuple):
    watts: float
    error: float  # relative standard deviation


class PowerModel:
    """Mean power of everything a profile counted the energy of."""

    def __init__(self, samples: list[EnergySample]):
        batches = sorted({sample.batch for sample in samples})
        self._fits = {batch: _Fit([sample for sample in samples if sample.batch == batch]) for batch in batches}

    def watts(self, config: DraftConfig, context_len: int, batch: int = 1) -> Power | None:
        """None where the profile counted nothing to go by: no energy at this batch, or none of this drafter."""
        try:
            weights, _ = batch_weights(list(self._fits), batch)
        except BadInput:
            return None
        if any(config.drafter not in self._fits[counted].drafters for counted in weights):
            return None
        watts = sum(weight * self._fits[counted].watts(config.drafter, config.draft_len, context_len) for counted, weight in weights.items())
        return Power(watts, float(np.hypot(COUNTER_ERROR, max(self._fits[counted].error for counted in weights))))


class _Fit:
    """The cells of one batch, by relative error."""

    def __init__(self, samples: list[EnergySample]):
        self.drafters = list(dict.fromkeys(sample.drafter for sample in samples))
        self._mean_draft_len = {drafter: float(np.mean([x.draft_len for x in samples if x.drafter == drafter])) for drafter in self.drafters}
        self._mean_context_len = float(np.mean([sample.context_len for sample in samples]))
        rows = np.array([self._row(sample.drafter, sample.draft_len, sample.context_len) for sample in samples])
        watts = np.array([sample.watts for sample in samples])
        self._coefficients = _least_squares(rows, watts)
        left_out = [
            rows[cell] @ _least_squares(kept, np.delete(watts, cell)) / watts[cell] - 1
            for cell in range(len(watts))
            if np.linalg.matrix_rank(kept := np.delete(rows, cell, axis=0)) == np.linalg.matrix_rank(rows)  # else the rest says nothing about it
        ]
        # Where no cell can be left out, none of them was checked by another: the whole scatter is what is not known.
        self.error = float(np.sqrt(np.mean(np.square(left_out)))) if left_out else float(np.std(watts) / np.mean(watts))

    def watts(self, drafter: DrafterSpec, draft_len: int, context_len: int) -> float:
        return float(self._row(drafter, draft_len, context_len) @ self._coefficients)

    def _row(self, drafter: DrafterSpec, draft_len: int, context_len: int) -> list[float]:
        indicators = [float(drafter == known) for known in self.drafters]
        return [*indicators, draft_len - self._mean_draft_len[drafter], (context_len - self._mean_context_len) / 1000]


def fit_power(profile: Profile) -> PowerModel:
    """Mean power of everything a profile counted the energy of."""
    return PowerModel(profile.energy)


def _least_squares(rows: np.ndarray, watts: np.ndarray) -> np.ndarray:
    """Least relative errors; a slope that nothing determines is zero."""
    return np.linalg.lstsq(rows / watts[:, None], np.ones(len(watts)), rcond=None)[0]
