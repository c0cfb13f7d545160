"""What a configuration costs and gains under a workload, with its interval; or why it is out of the question.

Uncertainty has four parts: texts scatter, cells that were left out of the fit moved it, cells not measured are missed
by the fit's error, and the machine changed its pace between passes. A comparison of two configurations uses the same
texts and the same left-out cells, and what they share cancels; the machine's pace does too, so it widens times only.
"""

import math
from typing import NamedTuple

import msgspec
import numpy as np
from scipy.special import ndtri, stdtrit  # not scipy.stats, which is slow to import

from planner.cost.acceptance import AcceptanceModel, context_weights, fit_acceptance
from planner.cost.energy import PowerModel, fit_power
from planner.cost.latency import LatencyModel, fit_latency
from planner.cost.memory import drafter_model, largest_budget, resident_bytes
from planner.errors import BadInput
from planner.measurements import Profile
from planner.plans import CONFIDENCE, PER_MILLION_TOKENS, Estimate, Interval
from planner.specs import LOADED, DraftConfig, Objective, SparseKV, Workload
from planner.units import format_bytes


class Models(NamedTuple):
    """A profile and what was fitted to it."""

    profile: Profile
    acceptance: AcceptanceModel
    latency: LatencyModel
    power: PowerModel


class Prediction(NamedTuple):
    """Time per token of one configuration, in the pieces that comparisons need."""

    estimate: Estimate
    workload: Workload
    per_text: list[tuple[float, np.ndarray, np.ndarray]]  # weight of a context, its texts, TPOT on each
    left_out: np.ndarray  # [J] mean TPOT under each fit with a cell left out
    error: float  # relative, of a round time that was not measured itself


def fit_models(profile: Profile) -> Models:
    return Models(profile, fit_acceptance(profile), fit_latency(profile), fit_power(profile))


def predict(models: Models, config: DraftConfig, workload: Workload, price_per_hour: float | None = None) -> Prediction:
    """The estimate of one configuration; BadInput where the profile says nothing about it.

    price_per_hour  of the device, in any currency; with it the estimate has a price
    """
    profile, latency = models.profile, models.latency
    own = drafter_model(profile, config.drafter).spec if config.drafter.kind in LOADED else profile.target
    whose, limit = min(("model", profile.target.max_context_len), ("drafter", own.max_context_len), key=lambda pair: pair[1])
    if workload.context_len + workload.output_len > limit:
        raise BadInput(f"context + output must fit the {whose}'s {limit} tokens, got {workload.context_len} + {workload.output_len}; shorten one")
    position = workload.context_len + workload.output_len / 2  # round time is linear in it, so the middle is the mean
    round_s = latency.round_s(config, workload.context_len, position, workload.batch)  # [1 + J, K + 1], of a tree by nodes
    if config.draft_len == 0:
        _, notes = context_weights(profile.contexts, workload.context_len)
        per_text, means, rounds_per_token, text_variance, sd_rounds, num_texts = [], round_s[:, 0], 1.0, 0.0, 0.0, 0
        rounds_se = 0.0
    else:
        strata, notes = models.acceptance.strata(config, workload)
        by_width = [_by_width(s.rounds.by_drafted, workload.batch) for s in strata]
        refresh_s, more = _refresh_s(latency, config, workload)
        notes = notes + more
        per_text = [(s.weight, s.rounds.texts, widths @ round_s[0] + refresh_s) for s, widths in zip(strata, by_width, strict=True)]
        means = sum(s.weight * (widths.mean(0) @ round_s.T) for s, widths in zip(strata, by_width, strict=True)) + refresh_s
        rounds = [(s.weight, s.rounds.by_drafted.sum(1), s.rounds.chance) for s in strata]
        rounds_per_token = float(sum(w * r.mean() for w, r, _ in rounds))
        text_variance = sum(w**2 * _variance_of_mean(tpot) for w, _, tpot in per_text)
        rounds_se = math.sqrt(sum(w**2 * _variance_of_mean(r) for w, r, _ in rounds))
        sd_rounds = math.sqrt(sum(w * (np.var(r, ddof=1) if len(r) > 1 else 0.0) + w * chance.mean() for w, r, chance in rounds))
        num_texts = min(len(r) for _, r, _ in rounds)

    tpot = float(means[0])
    error = latency.plain_error(workload.batch) if config.draft_len == 0 else latency.error(workload.batch, config.tree and config.drafter)
    latency_variance = _jackknife(means[1:]) + (tpot * error) ** 2 + (tpot * latency.unsteadiness) ** 2
    half = _quantile(num_texts)
    tpot_sd = math.sqrt(text_variance + latency_variance)
    ttft, ttft_sd = latency.ttft_s(config, workload.context_len)

    def seconds(objective: Objective) -> Interval:
        firsts, laters = weights(objective, workload)
        return _interval(firsts * ttft + laters * tpot, half * math.hypot(firsts * ttft_sd, laters * tpot_sd))

    power = models.power.watts(config, workload.context_len, workload.batch) if config.tree is None else None
    joules = None
    if power is not None:  # rounds are those of all streams, and so is what they use
        value = power.watts * tpot / workload.batch
        joules = _interval(value, half * value * math.hypot(power.error, tpot_sd / tpot))
    mean_round = tpot / rounds_per_token
    one = Interval(value=1.0, low=1.0, high=1.0)
    estimate = Estimate(
        config=config,
        tokens_per_round=_inverse(_interval(rounds_per_token, half * rounds_se)),
        round_s=_interval(mean_round, half * math.sqrt(latency_variance) / rounds_per_token),
        tpot_s=seconds("tpot"),
        ttft_s=_interval(ttft, half * ttft_sd),
        e2e_s=seconds("e2e"),
        memory_bytes=resident_bytes(profile, config, workload),
        speedup=one,
        sd_rounds_per_token=sd_rounds,
        num_texts=num_texts,
        notes=notes + latency.notes(workload.batch),
        joules_per_token=joules,
        price_per_million_tokens=None if price_per_hour is None else seconds("price").scaled(price_per_hour * PER_MILLION_TOKENS),
    )
    return Prediction(estimate, workload, per_text, means[1:], error)


