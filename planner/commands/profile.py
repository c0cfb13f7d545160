"""planner profile: measure a model on this device, from prompts to a Profile."""

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

import planner
from planner.commands.plan import kv_choices
from planner.commands.progress import Progress, Silent
from planner.commands.session import Session, check_length, drafter_models, load_drafters, open_journal, open_session, usual_weights, weights_bytes
from planner.cost.memory import own_cache_bytes
from planner.errors import BadInput, Unfinished
from planner.measurements import (
    AcceptanceSample,
    DrafterModel,
    EnergySample,
    Environment,
    Failure,
    MemorySample,
    PrefillSample,
    Profile,
    RoundSample,
    Seconds,
    Text,
)
from planner.specs import PLAIN, DeviceSpec, DraftConfig, DrafterSpec, Execution, Sampler, SparseKV, Weights, checked, describe, describe_sampler
from planner.units import format_bytes

MIN_TEXTS = 4  # kept whatever --max-minutes says: below, an interval means nothing
GROUP_SHARE = 0.25  # of the memory that the weights leave, for the caches of the texts that are written side by side
MAX_GROUP = 16


class Settings(NamedTuple):
    """What to measure. Lengths in tokens."""

    contexts: list[int]
    samplers: list[Sampler]
    policies: list[SparseKV]
    drafters: list[DrafterSpec] | None = None  # None: self_sparse, in int8 on a CPU and with the target's weights elsewhere, and ngram
    max_draft_len: int = 8
    num_texts: int = 16
    output_len: int = 128
    seed: int = 0
    max_minutes: float | None = None
    batches: list[int] = [1]  # streams side by side, to time rounds at; texts are written and replayed once for all


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
    from planner.profiler.device import complaints, describe_device, read_environment
    from planner.profiler.latency import needs_memory
    from planner.profiler.texts import digest, draw_prompts, expand

    settings = _checked(settings, session)
    environment = read_environment(session.model.device)
    device = describe_device(session.model.device)
    _check_room(session, device, settings)
    group = session.ranks.first(lambda: _group_size(session, device, settings), int)
    prompts = draw_prompts(session.tokenizer, expand(list(dataset)), length=max(settings.contexts), count=settings.num_texts, seed=settings.seed)
    header = _Run(
        planner_version=planner.__version__, torch=environment.torch, fingerprint=session.model.fingerprint, weights=session.weights,
        draft_models=drafter_models(session, settings.drafters),
        device=device.name, num_cores=device.num_cores, dtype=str(session.model.dtype), execution=session.model.kernels.execution,
        tensor_parallel=session.ranks.size, settings=settings._replace(max_minutes=None), group=group,
        texts=[prompt.key for prompt in prompts], prompts=digest(prompts),
    )  # fmt: skip
    deadline = None if settings.max_minutes is None else began + 60 * settings.max_minutes
    with open_journal(session, out, header, _PassDone | _TextDone, resume=resume) as (keep, done):
        num_earlier = len(done)

        def finish(entry: "_PassDone | _TextDone") -> None:
            keep(entry)
            done.append(entry)

        with needs_memory(f"one prompt of {max(settings.contexts)} tokens", "lower --contexts"):
            grounds = _prepare(session, prompts[0], settings)
        timing = _Timing(session, grounds, settings, [entry for entry in done if isinstance(entry, _PassDone)])
        known = {entry.key for entry in done if isinstance(entry, _TextDone)}
        warnings = []
        steps = _measure_acceptance(
            session, prompts, settings, group=group, known=known, deadline=deadline, progress=progress, warnings=warnings
        )  # fmt: skip
        if not timing.passes:
            finish(timing.run(progress))
        for entry in steps:
            texts_done = sum(isinstance(entry, _TextDone) for entry in done)
            if entry is not None:
                finish(entry)
            elif timing.due(texts_done / (len(prompts) * len(settings.contexts) * len(settings.samplers))):
                finish(timing.run(progress))
        while not timing.complete:
            finish(timing.run(progress))
    again = timing.again()
    energy = timing.energy(progress)
    texts = [entry for entry in done if isinstance(entry, _TextDone)]
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

    timing: "_Timing"
    again: list[RoundSample]
    texts: list["_TextDone"]
    energy: "_Energy"
    minutes: dict[str, float]


