"""What every setting does at every load: the one protocol that schedules are made from, and its answers as estimates.

Written for cells of an engine's benchmark in engine_loads.py, for a profile of the own runtime in runtime_loads.py.

n  questions: a setting, by its place in `settings`, at a concurrency and a context
"""

import math
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import ndtri  # not scipy.stats, which is slow to import

from planner.errors import BadInput
from planner.plans import CONFIDENCE, Interval
from planner.schedules import Compared, ServedEstimate, Setting, describe_setting
from planner.specs import Objective

HALF_WIDTH = float(ndtri((1 + CONFIDENCE) / 2))  # of an interval, in standard deviations


class Forecast(NamedTuple):
    """Arrays of one shape; nan where there is no answer or the setting may not run."""

    tpot_s: np.ndarray
    output_tokens_per_s: np.ndarray  # of all requests together
    round_s: np.ndarray
    tokens_per_round: np.ndarray
    running: np.ndarray  # requests that decode at once
    ttft_s: np.ndarray  # queueing included; nan where unknown
    sd_tpot: np.ndarray  # standard deviations of the logarithms
    sd_throughput: np.ndarray
    sd_round: np.ndarray
    sd_tokens: np.ndarray
    extrapolated: np.ndarray  # bool


class Loads(Protocol):
    """Predictions by setting and load."""

    settings: list[Setting]  # the first is off
    output_len: int
    notes: list[str]  # what was assumed

    def predict(self, setting: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray) -> Forecast:
        """Of each question, [n]."""

    def ratio_sd(self, a: np.ndarray, b: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray, of: str) -> np.ndarray:
        """[n] standard deviation of the logarithm of setting a's tpot or throughput over b's: what both share cancels."""


def compare_with_off(
    loads: Loads,
    setting: np.ndarray,  # [n]
    concurrency: np.ndarray,
    context_len: np.ndarray,
    objective: Objective,
    price_per_s: float | None = None,  # of all devices together
) -> list[Compared]:
    """Each setting's estimate, off's at the same load, and the speedup between them."""
    off = np.zeros_like(setting)
    found = estimates(loads, setting, concurrency, context_len, price_per_s)
    plain = estimates(loads, off, concurrency, context_len, price_per_s)
    sd = np.where(setting == 0, 0.0, loads.ratio_sd(setting, off, concurrency, context_len, measure(objective)))

    def better(own: ServedEstimate, base: ServedEstimate) -> float:
        if objective == "tpot":
            return base.tpot_s.value / own.tpot_s.value
        return own.output_tokens_per_s.value / base.output_tokens_per_s.value

    return [
        Compared(estimate=own, baseline=base, speedup=log_interval(math.log(better(own, base)), width))
        for own, base, width in zip(found, plain, sd, strict=True)
    ]


def estimates(loads: Loads, setting: np.ndarray, concurrency: np.ndarray, context_len: np.ndarray, price_per_s: float | None) -> list[ServedEstimate]:
    """What each setting should do at its load; BadInput where there is no answer."""
    f = loads.predict(setting, concurrency, context_len)
    found = []
    for i in range(len(setting)):
        what, at, context = loads.settings[setting[i]], int(concurrency[i]), int(context_len[i])
        if not np.isfinite(f.output_tokens_per_s[i]):
            raise BadInput(f"{describe_setting(what)} cannot run at concurrency {at} and context {context}; lower one of them")
        throughput = log_interval(np.log(f.output_tokens_per_s[i]), f.sd_throughput[i])
        price = None
        if price_per_s is not None:
            price = Interval(
                value=1e6 * price_per_s / throughput.value, low=1e6 * price_per_s / throughput.high, high=1e6 * price_per_s / throughput.low
            )
        found.append(
            ServedEstimate(
                setting=what,
                concurrency=at,
                context_len=context,
                output_len=loads.output_len,
                tpot_s=log_interval(np.log(f.tpot_s[i]), f.sd_tpot[i]),
                output_tokens_per_s=throughput,
                round_s=log_interval(np.log(f.round_s[i]), f.sd_round[i]),
                tokens_per_round=log_interval(np.log(f.tokens_per_round[i]), f.sd_tokens[i]),
                running_batch=float(f.running[i]),
                ttft_s=float(f.ttft_s[i]) if np.isfinite(f.ttft_s[i]) else None,
                e2e_s=at * loads.output_len / throughput.value,
                price_per_million_tokens=price,
                notes=["beyond what was measured: extrapolated"] if f.extrapolated[i] else [],
            )
        )
    return found


def measure(objective: Objective) -> str:
    """Which of the two a comparison by an objective rests on: at one load all but tpot order settings as throughput does."""
    return "tpot" if objective == "tpot" else "throughput"


def log_interval(value: float, sd: float) -> Interval:
    """Of a logarithm and its standard deviation, at 90 %."""
    half = min(HALF_WIDTH * float(sd), 30.0)
    middle = math.exp(value)
    return Interval(value=middle, low=middle * math.exp(-half), high=middle * math.exp(half))
