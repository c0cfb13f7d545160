"""planner profile: measure a model on this device, from prompts to a Profile."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

import planner
from planner.commands.profile_rounds import Energy, PassDone, Timing
from planner.commands.profile_settings import MIN_TEXTS, Settings, checked_settings
from planner.commands.profile_texts import TextDone, measure_texts
from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, drafter_models, open_journal, open_session, weights_bytes
from planner.errors import BadInput
from planner.measurements import (
    AcceptanceSample,
    DrafterModel,
    Environment,
    PrefillSample,
    Profile,
    RoundSample,
    Text,
    TreeSample,
)
from planner.specs import DeviceSpec, Execution, Weights
from planner.units import format_bytes

GROUP_SHARE = 0.25  # of the memory that the weights leave, for the caches of the texts that are written side by side
MAX_GROUP = 16


def profile(
    model: str,
    dataset: Sequence[str],
    *,
    settings: Settings,
    dtype: str = "bfloat16",
    device: str | None = None,
    execution: Execution | None = None,
    weights: Weights = "full",
    rope_theta: float | None = None,
    max_context_len: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress = Silent(),
) -> Profile:
    """Latency of rounds and acceptance along texts that the model writes for the prompts; minutes, not milliseconds.

    With `out`, a journal beside it holds what is finished, and `resume` goes on from there; saving the profile and
    removing the journal is the caller's. With max_minutes, fewer texts than asked for (at least 4) are replayed once
    the time is up, and the profile says so.
    """
    began = time.perf_counter()
    session = open_session(
        model, dtype=dtype, device=device, execution=execution, weights=weights, rope_theta=rope_theta, max_context_len=max_context_len
    )
    return measure(model, session, dataset, settings=settings, progress=progress, began=began, out=out, resume=resume)


def measure(
    model: str,
    session: Session,
    dataset: Sequence[str],
    *,
    settings: Settings,
    progress: Progress,
    began: float,  # perf_counter when the profile's minutes started to count
    out: str | Path | None = None,
    resume: bool = False,
) -> Profile:
    """The same with a model that is already loaded."""
    from planner.datasets import expand
    from planner.machine import complaints
    from planner.profiler.device import describe_device, read_environment
    from planner.profiler.latency import needs_memory
    from planner.profiler.texts import digest, draw_prompts
    from planner.runtime.weights import dtype_name

    settings = checked_settings(settings, session)
    environment = read_environment(session.model.device)
    device = describe_device(session.model.device)
    _check_room(session, device, settings)
    group = session.ranks.first(lambda: _group_size(session, device, settings), int)
    prompts = draw_prompts(session.tokenizer, expand(list(dataset)), length=max(settings.contexts), count=settings.num_texts, seed=settings.seed)
    header = _Run(
        planner_version=planner.__version__, torch=environment.torch, fingerprint=session.model.fingerprint, weights=session.weights,
        draft_models=drafter_models(session, settings.drafters),
        device=device.name, num_cores=device.num_cores, dtype=dtype_name(session.model.dtype), execution=session.model.kernels.execution,
        tensor_parallel=session.ranks.size, settings=settings._replace(max_minutes=None), group=group,
        texts=[prompt.key for prompt in prompts], prompts=digest(prompts),
    )  # fmt: skip
    deadline = None if settings.max_minutes is None else began + 60 * settings.max_minutes
    with open_journal(session, out, header, PassDone | TextDone, resume=resume) as (keep, done):
        num_earlier = len(done)

        def finish(entry: PassDone | TextDone) -> None:
            keep(entry)
            done.append(entry)

        with needs_memory(f"one prompt of {max(settings.contexts)} tokens", "lower --contexts"):
            grounds = _prepare(session, prompts[0], settings)
        timing = Timing(session, grounds, settings, [entry for entry in done if isinstance(entry, PassDone)])
        known = {entry.key for entry in done if isinstance(entry, TextDone)}
        warnings = []
        steps = measure_texts(session, prompts, settings, group=group, known=known, deadline=deadline, progress=progress, warnings=warnings)
        if not timing.passes:
            finish(timing.run(progress))
        for entry in steps:
            texts_done = sum(isinstance(entry, TextDone) for entry in done)
            if entry is not None:
                finish(entry)
            elif timing.due(texts_done / (len(prompts) * len(settings.contexts) * len(settings.samplers))):
                finish(timing.run(progress))
        while not timing.complete:
            finish(timing.run(progress))
    again = timing.again()
    energy = timing.energy(progress)
    texts = [entry for entry in done if isinstance(entry, TextDone)]
    minutes = {
        "rounds": sum(entry.minutes for entry in timing.passes),
        "texts": sum(entry.minutes for entry in texts),
        "other": (time.perf_counter() - began) / 60 - sum(entry.minutes for entry in done[num_earlier:]),
    }
    found = _Measured(timing, again, texts, energy, minutes)
    seen = [warning for entry in texts for warning in entry.warnings]
    warnings = complaints(environment) + session.warnings + seen + warnings + energy.warnings
    return session.ranks.first(lambda: _profile(model, session, settings, device, environment, found, warnings), Profile)


class _Measured(NamedTuple):
    """What a Profile is made of beside its settings."""

    timing: Timing
    again: list[RoundSample]
    texts: list[TextDone]
    energy: Energy
    minutes: dict[str, float]


def _profile(
    model: str, session: Session, settings: Settings, device: DeviceSpec, environment: Environment, found: _Measured, warnings: list[str]
) -> Profile:
    from planner.runtime.weights import dtype_name

    texts, samples, trees, prefill = _assembled(found.texts, settings)
    return Profile(
        model=model,
        target=session.target,
        target_fingerprint=session.model.fingerprint,
        weights_bytes=session.model.nbytes,
        dtype=dtype_name(session.model.dtype),
        execution_mode=session.model.kernels.execution,
        weights=session.weights,
        tensor_parallel=session.ranks.size,
        rope_theta=session.rope_theta,
        max_context_len=session.max_context_len,
        drafter_models=drafter_models(session, settings.drafters),
        device=device,
        environment=environment,
        seed=settings.seed,
        contexts=settings.contexts,
        samplers=settings.samplers,
        max_draft_len=settings.max_draft_len,
        texts=texts,
        acceptance=samples,
        trees=trees,
        rounds=found.timing.rounds + found.again,
        prefill=prefill,
        memory=[sample for entry in found.timing.passes[:1] for sample in entry.memory],
        energy=found.energy.samples,
        energy_source=found.energy.source,
        failures=found.timing.failures + [failure for entry in found.texts for failure in entry.failures],
        minutes=found.minutes,
        warnings=warnings,
    )


class _Run(msgspec.Struct, kw_only=True):
    """What must agree for a profile to be resumed."""

    planner_version: str
    torch: str
    fingerprint: str  # of the model
    weights: Weights
    draft_models: list[DrafterModel]
    device: str
    num_cores: int | None
    dtype: str
    execution: str
    settings: Settings
    group: int
    tensor_parallel: int
    texts: list[str]
    prompts: str  # digest of their tokens


def _check_room(session: Session, device: DeviceSpec, settings: Settings) -> None:
    """Refuse, before anything runs, a batch that cannot fit: on a CPU the system ends the process that takes too much."""
    context_len, batch = max(settings.contexts), max(settings.batches)
    stream_bytes = context_len * _kv_bytes_per_token(session, settings)
    room = device.memory_bytes - weights_bytes(session)
    if batch * stream_bytes > room:
        raise BadInput(
            f"a batch of {batch} at context {context_len} needs {format_bytes(batch * stream_bytes)} of KV cache, beside the weights there are "
            f"{format_bytes(room)}; the largest batch that fits is {room // stream_bytes}: lower --batches or --contexts"
        )


def _kv_bytes_per_token(session: Session, settings: Settings) -> int:
    """Of the target, hidden states that heads read included, and of the largest cache beside it."""
    beside = [own.spec.kv_bytes_per_token(own.dtype) for own in drafter_models(session, settings.drafters)]
    return session.model.new_cache(1).nbytes + max(beside, default=0)


def _group_size(session: Session, device: DeviceSpec, settings: Settings) -> int:
    """Texts written side by side: as many as fit, but small groups where the time is limited and may end between them."""
    stream_tokens = max(settings.contexts) + settings.output_len
    stream_bytes = stream_tokens * _kv_bytes_per_token(session, settings)
    fitting = int((device.memory_bytes - weights_bytes(session)) * GROUP_SHARE / stream_bytes)
    return max(1, min(MAX_GROUP if settings.max_minutes is None else MIN_TEXTS, fitting))


def _prepare(session: Session, prompt, settings: Settings) -> dict:
    """One prompt prefilled to every context, to time rounds on."""
    import torch

    from planner.profiler.latency import Ground, rounds_room
    from planner.runtime.model import prefill

    model, grounds = session.model, {}
    for context_len in settings.contexts:
        tokens = prompt.tokens[:context_len]
        cache = model.new_cache(context_len + rounds_room(settings.max_draft_len, max(settings.tree_sizes, default=0)))
        logits = prefill(model, torch.tensor([tokens], device=model.device), cache)
        grounds[context_len] = Ground(tokens, cache, logits)
    return grounds


def _assembled(done: list[TextDone], settings: Settings) -> tuple[list[Text], list[AcceptanceSample], list[TreeSample], list[PrefillSample]]:
    texts, samples, trees = [], [], []
    prefill_s = {context_len: {} for context_len in settings.contexts}
    for entry in sorted(done, key=lambda entry: (entry.context_len, settings.samplers.index(entry.sampler), entry.number)):
        samples += [msgspec.structs.replace(sample, text=len(texts)) for sample in entry.samples]
        trees += [msgspec.structs.replace(sample, text=len(texts)) for sample in entry.trees]
        texts += [entry.text] * (entry.text is not None)
        prefill_s[entry.context_len][entry.number] = entry.prefill_s
    for context_len in settings.contexts:
        for sampler in settings.samplers:
            count = sum(text.context_len == context_len and text.sampler == sampler for text in texts)
            if count < MIN_TEXTS:
                raise BadInput(
                    f"an interval needs at least {MIN_TEXTS} texts, only {count} grew beyond one token at context {context_len}; use other prompts"
                )
    prefill = [PrefillSample(context_len=c, seconds=list(prefill_s[c].values())) for c in settings.contexts]
    return texts, samples, trees, prefill