class _Energy(NamedTuple):
    """What the device counted, by which counter, and what is missing."""

    samples: list[EnergySample]
    source: str | None
    warnings: list[str]


def _profile(
    model: str, session: Session, settings: Settings, device: DeviceSpec, environment: Environment, found: _Measured, warnings: list[str]
) -> Profile:
    texts, samples, prefill = _assembled(found.texts, settings)
    return Profile(
        model=model,
        target=session.target,
        target_fingerprint=session.model.fingerprint,
        weights_bytes=session.model.nbytes,
        dtype=str(session.model.dtype).removeprefix("torch."),
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
        rounds=found.timing.rounds + found.again,
        prefill=prefill,
        memory=[sample for entry in found.timing.passes[:1] for sample in entry.memory],
        energy=found.energy.samples,
        energy_source=found.energy.source,
        failures=found.timing.failures + [failure for entry in found.texts for failure in entry.failures],
        minutes=found.minutes,
        warnings=warnings,
    )


def drafts(settings: Settings) -> list[DraftConfig]:
    """The drafters and policies to replay, each at the longest draft_len."""
    return [
        DraftConfig(drafter=drafter, kv=kv, draft_len=settings.max_draft_len)
        for drafter in settings.drafters
        for kv in kv_choices(drafter, settings.policies)
    ]


def latency_cells(settings: Settings, batch: int = 1) -> list[DraftConfig]:
    """Where rounds are timed: plain; the smallest cache at several widths, the largest at fewer; n-gram at the widest.

    Policies of one budget run the same kernels on caches of the same size, so one selection stands for all. Verifying is
    the same for every drafter, so those after the first are timed at three places. A batch above 1 does without K = 2:
    its cells take longer, and there may be many batches.
    """
    K = settings.max_draft_len
    middle = (K + 1) // 2
    cells = [PLAIN, *(DraftConfig(drafter=drafter, draft_len=K) for drafter in settings.drafters if drafter.kind == "ngram")]
    by_read = {
        drafter: sorted(kv_choices(drafter, settings.policies), key=lambda kv: kv.read(max(settings.contexts)))
        for drafter in settings.drafters
        if drafter.kind not in ("none", "ngram")
    }
    for number, (drafter, kvs) in enumerate((drafter, kvs) for drafter, kvs in by_read.items() if kvs):
        smallest, largest = kvs[0], kvs[-1]
        at_smallest = sorted({1, middle, K} | ({min(2, K)} if batch == 1 else set())) if number == 0 else sorted({1, middle})
        at_largest = sorted({1, middle, K}) if number == 0 else [K]
        cells += [DraftConfig(drafter=drafter, kv=smallest, draft_len=k) for k in at_smallest]
        if number or largest != smallest:
            cells += [DraftConfig(drafter=drafter, kv=largest, draft_len=k) for k in at_largest]
    return list(dict.fromkeys(cells))


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


class _PassDone(msgspec.Struct, kw_only=True, tag="pass"):
    """A few rounds of every latency cell."""

    rounds: list[RoundSample]
    memory: list[MemorySample]  # by batch; none where nothing fitted
    failures: list[Failure]
    minutes: float


class _TextDone(msgspec.Struct, kw_only=True, tag="text"):
    """A prompt, continued and replayed at one context under one sampler."""

    number: int  # of the prompt
    context_len: int
    sampler: Sampler
    prefill_s: Seconds
    text: Text | None  # None: it ended with its first token
    samples: list[AcceptanceSample]  # their `text` is filled in when the profile is put together
    failures: list[Failure]
    warnings: list[str] = []
    minutes: float

    @property
    def key(self) -> tuple:
        return self.number, self.context_len, self.sampler


