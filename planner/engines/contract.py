"""What tune asks of an engine: its command taken apart and put together, and what it says when it starts."""

from collections.abc import Callable
from typing import NamedTuple

from planner.exports import Step
from planner.schedules import Setting
from planner.serving import OFF


class Drafting(NamedTuple):
    """What a server is told to draft with."""

    method: str = OFF
    draft_model: str | None = None  # path or name, as the engine takes it
    steps: tuple[Step, ...] = ()  # by running batch, from 1 up without gaps; one is a static length
    words: tuple[str, ...] = ()  # what a user's command says of drafting beside that, as the engine's module keeps it

    @property
    def draft_len(self) -> int:
        return max((step.draft_len for step in self.steps), default=0)


class Command(NamedTuple):
    """A user's command, taken apart."""

    words: list[str]  # without what it says of drafting and of the address
    model: str | None  # path or name; None where it does not say
    tensor_parallel: int
    host: str
    port: int | None  # None: not said, any free one will do
    yours: Setting | None  # what it says of drafting: off, or a method and draft_len; None where it is neither, or cannot be told
    yours_drafting: Drafting | None  # the same, or a schedule, to launch it again; None where our words cannot say it


class Startup(NamedTuple):
    """What a server's log says before it answers."""

    version: str  # empty: not said
    kv_tokens: int | None
    kv_bytes: int | None
    warnings: list[str]  # lines that say a setting is not in force


class Engine(NamedTuple):
    """One engine's words. `name` is that of engine_rules."""

    name: str
    take_apart: Callable[[list[str]], Command]
    put_together: Callable[..., list[str]]  # (command, drafting, *, port, max_batch, folder) -> words; may write files into folder
    paste: Callable[..., str]  # (drafting, *, max_batch, folder) -> shell words that say the same; empty for off
    read_log: Callable[[str], Startup]
    usual_ready_s: float  # within which a start is waited for
    repeats: int  # how often a start is cheap enough to be done for each setting
