"""Loads of the own runtime, from its profile: predicted at the profiled batches and linear between them, as round times are.

The running batch is the concurrency: the runtime decodes all its streams side by side, or none under the memory cap.
Throughput is that of requests that follow each other, each prefilled by itself: the inverse of objective price.

B  batches it is predicted at      n  questions
"""

import numpy as np

from planner.cost.latency import batch_weights
from planner.errors import BadInput
from planner.measurements import Profile
from planner.schedules import Setting
from planner.search.loads import HALF_WIDTH, Forecast
from planner.search.objective import Prediction, difference, fit_models, predict
from planner.search.optimize import candidates
from planner.serving import OFF
from planner.specs import PLAIN, DraftConfig, DrafterSpec, FullKV, Sampler, Workload, describe_drafter
from planner.units import format_bytes


class RuntimeLoads:
    """Off, and every drafter, policy and draft_len that the profile answers for; an idle drafter takes off's time."""

    def __init__(self, profile: Profile, sampler: Sampler, output_len: int, concurrency: tuple[int, int], memory_cap_bytes: int | None = None):
        self._models, self._sampler, self.output_len, self._cap = fit_models(profile), sampler, output_len, memory_cap_bytes
        timed = sorted({sample.batch for sample in profile.rounds if sample.role == "cell" and sample.draft_len == 0})
        ends = [batch for end in concurrency for batch in batch_weights(timed, end)[0]]  # BadInput outside of them
        self._batches = [batch for batch in timed if min(ends) <= batch <= max(ends)]
        self._configs = [PLAIN, *candidates(self._models)]
        names = _names(list(dict.fromkeys(config.drafter for config in self._configs)))
        drafters = [name for drafter, name in names.items() if drafter != PLAIN.drafter]
        self.settings = [Setting(), *(Setting(drafter=name) for name in drafters)]
        self._config_of = [0] * len(self.settings)  # an idle drafter decodes as off does
        self._first_of = [0, *(next(i for i, c in enumerate(self._configs) if names[c.drafter] == name) for name in drafters)]
        for i, config in enumerate(self._configs[1:], 1):
            kv = None if isinstance(config.kv, FullKV) else config.kv
            self.settings.append(Setting(drafter=names[config.drafter], draft_len=config.draft_len, kv=kv))
            self._config_of.append(i)
            self._first_of.append(i)
        self._config_of, self._first_of = np.array(self._config_of), np.array(self._first_of)
        self._known: dict[tuple[int, int, int], Prediction | None] = {}  # (config, batch, context); None: no answer
        self._ratios: dict[tuple[int, int, int, int, str], float] = {}
        self.notes = list(profile.warnings)
        if len(self._batches) > 1:
            self.notes.append(f"times are interpolated between the profiled batches {', '.join(map(str, self._batches))}")
        if profile.trees:
            self.notes.append("settings by load are chains; trees are weighed by a plan for one load (--max-concurrency N)")
        if drafters:
            self.notes.append("an idle drafter was not timed: it is taken to cost what off does, its memory aside")

    def config(self, setting: Setting) -> DraftConfig:
        """What the runtime is told to run a setting; an idle drafter is off."""
        return self._configs[self._config_of[self.settings.index(setting)]]

    def predict(self, setting: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray) -> Forecast:
        shape, config = np.shape(setting), self._config_of[setting]
        memory = self._interpolated(self._first_of[setting], concurrency, context_len, self._memory)
        if self._cap is not None:
            over = memory > self._cap
            if (over & (setting == 0)).any():
                least = memory[over & (setting == 0)].min()
                raise BadInput(
                    f"plain decoding alone needs {format_bytes(least)} of {format_bytes(self._cap)}; raise --memory-cap, or lower --max-concurrency or --isl"
                )
            memory = np.where(over, np.nan, memory)
        runs = np.where(np.isnan(memory), np.nan, 1.0)

        def of(figure) -> np.ndarray:
            return self._interpolated(config, concurrency, context_len, figure) * runs

        tpot_s, ttft_s = of(lambda p: p.estimate.tpot_s.value), of(lambda p: p.estimate.ttft_s.value)
        later_s = (self.output_len - 1) * tpot_s / concurrency  # of a request, whose rounds are shared
        sd_tpot, sd_ttft = of(lambda p: _sd(p.estimate.tpot_s)), of(lambda p: _sd(p.estimate.ttft_s))
        return Forecast(
            tpot_s=tpot_s,
            output_tokens_per_s=self.output_len / (ttft_s + later_s),  # after the interpolation, which must be of what is linear
            round_s=of(lambda p: p.estimate.round_s.value),
            tokens_per_round=of(lambda p: p.estimate.tokens_per_round.value),
            running=concurrency * runs,
            ttft_s=ttft_s,
            sd_tpot=sd_tpot,
            sd_throughput=np.hypot(ttft_s * sd_ttft, later_s * sd_tpot) / (ttft_s + later_s),
            sd_round=of(lambda p: _sd(p.estimate.round_s)),
            sd_tokens=of(lambda p: _sd(p.estimate.tokens_per_round)),
            extrapolated=np.zeros(shape, bool),
        )

    def ratio_sd(self, a: np.ndarray, b: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray, of: str) -> np.ndarray:
        asked, inverse = np.unique(np.stack([self._config_of[a], self._config_of[b], concurrency, context_len]), axis=1, return_inverse=True)
        return np.array([self._one_ratio_sd(*map(int, column), of) for column in asked.T])[inverse.ravel()]

    def _one_ratio_sd(self, a: int, b: int, concurrency: int, context_len: int, of: str) -> float:
        weights, _ = batch_weights(self._batches, concurrency)
        return sum(weight * self._ratio_at(a, b, batch, context_len, of) for batch, weight in weights.items())

    def _ratio_at(self, a: int, b: int, batch: int, context_len: int, of: str) -> float:
        key = (a, b, batch, context_len, of)
        if key not in self._ratios:
            one, other = self._at(a, batch, context_len), self._at(b, batch, context_len)
            if one is None or other is None:
                self._ratios[key] = np.nan
            elif a == b:
                self._ratios[key] = 0.0
            else:
                gap = difference(one, other, "tpot" if of == "tpot" else "price")
                self._ratios[key] = float(np.log((1 + gap.high) / (1 + gap.value)) / HALF_WIDTH)
        return self._ratios[key]

    def _interpolated(self, config: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray, figure) -> np.ndarray:
        """[n] a figure of predictions, linear between the two batches around each concurrency."""
        found = np.empty(len(config))
        pairs, which = np.unique(np.stack([config, context_len]), axis=1, return_inverse=True)
        for i, (own, context) in enumerate(pairs.T):
            here = which.ravel() == i
            known = [self._at(int(own), batch, int(context)) for batch in self._batches]
            found[here] = np.interp(concurrency[here], self._batches, [np.nan if p is None else figure(p) for p in known])
        return found

    def _memory(self, prediction: Prediction) -> float:
        return prediction.estimate.memory_bytes.value

    def _at(self, config: int, batch: int, context_len: int) -> Prediction | None:
        key = (config, batch, context_len)
        if key not in self._known:
            workload = Workload(context_len=context_len, output_len=self.output_len, sampler=self._sampler, batch=batch)
            try:
                self._known[key] = predict(self._models, self._configs[config], workload)
            except BadInput:
                if config == 0:
                    raise
                self._known[key] = None  # a policy or draft_len that was not profiled at this load
        return self._known[key]


def _names(drafters: list[DrafterSpec]) -> dict[DrafterSpec, str]:
    """A name for each, its path in full where two would be called alike."""
    short = [describe_drafter(drafter) for drafter in drafters]
    return {
        d: OFF if d == PLAIN.drafter else f"{name} ({d.path})" if short.count(name) > 1 else name for d, name in zip(drafters, short, strict=True)
    }


def _sd(interval) -> float:
    return float(np.log(interval.high / interval.value) / HALF_WIDTH)
