"""A study: the best of many candidates where one evaluation is a simulation or a real run, shared by workers and kept in a storage.

Optuna holds the trials: in memory, in a journal file, or in a database for workers on several machines; its own tools read
them. surrogate.py chooses. A trial stands in the storage whole from its first moment, its candidate included, so that workers
see what others have begun. Of two that began the same candidate at one moment, the later lets go.
"""

import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from planner.errors import BadInput, Unfinished
from planner.search.surrogate import Coordinates, features, next_candidate

T = TypeVar("T", bound=Hashable)

HEARTBEAT_S = 30.0  # between two signs of life of a worker
STALE_BEATS = 4  # without a sign of life, after which its candidate is free again
POLL_S = 0.5  # between two looks at what others are still evaluating
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # module -> what pip installs


class Failed(Exception):
    """An evaluation's word for: this candidate cannot be run, for such a reason; pass over it."""


class Evaluated(NamedTuple):
    cost: float  # lower is better
    record: str = ""  # whatever else is to be kept of it, as text


class Tried(NamedTuple, Generic[T]):
    """A candidate that was evaluated, by whichever worker."""

    candidate: T
    cost: float | None  # None: it failed
    record: str  # the reason, if it failed
    worker: str


def run_study(
    candidates: Sequence[T],
    evaluate: Callable[[T], Evaluated],
    *,
    coordinates: Sequence[Coordinates],  # of each candidate
    num_trials: int,
    seed: int,
    identity: dict[str, str],  # what must agree for two workers to share a study, by name; the candidates are added
    storage: str | None = None,
    name: str = "planner",
    first: Sequence[T] = (),
    waiting: Callable[[int], None] = lambda running: None,
) -> list[Tried[T]]:
    """Evaluate until so many candidates were tried, by all workers together; returns what all of them tried, in order.

    storage  None: memory. A path: Optuna's journal file. A URL of a database, sqlite:///file.db or postgresql://...
    first    evaluated before any that is chosen
    waiting  told how many candidates other workers are still evaluating, once nothing else is left to do

    What is in the storage already is not evaluated again, except by a worker that was killed. BadInput for a storage that
    cannot be used or holds another study, Unfinished where it stops answering.
    """
    identity = identity | {"candidates": sha256(repr((list(candidates), list(coordinates))).encode()).hexdigest()[:16]}
    with _speaking(storage):
        study = _Study(_open(storage, name, identity), candidates, coordinates, min(num_trials, len(candidates)), seed, first, storage is not None)
        waits = False
        while True:
            if (begun := study.begin()) is not None:
                waits = False
                study.evaluate(*begun, evaluate)
            elif running := study.num_running():
                if not waits:
                    waiting(running)
                waits = True
                time.sleep(POLL_S)
            else:
                return study.tried()


class _Study:
    """Trials of one storage. A trial's candidate is its index; a trial that failed without a reason was let go."""

    def __init__(self, study, candidates, coordinates, num_trials: int, seed: int, first, shared: bool):
        self._study, self._candidates, self._num_trials, self._seed, self._shared = study, list(candidates), num_trials, seed, shared
        self._coordinates, self._x = coordinates, features(coordinates)
        self._distributions = _distributions(coordinates)
        places = {candidate: index for index, candidate in enumerate(self._candidates)}
        self._first = [places[candidate] for candidate in first]
        self._worker = f"{_machine()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def begin(self) -> tuple[int, int] | None:
        """A candidate that is this worker's now, and its trial; None where none is left."""
        from optuna.trial import TrialState, create_trial

        while True:
            trials = self._trials()
            unseen = [index for index in range(len(self._candidates)) if index not in trials]
            if len(trials) >= self._num_trials or not unseen:
                return None
            index = self._choose(trials, unseen)
            point = self._coordinates[index]
            own = uuid.uuid4().hex
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING, params=point, distributions={name: self._distributions[name] for name in point},
                    user_attrs={"candidate": index, "worker": self._worker, "trial": own, "beat": time.time()},
                )
            )  # fmt: skip
            number = next(trial.number for trial in self._study.get_trials(deepcopy=False) if trial.user_attrs["trial"] == own)
            trials = self._trials()
            if trials[index].number == number and sum(1 for trial in trials.values() if trial.number < number) < self._num_trials:
                return index, number
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def evaluate(self, index: int, number: int, evaluate: Callable[[T], Evaluated]) -> None:
        """Run one candidate and tell the storage. Whatever ends it early, but for a kill, lets the candidate go."""
        from optuna.trial import Trial, TrialState

        trial = Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        try:
            with _beating(trial) if self._shared else nullcontext():
                done = evaluate(self._candidates[index])
            if not np.isfinite(done.cost):
                raise ValueError(f"a cost must be finite, got {done.cost}")
            trial.set_user_attr("record", done.record)
            self._study.tell(number, float(done.cost), skip_if_finished=True)
        except Failed as error:
            trial.set_user_attr("record", str(error))
        finally:
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def num_running(self) -> int:
        return sum(1 for trial in self._trials().values() if not trial.state.is_finished())

    def tried(self) -> list[Tried[T]]:
        return [
            Tried(self._candidates[index], trial.value, trial.user_attrs["record"], trial.user_attrs["worker"].rpartition(":")[0])
            for index, trial in self._trials().items()
        ]

    def _trials(self) -> dict:
        """The trial that counts for each candidate, in the order they began: a finished one, else the first of the living."""
        found = {}
        for trial in self._study.get_trials(deepcopy=False):
            index = trial.user_attrs.get("candidate")
            if self._counts(trial) and (index not in found or trial.state.is_finished() > found[index].state.is_finished()):
                found[index] = trial
        return dict(sorted(found.items(), key=lambda item: item[1].number))

    def _counts(self, trial) -> bool:
        from optuna.trial import TrialState

        match trial.state:
            case TrialState.COMPLETE:
                return True
            case TrialState.FAIL:
                return "record" in trial.user_attrs
            case TrialState.RUNNING:
                return self._lives(trial.user_attrs["worker"], trial.user_attrs["beat"])
        return False

    def _lives(self, worker: str, beat: float) -> bool:
        """Whether a worker is still at it: on this machine its process tells, elsewhere its signs of life."""
        if worker == self._worker:
            return True
        machine, pid, _ = worker.rsplit(":", 2)
        if machine == _machine() and os.name == "posix":  # elsewhere, os.kill would end it
            if int(pid) == os.getpid():
                return False  # an earlier process had our number
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass
        return time.time() - beat < STALE_BEATS * HEARTBEAT_S

    def _choose(self, trials: dict, unseen: list[int]) -> int:
        for index in self._first:
            if index not in trials:
                return index
        costs = {index: trial.value for index, trial in trials.items() if trial.value is not None}
        pending = [index for index, trial in trials.items() if not trial.state.is_finished()]
        return next_candidate(self._x, costs, pending, unseen, np.random.default_rng((self._seed, len(trials))))


