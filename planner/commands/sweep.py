"""planner sweep: run configurations for real, a whole grid or the part of it that a study chooses."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np

import planner
from planner.commands.groups import shared_moments, whole_groups
from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, check_length, drafter_models, load_drafters, open_journal, open_session
from planner.errors import BadInput, OutOfMemory
from planner.measurements import DrafterModel, Environment
from planner.plans import Interval, Rejected, Studied, Sweep, SweepCell, Trial, tokens_per_round
from planner.search.study import Evaluated, Failed, Tried, run_study
from planner.search.surrogate import Coordinates
from planner.specs import PLAIN, DraftConfig, Execution, SparseKV, Storage, Weights, Workload, checked, describe_drafter, selection_of

STUDY = "planner sweep"  # its name in a storage
CHOSEN_BY = "expected improvement"


def sweep(
    model: str,
    dataset: Sequence[str],
    *,
    workload: Workload,
    configs: Sequence[DraftConfig],
    num_texts: int = 8,
    dtype: str = "bfloat16",
    device: str | None = None,
    execution: Execution | None = None,
    weights: Weights = "full",
    rope_theta: float | None = None,
    max_context_len: int | None = None,
    seed: int = 1,
    out: str | Path,
    resume: bool = False,
    num_trials: int | None = None,
    storage: str | None = None,
    progress: Progress = Silent(),
) -> Sweep:
    """Run a whole grid, plain decoding included. What is finished stands in a journal beside `out`; resume goes on from it.

    num_trials  only so many configurations of the grid, each chosen by what those before it took
    storage     where that study stands, for all processes that share it, in place of the journal (planner/search/study.py)

    For a batch, texts run side by side in groups of as many, and num_texts is rounded up to whole groups.
    """
    from planner.datasets import expand
    from planner.machine import complaints
    from planner.profiler.device import describe_device, read_environment
    from planner.profiler.texts import digest, draw_prompts

    if num_trials is not None and num_trials < 2:
        raise BadInput(f"a study compares plain decoding with at least one other, got --trials {num_trials}; raise it")
    if storage in get_args(Storage):
        raise BadInput(f"--storage is where the study of --trials stands, got {storage}; what becomes of a draft model's keys is --kv-storage here")
    if storage is not None and num_trials is None:
        raise BadInput("--storage holds a study of a part of the grid, got no --trials; give both or drop it")
    if storage is not None and resume:
        raise BadInput("--resume goes on from the journal beside --out, and a study in --storage goes on by itself; drop --resume")
    began = time.perf_counter()
    workload = checked(workload)
    session = open_session(
        model, dtype=dtype, device=device, execution=execution, weights=weights, rope_theta=rope_theta, max_context_len=max_context_len
    )
    if num_trials is not None and session.ranks.size > 1:
        raise BadInput(f"a study is for one process with a model of its own, got {session.ranks.size} of torchrun; drop --trials or torchrun")
    arms = list(dict.fromkeys([PLAIN, *configs]))
    drafters = [config.drafter for config in arms]
    load_drafters(session, drafters)
    check_length(session, drafters, workload.context_len, workload.output_len)
    environment = read_environment(session.model.device)
    count = whole_groups(num_texts, workload.batch)
    prompts = draw_prompts(session.tokenizer, expand(list(dataset)), length=workload.context_len, count=count, seed=seed)
    device_spec = describe_device(session.model.device)
    header = _SweepRun(
        planner_version=planner.__version__, torch=environment.torch, fingerprint=session.model.fingerprint, weights=session.weights, draft_models=drafter_models(session, drafters),
        device=device_spec.name, num_cores=device_spec.num_cores, dtype=dtype, execution=session.model.kernels.execution,
        tensor_parallel=session.ranks.size, workload=workload,
        seed=seed, texts=[prompt.key for prompt in prompts], prompts=digest(prompts),
    )  # fmt: skip
    with open_journal(session, out if storage is None else None, header, _Finished, resume=resume) as (keep, entries):
        entries = [entry for entry in entries if entry.trial.config in arms]
        earlier_minutes, lap_s = sum(entry.minutes for entry in entries), began

        def finished(trial: Trial) -> None:
            nonlocal lap_s
            now = time.perf_counter()
            keep(_Finished(trial=trial, minutes=(now - lap_s) / 60))
            lap_s = now
            progress.advance()

        run = _Runs(session, prompts, workload, seed, longest=max(config.verified for config in arms), finished=finished)
        trials = [entry.trial for entry in entries]
        if num_trials is None:
            progress.stage("sweep", len(arms) * len(prompts))
            progress.advance(len(trials))
            trials += run(arms, trials)
            tried = None
        else:
            progress.stage("sweep", min(num_trials, len(arms)) * len(prompts))
            progress.advance(len(trials))
            tried = _studied(arms, run, trials, num_trials, seed, header, storage, progress)
    minutes = earlier_minutes + (time.perf_counter() - began) / 60
    warnings = complaints(environment) + session.warnings + shared_moments(workload.batch, len(prompts))
    report = partial(_report, model, workload, environment)
    if tried is None:
        return session.ranks.first(lambda: report(arms, trials, minutes, warnings), Sweep)
    found = _measured(tried)
    workers = len({one.worker for one in tried})
    if workers > 1:
        warnings = [*warnings, f"{workers} processes measured these: what differs between their machines or moments stands in the comparison"]
    study = Studied(
        num_candidates=len(arms), chosen_by=CHOSEN_BY, left_out=[config for config in arms if config not in {one.candidate for one in tried}],
        failed=[Rejected(config=one.candidate, reason=one.record) for one in tried if one.cost is None],
    )  # fmt: skip
    if storage is not None:
        minutes = sum(arm.minutes for arm in found.values())  # of all processes
    return report(list(found), [trial for arm in found.values() for trial in arm.trials], minutes, warnings, study)


def coordinates(config: DraftConfig) -> Coordinates:
    """A configuration as a study sees it."""
    found: Coordinates = {"drafter": describe_drafter(config.drafter)}
    if config.draft_len:
        found |= {"selection": selection_of(config.kv) or "full", "draft_len": config.draft_len}
    if config.tree is not None:
        found["tree_size"] = config.tree.max_size
    if isinstance(config.kv, SparseKV):
        found["kv_budget"] = config.kv.budget
    return found


class _SweepRun(msgspec.Struct, kw_only=True):
    """What must agree for a sweep to be resumed."""

    planner_version: str
    torch: str
    fingerprint: str  # of the model
    weights: Weights
    draft_models: list[DrafterModel]
    device: str
    num_cores: int | None
    dtype: str
    execution: str
    tensor_parallel: int
    workload: Workload
    seed: int
    texts: list[str]
    prompts: str  # digest of their tokens


class _Finished(msgspec.Struct, kw_only=True):
    trial: Trial
    minutes: float


class _Arm(msgspec.Struct, kw_only=True):
    """What a study keeps of a configuration, for whoever shares it."""

    trials: list[Trial]
    minutes: float


class _Runs:
    """Runs configurations on the prompts of a sweep, and tells of every trial that is finished."""

    def __init__(self, session: Session, prompts: list, workload: Workload, seed: int, *, longest: int, finished: Callable[[Trial], None]):
        self._session, self._prompts, self._workload, self._seed = session, prompts, workload, seed
        self._longest, self._finished = longest, finished

    def __call__(self, configs: Sequence[DraftConfig], known: Sequence[Trial], prefilled: dict | None = None) -> list[Trial]:
        """Trials that are not known yet. Unfinished where the memory does not suffice."""
        from planner.profiler.latency import needs_memory
        from planner.profiler.trial import run_trials

        workload = self._workload
        steps = run_trials(
            self._session.model, self._prompts, configs, workload.sampler, output_len=workload.output_len,
            stop_tokens=self._session.tokenizer.stop_tokens, seed=self._seed, batch=workload.batch,
            skip={(trial.text, trial.config) for trial in known}, prefilled=prefilled, longest=self._longest,
        )  # fmt: skip
        found = []
        with needs_memory(f"{workload.batch} streams at context {workload.context_len}", "end other programs, or lower --max-concurrency or --isl"):
            for trial in steps:
                self._finished(trial)
                found.append(trial)
        return found


def _studied(
    arms: list[DraftConfig], run: _Runs, known: list[Trial], num_trials: int, seed: int, header: _SweepRun, storage: str | None, progress: Progress
) -> list[Tried[DraftConfig]]:  # fmt: skip
    """Those of the grid that a study chooses, by time per token. What the journal knows comes first, plain decoding before it."""
    prefilled: dict = {}  # every configuration runs by itself, and each prompt is to be prefilled once

    def evaluate(config: DraftConfig) -> Evaluated:
        before = [trial for trial in known if trial.config == config]
        began = time.perf_counter()
        try:
            trials = before + run([config], before, prefilled)
        except OutOfMemory as error:
            if config == PLAIN:
                raise
            raise Failed(str(error)) from None
        tpot_s = [trial.tpot_s for trial in trials if trial.output_len > 1]
        if not tpot_s and config != PLAIN:
            raise Failed("every text ended with its first token")
        if not tpot_s:
            raise BadInput("every text ended with its first token when decoded plainly, so nothing can be compared; use other prompts")
        arm = _Arm(trials=trials, minutes=(time.perf_counter() - began) / 60)
        return Evaluated(float(np.exp(np.mean(np.log(tpot_s)))), msgspec.json.encode(arm).decode())

    return run_study(
        arms, evaluate, coordinates=[coordinates(config) for config in arms], num_trials=num_trials, seed=seed, storage=storage, name=STUDY,
        identity={name: msgspec.json.encode(getattr(header, name)).decode() for name in header.__struct_fields__},
        first=list(dict.fromkeys([PLAIN, *(trial.config for trial in known)])),
        waiting=lambda running: progress.stage("waiting for what other processes are running", running),
    )  # fmt: skip


def _measured(tried: list[Tried[DraftConfig]]) -> dict[DraftConfig, _Arm]:
    """What a study has measured, plain decoding first."""
    try:
        found = {one.candidate: msgspec.json.decode(one.record, type=_Arm) for one in tried if one.cost is not None}
    except msgspec.MsgspecError as error:
        raise BadInput(f"the study holds a measurement that cannot be read: {error}; begin another") from None
    return dict(sorted(found.items(), key=lambda item: item[0] != PLAIN))


def _report(
    model: str, workload: Workload, environment: Environment, arms: list[DraftConfig], trials: list[Trial], minutes: float, warnings: list[str],
    study: Studied | None = None,
) -> Sweep:  # fmt: skip
    from planner.search.compare import best_of, mean_interval, objective_by_text, paired_ratio

    table = objective_by_text(trials, "tpot")
    cells = []
    for config in arms:
        own = [trial for trial in trials if trial.config == config]
        gain = paired_ratio(table[PLAIN], table[config])
        cells.append(
            SweepCell(
                config=config,
                measured_tpot_s=mean_interval([trial.tpot_s for trial in own]),
                measured_e2e_s=mean_interval([trial.e2e_s for trial in own]),
                measured_tokens_per_round=tokens_per_round(own),
                speedup=Interval(value=1 + gain.value, low=1 + gain.low, high=1 + gain.high),
                trials=own,
            )
        )
    return Sweep(
        planner_version=planner.__version__, model=model, environment=environment, workload=workload, cells=cells, best=best_of(table),
        minutes=minutes, warnings=warnings, study=study,
    )  # fmt: skip
