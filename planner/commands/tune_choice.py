"""From the loads that were run to a profile, from that to what to set at each load, and how that held when it was run."""

from typing import NamedTuple

import numpy as np

from planner.commands.deploying import steps_by_batch
from planner.exports import Step
from planner.importers.contract import conditional
from planner.plans import Interval
from planner.schedules import Schedule, Setting
from planner.search.compare import paired_ratio, ratio_interval
from planner.search.grid import Grid, Question, choose, evaluate, ratio_sds
from planner.search.loads import Loads, log_interval, measure
from planner.search.schedule import make_schedule
from planner.search.totals import best_static, counts_of, gains, relative
from planner.search.within import Within
from planner.serving import ServedCell
from planner.specs import Objective
from planner.tunings import CheckedLoad, Run, TunedLoad

FIXED = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark", "pard")  # methods that draft as many tokens as they were told, each round
OTHER = 0.1  # by which the counted length of a draft may differ from what was told before it is believed instead


def served_cells(runs: list[Run], tensor_parallel: int) -> tuple[list[ServedCell], list[str]]:
    """A cell for each measured run, all of one context and output, which are the means; and what was left out, and why."""
    answers = [answer for run in runs for answer in run.answers]
    context_len = max(1, round(float(np.mean([answer.prompt_tokens for answer in answers]))))
    output_len = max(2, round(float(np.mean([answer.output_tokens for answer in answers]))))
    cells, doubts = [], []
    for run in runs:
        draft_len, counted, source = run.setting.draft_len, run.counted, f"launch {run.launch + 1}"
        if counted is not None and counted.rounds > 0 and run.setting.drafter in FIXED:
            drafted = counted.drafted / counted.rounds
            if abs(drafted - draft_len) > OTHER * max(draft_len, 1):
                draft_len = round(drafted)
                if abs(drafted - draft_len) > OTHER * draft_len:
                    doubts.append(
                        f"concurrency {run.concurrency} of {source} drafted {drafted:.2f} tokens a round, told {run.setting.draft_len}: left out"
                    )
                    continue
        tokens, acceptance = None, []
        if draft_len and counted is not None and counted.rounds > 0:
            tokens = min(max(1.0, counted.tokens / counted.rounds), draft_len + 1)
            survived = np.minimum.accumulate([1.0, *(value / counted.rounds for value in counted.survived[:draft_len])])[1:]
            acceptance = conditional(source, survived.tolist())
        cells.append(
            ServedCell(
                drafter=run.setting.drafter, draft_len=draft_len, concurrency=run.concurrency, context_len=context_len, output_len=output_len,
                tpot_s=run.tpot_s, itl_s=run.tpot_s * tokens if tokens else None, output_tokens_per_s=run.output_tokens_per_s,
                ttft_s=float(np.mean([answer.ttft_s for answer in run.answers])), tokens_per_round=tokens, acceptance=acceptance,
                tokens_sd=_texts_sd(run) if tokens else None,
                tensor_parallel=tensor_parallel, source=source,
            )
        )  # fmt: skip
    return cells, doubts


def _texts_sd(run: Run) -> float | None:
    """Of the mean time per token, relatively: requests of one load share their steps, so they differ by what was accepted."""
    if len(run.answers) < 2:
        return None
    seconds, tokens = np.array([(answer.decode_s, answer.output_tokens - 1) for answer in run.answers]).T
    apart = seconds - run.tpot_s * tokens
    return float(min(2.0, apart.std(ddof=1) * np.sqrt(len(apart)) / seconds.sum()))


class Choice(NamedTuple):
    schedule: Schedule  # within what the engine can be told
    steps: tuple[Step, ...]  # by running batch; none: off
    loads: list[TunedLoad]
    gain: Interval | None  # over yours, over all loads; None where that was not measured


def choose_setting(loads: Loads, question: Question, scheduled: bool, yours: Setting | None, places: list[int], **about) -> Choice:
    """What one server is told.

    scheduled  the draft length may follow the running batch; else there is one for all loads
    yours      what to compare with, where it is among the settings
    places     concurrencies to show
    """
    grid = evaluate(loads, question)
    if scheduled:
        kept: Loads = loads
    else:
        best = loads.settings[best_static(grid)]
        kept = Within(loads, lambda setting: setting == best)
    schedule = make_schedule(kept, question, **about)
    rows = schedule.deployments[0].schedule
    index = {setting: s for s, setting in enumerate(loads.settings)}
    path = np.array([[index[next(r.setting for r in rows if at <= r.concurrency_to)] for at in grid.concurrency]])
    chosen = None if all(row.draft_len == 0 for row in rows) else rows
    running = [(int(at), float(grid.forecast.running[s, 0, c])) for c, (at, s) in enumerate(zip(grid.concurrency, path[0], strict=True))]
    known = [running[i] for i in np.unique(np.linspace(0, len(running) - 1, 33).round().astype(int))]
    steps = steps_by_batch(chosen, known, question.concurrency_to)[0] if chosen else ()
    if not chosen:
        path = np.zeros_like(path)
    own = index.get(yours) if yours is not None else None
    free = choose(grid, [grid.free], question.objective)[0].best
    counts = counts_of(grid, free)
    return Choice(
        schedule, steps, [_tuned(grid, path, free, own, at) for at in places],
        None if own is None else gains(grid, [path], np.full_like(path, own), counts)[0],
    )  # fmt: skip


