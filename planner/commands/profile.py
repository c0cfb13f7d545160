"""planner profile: measure a model on this device, from prompts to a Profile."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, open_session
from planner.errors import BadInput
from planner.measurements import MIN_DISTINCT_4GRAMS, AcceptanceSample, MemorySample, PrefillSample, Profile
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV, checked

MIN_TEXTS = 4  # kept whatever --max-minutes says: below, an interval means nothing
GROUP_SHARE = 0.25  # of the free memory, for the caches of the texts that are written side by side
MAX_GROUP = 16


class Settings(NamedTuple):
    """What to measure. Lengths in tokens."""

    contexts: list[int]
    samplers: list[Sampler]
    policies: list[SparseKV]
    max_draft_len: int = 8
    num_texts: int = 16
    output_len: int = 128
    seed: int = 0
    max_minutes: float | None = None


def profile(
    model: str,
    dataset: Sequence[str],
    *,
    settings: Settings,
    dtype: str = "bfloat16",
    device: str | None = None,
    progress: Progress = Silent(),
) -> Profile:
    """Latency of rounds and acceptance along texts that the model writes for the prompts; minutes, not milliseconds.

    With max_minutes, fewer texts than asked for (at least 4) are replayed once the time is up, and the profile says so.
    """
    began = time.perf_counter()
    session = open_session(model, dtype=dtype, device=device)
    return measure(model, session, dataset, settings=_checked(settings, session), progress=progress, began=began)


def measure(model: str, session: Session, dataset: Sequence[str], *, settings: Settings, progress: Progress, began: float) -> Profile:
    """The same with a model that is already loaded."""
    from planner.profiler.device import complaints, describe_device, read_environment
    from planner.profiler.texts import draw_prompts, expand

    environment = read_environment(session.model.device)
    prompts = draw_prompts(session.tokenizer, expand(list(dataset)), length=max(settings.contexts), count=settings.num_texts, seed=settings.seed)
    deadline = None if settings.max_minutes is None else began + 60 * settings.max_minutes
    clock = _Clock(began)
    latency = _measure_latency(session, prompts[0], settings, progress)
    clock.stop("latency")
    acceptance = _measure_acceptance(session, prompts, settings, deadline, progress)
    clock.stop("acceptance")
    drift, _failures = _again(session, latency, settings)
    clock.stop("drift")
    return Profile(
        model=model,
        target=session.model.spec,
        target_fingerprint=session.model.fingerprint,
        weights_bytes=session.model.nbytes,
        dtype=str(session.model.dtype).removeprefix("torch."),
        execution_mode="eager",
        device=describe_device(session.model.device),
        environment=environment,
        seed=settings.seed,
        contexts=settings.contexts,
        samplers=settings.samplers,
        max_draft_len=settings.max_draft_len,
        texts=acceptance.texts,
        acceptance=acceptance.samples,
        rounds=latency.rounds + drift,
        prefill=[PrefillSample(context_len=c, seconds=acceptance.prefill_s[c]) for c in settings.contexts],
        memory=latency.memory,
        failures=latency.failures,
        minutes=clock.minutes,
        warnings=complaints(environment) + acceptance.warnings + _repetition(acceptance.texts),
    )


def drafts(settings: Settings) -> list[DraftConfig]:
    """The drafters and policies to replay, each at the longest draft_len."""
    K = settings.max_draft_len
    sparse = [DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=kv, draft_len=K) for kv in settings.policies]
    return [*sparse, DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=K)]


def latency_cells(settings: Settings) -> list[DraftConfig]:
    """Where rounds are timed: plain; the smallest budget at several widths, the largest at fewer; n-gram at the widest.

    Policies of one budget run the same kernels on caches of the same size, so one selection stands for all.
    """
    K = settings.max_draft_len
    widths = sorted({1, 2, (K + 1) // 2, K})
    by_budget = sorted(settings.policies, key=lambda kv: kv.budget)
    cells = [PLAIN, DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=K)]
    if by_budget:
        self_sparse = DrafterSpec(kind="self_sparse")
        cells += [DraftConfig(drafter=self_sparse, kv=by_budget[0], draft_len=k) for k in widths]
        if by_budget[-1].budget > by_budget[0].budget:
            cells += [DraftConfig(drafter=self_sparse, kv=by_budget[-1], draft_len=k) for k in sorted({1, (K + 1) // 2, K})]
    return cells


class _Latency(NamedTuple):
    grounds: dict
    rounds: list
    memory: list[MemorySample]
    failures: list


class _Acceptance(NamedTuple):
    texts: list
    samples: list[AcceptanceSample]
    prefill_s: dict[int, list[float]]
    warnings: list[str]


class _Clock:
    def __init__(self, began: float):
        self._last = began
        self.minutes: dict[str, float] = {}

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.minutes[stage] = (now - self._last) / 60
        self._last = now


def _checked(settings: Settings, session: Session) -> Settings:
    spec = session.model.spec
    for context_len in settings.contexts:
        if context_len < 1 or context_len + settings.output_len > spec.max_context_len:
            raise BadInput(
                f"context + output must fit the model's {spec.max_context_len} tokens, got {context_len} + {settings.output_len}; "
                f"the longest context is {spec.max_context_len - settings.output_len}"
            )
    if settings.num_texts < MIN_TEXTS:
        raise BadInput(f"an interval needs at least {MIN_TEXTS} texts, got {settings.num_texts}; raise --texts")
    if settings.output_len < 16:
        raise BadInput(f"a text needs at least 16 tokens, got {settings.output_len}; raise --output-len")
    if not 1 <= settings.max_draft_len <= 64:
        raise BadInput(f"max_draft_len must lie in 1..64, got {settings.max_draft_len}")
    if settings.max_minutes is not None and not settings.max_minutes > 0:
        raise BadInput(f"--max-minutes must be positive, got {settings.max_minutes:g}")
    return settings._replace(
        contexts=sorted(set(settings.contexts)),
        samplers=[checked(sampler) for sampler in settings.samplers],
        policies=[checked(policy) for policy in settings.policies],
    )


def _measure_latency(session: Session, prompt, settings: Settings, progress: Progress) -> _Latency:
    import torch

    from planner.profiler.device import PeakMemory
    from planner.profiler.latency import PASSES, Ground, measure_rounds, rounds_room
    from planner.runtime.model import prefill

    model, cells = session.model, latency_cells(settings)
    progress.stage("latency", PASSES * len(cells) * len(settings.contexts))
    memory = PeakMemory(model.device)
    memory.reset()
    grounds = {}
    for context_len in settings.contexts:
        tokens = prompt.tokens[:context_len]
        cache = model.new_cache(context_len + rounds_room(settings.max_draft_len))
        logits = prefill(model, torch.tensor([tokens], device=model.device), cache)
        grounds[context_len] = Ground(tokens, cache, logits)
    rounds, failures = measure_rounds(model, grounds, cells, _warmest(settings), seed=settings.seed, on_pass=progress.advance)
    known = model.nbytes + sum(ground.cache.nbytes for ground in grounds.values())
    peak = max(0, memory.read() - session.base_bytes)
    sample = MemorySample(context_len=max(settings.contexts), known_bytes=known, peak_bytes=peak, base_bytes=session.base_bytes)
    return _Latency(grounds, rounds, [sample], failures)


def _again(session: Session, latency: _Latency, settings: Settings):
    """The first cell once more: has the machine changed?"""
    from planner.profiler.latency import measure_rounds

    context_len = settings.contexts[0]
    grounds = {context_len: latency.grounds[context_len]}
    return measure_rounds(session.model, grounds, [PLAIN], _warmest(settings), seed=settings.seed, role="drift")


def _measure_acceptance(session: Session, prompts: list, settings: Settings, deadline: float | None, progress: Progress) -> _Acceptance:
    import torch

    from planner.profiler.acceptance import replay, write_texts
    from planner.profiler.device import available_memory
    from planner.profiler.timer import synchronize
    from planner.runtime.decode import cache_capacity
    from planner.runtime.model import prefill

    model, configs = session.model, drafts(settings)
    capacity = cache_capacity(max(settings.contexts), settings.output_len, 0)
    stream_bytes = capacity * model.spec.kv_bytes_per_token(str(model.dtype).removeprefix("torch."))
    group = max(1, min(MAX_GROUP, int(available_memory(model.device) * GROUP_SHARE / stream_bytes)))
    found = _Acceptance([], [], {c: [] for c in settings.contexts}, [])
    progress.stage("texts", len(prompts) * len(settings.contexts) * (1 + len(settings.samplers)))
    for first in range(0, len(prompts), group):
        batch = prompts[first : first + group]
        if first >= MIN_TEXTS and deadline is not None and time.perf_counter() > deadline:
            found.warnings.append(f"stopped after {first} of {len(prompts)} texts, --max-minutes was up: intervals are wider than asked for")
            break
        cache = model.new_cache(capacity, batch=len(batch))
        elapsed = [0.0] * len(batch)
        for begin, context_len in zip([0, *settings.contexts], settings.contexts):
            logits = []
            cache.truncate(begin)
            for b, prompt in enumerate(batch):  # one by one: this is also the measurement of prefill
                stream = cache.stream(b)
                before = synchronize(model.device)
                logits.append(prefill(model, torch.tensor([prompt.tokens[begin:context_len]], device=model.device), stream))
                elapsed[b] += synchronize(model.device) - before
                found.prefill_s[context_len].append(elapsed[b])
                progress.advance()
            for number, sampler in enumerate(settings.samplers):
                cache.lengths = [context_len] * len(batch)
                seeds = [settings.seed + 1000 * number + first + b for b in range(len(batch))]
                written = write_texts(
                    model, cache, batch, context_len, torch.cat(logits), sampler, output_len=settings.output_len,
                    stop_tokens=session.tokenizer.stop_tokens, seeds=seeds,
                )  # fmt: skip
                for text, target_text in written:
                    found.texts.append(text)
                    found.samples.extend(replay(model, target_text, config, len(found.texts) - 1) for config in configs)
                    progress.advance()
    for context_len in settings.contexts:
        for sampler in settings.samplers:
            count = sum(text.context_len == context_len and text.sampler == sampler for text in found.texts)
            if count < MIN_TEXTS:
                raise BadInput(
                    f"an interval needs at least {MIN_TEXTS} texts, only {count} grew beyond one token at context {context_len}; use other prompts"
                )
    return found


def _warmest(settings: Settings) -> Sampler:
    """The sampler to time with: the hottest, whose drafts are rejected most often, as rounds usually are."""
    return max(settings.samplers, key=lambda sampler: sampler.temperature)


def _repetition(texts: list) -> list[str]:
    warnings = []
    for sampler in dict.fromkeys(text.sampler for text in texts):
        own = [text for text in texts if text.sampler == sampler]
        looping = sum(text.distinct_4grams < MIN_DISTINCT_4GRAMS for text in own)
        if looping:
            name = "greedy" if sampler.greedy else f"temperature {sampler.temperature:g}"
            warnings.append(
                f"{looping} of {len(own)} texts written with {name} repeat themselves (distinct 4-grams below {MIN_DISTINCT_4GRAMS}): their acceptance is inflated"
            )
    return warnings
