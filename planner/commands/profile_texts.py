"""The part of a profile that measures acceptance: texts that the target writes, and every drafter replayed along them."""

import gc
import time
from collections.abc import Iterator

import msgspec

from planner.commands.profile_settings import MIN_TEXTS, Settings, drafts
from planner.commands.progress import Progress
from planner.commands.session import Session
from planner.errors import Unfinished
from planner.measurements import AcceptanceSample, Failure, Seconds, Text, TreeSample
from planner.specs import TREELESS, DraftConfig, Sampler, describe, describe_sampler


class TextDone(msgspec.Struct, kw_only=True, tag="text"):
    """A prompt, continued and replayed at one context under one sampler."""

    number: int  # of the prompt
    context_len: int
    sampler: Sampler
    prefill_s: Seconds
    text: Text | None  # None: it ended with its first token
    samples: list[AcceptanceSample]  # their `text`, and that of `trees`, is filled in when the profile is put together
    trees: list[TreeSample] = []
    failures: list[Failure]
    warnings: list[str] = []
    minutes: float

    @property
    def key(self) -> tuple:
        return self.number, self.context_len, self.sampler


def measure_texts(
    session: Session,
    prompts: list,
    settings: Settings,
    *,
    group: int,
    known: set[tuple],
    deadline: float | None,
    progress: Progress,
    warnings: list[str],
) -> Iterator[TextDone | None]:
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
) -> Iterator[TextDone | None]:
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
                samples, trees, failures = [], [], []
                if text is not None:
                    where = f"text {numbers[b] + 1} at context {context_len}"
                    samples, trees, failures = _replay_all(model, target_text, configs, settings, where)
                yield TextDone(
                    number=numbers[b], context_len=context_len, sampler=sampler, prefill_s=elapsed[b], text=text, samples=samples, trees=trees,
                    failures=failures, minutes=(time.perf_counter() - last) / 60,
                )  # fmt: skip
                progress.advance()
                last = time.perf_counter()
            yield None
            last = time.perf_counter()
        cache.lengths = [context_len] * len(batch)


def _replay_all(
    model, target_text, configs: list[DraftConfig], settings: Settings, where: str
) -> tuple[list[AcceptanceSample], list[TreeSample], list[Failure]]:
    """Every drafter along one text, its chains and its trees; one that runs out of memory is reported and passed over."""
    from planner.profiler.acceptance import replay, replay_trees
    from planner.profiler.latency import is_out_of_memory

    samples, trees, failures = [], [], []
    for config in configs:
        try:
            samples.append(replay(model, target_text, config, 0))
            if settings.tree_sizes and config.drafter.kind not in TREELESS:
                trees += replay_trees(model, target_text, config, settings.tree_levels, max(settings.tree_sizes), 0)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or model.kernels.num_ranks > 1:
                raise
            failures.append(
                Failure(cell=f"replay of {describe(config)} along {where}, {describe_sampler(target_text.sampler)}", reason="out of memory")
            )
    target_text.prompt_caches.clear()  # the group's other texts, and rounds, need the room
    return samples, trees, failures