def _refresh_s(latency: LatencyModel, config: DraftConfig, workload: Workload) -> tuple[float, list[str]]:
    """Seconds per token that choosing again takes: streams choose one after the other, and all wait. And what is not known of it."""
    if not isinstance(config.kv, SparseKV) or config.kv.refresh is None:
        return 0.0, []
    choice_s = latency.choice_s(config, workload.context_len)
    if choice_s is None:
        return 0.0, [
            f"a choice every {config.kv.refresh} tokens is not in these times: a draft model's was not timed by itself; run it (planner check)"
        ]
    return workload.batch * choice_s / config.kv.refresh, []


def with_speedup(prediction: Prediction, baseline: Prediction, objective: Objective) -> Prediction:
    """The same, its speedup over plain decoding filled in."""
    if prediction.estimate.config.draft_len == 0:
        return prediction
    ratio = difference(baseline, prediction, objective)  # baseline / this - 1
    speedup = Interval(value=1 + ratio.value, low=1 + ratio.low, high=1 + ratio.high)
    return prediction._replace(estimate=msgspec.structs.replace(prediction.estimate, speedup=speedup))


def difference(a: Prediction, b: Prediction, objective: Objective) -> Interval:
    """objective(a) / objective(b) - 1, on the same texts and the same left-out cells."""
    value_a, value_b = objective_s(a, objective), objective_s(b, objective)
    _, laters = weights(objective, b.workload)
    texts, rest = _difference_variance(a, b)
    num_texts = min((e.num_texts for e in (a.estimate, b.estimate) if e.num_texts), default=0)
    ratio = _interval(value_a / value_b, _quantile(num_texts) * laters / value_b * math.sqrt(texts + rest))
    return Interval(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)


def text_share(a: Prediction, b: Prediction) -> float:
    """Share of a comparison's variance that more texts would remove; the rest needs more cells."""
    texts, rest = _difference_variance(a, b)
    return texts / (texts + rest) if texts + rest > 0 else 0.0


def objective_s(prediction: Prediction, objective: Objective) -> float:
    """The number that is minimised, in seconds: a price is the device's time, whatever an hour of it costs."""
    firsts, laters = weights(objective, prediction.workload)
    return firsts * prediction.estimate.ttft_s.value + laters * prediction.estimate.tpot_s.value


