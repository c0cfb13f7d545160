"""What is tuned: an engine by its command, or servers that are there; and how one comes to run with a given drafting."""

import os
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from planner.commands.flags import AskedTune
from planner.commands.local_system import local_cpu, local_gpu
from planner.commands.pools import ComparedPool, compare_pool
from planner.commands.sizes import model_size, system_spec
from planner.cost.capacity import Settings
from planner.engine_rules import METHODS, DraftRules, find_drafting, find_engine
from planner.engines.completions import api_client
from planner.engines.contract import Drafting, Startup
from planner.engines.http import Bounds, Client, Key
from planner.engines.launch import address, free_port, recorded, running
from planner.engines.launchers import LAUNCHERS, drafting_like, find_launcher
from planner.errors import BadInput
from planner.exports import Step
from planner.schedules import Setting
from planner.serving import OFF, ModelSize, SystemSpec
from planner.tunings import Launch

REQUEST = Bounds(connect_s=5.0, read_s=120.0, total_s=900.0)
MODELLESS = ("ngram", "suffix", "mtp")  # methods that load nothing of their own
SIZE = "a folder, a config.json, a GGUF file or num_layers=..,num_kv_heads=..,head_dim=..,weights_gib=.."


class Subject(Protocol):
    """What is tuned."""

    rules: DraftRules  # what the engine can be told
    version: str  # that they were read for
    method: str
    yours: Setting | None  # what the user runs now; None: not known
    yours_drafting: Drafting | None  # the same, where it can be run again
    tensor_parallel: int
    repeats: int  # starts of each setting
    restarts: bool  # a server with another drafting can be had
    model: ModelSize
    drafter: ModelSize | None  # None: not known, or it has no size
    system: SystemSpec

    def drafting(self, steps: tuple[Step, ...]) -> Drafting:
        """Off where there are no steps."""

    def serve(self, drafting: Drafting, number: int, folder: Path) -> AbstractContextManager[tuple[Client, Launch]]:
        """A server that answers; `number` were there before."""

    def paste(self, steps: tuple[Step, ...], folder: Path) -> str:
        """Shell words to add to the command; empty for off, or where the engine is not known."""


class Launched:
    """An engine by its command, which is started with another drafting in place of its own."""

    restarts = True

    def __init__(self, asked: AskedTune, key: Key | None):
        words = _split(asked.launch)
        self._asked, self._key, self._engine = asked, key, find_launcher(words, asked.engine)
        self._command = self._engine.take_apart(words)
        self.rules, self.version = find_drafting(asked.engine or self._engine.name)
        self.yours, self.yours_drafting = self._command.yours, self._command.yours_drafting
        said = self.yours_drafting
        method = asked.method or (said.method if said and said.method != OFF else None)
        if method not in self.rules.methods:
            got = "none, and the command drafts nothing" if method is None else method[:80]
            raise BadInput(f"{self.rules.name} drafts with {', '.join(self.rules.methods)}, got {got}; give --method")
        self.method = method
        self._draft_model = asked.draft_model or (said.draft_model if said and said.method == method else None)
        if self._draft_model is None and method not in MODELLESS:
            raise BadInput(f"{self.rules.name} loads a checkpoint for {method}, got none; give --draft-model")
        self.tensor_parallel, self.repeats = self._command.tensor_parallel, self._engine.repeats

    def drafting(self, steps: tuple[Step, ...]) -> Drafting:
        return drafting_like(self._command, self.method, self._draft_model, steps) if steps else Drafting()

    @cached_property
    def system(self) -> SystemSpec:
        return system_spec(self._asked.system) if self._asked.system else local_gpu() or local_cpu()

    @cached_property
    def model(self) -> ModelSize:
        name = self._asked.model or _lying_here(self._command.model)
        if name is None:
            raise BadInput(f"the size of {str(self._command.model)[:80]!r} is needed, and it does not lie here; give --model with {SIZE}")
        return model_size(name)

    @cached_property
    def drafter(self) -> ModelSize | None:
        name = self._asked.draft_size or _lying_here(self._draft_model)
        return None if name is None else model_size(name)

    @contextmanager
    def serve(self, drafting: Drafting, number: int, folder: Path) -> Iterator[tuple[Client, Launch]]:
        port, most = self._command.port or free_port(), self._asked.concurrency[1]
        words = self._engine.put_together(self._command, drafting, port=port, max_batch=most, folder=folder)
        url, ready_s = address(self._command.host, port), self._asked.ready_s or self._engine.usual_ready_s
        with running(words, log=folder / f"launch-{number + 1}.log", url=url, ready_s=ready_s) as server:
            said = self._engine.read_log(server.log_text())
            compared = self._compare(said, drafting)
            yield Client(url, self._key, REQUEST), Launch(
                drafter=drafting.method, steps=list(drafting.steps), command=recorded(words), version=said.version, ready_s=server.ready_s,
                pool=compared and compared.pool, difference=compared.difference if compared else "", warnings=said.warnings[:20] if drafting.steps else [],  # off is what those ask for
            )  # fmt: skip

    def paste(self, steps: tuple[Step, ...], folder: Path) -> str:
        return self._engine.paste(self.drafting(steps), max_batch=self._asked.concurrency[1], folder=folder) if steps else ""

    def _compare(self, said: Startup, drafting: Drafting) -> ComparedPool | None:
        """The KV pool that the log speaks of beside what is expected; on a CPU only what its tokens take is."""
        device = None if self._asked.system is None and local_gpu() is None else self.system
        return compare_pool(
            said, settings=Settings(find_engine(self._engine.name), self.tensor_parallel), model=self.model,
            drafter=self.drafter if drafting.steps else None, system=device, method=drafting.method,
        )  # fmt: skip