def _tuned(grid: Grid, path: np.ndarray, free: np.ndarray, yours: int | None, concurrency: int) -> TunedLoad:
    c = concurrency - int(grid.concurrency[0])
    s, f, objective = int(path[0, c]), grid.forecast, grid.asked.objective

    def over(other: int) -> Interval:
        values = 1 / f.tpot_s if measure(objective) == "tpot" else f.output_tokens_per_s
        return relative(float(np.log(values[s, 0, c] / values[other, 0, c])), float(ratio_sds(grid, [(s, other, 0, c)], objective)[0][0]))

    score = grid.score(grid.free, objective)[:, 0, c]
    others = [int(other) for other, value in zip(grid.free, score, strict=True) if other != s and np.isfinite(value)]
    rival = max(others, key=lambda other: score[grid.free == other][0], default=None)
    return TunedLoad(
        next_best=None if rival is None else grid.loads.settings[rival],
        gain_over_next=None if rival is None else over(rival),
        concurrency=concurrency, setting=grid.loads.settings[s], running_batch=float(f.running[s, 0, c]),
        tpot_s=log_interval(float(np.log(f.tpot_s[s, 0, c])), f.sd_tpot[s, 0, c]),
        output_tokens_per_s=log_interval(float(np.log(f.output_tokens_per_s[s, 0, c])), f.sd_throughput[s, 0, c]),
        gain_over_off=over(0), gain_over_yours=None if yours is None else over(yours), best=grid.loads.settings[int(free[0, c])],
    )  # fmt: skip


def checked_loads(runs: dict[str, list[Run]], loads: Loads, context_len: int, objective: Objective) -> list[CheckedLoad]:
    """What was predicted beside what was measured on prompts not used before, and what the choice gains over each, prompt by prompt.

    runs  by role: chosen, off, yours
    """
    found = []
    for role, own in runs.items():
        for concurrency in sorted({run.concurrency for run in own}):
            at = [run for run in own if run.concurrency == concurrency]
            answers = [answer for run in at for answer in run.answers]
            rival = [run for run in runs["chosen"] if run.concurrency == concurrency]
            tpot_s, rate = _predicted(loads, at[0].setting, concurrency, context_len)
            speed = ratio_interval([answer.output_tokens for answer in answers], [answer.ttft_s + answer.decode_s for answer in answers])
            found.append(
                CheckedLoad(
                    role=role, setting=at[0].setting, concurrency=concurrency, num_answers=len(answers), predicted_tpot_s=tpot_s,
                    predicted_output_tokens_per_s=rate,
                    measured_tpot_s=ratio_interval([answer.decode_s for answer in answers], [answer.output_tokens - 1 for answer in answers]),
                    measured_output_tokens_per_s=Interval(value=concurrency * speed.value, low=concurrency * speed.low, high=concurrency * speed.high),
                    gain=None if role == "chosen" or not rival else paired_ratio(_by_prompt(at, objective), _by_prompt(rival, objective)),
                )
            )  # fmt: skip
    return sorted(found, key=lambda one: one.concurrency)


def pace(runs: list[Run]) -> float:
    """By how much the times per token of one setting at one load differ between its starts, at most: what the machine did meanwhile."""
    times: dict[tuple, list[float]] = {}
    for run in runs:
        if not run.setting.draft_len:  # those with drafts differ by their texts as well
            times.setdefault((run.setting, run.concurrency), []).append(run.tpot_s)
    return max((max(own) / min(own) for own in times.values()), default=1.0)


def _predicted(loads: Loads, setting: Setting, concurrency: int, context_len: int) -> tuple[Interval | None, Interval | None]:
    if setting not in loads.settings:
        return None, None
    f = loads.predict(*(np.array([value]) for value in (loads.settings.index(setting), concurrency, context_len)))
    if not np.isfinite(f.tpot_s[0]):
        return None, None
    return log_interval(float(np.log(f.tpot_s[0])), f.sd_tpot[0]), log_interval(float(np.log(f.output_tokens_per_s[0])), f.sd_throughput[0])


def _by_prompt(runs: list[Run], objective: Objective) -> dict[str, float]:
    """Seconds for a token, mean over the starts."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for place, answer in zip(run.prompts, run.answers, strict=True):
            seconds = answer.tpot_s if measure(objective) == "tpot" else (answer.ttft_s + answer.decode_s) / answer.output_tokens
            found.setdefault(str(place), []).append(seconds)
    return {place: float(np.exp(np.log(values).mean())) for place, values in found.items()}