def weights(objective: Objective, workload: Workload) -> tuple[float, float]:
    """What an objective is made of: so many times TTFT, and so many times TPOT.

    Price is the device's time per output token. A prompt is prefilled by itself, so each request is charged the whole of
    its TTFT; a round serves the batch, so a request is charged its share. With one stream that is end-to-end time over
    output_len, and both objectives order configurations alike. Throughput, of requests that follow each other, is its inverse.
    """
    later = workload.output_len - 1
    match objective:
        case "tpot":
            return 0.0, 1.0
        case "e2e":
            return 1.0, float(later)
        case "price" | "throughput":
            return 1 / workload.output_len, later / workload.batch / workload.output_len


def refusal(models: Models, prediction: Prediction, workload: Workload, cap_bytes: int | None) -> str | None:
    """Why a configuration may not be used under a memory cap; None if it may."""
    needed = prediction.estimate.memory_bytes.value
    if cap_bytes is None or needed <= cap_bytes:
        return None
    config = prediction.estimate.config
    reason = f"needs {format_bytes(needed)} of {format_bytes(cap_bytes)}, {format_bytes(needed - cap_bytes)} too much"
    if isinstance(config.kv, SparseKV):
        largest = largest_budget(models.profile, config, workload, cap_bytes)
        reason += f"; the largest kv_budget that fits is {largest}" if largest else "; no kv_budget fits"
    return reason


def _by_width(by_drafted: np.ndarray, batch: int) -> np.ndarray:
    """[texts, K+1] rounds per token of each text, by what the widest of its batch verifies: the pass is as wide for all.

    The neighbours are at any place of any text, so their drafts are draws from the mean over texts. A batch of one has none.
    """
    rounds = by_drafted.sum(1, keepdims=True)
    own = np.cumsum(by_drafted / rounds, axis=1)  # P(this stream drafts at most k)
    neighbours = np.cumsum(by_drafted.sum(0) / by_drafted.sum()) ** (batch - 1)
    return rounds * np.diff(own * neighbours, axis=1, prepend=0.0)


def _difference_variance(a: Prediction, b: Prediction) -> tuple[float, float]:
    """Variance of the difference in TPOT, in seconds squared: by texts, and by what the fit does not know."""
    contexts = max(len(a.per_text), len(b.per_text))
    texts = sum(_paired_variance(a.per_text[i] if a.per_text else None, b.per_text[i] if b.per_text else None) for i in range(contexts))
    missed = (a.estimate.tpot_s.value * a.error) ** 2 + (b.estimate.tpot_s.value * b.error) ** 2
    return texts, _jackknife(a.left_out - b.left_out) + missed


def _paired_variance(a, b) -> float:
    """Variance of the difference of mean TPOTs at one context; a configuration without texts is the same on all of them.

    Where both have the same texts it is that of the mean difference; a text that one of them lacks has nothing to cancel.
    """
    if a is None or b is None:
        weight, _, tpot = a or b
        return weight**2 * _variance_of_mean(tpot)
    _, rows_a, rows_b = np.intersect1d(a[1], b[1], return_indices=True)
    covariance = np.cov(a[2][rows_a], b[2][rows_b])[0, 1] if len(rows_a) > 1 else 0.0
    variance = _variance_of_mean(a[2]) + _variance_of_mean(b[2]) - 2 * covariance * len(rows_a) / (len(a[1]) * len(b[1]))
    return a[0] ** 2 * max(0.0, float(variance))


def _variance_of_mean(values: np.ndarray) -> float:
    return float(np.var(values, ddof=1) / len(values)) if len(values) > 1 else 0.0


def _jackknife(left_out: np.ndarray) -> float:
    """Variance from estimates with one cell left out each (Efron 1982)."""
    J = len(left_out)
    return float((J - 1) / J * np.square(left_out - left_out.mean()).sum()) if J > 1 else 0.0


def _quantile(num_texts: int) -> float:
    """Half-width of the interval in standard deviations; Student's t, texts being the scarcest sample."""
    tail = (1 + CONFIDENCE) / 2
    return float(stdtrit(num_texts - 1, tail)) if num_texts > 1 else float(ndtri(tail))


def _interval(value: float, half: float) -> Interval:
    """Symmetric on a log scale: a time stays positive however little is known about it."""
    value, factor = float(value), math.exp(min(half / value, 30.0))
    return Interval(value=value, low=value / factor, high=value * factor)


def _inverse(interval: Interval) -> Interval:
    return Interval(value=1 / interval.value, low=1 / interval.high, high=1 / interval.low)
