"""Loads against servers, one after the other, every finished one in a journal."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from planner.commands.flags import AskedTune
from planner.commands.progress import Progress
from planner.commands.tune_servers import REQUEST, Subject
from planner.engines.completions import Asked, Prompt, find_model
from planner.engines.contract import Drafting
from planner.engines.http import Client
from planner.engines.load import run_load
from planner.errors import ServerError
from planner.exports import Step
from planner.schedules import Setting
from planner.search.design import Probe
from planner.tunings import Launch, Run

WARM_TOKENS = 16  # of requests that are not measured: connections, and kernels that are compiled when they are first needed


class Item(NamedTuple):
    """One start, and what to run against it."""

    stage: str  # measure or check
    repeat: int
    drafting: Drafting
    loads: tuple[int, ...]

    def setting(self, load: int) -> Setting:
        draft_len = Probe(self.drafting.steps, self.loads).draft_len(load)
        return Setting(drafter=self.drafting.method, draft_len=draft_len) if self.drafting.steps else Setting()


class Piece(msgspec.Struct, kw_only=True):
    """What a journal holds: a start, or a load that is finished."""

    stage: str
    repeat: int
    drafter: str
    steps: list[Step]
    launch: Launch | None = None
    run: Run | None = None
    minutes: float = 0.0


class Bench:
    """Runs loads, and knows those that a journal already holds."""

    def __init__(
        self, subject: Subject, folder: Path, asked: AskedTune, seed: int, earlier: list[Piece], keep: Callable[[Piece], None], progress: Progress
    ):
        self._subject, self._folder, self._asked, self._seed, self._keep, self._progress = subject, folder, asked, seed, keep, progress
        self.launches = [piece.launch for piece in earlier if piece.launch is not None]
        self.runs = [piece.run for piece in earlier if piece.run is not None]
        self._done = {(piece.stage, piece.repeat, piece.drafter, *piece.steps, piece.run.concurrency) for piece in earlier if piece.run is not None}
        self.earlier_minutes = sum(piece.minutes for piece in earlier)
        self._began = time.monotonic()
        self.cut: list[str] = []

    @property
    def minutes(self) -> float:
        return self.earlier_minutes + (time.monotonic() - self._began) / 60

    def runs_of(self, items: Sequence[Item]) -> list[Run]:
        """What was run of these."""
        keys = {(item.stage, item.repeat, item.drafting.method, *item.drafting.steps) for item in items}
        return [run for run in self.runs if (run.stage, run.repeat, (at := self.launches[run.launch]).drafter, *at.steps) in keys]

    @property
    def requests(self) -> int:
        return sum(run.sent for run in self.runs)

    def __call__(self, item: Item, prompts: Callable[[int], list[Prompt]], warm: list[Prompt]) -> None:
        """Run what is not done yet. Where a server with a drafter fails, that is kept in mind, and the rest of its loads passed over.

        prompts  those of a load      warm  others, to begin with
        """
        todo = [load for load in item.loads if (item.stage, item.repeat, item.drafting.method, *item.drafting.steps, load) not in self._done]
        self._progress.advance(len(item.loads) - len(todo))
        if not todo or self._stop(item, {todo[0]: prompts(todo[0])}):
            self._progress.advance(len(todo))
            return
        ran = len(self.runs)
        try:
            self._run(item, {load: prompts(load) for load in todo}, warm)
        except ServerError as error:
            if not (item.drafting.steps and self._subject.restarts):
                raise
            self.cut.append(f"{self._named(item)} failed, and what was left of it was passed over: {error}"[:2000])
            self._progress.advance(len(todo) - (len(self.runs) - ran))

    def _run(self, item: Item, loads: dict[int, list[Prompt]], warm: list[Prompt]) -> None:
        about = {"stage": item.stage, "repeat": item.repeat, "drafter": item.drafting.method, "steps": list(item.drafting.steps)}
        at = time.monotonic()
        with self._subject.serve(item.drafting, len(self.launches), self._folder) as (client, launch):
            metrics, judge = _has_metrics(client), not self._asked.keep_repetitive
            asked = Asked(
                find_model(client, self._asked.served_model), self._asked.output_len, self._asked.temperature, self._asked.top_p, self._seed
            )
            self.launches.append(launch)
            self._keep(Piece(**about, launch=launch, minutes=(time.monotonic() - at) / 60))
            at, short = time.monotonic(), asked._replace(output_len=min(WARM_TOKENS, asked.output_len))
            run_load(client, short, warm, concurrency=min(len(warm), max(loads)), metrics=False, total_s=REQUEST.total_s, judge=False)
            for load, prompts in loads.items():
                if self._stop(item, {load: prompts}):
                    self._progress.advance()
                    continue
                found = run_load(client, asked, prompts, concurrency=load, metrics=metrics, total_s=REQUEST.total_s, judge=judge)
                run = Run(
                    launch=len(self.launches) - 1, stage=item.stage, repeat=item.repeat, setting=item.setting(load), concurrency=load, answers=found.answers,
                    prompts=found.prompts, wall_s=found.wall_s, sent=found.sent, degenerate=found.degenerate, short=found.short, counted=found.counted,
                )  # fmt: skip
                self.runs.append(run)
                now = time.monotonic()
                self._keep(Piece(**about, run=run, minutes=(now - at) / 60))
                at = now
                self._progress.advance()

    def _stop(self, item: Item, loads: dict[int, list[Prompt]]) -> bool:
        """Whether a bound is reached, which is said."""
        asked, bound = self._asked, None
        if self.minutes > asked.cap_minutes:
            bound = f"--cap-minutes {asked.cap_minutes:g}"
        elif self.requests + sum(len(prompts) + load for load, prompts in loads.items()) > asked.cap_requests:
            bound = f"--cap-requests {asked.cap_requests}"
        if bound is not None:
            self.cut.append(f"{bound} was reached: {self._named(item)} was not run from concurrency {min(loads)} on")
        return bound is not None

    def _named(self, item: Item) -> str:
        drafts = f" up to K={item.drafting.draft_len}" if item.drafting.steps else ""
        return f"{item.stage} {item.repeat + 1} of {item.drafting.method}{drafts}"


def _has_metrics(client: Client) -> bool:
    """Whether there are counters; a server without them is tuned by what its answers say."""
    try:
        client.get("/metrics")
    except ServerError:
        return False
    return True
