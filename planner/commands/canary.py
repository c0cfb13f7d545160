"""planner check PLAN --base-url A --baseline-url B: the same prompts to a server with the plan and to one without, in turn.

Prompts run in groups of as many as the concurrency, a group against the one server and then the same against the other, the first
of the two changing from group to group, so that drifting load and machines fall on both. A pair is a prompt's time per token on both;
prompts of a group share their moment, so a group counts once in an interval.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

import numpy as np

import planner
from planner.canaries import Answer, Canary, CanaryCell, Group
from planner.commands.drift import describe_plan, load_either
from planner.commands.groups import whole_groups
from planner.commands.progress import Progress, Silent
from planner.engines.completions import Asked, Prompt, api_client, complete, find_model
from planner.engines.http import Bounds, Client, Key
from planner.engines.load import threads
from planner.engines.prompts import read_prompts
from planner.errors import BadInput
from planner.measurements import fingerprint
from planner.plans import CONFIDENCE, Interval, Plan
from planner.schedules import Schedule
from planner.search.compare import paired_ratio

MIN_GROUPS = 4  # per concurrency: with fewer an interval says nothing
MAX_CONCURRENCY = 512  # threads here
MAX_PROMPTS = 10_000
REQUEST = Bounds(connect_s=5.0, read_s=60.0, total_s=600.0)


def canary(
    plan_path: str | Path,
    dataset: Sequence[str],
    *,
    base_url: str,
    baseline_url: str,
    min_speedup: float,
    concurrency: Sequence[int] | None = None,
    num_texts: int = 16,
    served_model: str | None = None,
    seed: int = 1,
    key: Key | None = None,
    bounds: Bounds = REQUEST,
    progress: Progress = Silent(),
) -> Canary:
    """Whether the server with the plan is shown to be so much faster than the one without, at each of a few concurrencies.

    num_texts  prompts at each, rounded up to whole groups and to MIN_GROUPS of them
    served_model  the name that both servers answer to, where they serve several
    """
    plan = load_either(plan_path)
    if not (math.isfinite(min_speedup) and 0 < min_speedup <= 1000):
        raise BadInput(f"a speedup to ask for lies above 0 and up to 1000, got {min_speedup}; set --min-speedup, 1.3 for example")
    loads = sorted(set(concurrency or _usual_loads(plan)))
    if not 1 <= loads[0] <= loads[-1] <= MAX_CONCURRENCY:
        raise BadInput(f"a canary runs 1 to {MAX_CONCURRENCY} requests side by side, got {loads[0]} to {loads[-1]}; set --max-concurrency")
    sizes = [max(whole_groups(num_texts, load), MIN_GROUPS * load) for load in loads]
    if num_texts < 1 or sum(sizes) > MAX_PROMPTS:
        raise BadInput(f"a canary sends 1 to {MAX_PROMPTS} prompts, got {sum(sizes)} for concurrencies {loads}; change --texts or --max-concurrency")
    context_len, asked = _asked(plan, seed)
    prompts = read_prompts(list(dataset), count=max(sizes) + 1, context_len=context_len, seed=seed)
    clients = [api_client(url, key, bounds) for url in (base_url, baseline_url)]
    if clients[0].name == clients[1].name:
        raise BadInput(f"a canary needs two servers, both addresses are {clients[0].name}; give --baseline-url that of the one without the plan")
    both = [asked._replace(model=find_model(client, served_model, plan.model)) for client in clients]
    progress.stage("canary", 2 * (1 + sum(size // load for size, load in zip(sizes, loads, strict=True))))
    cells, objective = [], "tpot" if plan.objective == "tpot" else "throughput"
    predict = _predictions(plan)
    with threads(loads[-1], clients) as pool:
        for client, own in zip(clients, both, strict=True):  # not measured: connections, lazily compiled kernels
            _run(pool, client, own, prompts[-1:], bounds)
            progress.advance()
        for load, size in zip(loads, sizes, strict=True):
            runs: tuple[list[Group], list[Group]] = ([], [])
            for at in range(0, size, load):
                for which in (0, 1) if at // load % 2 == 0 else (1, 0):
                    runs[which].append(_run(pool, clients[which], both[which], prompts[at : at + load], bounds))
                    progress.advance()
            cells.append(_cell(load, *runs, objective, min_speedup, 1 - (1 - CONFIDENCE) / len(loads), predict(load)))
    passed, decided = all(cell.verdict == "pass" for cell in cells), any(cell.verdict == "fail" for cell in cells)
    prompt_len = np.mean([answer.prompt_tokens for cell in cells for group in cell.groups for answer in group.answers])
    return Canary(
        planner_version=planner.__version__,
        plan_sha256=fingerprint(plan_path),
        model=plan.model,
        server=clients[0].name,
        baseline_server=clients[1].name,
        measure=objective,
        min_speedup=min_speedup,
        output_len=asked.output_len,
        temperature=asked.temperature,
        seed=seed,
        cells=cells,
        passed=passed,
        decided=decided or passed,
        verdict=_verdict(cells, objective, min_speedup),
        notes=_notes(plan, context_len, float(prompt_len), asked, cells),
    )


def _run(pool: ThreadPoolExecutor, client: Client, asked: Asked, prompts: list[Prompt], bounds: Bounds) -> Group:
    """All prompts at once."""
    begin = time.perf_counter()
    futures = [pool.submit(complete, client, prompt, asked, bounds.total_s) for prompt in prompts]
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future.done():
            future.result()  # raises what went wrong, before the others are waited for
    answers = [future.result() for future in futures]
    return Group(wall_s=time.perf_counter() - begin, answers=answers)


def _cell(
    load: int, own: list[Group], base: list[Group], objective: str, min_speedup: float, confidence: float, predicted: float | None
) -> CanaryCell:
    tpot, base_tpot = (_by_group([np.log([answer.tpot_s for answer in group.answers]).mean() for group in groups]) for groups in (own, base))
    rate, base_rate = (_by_group([math.log(group.output_tokens_per_s) for group in groups]) for groups in (own, base))
    quicker, more = (_plus_one(paired_ratio(a, b, confidence)) for a, b in ((base_tpot, tpot), (rate, base_rate)))
    decides = quicker if objective == "tpot" else more
    verdict: Literal["pass", "fail", "undecided"] = "pass" if decides.low >= min_speedup else "fail" if decides.high < min_speedup else "undecided"
    return CanaryCell(
        concurrency=load,
        num_prompts=load * len(own),
        tpot_s=_mean(tpot),
        baseline_tpot_s=_mean(base_tpot),
        tpot_speedup=quicker,
        output_tokens_per_s=_mean(rate),
        baseline_output_tokens_per_s=_mean(base_rate),
        throughput_speedup=more,
        predicted_speedup=predicted,
        verdict=verdict,
        more_prompts=None if verdict != "undecided" else _more(decides, min_speedup, len(own), load),
        groups=own,
        baseline_groups=base,
    )


def _by_group(logs: list[float]) -> dict[str, float]:
    return {str(i): math.exp(value) for i, value in enumerate(logs)}


def _mean(values: dict[str, float]) -> float:
    return float(np.exp(np.log(list(values.values())).mean()))


def _plus_one(difference: Interval) -> Interval:
    return Interval(value=difference.value + 1, low=difference.low + 1, high=difference.high + 1)


def _more(speedup: Interval, asked: float, groups: int, load: int) -> int | None:
    """Further prompts until an interval that shrinks with the root of their number leaves the asked speedup out; None where that is hopeless."""
    half, gap = math.log(speedup.high / speedup.low) / 2, abs(math.log(speedup.value / asked))
    needed = math.inf if gap == 0 else groups * (half / gap) ** 2
    return math.ceil(needed * 1.1 - groups) * load if needed * load <= MAX_PROMPTS else None


def _asked(plan: Plan | Schedule, seed: int) -> tuple[int, Asked]:
    """Context to cut raw text to, and how answers are written; a schedule names no sampler, so it is greedy."""
    if isinstance(plan, Schedule):
        return plan.contexts[0], Asked("", max(2, plan.output_len), 0.0, seed=seed)
    workload, sampler = plan.workload, plan.workload.sampler
    return workload.context_len, Asked("", workload.output_len, sampler.temperature, sampler.top_p, seed)


def _usual_loads(plan: Plan | Schedule) -> list[int]:
    """Of a plan its own; of a schedule both ends and one between, as far as 16 requests."""
    if not isinstance(plan, Schedule):
        return [plan.workload.batch]
    first, last = plan.concurrency_from, min(plan.concurrency_to, max(plan.concurrency_from, 16))
    return [first, round(math.sqrt(first * last)), last]


def _predictions(plan: Plan | Schedule):
    """Load -> the speedup by time per token that the plan predicts there; None beyond it, or where it keeps no predictions."""
    try:
        planned = describe_plan(plan, None, None)
    except BadInput:
        return lambda load: None

    def predict(load: int) -> float | None:
        if not planned.first <= load <= planned.last:
            return None
        return planned.curves.off(load).tpot_s / planned.curves.at(planned.setting(load), load).tpot_s

    return predict


def _verdict(cells: list[CanaryCell], objective: str, min_speedup: float) -> str:
    def told(cell: CanaryCell) -> str:
        speedup = cell.tpot_speedup if objective == "tpot" else cell.throughput_speedup
        return f"{speedup.value:.2f} [{speedup.low:.2f}, {speedup.high:.2f}] at concurrency {cell.concurrency}"

    by = "time per token" if objective == "tpot" else "throughput"
    if failed := [cell for cell in cells if cell.verdict == "fail"]:
        return f"fails: the speedup by {by} is below {min_speedup:g}: {'; '.join(map(told, failed))}"
    if open_ := [cell for cell in cells if cell.verdict == "undecided"]:
        need = [cell.more_prompts for cell in open_]
        more = (
            "so close to what is asked that no number of prompts is likely to tell"
            if None in need
            else f"about {max(need)} more prompts would tell, raise --texts"
        )
        return f"undecided: the speedup by {by} may be below {min_speedup:g} or above: {'; '.join(map(told, open_))}; {more}"
    return f"passes: the speedup by {by} is at least {min_speedup:g}: {'; '.join(map(told, cells))}"


def _notes(plan: Plan | Schedule, context_len: int, prompt_len: float, asked: Asked, cells: list[CanaryCell]) -> list[str]:
    notes = []
    if isinstance(plan, Schedule):
        notes.append("a schedule names no sampler: answers were greedy")
        if len(plan.contexts) > 1:
            notes.append(f"the schedule is for several contexts, raw text was cut for the shortest, {context_len}")
    elif plan.workload.sampler.top_k:
        notes.append(f"the plan samples with top-k {plan.workload.sampler.top_k}, which completions have no word for: it was left out")
    if abs(prompt_len / context_len - 1) > 0.25:
        notes.append(f"prompts hold {prompt_len:.0f} tokens on average, the plan is for {context_len}")
    answers: list[Answer] = [answer for cell in cells for group in [*cell.groups, *cell.baseline_groups] for answer in group.answers]
    short = sum(answer.output_tokens < asked.output_len for answer in answers)
    if short:
        notes.append(f"{short} of {len(answers)} answers ended before {asked.output_len} tokens; time per token is over those they have")
    return notes
