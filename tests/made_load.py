"""An engine whose behaviour under load is a law, chosen so that what a schedule should be is known."""

import numpy as np

from planner.schedules import Setting
from planner.search.loads import Forecast


class LawLoads:
    """Loads by a law (drafter, draft_len, concurrency [n], context_len [n]) -> tpot_s, running, each [n]."""

    def __init__(self, law, longest: dict[str, int], *, output_len=128, sd=0.01, shared=0.0, measured=(1, 256), ttft_s=None):
        """sd  of a logarithm; shared  the part of its variance that two settings share"""
        self.settings = [Setting(), *(Setting(drafter=name, draft_len=k) for name in longest for k in range(longest[name] + 1))]
        self.output_len, self.notes = output_len, []
        self._law, self._sd, self._shared, self._measured, self._ttft_s = law, sd, shared, measured, ttft_s

    def predict(self, setting, concurrency, context_len):
        tpot_s, running = np.empty(len(setting)), np.empty(len(setting))
        for i in np.unique(setting):
            here, what = setting == i, self.settings[i]
            tpot_s[here], running[here] = self._law(what.drafter, what.draft_len, concurrency[here], context_len[here])
        sd = np.full(len(setting), self._sd)
        ttft_s = np.full(len(setting), np.nan) if self._ttft_s is None else self._ttft_s(concurrency, running)
        outside = (concurrency < self._measured[0]) | (concurrency > self._measured[1])
        return Forecast(tpot_s, running / tpot_s, 2 * tpot_s, np.full(len(setting), 2.0), running, ttft_s, sd, sd, sd, sd, outside)

    def ratio_sd(self, a, b, concurrency, context_len, of):
        return np.where(a == b, 0.0, self._sd * np.sqrt(2 * (1 - self._shared)))


def roofline(drafter, draft_len, concurrency, context_len, *, capacity=None, gain=0.7, idle_tax=0.03, draft_cost=0.08):
    """Memory-bound until the tokens of a step fill the matrix units: drafting pays at small loads, and costs at large ones.

    capacity  drafter -> tokens of KV that fit; gain  acceptance of each draft
    """
    running = np.asarray(concurrency, float)
    if capacity is not None:
        running = np.minimum(running, np.maximum(1, capacity[drafter] // (context_len + 128)))
    tokens = running * (draft_len + 1)
    round_s = np.maximum(8e-3, 8e-5 * tokens) + 2e-8 * running * context_len + draft_cost * 8e-3 * draft_len + idle_tax * 8e-3 * (drafter != "none")
    a = gain if np.isscalar(gain) else gain[drafter]
    return round_s / sum(a**i for i in range(draft_len + 1)), running
