"""planner simulate: settings of a server under requests that come and go, on the same arrivals. Does not need torch."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from hashlib import sha256 as sha256_of
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, get_args

import planner
from planner.commands.flags import AskedSimulation
from planner.commands.progress import Progress, Silent
from planner.commands.simulate_arms import Opened, Setting, open_arms
from planner.commands.simulate_load import find_requests
from planner.errors import BadInput
from planner.measurements import fingerprint
from planner.schedules import Limits
from planner.simulations import Arm, Simulation, Studied, Tried
from planner.simulations import Server as ServerInfo
from planner.simulator.costs import Prefill, tabulate
from planner.simulator.engine import Outcome, Router, Server
from planner.simulator.engine import simulate as serve
from planner.simulator.figures import overloaded, report_arm
from planner.simulator.metrics import keeps
from planner.simulator.scheduler import Batching, KVRoom
from planner.simulator.sources import USUAL_SPREAD, PlanSource, feasible, pass_s
from planner.simulator.texts import Acceptance
from planner.simulator.workload import Request

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, BLOCK_TOKENS = 256, 8192, 16  # vLLM's on a large GPU
STUDY = "planner simulate"  # its name in a storage
MAX_WORKERS, MAX_REPLICAS = 64, 4096


class Configuration(NamedTuple):
    """One candidate of a study."""

    setting: str
    max_num_seqs: int
    max_num_batched_tokens: int


def simulate(path: str | Path, asked: AskedSimulation, *, limits: Sequence[Limits] = (), seed: int = 0, progress: Progress = Silent()) -> Simulation:
    """Off, --also, and what the schedule says, one after the other on the same requests; and a study over configurations, if asked.

    limits  one goodput is reported for each
    """
    began = time.perf_counter()
    _check(asked)
    requests, load = find_requests(asked, seed)
    opened = open_arms(path, asked, requests)
    bench = Bench(opened, asked, requests, seed)
    seqs, batched = (
        values[0] if values else usual for values, usual in zip((asked.max_num_seqs, asked.max_num_batched_tokens), bench.usual, strict=True)
    )
    servers = [bench.server(setting, seqs, batched) for setting in opened.settings]
    progress.stage("settings", len(servers))
    outcomes = _each(partial(_run, requests, seed), servers, asked.workers, progress)
    arms = [
        report_arm(setting.name, setting.drafter, setting.steps, server, outcome, limits, outcomes[0] if i else None, seed)
        for i, (setting, server, outcome) in enumerate(zip(opened.settings, servers, outcomes, strict=True))
    ]
    study = None if asked.num_trials is None else _studied(bench, fingerprint(path), limits, seed, progress)
    source = opened.source
    return Simulation(
        planner_version=planner.__version__, sha256=fingerprint(path), source=source.source, load=load, seed=seed, limits=list(limits), arms=arms,
        server=ServerInfo(
            model=source.model, system=source.system, replicas=asked.replicas, router=asked.router, tensor_parallel=source.tensor_parallel,
            max_num_seqs=seqs, max_num_batched_tokens=batched, block_tokens=BLOCK_TOKENS, prefix_caching=asked.prefix_caching,
        ),
        study=study, seconds=time.perf_counter() - began, notes=[*source.notes, *opened.notes, *bench.notes, *_warnings(arms, outcomes)],
    )  # fmt: skip


class Bench:
    """What all arms share."""

    def __init__(self, opened: Opened, asked: AskedSimulation, requests: list[Request], seed: int):
        self.source, self.settings, self.asked, self.requests = opened.source, opened.settings, asked, requests
        self.notes: list[str] = []
        self._longest = max(request.input_len + request.output_len for request in requests) + 1
        self._pass_s = pass_s(self.source)
        most = self.source.max_batch
        self.usual = (MAX_NUM_SEQS if most is None else min(MAX_NUM_SEQS, most), MAX_NUM_BATCHED_TOKENS)
        if asked.kv_tokens is not None and len({setting.drafter for setting in self.settings}) > 1:
            self.notes.append("--kv-tokens is the room of every setting: what a drafter takes of it is not subtracted")
        self._spread = USUAL_SPREAD if asked.spread is None else asked.spread
        if not 0 <= self._spread <= 5:
            raise BadInput(f"--spread is a standard deviation of a logit, from 0 to 5, got {self._spread:g}")
        self._acceptance = {
            name: self._accepted(name) for name in dict.fromkeys(setting.drafter for setting in self.settings if setting.policy.max_draft_len)
        }
        if self._acceptance and asked.spread is None:
            self.notes.append(
                f"how far texts differ in acceptance was not measured: a standard deviation of {USUAL_SPREAD} of its logit is assumed; --spread sets another"
            )
        if self._longest > 2 * max(self.source.contexts) and not isinstance(self.source, PlanSource):
            self.notes.append(
                f"texts grow up to {self._longest - 1:,} tokens, the longest context measured is {max(self.source.contexts):,}: measure longer ones"
            )
        self._tables: dict = {}

    def server(self, setting: Setting, max_num_seqs: int, max_num_batched_tokens: int) -> Server:
        """The server of one arm; BadInput where it cannot be."""
        asked, source = self.asked, self.source
        if source.max_batch is not None and isinstance(source, PlanSource) and max_num_seqs > source.max_batch:
            raise BadInput(f"the plan is for {source.max_batch} streams, got --max-num-seqs {max_num_seqs}; plan for that many")
        tokens = asked.kv_tokens or source.kv_tokens(setting.drafter, max_num_seqs, max_num_batched_tokens)
        if tokens is None or tokens < BLOCK_TOKENS:
            raise BadInput(
                f"memory holds {tokens or 0} tokens beside {setting.drafter}, not one block of {BLOCK_TOKENS}; give --kv-tokens, or another --system"
            )
        return Server(
            cost=self._table(setting, max_num_seqs), room=KVRoom(blocks=tokens // BLOCK_TOKENS, block_tokens=BLOCK_TOKENS),
            batching=Batching(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, prefix_caching=asked.prefix_caching),
            policy=setting.policy, acceptance=self._acceptance.get(setting.drafter), replicas=asked.replicas, router=asked.router,
        )  # fmt: skip

    def _table(self, setting: Setting, max_num_seqs: int):
        draft_lens = tuple(sorted({k for row in setting.policy.draft_len for k in row}))
        key = setting.drafter, draft_lens, max_num_seqs
        if key not in self._tables:
            self._tables[key] = tabulate(
                partial(self.source.rounds, setting.drafter), draft_lens, max_batch=max_num_seqs, longest=self._longest, pass_s=self._pass_s,
                prefill=self._prefill(setting.drafter),
            )  # fmt: skip
        return self._tables[key]

    def _prefill(self, drafter: str) -> Prefill:
        if self.asked.prefill_rate is not None:
            return Prefill(1 / self.asked.prefill_rate, 0.0)
        found = self.source.prefill(drafter)
        if found is None:
            raise BadInput(
                "nothing says how long prompts take: no time to the first token was measured, nor is the system's peak known; give --prefill-rate"
            )
        return found

    def _accepted(self, drafter: str) -> Acceptance:
        source = self.source
        lens = list(range(1, 1 + max(setting.policy.max_draft_len for setting in self.settings if setting.drafter == drafter)))
        rows = tuple(feasible(source.tokens_per_round(drafter, lens, context), self._spread) for context in source.contexts)
        return Acceptance(tokens_per_round=rows, contexts=tuple(source.contexts), spread=self._spread)


def _run(requests: list[Request], seed: int, server: Server) -> Outcome:
    return serve(requests, server, seed=seed)


def _each(run: Callable, servers: Sequence[Server], workers: int, progress: Progress) -> list[Outcome]:
    """In as many processes as asked, in order."""
    found = []
    if workers == 1 or len(servers) == 1:
        for server in servers:
            found.append(run(server))
            progress.advance()
        return found
    with ProcessPoolExecutor(min(workers, len(servers)), initializer=_quiet) as pool:
        try:
            for outcome in pool.map(run, servers):
                found.append(outcome)
                progress.advance()
        except BaseException:
            _end(pool)
            raise
    return found


def _studied(bench: Bench, sha256: str, limits: Sequence[Limits], seed: int, progress: Progress) -> Studied:
    """Settings x limits of a step, by as many processes as asked, and whoever else shares the storage."""
    asked = bench.asked
    with TemporaryDirectory() as folder, ExitStack() as stack:
        storage = asked.storage or (str(Path(folder) / "study.journal") if asked.workers > 1 else None)
        progress.stage("study", min(asked.num_trials, len(_candidates(bench))))
        if asked.workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(asked.workers - 1, initializer=_quiet))
            for _ in range(asked.workers - 1):
                pool.submit(_take_part, bench, sha256, limits, seed, storage)
        try:
            tried = _take_part(bench, sha256, limits, seed, storage, progress)
        except BaseException:
            if asked.workers > 1:
                _end(pool)
            raise
    rows = [Tried(**one.candidate._asdict(), cost=one.cost, reason=one.record[:2000], worker=one.worker) for one in tried]
    able = [i for i, row in enumerate(rows) if row.cost is not None]
    return Studied(
        minimised=_minimised(limits), num_candidates=len(_candidates(bench)), tried=rows, best=min(able, key=lambda i: rows[i].cost, default=None)
    )


def _take_part(bench: Bench, sha256: str, limits: Sequence[Limits], seed: int, storage: str | None, progress: Progress = Silent()) -> list:
    """One worker's share of a study; returns what all of them tried."""
    from planner.search.study import Evaluated, Failed, run_study

    asked, settings, candidates = bench.asked, {setting.name: setting for setting in bench.settings}, _candidates(bench)

    def evaluate(candidate: Configuration) -> Evaluated:
        try:
            outcome = _run(bench.requests, seed, bench.server(settings[candidate.setting], *candidate[1:]))
        except BadInput as error:
            raise Failed(str(error)) from None
        progress.advance()
        if limits:
            return Evaluated(100 * (1 - float(keeps(outcome, limits[0]).mean())))
        if outcome.rejected.all():
            raise Failed("no request fits into memory")
        return Evaluated(float(outcome.e2e_s[~outcome.rejected].mean()))

    load = asked._replace(workers=1, storage=None, num_trials=None, trace=None)  # what is the same for all who share the study, a path excepted
    digest = sha256_of(repr([(r.arrival_s, r.input_len, r.output_len) for r in bench.requests]).encode()).hexdigest()
    return run_study(
        candidates, evaluate, coordinates=[_coordinates(settings[c.setting], c) for c in candidates], num_trials=asked.num_trials, seed=seed,
        identity={"file": sha256, "requests": digest, "flags": repr(load), "limits": repr(list(limits)), "seed": str(seed)}, storage=storage, name=STUDY,
    )  # fmt: skip