class There:
    """Servers that are not to be restarted: one with a drafter, maybe one without."""

    restarts, repeats, yours_drafting = False, 1, None

    def __init__(self, asked: AskedTune, key: Key | None):
        missing = [
            flag
            for flag, value in {"--method": asked.method, "--draft-len": asked.draft_len, "--model": asked.model, "--system": asked.system}.items()
            if not value
        ]
        if missing:
            raise BadInput(f"a server that is there does not say everything about itself; beside --base-url give {', '.join(missing)}")
        urls = [asked.base_url, *([asked.baseline_url] if asked.baseline_url else [])]
        self._clients = [api_client(url, key, REQUEST) for url in urls]
        if len({client.name for client in self._clients}) < len(urls):
            raise BadInput(f"a server with a drafter and one without are two, both addresses are {self._clients[0].name}; give --baseline-url")
        if asked.method not in METHODS:
            raise BadInput(f"a method is one of {', '.join(METHODS)}, got --method {asked.method[:80]}")
        self.rules, self.version = find_drafting(asked.engine) if asked.engine else (DraftRules("a server", (0,), (0,), METHODS), "")
        self._engine = LAUNCHERS.get(self.rules.name)
        self.method, self._draft_model, self.tensor_parallel = asked.method, asked.draft_model, 1
        self.yours = Setting(drafter=asked.method, draft_len=asked.draft_len)
        self.model, self.system = model_size(asked.model), system_spec(asked.system)
        self.drafter = model_size(asked.draft_size) if asked.draft_size else None
        self._max_batch = asked.concurrency[1]

    def drafting(self, steps: tuple[Step, ...]) -> Drafting:
        return Drafting(self.method, self._draft_model, steps) if steps else Drafting()

    @contextmanager
    def serve(self, drafting: Drafting, number: int, folder: Path) -> Iterator[tuple[Client, Launch]]:
        client = self._clients[0 if drafting.steps else 1]
        yield client, Launch(drafter=drafting.method, steps=list(drafting.steps), command=[client.name])

    def paste(self, steps: tuple[Step, ...], folder: Path) -> str:
        return self._engine.paste(self.drafting(steps), max_batch=self._max_batch, folder=folder) if steps and self._engine else ""


def _split(text: str) -> list[str]:
    """The words of a command."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"--launch takes a command as a shell does, got one with {str(error).lower()}; check its quotes") from None
    if not words:
        raise BadInput("--launch takes the command that starts the server, got nothing; for example 'vllm serve MODEL'")
    return words


def _lying_here(name: str | None) -> str | None:
    """A model's folder or file, also where a hub's name is in its cache; None where there is neither."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".gguf" and path.is_file():
        return str(path)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cached = sorted((home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return str(cached[-1].parent) if cached and "\0" not in name else None
