"""The part of a profile that times rounds: passes over the latency cells, the drift check, and energy."""

import time
from typing import NamedTuple

import msgspec

from planner.commands.profile_settings import Settings, latency_cells
from planner.commands.progress import Progress
from planner.commands.session import Session, drafter_models, weights_bytes
from planner.cost.memory import own_cache_bytes
from planner.measurements import EnergySample, Failure, MemorySample, RoundSample
from planner.specs import PLAIN


class PassDone(msgspec.Struct, kw_only=True, tag="pass"):
    """A few rounds of every latency cell."""

    rounds: list[RoundSample]
    memory: list[MemorySample]  # by batch; none where nothing fitted
    failures: list[Failure]
    minutes: float


class Energy(NamedTuple):
    """What the device counted, by which counter, and what is missing."""

    samples: list[EnergySample]
    source: str | None
    warnings: list[str]


class Timing:
    """The passes over the latency cells: the first before any text, the others spread over the texts, the last at the end."""

    def __init__(self, session: Session, grounds: dict, settings: Settings, passes: list[PassDone]):
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

    def run(self, progress: Progress) -> PassDone:
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
        done = PassDone(rounds=rounds, memory=samples, failures=failures, minutes=(time.perf_counter() - began) / 60)
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

    def energy(self, progress: Progress) -> Energy:
        """One pass over all cells that could be timed. Not in the journal: a resumed profile does it again, in a second or two for each cell."""
        from planner.profiler.energy import open_counter
        from planner.profiler.latency import energy_pass

        samples, skip = [], {failure.cell for failure in self.failures}
        with open_counter(self._session.model.device, self._session.ranks.size) as (counter, warnings):
            if counter is None:
                return Energy([], None, warnings)
            progress.stage("energy", len(self._settings.batches))
            cells = {batch: [c for c in latency_cells(self._settings, batch) if c.tree is None] for batch in self._settings.batches}
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
        return Energy(samples, counter.name, warnings)
