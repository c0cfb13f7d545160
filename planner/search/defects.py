"""What an engine does otherwise than it was told, or than it should, seen in the data alone: a list of known issues goes out of date.

Every finding is shown at 95 %, one-sided, over what answers of one run differ by and what two runs of one setting differ by.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from scipy import stats

from planner.schedules import Setting
from planner.serving import OFF
from planner.tunings import Defect, Launch, Run

SURE = 0.95
RUNS_DIFFER = 0.015  # sd of the logarithm of two runs' times for one setting, an engine started anew in between
ENOUGH = 50  # rounds that tell what is drafted
OFTEN = 200  # drafts, or tries of a position, of which one accepted at 2 % would be missed 2 times in 100
LENGTH_OFF = 0.10  # relative, of drafted tokens per round
IDLE_COSTS = 0.02  # relative, of off's time per token
COLLAPSED = 1.5  # times the time per token that other runs speak for
STARVED = 0.10  # share of the requests in the system that wait
DRAFTS_LESS = ("ngram", "suffix", "lookup")  # methods, by part of the name, that draft only what they found


class Timed(NamedTuple):
    """Time per token of a run: its logarithm, and the standard deviation of that."""

    log: float
    sd: float


def find_defects(
    runs: Sequence[Run], launches: Sequence[Launch], *, engine: str = "", predicted: Callable[[Run], float | None] = lambda run: None
) -> list[Defect]:
    """Everything that is surely amiss, each kind with its figures in one sentence.

    engine  as engine_rules calls it, for issues by number
    predicted  time per token of a run by what other runs say, where there is a model of them
    """
    gone = collapsed(runs, launches, predicted)
    return [
        *_ignored(runs, launches, engine),
        *_idle([run for i, run in enumerate(runs) if i not in gone]),
        *_collapse(runs, gone, engine),
        *_never_accepted(runs, engine),
        *_starved(runs, launches, engine),
        *_warned(launches),
    ]


def collapsed(
    runs: Sequence[Run], launches: Sequence[Launch], predicted: Callable[[Run], float | None] = lambda run: None
) -> dict[int, tuple[float, str]]:
    """Runs under a schedule by load that take far longer than others speak for, by place: how many times as long, and beside what.

    What speaks: the same setting in another launch, at this load, or at a larger one, where a token takes no less; or at a smaller one,
    from which it grows at most in proportion; off, beside an idle drafter; else what a model of other runs predicts.
    """
    found = {}
    for i, run in enumerate(runs):
        if len(launches[run.launch].steps) < 2:
            continue
        own, bounds = _timed(run), []
        for other in runs:
            same = other.setting == run.setting or run.setting.idle and other.setting == Setting()
            scheduled = len(launches[other.launch].steps) > 1
            if other is run or not same or scheduled and other.concurrency == run.concurrency:
                continue
            more = max(1.0, run.concurrency / other.concurrency)
            beside = f"{_name(other.setting)} at concurrency {other.concurrency} takes {1e3 * other.tpot_s:.3g} ms"
            bounds.append((_timed(other).log + math.log(more), _timed(other).sd, beside))
        if not bounds and (expected := predicted(run)) is not None:
            bounds.append((math.log(expected), 0.1, f"other runs speak for {1e3 * expected:.3g} ms"))
        for log, sd, beside in sorted(bounds, key=lambda bound: bound[0])[:1]:
            if own.log - log - _z() * math.hypot(own.sd, sd) > math.log(COLLAPSED):
                found[i] = math.exp(own.log - log), beside
    return found


def _ignored(runs: Sequence[Run], launches: Sequence[Launch], engine: str) -> list[Defect]:
    """Drafts of another length than the server was told for the load."""
    wrong = []
    for run in runs:
        own = run.counted
        if own is None or own.rounds < ENOUGH:
            continue
        least, most = _told(run, launches[run.launch])
        emitted = own.tokens / own.rounds
        per_draft = own.drafted / own.drafts if own.drafts else 0.0
        less = any(part in run.setting.drafter.lower() for part in DRAFTS_LESS)
        ends = run.sent / own.drafts if own.drafts else 0.0  # drafts that stop at a request's end
        if most == 0 and own.drafted > LENGTH_OFF * own.rounds:
            wrong.append((run, f"drafts {own.drafted / own.rounds:.2g} tokens a round"))
        elif most > 0 and (per_draft > most * (1 + LENGTH_OFF) or not per_draft and emitted > most + 1 + LENGTH_OFF):
            wrong.append((run, f"drafts {per_draft:.2g} tokens" if per_draft else f"emits {emitted:.2g} tokens a round"))
        elif not less and least > 0 and per_draft and per_draft < least * (1 - LENGTH_OFF - ends):
            wrong.append((run, f"drafts {per_draft:.2g} tokens"))
        elif not less and least > 0 and not own.drafted and not own.accepted:
            wrong.append((run, "drafts nothing"))
    known, remedy = {
        "vllm": ("vLLM ignores num_speculative_tokens_per_batch_size with data parallelism above 1", "start one server for each replica, or choose one length"),
        "sglang": ("SGLang switches adaptive drafting off with a warning, but for EAGLE with topk 1", "choose one length (--speculative-num-steps)"),
    }.get(engine, ("", "read the engine's log for what it made of the setting, and choose one length for all loads"))  # fmt: skip
    return _one(
        "draft_len ignored", [f"told {run.setting.draft_len} at concurrency {run.concurrency} it {what}" for run, what in wrong], known, remedy
    )


def _idle(runs: Sequence[Run]) -> list[Defect]:
    """What a loaded drafter costs that drafts nothing, over off at the same loads."""
    gaps, found = {}, []
    for run in runs:
        drafts = run.counted is not None and run.counted.drafted > LENGTH_OFF * run.counted.rounds
        for off in runs:
            if run.setting.idle and not drafts and off.setting == Setting() and off.concurrency == run.concurrency:
                a, b = _timed(run), _timed(off)
                gaps.setdefault(run.setting.drafter, []).append((a.log - b.log, a.sd**2 + b.sd**2, run.concurrency))
    for drafter, own in gaps.items():
        logs, variances, loads = (np.array(column) for column in zip(*own, strict=True))
        weights = 1 / variances
        mean = float(np.average(logs, weights=weights))
        sd = weights.sum() ** -0.5
        if len(logs) > 1:  # costs that differ by load are not known better than they agree
            spread = np.average((logs - mean) ** 2, weights=weights) / (len(logs) - 1)
            sd = max(sd, math.sqrt(spread) * stats.t.ppf(SURE, len(logs) - 1) / _z())
        if mean - _z() * sd > math.log1p(IDLE_COSTS):
            low, high = (100 * math.expm1(mean + sign * _z() * sd) for sign in (-1, 1))
            at = ", ".join(map(str, sorted(set(loads.tolist()))))
            found.append(
                Defect(
                    name="idle drafter",
                    what=f"{drafter} loaded and drafting nothing costs {100 * math.expm1(mean):.1f} % [{low:.1f}, {high:.1f}] of the time per token over off, at concurrency {at}",
                    known_as="measured elsewhere as 7 to 22 %",
                    remedy="it is in the plan; for loads at which nothing is drafted, a server without the drafter is faster by as much",
                )
            )
    return found


def _collapse(runs: Sequence[Run], gone: dict[int, tuple[float, str]], engine: str) -> list[Defect]:
    said = [
        f"at concurrency {runs[i].concurrency} {_name(runs[i].setting)} under a schedule takes {1e3 * runs[i].tpot_s:.3g} ms a token, "
        f"{times:.1f} times what is to be expected ({beside})"
        for i, (times, beside) in gone.items()
    ]
    known = "vLLM issue 49548" if engine == "vllm" else ""
    return _one("collapse", said, known, "choose one length for all loads, or keep the schedule's edges away from the loads that you serve")


def _never_accepted(runs: Sequence[Run], engine: str) -> list[Defect]:
    """Positions that are drafted again and again and accepted never."""
    found = []
    for drafter in dict.fromkeys(run.setting.drafter for run in runs if run.setting.drafter != OFF):
        drafting = [
            run for run in runs if run.setting.drafter == drafter and run.setting.draft_len and run.counted is not None and run.counted.drafted
        ]
        own = [run.counted for run in drafting if run.counted is not None]
        drafts = sum(run.counted.drafts or run.counted.drafted / run.setting.draft_len for run in drafting if run.counted is not None)
        accepted = sum(counted.accepted for counted in own)
        longest = max((len(counted.survived) for counted in own), default=0)
        if drafts >= OFTEN and not accepted:
            what = f"of {drafts:.0f} drafts of {drafter} none is accepted"
        else:
            for i in range(1, longest):
                reached = sum(counted.survived[i - 1] for counted in own if i < len(counted.survived) and counted.drafted > i * counted.drafts)
                if reached >= OFTEN and not any(counted.survived[i] for counted in own if i < len(counted.survived)):
                    what = f"draft {i + 1} of {drafter} is never accepted, in {reached:.0f} rounds in which those before it were"
                    break
            else:
                continue
        known = "a drafter's max_model_len, beyond which it goes on drafting in vain" if engine == "vllm" else ""
        remedy = "check that the drafter was made for this model and this length of context, and that no cap on its context is set"
        found.append(Defect(name="never accepted", what=what, known_as=known, remedy=remedy))
    return found


def _starved(runs: Sequence[Run], launches: Sequence[Launch], engine: str) -> list[Defect]:
    """Requests that wait, beyond what a first token takes where nobody waits, and the step that a request may just have missed."""
    said, pools = [], []
    least = min(runs, key=lambda run: run.concurrency, default=None)
    for run in runs:
        ttft_s, decode_s = (np.array([getattr(answer, name) for answer in run.answers]) for name in ("ttft_s", "decode_s"))
        alone_s = ttft_s.min() if run is least else np.median([answer.ttft_s for answer in least.answers])
        round_s = np.array([answer.decode_s / max(1, answer.chunks - 1) for answer in run.answers]).mean()
        waits_s, whole_s = np.maximum(0.0, ttft_s - alone_s - 2 * round_s), ttft_s + decode_s
        share, busy = waits_s.sum() / whole_s.sum(), run.output_tokens_per_s * run.tpot_s
        rest = waits_s - share * whole_s
        sd = math.sqrt(float((rest**2).sum()) * len(rest) / max(1, len(rest) - 1)) / whole_s.sum()
        if len(rest) < 2 or share - _z() * sd < STARVED or busy > run.concurrency * (1 - STARVED):
            continue
        first = f"of {run.concurrency} requests in the system {busy:.1f} decode at once, a first token takes {np.median(ttft_s):.2g} s"
        said.append((-share, f"{_name(run.setting)}: {first}"))
        pool, tokens = launches[run.launch].pool, np.mean([answer.prompt_tokens + answer.output_tokens for answer in run.answers])
        if pool is not None and pool.tokens is not None and pool.tokens / tokens < run.concurrency:
            pools.append(f"; its KV cache of {pool.tokens} tokens holds {pool.tokens / tokens:.0f} requests of {tokens:.0f}")
    cap = {"vllm": "--max-num-seqs", "sglang": "--max-running-requests", "llama.cpp": "-np"}.get(engine, "the engine's cap on running requests")
    known = "SGLang runs 48 requests at most once a drafter is loaded, unless told otherwise" if engine == "sglang" else ""
    worst = [text for _, text in sorted(said)]
    remedy = f"raise {cap}, or the memory for keys and values; where prompts are long, waiting for prefill looks the same"
    defects = _one("starved", worst, known, remedy, most=1)
    return [msgspec.structs.replace(defects[0], what=defects[0].what + pools[-1])] if pools else defects


def _warned(launches: Sequence[Launch]) -> list[Defect]:
    lines = dict.fromkeys(line for launch in launches for line in launch.warnings)
    return [
        Defect(name="warned", what=f"the engine says: {line}"[:2000], remedy="a setting is not in force; leave it out, or use what the line names")
        for line in lines
    ]


def _told(run: Run, launch: Launch) -> tuple[int, int]:
    """Least and most draft_len that the server was told for the batches that run while this load is up: one more or less waits or is prefilled."""
    first, last = max(1, math.floor(run.output_tokens_per_s * run.tpot_s * 0.9)), run.concurrency
    told = [step.draft_len for step in launch.steps if step.batch_from <= last and step.batch_to >= min(first, last)]
    return min([*told, run.setting.draft_len]), max([*told, run.setting.draft_len])


def _timed(run: Run) -> Timed:
    logs = np.log([answer.tpot_s for answer in run.answers])
    sd = float(logs.std(ddof=1) * stats.t.ppf(SURE, len(logs) - 1) / _z() / math.sqrt(len(logs))) if len(logs) > 1 else 0.5
    return Timed(math.log(run.tpot_s), math.hypot(sd, RUNS_DIFFER))


def _z() -> float:
    return float(stats.norm.ppf(SURE))


def _name(setting: Setting) -> str:
    return "off" if setting.drafter == OFF else f"{setting.drafter} at {setting.draft_len}"


def _one(name, said: list[str], known_as: str, remedy: str, most: int = 3) -> list[Defect]:
    """One defect for all loads that show it."""
    more = f"; and at {len(said) - most} more loads" if len(said) > most else ""
    return [Defect(name=name, what="; ".join(said[:most]) + more, known_as=known_as, remedy=remedy)] if said else []
