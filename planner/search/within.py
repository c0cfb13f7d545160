"""Loads with some of their settings: what an engine can run of them."""

from collections.abc import Callable

import numpy as np

from planner.schedules import Setting
from planner.search.loads import Forecast, Loads


class Within:
    """The settings that are kept, off among them; a Loads like the one it is made from."""

    def __init__(self, loads: Loads, keep: Callable[[Setting], bool]):
        self._loads, self._places = loads, np.array([i for i, setting in enumerate(loads.settings) if i == 0 or keep(setting)])
        self.settings = [loads.settings[i] for i in self._places]
        self.output_len, self.notes = loads.output_len, loads.notes

    def predict(self, setting: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray) -> Forecast:
        return self._loads.predict(self._places[setting], concurrency, context_len)

    def ratio_sd(self, a: np.ndarray, b: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray, of: str) -> np.ndarray:
        return self._loads.ratio_sd(self._places[a], self._places[b], concurrency, context_len, of)