def _distributions(coordinates: Sequence[Coordinates]) -> dict:
    """How Optuna's tools are to read the coordinates."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found = {}
    for name in dict.fromkeys(name for point in coordinates for name in point):
        values = [point[name] for point in coordinates if name in point]
        if isinstance(values[0], str):
            found[name] = CategoricalDistribution(sorted(set(values)))
        else:
            found[name] = FloatDistribution(min(values), max(values))
    return found


def _open(storage: str | None, name: str, identity: dict[str, str]):
    """The study of that name, made if it is not there. BadInput if it belongs to another run."""
    import optuna

    opened = _storage(storage) or optuna.storages.InMemoryStorage()
    try:  # before it is made: that would write, and whoever is refused leaves no trace
        study = optuna.load_study(storage=opened, study_name=name)
    except KeyError:
        study = optuna.create_study(storage=opened, study_name=name, load_if_exists=True)
    if "identity" not in study.user_attrs:
        study.set_user_attr("identity", identity)
    there = study.user_attrs["identity"]
    differ = [key for key in {**identity, **there} if identity.get(key) != there.get(key)]
    if differ:
        verb = "differs" if len(differ) == 1 else "differ"
        raise BadInput(
            f"the study in {shown(storage)} belongs to another run ({', '.join(differ)} {verb}); go on with what it began with, or give another --storage"
        )
    return study


def _storage(storage: str | None):
    from optuna.exceptions import OptunaError
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    if storage is None:
        return None
    if "://" not in storage:
        _check_journal(Path(storage))
        try:
            return JournalStorage(JournalFileBackend(storage))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"the study in {storage} is damaged: {error}; delete it, or give another --storage") from None
    patience = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(3):  # two workers that make the tables at one moment: the second finds them made when it tries again
        try:
            return RDBStorage(storage, engine_kwargs=patience)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or "its driver"
            raise BadInput(f"{shown(storage)} needs a database driver ({missing} is missing); pip install {DRIVERS.get(missing, missing)}") from None
        except (SQLAlchemyError, OptunaError) as error:
            if attempt == 2:
                raise BadInput(f"--storage must be a database that can be written, {shown(storage)} is not: {_reason(error)}; change it") from None
            time.sleep(0.2)


def _check_journal(path: Path) -> None:
    """BadInput for a file that is no journal of Optuna's, or cannot be one."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--storage is a journal file in a folder that exists, or a database's URL, got {path}; change it")
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            line = file.readline(2**20)
    except OSError as error:
        raise BadInput(f"cannot write the journal file {path}: {error.strerror or error}; change --storage") from None
    with suppress(msgspec.MsgspecError):
        if not line or "op_code" in msgspec.json.decode(line, type=dict):
            return
    raise BadInput(f"--storage must be a new file or a study's, {path} holds something else; give another")


def shown(storage: str) -> str:
    """A storage as messages name it, without a password."""
    scheme, mark, rest = storage.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if mark else storage


@contextmanager
def _speaking(storage: str | None) -> Iterator[None]:
    """Inside, Optuna keeps quiet, and a storage that fails says so in one line."""
    import optuna
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            yield
    except (OptunaError, SQLAlchemyError, OSError) as error:
        if storage is None:
            raise
        raise Unfinished(
            f"the study in {shown(storage)} does not answer: {_reason(error)}; what was finished stands in it, the same command goes on from there"
        ) from None
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _beating(trial) -> Iterator[None]:
    """Signs of life while a candidate is evaluated. One that is missed means nothing: the trial's end will say what is wrong."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            with suppress(Exception):
                trial.set_user_attr("beat", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _reason(error: Exception) -> str:
    """The first line of what the database itself said."""
    return str(getattr(error, "orig", None) or error.__cause__ or error).strip().partition("\n")[0]


def _machine() -> str:
    """Where a process id means something: containers of one machine have their own."""
    try:
        return f"{socket.gethostname()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
