"""Files written whole or not at all, read with a limit, and journals that survive a kill.

Of the processes that torchrun starts, the first alone writes.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from planner.errors import BadInput

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
    """Replace the file in one step; after a crash the old content or the new one is there, never half of it."""
    if process_rank() > 0:
        return
    path = Path(path)
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


def check_writable(path: str | Path) -> None:
    """BadInput unless a file can be written there; asked before a long run, not after it."""
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise BadInput(f"the folder of the output file must exist, {parent} does not; create it or change --out")
    if Path(path).is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write {path}; change --out")


class Journal:
    """Finished pieces of a long run, one JSON line each, flushed as they come. The first line says what run it is."""

    def __init__(self, path: str | Path, header: msgspec.Struct, *, resume: bool):
        """Start afresh, or with `resume` go on behind an existing journal of the very same run; BadInput if it is another's."""
        self.path = Path(path)
        first = msgspec.json.encode(header)
        self._lines: list[bytes] = []
        if resume and self.path.exists():
            lines = read_bytes(self.path, "journal").split(b"\n")
            if lines[0] != first:
                raise BadInput(
                    f"the journal {self.path} belongs to another run (model, device, version or settings differ); delete it or drop --resume"
                )
            self._lines = [line for line in lines[1:-1] if line]  # what a kill cut off has no newline behind it
        write_whole(self.path, b"".join(line + b"\n" for line in [first, *self._lines]))

    def entries(self, kind: type) -> Iterator:
        """What earlier runs finished."""
        for line in self._lines:
            try:
                yield msgspec.json.decode(line, type=kind)
            except msgspec.MsgspecError as error:
                raise BadInput(f"the journal {self.path} is damaged: {error}; delete it") from None

    def add(self, entry: msgspec.Struct) -> None:
        """Append one finished piece; on disk when this returns."""
        with open(self.path, "ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())


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