def _checked(settings: Settings, session: Session) -> Settings:
    from planner.runtime.drafters import drafting_model

    drafters = settings.drafters
    if drafters is None:
        drafters = [DrafterSpec(kind="self_sparse", weights=usual_weights(str(session.model.device))), DrafterSpec(kind="ngram")]
    drafters = list(dict.fromkeys(drafter for drafter in drafters if drafter.kind != "none"))
    load_drafters(session, drafters)
    for drafter in drafters:
        if drafter.kind != "ngram":
            drafting_model(drafter, session.model)  # refuses what the model cannot be made into; and before anything is timed
        if drafter.kind == "self_sparse" and not settings.policies:
            raise BadInput("drafter self_sparse needs a kv budget, got none; give --kv-budgets or leave it out of --drafters")
    for context_len in settings.contexts:
        if context_len < 1:
            raise BadInput(f"a context has at least one token, got {context_len}; change --contexts")
        check_length(session, drafters, context_len, settings.output_len)
    if settings.num_texts < MIN_TEXTS:
        raise BadInput(f"an interval needs at least {MIN_TEXTS} texts, got {settings.num_texts}; raise --texts")
    if settings.output_len < 16:
        raise BadInput(f"a text needs at least 16 tokens, got {settings.output_len}; raise --output-len")
    if not 1 <= settings.max_draft_len <= 64:
        raise BadInput(f"max_draft_len must lie in 1..64, got {settings.max_draft_len}")
    if not settings.batches or min(settings.batches) < 1:
        raise BadInput(f"a batch counts streams and must be at least 1, got {settings.batches}; give --batches 1,4,8")
    if settings.max_minutes is not None and not settings.max_minutes > 0:
        raise BadInput(f"--max-minutes must be positive, got {settings.max_minutes:g}")
    return settings._replace(
        drafters=drafters,
        contexts=sorted(set(settings.contexts)),
        batches=sorted(set(settings.batches)),
        samplers=[checked(sampler) for sampler in settings.samplers],
        policies=[checked(policy) for policy in settings.policies],
    )


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
        cache = model.new_cache(context_len + rounds_room(settings.max_draft_len))
        logits = prefill(model, torch.tensor([tokens], device=model.device), cache)
        grounds[context_len] = Ground(tokens, cache, logits)
    return grounds


