"""Loads of a serving engine, from a model of its measured cells."""

from collections.abc import Sequence

import numpy as np

from planner.cost.serving import Cells, ServingModel
from planner.cost.step_law import IDLE_TAX
from planner.errors import BadInput
from planner.schedules import Setting
from planner.search.loads import Forecast
from planner.serving import OFF

ROOM_LEFT = 0.9  # share of the requests that may be lost to a drafter before it is said


class EngineLoads:
    """Over a model of an engine's measured cells: off, each drafter idle, and each at 1 to its longest measured draft_len."""

    def __init__(self, model: ServingModel, output_len: int, asked: Sequence[Setting] = (), *, idle: bool = True):
        """asked  settings beside the candidates, such as a draft_len beyond those measured
        idle   a drafter that is loaded may draft nothing
        """
        self._model, self.output_len = model, output_len
        loaded = [name for name in model.drafters if name != OFF]
        lengths = {name: range(0 if idle else 1, model.max_draft_len[name] + 1) for name in loaded}
        self.settings = [Setting(), *(Setting(drafter=name, draft_len=k) for name in loaded for k in lengths[name])]
        if unknown := [setting.drafter for setting in asked if setting.drafter not in model.drafters]:
            raise BadInput(f"the profile knows drafters {', '.join(model.drafters)}, got {unknown[0]!r}; measure it, or choose one of them")
        if never := [setting.drafter for setting in asked if setting.draft_len > 0 and not model.max_draft_len[setting.drafter]]:
            raise BadInput(f"the profile has {never[0]!r} idle only, so nothing is known of what it drafts; measure it with a draft_len above 0")
        self.settings += [setting for setting in dict.fromkeys(asked) if setting not in self.settings]
        place = {name: i for i, name in enumerate(model.drafters)}
        self._drafter = np.array([place[setting.drafter] for setting in self.settings])
        self._draft_len = np.array([setting.draft_len for setting in self.settings])
        self.notes = []
        if not model.off_measured:
            self.notes.append("off was not measured: it is taken from the cells that draft, and so is every speedup; measure it without a drafter")
        if idle and (unknown := [name for name in loaded if name not in model.idle_measured]):
            self.notes.append(
                f"what {', '.join(unknown)} costs idle was not measured: {IDLE_TAX:.0%} of a round are assumed; measure it with draft_len 0"
            )
        drafting = [name for name in loaded if model.max_draft_len[name]]
        if unknown := [name for name in drafting if name not in model.acceptance_measured]:
            self.notes.append(
                f"no acceptance of {', '.join(unknown)} was measured: how its times per token split into rounds and tokens is assumed, the times are not"
            )
        if single := [f"{name} K={model.draft_lens[name][0]}" for name in drafting if len(model.draft_lens[name]) == 1]:
            self.notes.append(f"one draft length was measured of each of {', '.join(single)}: others are extrapolated; measure a second")
        self.notes += [note for name in loaded if (note := self._starved(name, place[name]))]

    def _starved(self, name: str, drafter: int) -> str | None:
        """That a drafter takes memory of requests that were measured, if it does."""
        context_len = self._model.contexts[-1]
        without, beside = self._model.capacity(Cells(np.array([0, drafter]), 0, 1, context_len, self.output_len))
        if beside > ROOM_LEFT * without or beside > max(self._model.max_concurrency.values()):
            return None
        return f"memory holds about {beside:.0f} requests of context {context_len} beside {name}, {without:.0f} without it: drafting has to make up for that"

    def predict(self, setting: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray) -> Forecast:
        served = self._model.predict(self._cells(setting, concurrency, context_len))
        found = Forecast(*(getattr(served, name) for name in Forecast._fields))
        return found._replace(**{name: np.where(served.fits, getattr(found, name), np.nan) for name in ("tpot_s", "output_tokens_per_s", "ttft_s")})

    def ratio_sd(self, a: np.ndarray, b: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray, of: str) -> np.ndarray:
        return self._model.ratio_sd(self._cells(a, concurrency, context_len), self._cells(b, concurrency, context_len), of)

    def _cells(self, setting: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray) -> Cells:
        return Cells(self._drafter[setting], self._draft_len[setting], concurrency, context_len, np.full(len(setting), self.output_len))