def _candidates(bench: Bench) -> list[Configuration]:
    asked, (seqs, batched) = bench.asked, bench.usual
    seqs = asked.max_num_seqs if len(asked.max_num_seqs) > 1 else _around(asked.max_num_seqs, seqs, bench.source.max_batch)
    batched = asked.max_num_batched_tokens if len(asked.max_num_batched_tokens) > 1 else _around(asked.max_num_batched_tokens, batched, None)
    return [Configuration(setting.name, s, b) for setting in bench.settings for s in seqs for b in batched]


def _minimised(limits: Sequence[Limits]) -> str:
    return "requests outside of the limits, %" if limits else "mean end-to-end time, s"


def _coordinates(setting: Setting, candidate: Configuration) -> dict:
    found = {"max_num_seqs": math.log2(candidate.max_num_seqs), "max_num_batched_tokens": math.log2(candidate.max_num_batched_tokens)}
    fixed = len({k for row in setting.policy.draft_len for k in row}) == 1
    return found | ({"draft_len": float(setting.policy.max_draft_len)} if fixed else {}) | {"setting": setting.name if not fixed else setting.drafter}


def _around(given: tuple[int, ...], usual: int, most: int | None) -> list[int]:
    """A quarter to twice the usual."""
    middle = given[0] if given else usual
    return sorted({value for value in (middle // 4, middle // 2, middle, 2 * middle) if value >= 1 and (most is None or value <= most)})


def _warnings(arms: Sequence[Arm], outcomes: Sequence[Outcome]) -> list[str]:
    found = []
    for arm in arms:
        if arm.rejected:
            found.append(f"{arm.name}: {arm.rejected} requests are longer than the {arm.kv_tokens:,} tokens that memory holds, and were refused")
    if names := [arm.name for arm, outcome in zip(arms, outcomes, strict=True) if overloaded(outcome)]:
        found.append(
            f"{', '.join(names)}: requests come faster than they are served, so times grow with the length of the trace; add replicas, or lower --rate"
        )
    return found


def _check(asked: AskedSimulation) -> None:
    for flag, values in {"--max-num-seqs": asked.max_num_seqs, "--max-num-batched-tokens": asked.max_num_batched_tokens}.items():
        if not all(1 <= value <= 2**20 for value in values):
            raise BadInput(f"{flag} must lie in 1..{2**20}, got {', '.join(map(str, values))}")
        if len(values) > 1 and asked.num_trials is None:
            raise BadInput(f"several {flag} are for a study, got {', '.join(map(str, values))} without --trials; give one, or --trials")
    if not 1 <= asked.replicas <= MAX_REPLICAS:
        raise BadInput(f"--replicas must lie in 1..{MAX_REPLICAS}, got {asked.replicas}")
    if asked.router not in get_args(Router):
        raise BadInput(f"--router is {' or '.join(get_args(Router))}, got {asked.router[:80]!r}")
    if asked.num_trials is not None and asked.num_trials < 1:
        raise BadInput(f"a study tries at least one configuration, got --trials {asked.num_trials}")
    if asked.storage is not None and asked.num_trials is None:
        raise BadInput("--storage holds a study, got no --trials; give both or drop it")
    if not 1 <= asked.workers <= MAX_WORKERS:
        raise BadInput(f"--workers must lie in 1..{MAX_WORKERS}, got {asked.workers}")
    if asked.kv_tokens is not None and not BLOCK_TOKENS <= asked.kv_tokens <= 2**40:
        raise BadInput(f"--kv-tokens must lie in {BLOCK_TOKENS}..{2**40}, got {asked.kv_tokens}")
    if asked.prefill_rate is not None and not 0 < asked.prefill_rate <= 1e9:
        raise BadInput(f"--prefill-rate is in tokens per second, above 0 and at most 1e9, got {asked.prefill_rate:g}")


def _quiet() -> None:
    """A worker leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(pool: ProcessPoolExecutor) -> None:
    """Without waiting for what is under way."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
