"""Files written whole or not at all, read with a limit, and journals that survive a kill.

Of the processes that torchrun starts, the first alone writes.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Self

import msgspec

from planner.errors import BadInput, Unfinished

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two runs with one --out are not kept apart
    fcntl = None

MAX_JSON_BYTES = 256 * 2**20  # a profile of 64 texts and five contexts is about 10 MB


def process_rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun, whatever else sets RANK."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def read_bytes(path: str | Path, what: str) -> bytes:
    """The content of a file of ours; BadInput if it is missing, unreadable or absurdly large."""
    path = Path(path)
    try:
        if not path.is_file() and path.exists():
            raise BadInput(f"the {what} must be a file, {path} is not")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise BadInput(f"a {what} holds at most {MAX_JSON_BYTES} bytes, {path} has {size}")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read the {what} {path}: {error.strerror or error}") from None


def write_whole(path: str | Path, content: bytes) -> None:
    """Replace the file in one step; after a crash the old content or the new one is there, never half of it.

    Unfinished, and the old content, where the disk does not take the new one.
    """
    if process_rank() > 0:
        return
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".planner-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Unfinished(f"cannot write {path}: {error.strerror or error}; make room on its disk") from None


def check_writable(path: str | Path) -> None:
    """BadInput unless a file can be written there; asked before a long run, not after it."""
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise BadInput(f"the folder of the output file must exist, {parent} does not; create it or change --out")
    if Path(path).is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write {path}; change --out")


class Journal:
    """Finished pieces of a long run, one JSON line each, on disk as they come. The first line says what run it is.

    No second run gets it until it is closed; the kernel closes it when the process is killed.
    """

    def __init__(self, path: str | Path, header: msgspec.Struct, *, resume: bool):
        """Start one, or with `resume` go on behind an existing one of the very same run.

        BadInput, and the file as it was, if it is another run's, in use, or if it holds pieces and is not to be resumed.
        """
        self.path = Path(path)
        self._file = _open_alone(self.path)
        try:
            content = read_bytes(self.path, "journal")
            end = content.rfind(b"\n") + 1  # what a kill cut off has no newline behind it
            earlier = content[:end].split(b"\n")[:-1]
            first = msgspec.json.encode(header)
            if earlier and resume and earlier[0] != first:
                raise BadInput(
                    f"the journal {self.path} belongs to another run ({_difference(earlier[0], first)}); "
                    "resume with what it began with, delete it, or change --out"
                )
            if earlier[1:] and not resume:
                raise BadInput(
                    f"the journal {self.path} holds {len(earlier) - 1} finished pieces of an interrupted run; go on with --resume, or delete it"
                )
            self._lines = [line for line in earlier[1:] if line]
            self._end = end if resume else 0
            if self._end == 0:
                self._append(first)
        except BaseException:
            self.close()
            raise

    def entries(self, kind: type) -> Iterator:
        """What earlier runs finished."""
        for line in self._lines:
            try:
                yield msgspec.json.decode(line, type=kind)
            except msgspec.MsgspecError as error:
                raise BadInput(f"the journal {self.path} is damaged: {error}; delete it") from None

    def add(self, entry: msgspec.Struct) -> None:
        """Append one finished piece; on disk when this returns. Unfinished where the disk does not take it, and the journal as before."""
        self._append(msgspec.json.encode(entry))

    def close(self) -> None:
        """Let others have it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        rest = memoryview(line + b"\n")
        end = self._end + len(rest)
        try:
            self._file.truncate(self._end)  # a write that failed may have left half a line, also in an earlier run
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise Unfinished(f"cannot write the journal {self.path}: {error.strerror or error}; make room on its disk") from None
        self._end = end


def _open_alone(path: Path) -> FileIO:
    """The file, to append to, made if it is not there, and locked as long as it is open. BadInput if another process has it."""
    while True:
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115 - the journal closes it
        except OSError as error:
            raise BadInput(f"cannot write the journal {path}: {error.strerror or error}; change --out") from None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BadInput(f"another process is writing the journal {path}; wait for it, or change --out") from None
        except OSError:
            pass  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # whoever had it has just finished and removed it


def _difference(there: bytes, here: bytes) -> str:
    """Which fields of two headers differ, by name."""
    try:
        before, now = msgspec.json.decode(there, type=dict), msgspec.json.decode(here, type=dict)
    except msgspec.MsgspecError:
        return "its first line is damaged"
    differ = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return f"{', '.join(differ)} {'differs' if len(differ) == 1 else 'differ'}"


def journal_path(out: str | Path) -> Path:
    """Where the journal of a run that writes `out` lies: beside it."""
    return Path(f"{out}.journal.jsonl")


def remove_journal(out: str | Path) -> None:
    """The run is complete, and its result written."""
    if process_rank() == 0:
        journal_path(out).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