class _Timing:
    """The passes over the latency cells: the first before any text, the others spread over the texts, the last at the end."""

    def __init__(self, session: Session, grounds: dict, settings: Settings, passes: list[_PassDone]):
        from planner.profiler.latency import PASSES

        self._session, self._grounds, self._settings = session, grounds, settings
        self._wanted = PASSES
        self._sampler = max(settings.samplers, key=lambda sampler: sampler.temperature)  # hot drafts are rejected often, as rounds usually are
        self.passes = passes

    @property
    def complete(self) -> bool:
        return len(self.passes) >= self._wanted

    @property
    def failures(self) -> list[Failure]:
        return [failure for entry in self.passes for failure in entry.failures]

    @property
    def rounds(self) -> list[RoundSample]:
        from planner.profiler.latency import merge_passes

        return merge_passes([entry.rounds for entry in self.passes])

    def due(self, share: float) -> bool:
        """Whether the next pass belongs behind this share of the texts; the last one is kept for the end."""
        return len(self.passes) < min(self._wanted - 1, 1 + (self._wanted - 1) * share)

    def run(self, progress: Progress) -> _PassDone:
        from planner.profiler.device import PeakMemory
        from planner.profiler.latency import measure_pass

        began = time.perf_counter()
        session = self._session
        progress.stage(f"rounds, pass {len(self.passes) + 1} of {self._wanted}", len(self._settings.batches))
        memory = PeakMemory(session.model.device)
        skip = {failure.cell for failure in self.failures}
        seed = self._settings.seed + len(self.passes)
        rounds, samples, failures = [], [], []
        for batch in self._settings.batches:
            memory.reset()
            timed, failed = measure_pass(
                session.model, self._grounds, latency_cells(self._settings, batch), self._sampler, seed=seed, batch=batch, skip=skip
            )
            peak = max(0, memory.read() - session.base_bytes)
            if timed:
                samples.append(
                    MemorySample(
                        context_len=max(self._grounds), batch=batch, known_bytes=self._known_bytes(timed), peak_bytes=peak,
                        base_bytes=session.base_bytes,
                    )
                )  # fmt: skip
            rounds += timed
            failures += failed
            progress.advance()
        done = _PassDone(rounds=rounds, memory=samples, failures=failures, minutes=(time.perf_counter() - began) / 60)
        self.passes.append(done)
        return done

    def _known_bytes(self, timed: list[RoundSample]) -> int:
        """Weights, the prompts of all contexts, and what a batch was timed on, one context at a time: the largest copies and cache of a drafter's own."""
        grounds = {context_len: ground.cache for context_len, ground in self._grounds.items()}
        own = {model.drafter: model for model in drafter_models(self._session, self._settings.drafters)}

        def beside(sample: RoundSample) -> int:
            cache = grounds[sample.context_len]
            total = sample.batch * cache.nbytes * (sample.batch > 1)
            if sample.drafter in own:
                model = own[sample.drafter]
                total += own_cache_bytes(
                    model.spec, model.dtype, sample.kv, capacity=cache.capacity, draft_len=sample.draft_len, batch=sample.batch
                )  # fmt: skip
            return total

        return weights_bytes(self._session) + sum(cache.nbytes for cache in grounds.values()) + max(map(beside, timed))

    def again(self) -> list[RoundSample]:
        """The first cell once more: has the machine changed since the first pass?"""
        from planner.profiler.latency import measure_pass

        first = {self._settings.contexts[0]: self._grounds[self._settings.contexts[0]]}
        batch = self._settings.batches[0]
        return measure_pass(self._session.model, first, [PLAIN], self._sampler, seed=self._settings.seed, batch=batch, role="drift")[0]

    def energy(self, progress: Progress) -> _Energy:
        """One pass over all cells that could be timed. Not in the journal: a resumed profile does it again, in a second or two for each cell."""
        from planner.profiler.energy import open_counter
        from planner.profiler.latency import energy_pass

        samples, skip = [], {failure.cell for failure in self.failures}
        with open_counter(self._session.model.device, self._session.ranks.size) as (counter, warnings):
            if counter is None:
                return _Energy([], None, warnings)
            progress.stage("energy", len(self._settings.batches))
            cells = {batch: latency_cells(self._settings, batch) for batch in self._settings.batches}
            try:
                for batch, configs in cells.items():
                    samples += energy_pass(
                        self._session.model, self._grounds, configs, self._sampler, counter, seed=self._settings.seed, batch=batch, skip=skip
                    )
                    progress.advance()
                    if not samples:
                        break  # every cell waits a second for the counter to move
            except OSError as error:  # minutes of measuring are not to be lost by it
                warnings.append(f"the energy counter ({counter.name}) stopped answering: {error}")
        missing = len(self._grounds) * sum(map(len, cells.values())) - len(samples) - len(skip)
        if missing > 0:
            warnings.append(
                f"energy of {missing} cells is missing, the counter ({counter.name}) stood still or did not answer: "
                "plans show J per token only where it is known"
            )
        return _Energy(samples, counter.name, warnings)


def _measure_acceptance(
    session: Session,
    prompts: list,
    settings: Settings,
    *,
    group: int,
    known: set[tuple],
    deadline: float | None,
    progress: Progress,
    warnings: list[str],
) -> Iterator[_TextDone | None]:
    """Groups of prompts, each continued at every context under every sampler; what is known is passed over.

    None after every stage: a moment to time rounds, nothing being half done. A group that the memory does not suffice for is halved, and so are those after it.
    """
    from planner.profiler.latency import is_out_of_memory

    first, group_s, news = 0, 0.0, []  # group_s: how long the last group took; news: warnings for the next entry
    while first < len(prompts):
        size = min(group, len(prompts) - first)
        todo = {(n, c, s) for n in range(first, first + size) for c in settings.contexts for s in settings.samplers} - known
        late = deadline is not None and session.ranks.first(lambda: time.perf_counter() + group_s > deadline, bool)  # noqa: B023 - called here
        if todo and first >= MIN_TEXTS and late:
            warnings.append(f"stopped after {first} of {len(prompts)} texts, --max-minutes was up: intervals are wider than asked for")
            return
        begin_s = time.perf_counter()
        try:
            for entry in _continue_group(session, prompts, range(first, first + size), settings, todo, progress) if todo else ():
                if entry is not None:
                    entry.warnings, news = news, []
                    known.add(entry.key)
                yield entry
            first += size
            group_s = time.perf_counter() - begin_s
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1 or session.ranks.size > 1:  # of several ranks, one alone cannot begin anew
                raise Unfinished(
                    f"the memory does not suffice for one text at context {max(settings.contexts)}; end other programs or lower --contexts"
                ) from None
        gc.collect()  # out here nothing holds on to the group's cache, as the error did
        group = size // 2
        news = [*news, f"the memory did not suffice for {size} texts side by side: from text {first + 1} on, {group} were written at once"]


