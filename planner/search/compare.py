"""Compare configurations that were run on the same texts: paired, text by text, on a log scale.

Texts that were decoded side by side count as one each, as texts that ran alone do: what differs between them is mostly
what they let a drafter guess. But they share their rounds and the machine's moment, which pairing cannot take out, so
where the machine is restless, intervals of a batch are too narrow.
"""

import numpy as np
from scipy import stats

from planner.errors import BadInput
from planner.plans import CONFIDENCE, Interval, Trial
from planner.specs import DraftConfig, Objective


def objective_by_text(trials: list[Trial], objective: Objective) -> dict[DraftConfig, dict[str, float]]:
    """Seconds by configuration and text. A text that ended with its first token has no time per later token.

    Price counts the tokens that a text really has, and end-to-end time does not: where stop tokens end texts at
    different lengths, the two part.
    """
    seconds = {"e2e": Trial.e2e_s, "tpot": Trial.tpot_s, "price": Trial.device_s_per_token, "throughput": Trial.device_s_per_token}[objective].fget
    table: dict[DraftConfig, dict[str, float]] = {}
    for trial in trials:
        if trial.output_len < 2:
            table.setdefault(trial.config, {})
            continue
        table.setdefault(trial.config, {})[trial.text] = seconds(trial)
    return table


def paired_ratio(a: dict[str, float], b: dict[str, float], confidence: float = CONFIDENCE) -> Interval:
    """Geometric mean of a / b over the texts both ran, minus 1, with Student's interval. One text alone has no bounds but -1 and 1e9."""
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise BadInput("a paired comparison needs a text that both configurations ran, there is none; use other prompts")
    logs = np.log([a[text] / b[text] for text in shared])
    if not logs.any():
        return Interval(value=0.0, low=0.0, high=0.0)
    if len(logs) < 2:
        value = float(np.exp(logs.mean()) - 1)
        return Interval(value=value, low=-1.0, high=max(1e9, value))
    half = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return Interval(value=float(np.expm1(logs.mean())), low=float(np.expm1(logs.mean() - half)), high=float(np.expm1(logs.mean() + half)))


def mean_interval(values: list[float]) -> Interval:
    """Mean over texts with Student's 90 % interval."""
    array = np.array(values)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else 0.0
    return Interval(value=float(array.mean()), low=float(array.mean() - half), high=float(array.mean() + half))


def ratio_interval(above: list[float], below: list[float]) -> Interval:
    """Sum of the one over sum of the other, with Student's 90 % interval over the pairs; of one pair, no width is known."""
    a, b = np.array(above), np.array(below)
    value = float(a.sum() / b.sum())
    if len(a) < 2:
        return Interval(value=value, low=value, high=value)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(a) - 1) * (a - value * b).std(ddof=1) * np.sqrt(len(a)) / b.sum()
    return Interval(value=value, low=float(value - half), high=float(value + half))


def best_of(table: dict[DraftConfig, dict[str, float]]) -> DraftConfig:
    """The configuration with the smallest mean over the texts that all of them ran."""
    shared = set.intersection(*(set(by_text) for by_text in table.values()))
    return min(table, key=lambda config: np.mean([table[config][text] for text in shared]))


def regret(table: dict[DraftConfig, dict[str, float]], chosen: DraftConfig) -> Interval:
    """How much worse the choice is than the best one measured, which was picked from the same numbers: an upper estimate."""
    return paired_ratio(table[chosen], table[best_of(table)])


def expected_tokens_per_round(rounds_per_token: float, sd: float, num_profiled: int, num_run: int) -> Interval:
    """Where the mean of `num_run` new texts should lie, given the profiled ones: a prediction interval.

    sd  between texts, chance included
    """
    half = 0.0
    if num_profiled > 1 and sd > 0:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, num_profiled - 1) * sd * np.sqrt(1 / num_profiled + 1 / num_run)
    return Interval(
        value=1 / rounds_per_token, low=float(1 / (rounds_per_token + half)), high=float(1 / max(rounds_per_token - half, rounds_per_token / 100))
    )


def tied_within(table: dict[DraftConfig, dict[str, float]], chosen: DraftConfig, epsilon: float, looks: int) -> tuple[set[DraftConfig], bool | None]:
    """Configurations still in the race, and whether the choice is within epsilon of all of them at 95 %.

    True: shown. False: shown to be worse than epsilon. None: not yet known. The 5 % are shared out over comparisons
    and looks (Bonferroni), since the question is asked again after every few texts.
    """
    others = [config for config in table if config != chosen]
    confidence = 1 - 2 * 0.05 / (max(1, len(others)) * looks)  # each comparison looks at one side
    gaps = {config: paired_ratio(table[chosen], table[config], confidence) for config in others}
    racing = {config for config, gap in gaps.items() if gap.high > 0}
    if all(gap.high <= epsilon for gap in gaps.values()):
        return racing, True
    if any(gap.low > epsilon for gap in gaps.values()):
        return racing, False
    return racing, None