def _continue_group(
    session: Session,
    prompts: list,
    numbers: range,  # of the prompts that make up the group
    settings: Settings,
    todo: set[tuple],
    progress: Progress,
) -> Iterator[_TextDone | None]:
    """The texts of a group that are still to do, replayed as soon as all are written.

    All of them are written, whatever is to do: what is computed beside a text may change its last bits, and with them the text.
    A shorter context is the beginning of the longer one's prompt, so prefill goes on where it was.
    """
    import torch

    from planner.profiler.acceptance import write_texts
    from planner.profiler.timer import synchronize
    from planner.runtime.decode import cache_capacity
    from planner.runtime.model import prefill

    model, configs = session.model, drafts(settings)
    batch = [prompts[n] for n in numbers]
    contexts = [c for c in settings.contexts if c <= max(c for _, c, _ in todo)]
    last = time.perf_counter()
    cache = model.new_cache(cache_capacity(contexts[-1], settings.output_len, 0), batch=len(batch))
    elapsed = [0.0] * len(batch)
    for begin, context_len in zip([0, *contexts], contexts):
        logits = []
        cache.truncate(begin)
        progress.stage(f"prompts at {context_len} tokens", len(batch))
        for b, prompt in enumerate(batch):  # one by one: this is also the measurement of prefill
            stream = cache.stream(b)
            before = synchronize(model.device)
            logits.append(prefill(model, torch.tensor([prompt.tokens[begin:context_len]], device=model.device), stream))
            elapsed[b] += synchronize(model.device) - before
            progress.advance()
        for index, sampler in enumerate(settings.samplers):
            missing = [b for b, n in enumerate(numbers) if (n, context_len, sampler) in todo]
            if not missing:
                continue
            cache.lengths = [context_len] * len(batch)
            seeds = [settings.seed + 1000 * index + n for n in numbers]
            progress.stage(f"texts at {context_len} tokens, {describe_sampler(sampler)}", 1 + len(missing))
            written = write_texts(
                model, cache, batch, context_len, torch.cat(logits), sampler, output_len=settings.output_len,
                stop_tokens=session.tokenizer.stop_tokens, seeds=seeds,
            )  # fmt: skip
            progress.advance()
            for b in missing:
                text, target_text = written[b] or (None, None)
                samples, failures = (
                    ([], []) if text is None else _replay_all(model, target_text, configs, f"text {numbers[b] + 1} at context {context_len}")
                )
                yield _TextDone(
                    number=numbers[b], context_len=context_len, sampler=sampler, prefill_s=elapsed[b], text=text, samples=samples,
                    failures=failures, minutes=(time.perf_counter() - last) / 60,
                )  # fmt: skip
                progress.advance()
                last = time.perf_counter()
            yield None
            last = time.perf_counter()
        cache.lengths = [context_len] * len(batch)


def _replay_all(model, target_text, configs: list[DraftConfig], where: str) -> tuple[list[AcceptanceSample], list[Failure]]:
    """Every drafter along one text; one that runs out of memory is reported and passed over."""
    from planner.profiler.acceptance import replay
    from planner.profiler.latency import is_out_of_memory

    samples, failures = [], []
    for config in configs:
        try:
            samples.append(replay(model, target_text, config, 0))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or model.kernels.num_ranks > 1:
                raise
            failures.append(
                Failure(cell=f"replay of {describe(config)} along {where}, {describe_sampler(target_text.sampler)}", reason="out of memory")
            )
    return samples, failures


def _assembled(done: list[_TextDone], settings: Settings) -> tuple[list[Text], list[AcceptanceSample], list[PrefillSample]]:
    texts, samples = [], []
    prefill_s = {context_len: {} for context_len in settings.contexts}
    for entry in sorted(done, key=lambda entry: (entry.context_len, settings.samplers.index(entry.sampler), entry.number)):
        samples += [msgspec.structs.replace(sample, text=len(texts)) for sample in entry.samples]
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
    return texts, samples, prefill
