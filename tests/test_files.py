"""Files are replaced whole or not at all; journals go on where a kill or a full disk left them."""

import errno
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from collections import Counter

import msgspec
import pytest

from planner import files
from planner.errors import BadInput, Unfinished
from planner.files import MAX_JSON_BYTES, Journal, check_writable, journal_path, read_bytes, write_whole


class Header(msgspec.Struct):
    run: str
    seed: int = 0


class Piece(msgspec.Struct):
    number: int
    name: str = ""


HEADER = Header("profile")


def resumed(path, header=HEADER):
    with Journal(path, header, resume=True) as journal:
        return list(journal.entries(Piece))


# ---- whole files


def test_what_is_written_is_read(tmp_path):
    for content in (b"", b"\x00\xff\n", b"x" * 100_000):
        write_whole(tmp_path / "f", content)
        assert read_bytes(tmp_path / "f", "file") == content
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    write_whole(tmp_path / "f", b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(Unfinished, match="cannot write .*f: No space left on device; make room"):
        write_whole(tmp_path / "f", b"new and longer")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "f", b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "f", b"new")
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_gets_the_rights_that_open_would_give_it(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "f", b"")
        assert os.umask(mask) == mask  # looked at, not changed
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_a_reader_never_sees_half_a_file(tmp_path):
    contents = [b"a" * 300_000, b"b" * 200_000]
    write_whole(tmp_path / "f", contents[0])
    done = threading.Event()

    def write():
        for i in range(30):
            write_whole(tmp_path / "f", contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert read_bytes(tmp_path / "f", "file") in contents
    writer.join()


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(BadInput, match=f"profile holds at most {MAX_JSON_BYTES} bytes, .*huge has {MAX_JSON_BYTES + 1}"):
        read_bytes(tmp_path / "huge", "profile")


@pytest.mark.parametrize("name", ["missing", ".", "missing/f"])
def test_what_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(BadInput, match="cannot read the plan|the plan must be a file"):
        read_bytes(tmp_path / name, "plan")


def test_a_device_is_refused_unread(monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read without a limit"))  # it would not end
    with pytest.raises(BadInput):
        read_bytes("/dev/zero", "profile")


def test_a_long_name_in_another_script_can_be_written(tmp_path):
    name = "\u65e5" * 84  # 252 bytes; the file system allows 255
    (tmp_path / name).write_bytes(b"old")
    write_whole(tmp_path / name, b"new")


def test_an_output_file_is_checked_before_the_run(tmp_path):
    check_writable(tmp_path / "f")
    assert not (tmp_path / "f").exists()
    with pytest.raises(BadInput, match="folder of the output file must exist"):
        check_writable(tmp_path / "missing" / "f")
    with pytest.raises(BadInput, match="cannot write"):
        check_writable(tmp_path)


# ---- journals


def test_a_journal_gives_back_what_was_added(tmp_path):
    journal = Journal(tmp_path / "j", HEADER, resume=False)
    pieces = [Piece(i, name) for i, name in enumerate(["", "two\nlines", "\u65e5\u2028"])]
    for piece in pieces:
        journal.add(piece)
    assert list(journal.entries(Piece)) == []  # earlier runs finished nothing
    journal.close()
    assert resumed(tmp_path / "j") == pieces


def test_a_resumed_journal_goes_on_and_can_be_resumed_again(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    Journal(tmp_path / "j", HEADER, resume=True).add(Piece(2))
    assert resumed(tmp_path / "j") == [Piece(1), Piece(2)]


def test_resuming_what_never_began_begins_it(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=True).add(Piece(1))
    assert resumed(tmp_path / "j") == [Piece(1)]


def test_without_resume_what_was_finished_is_not_thrown_away(tmp_path):
    for pieces in ([Piece(1)], [Piece(1), Piece(2)]):
        Journal(tmp_path / "j", HEADER, resume=True).add(pieces[-1])
        with pytest.raises(BadInput, match=f"holds {len(pieces)} finished pieces .*--resume, or delete it"):
            Journal(tmp_path / "j", HEADER, resume=False)
        assert resumed(tmp_path / "j") == pieces


@pytest.mark.parametrize("content", [b"", b'{"run":"pro', b'{"run":"another"}\n', b'{"run":"another"}\n{"num'])
def test_without_resume_a_journal_that_holds_nothing_is_begun_anew(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    assert resumed(tmp_path / "j") == [Piece(1)]


@pytest.mark.parametrize("content", [b"", b'{"run":"pro'])
def test_a_journal_killed_before_its_first_line_was_whole_is_begun_by_a_resume(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    Journal(tmp_path / "j", HEADER, resume=True).add(Piece(1))
    assert resumed(tmp_path / "j") == [Piece(1)]


def test_a_run_killed_at_any_byte_keeps_every_finished_piece(tmp_path):
    journal = Journal(tmp_path / "j", HEADER, resume=False)
    start = os.path.getsize(tmp_path / "j")
    ends = []
    for i in range(3):
        journal.add(Piece(i, "x\ny"))
        ends.append(os.path.getsize(tmp_path / "j"))
    content = (tmp_path / "j").read_bytes()
    for size in range(start, len(content) + 1):
        (tmp_path / "cut").write_bytes(content[:size])
        finished = sum(end <= size for end in ends)
        with Journal(tmp_path / "cut", HEADER, resume=True) as again:
            assert list(again.entries(Piece)) == [Piece(i, "x\ny") for i in range(finished)]
            again.add(Piece(99))  # not glued to the half line that the kill left
        assert resumed(tmp_path / "cut") == [*(Piece(i, "x\ny") for i in range(finished)), Piece(99)]


@pytest.mark.parametrize(
    "other, differs", [(Header("profile", seed=1), "seed differs"), (Header("check"), "run differs"), (Header("check", 1), "run, seed differ")]
)
def test_the_journal_of_another_run_is_refused_and_kept(tmp_path, other, differs):
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    with pytest.raises(BadInput, match=rf"another run \({differs}\); .*delete it, or change --out"):
        Journal(tmp_path / "j", other, resume=True)
    assert resumed(tmp_path / "j") == [Piece(1)]


def test_a_journal_whose_first_line_is_no_header_is_refused_and_kept(tmp_path):
    for content in (b"\xff\x00\n", b"[1]\n", b"a text of the user's\n"):
        (tmp_path / "j").write_bytes(content)
        with pytest.raises(BadInput, match="first line is damaged"):
            Journal(tmp_path / "j", HEADER, resume=True)
        assert (tmp_path / "j").read_bytes() == content


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=False).close()
    with open(tmp_path / "j", "ab") as file:
        file.write(b'{"number": "one"}\n{"number": 2}\n')
    with pytest.raises(BadInput, match="damaged: .*number.*; delete it"):
        resumed(tmp_path / "j")


def test_a_journal_lies_beside_what_the_run_writes(tmp_path):
    Journal(journal_path(tmp_path / "profile.json"), HEADER, resume=False)
    assert os.listdir(tmp_path) == ["profile.json.journal.jsonl"]


def hold(path, held, release):
    journal = Journal(path, HEADER, resume=True)
    held.set()
    release.wait(30)
    journal.close()


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_one_process_at_a_time_writes_a_journal(tmp_path, end):
    """The lock ends with the process, however that ends."""
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "j", held, release))
    other.start()
    assert held.wait(30)
    for resume in (False, True):
        with pytest.raises(BadInput, match="another process is writing the journal .*wait for it, or change --out"):
            Journal(tmp_path / "j", HEADER, resume=resume)
    release.set() if end == "closed" else other.kill()
    other.join()
    assert resumed(tmp_path / "j") == [Piece(1)]


def test_a_journal_that_was_removed_while_it_was_waited_for_is_begun_anew(tmp_path, monkeypatch):
    """Between opening and locking, the run that had it finishes and removes it: what is added must not go into the removed file."""
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    real, calls = files.fcntl.flock, Counter()

    def flock(file, operation):
        calls["flock"] += 1
        if calls["flock"] == 1:
            (tmp_path / "j").unlink()
        real(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    Journal(tmp_path / "j", HEADER, resume=True).add(Piece(2))
    monkeypatch.undo()
    assert calls["flock"] == 2 and resumed(tmp_path / "j") == [Piece(2)]


# ---- a full disk


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_disk_that_fills_up_leaves_the_journal_as_it_was_and_room_lets_it_go_on(tmp_path, monkeypatch, step):
    journal = Journal(tmp_path / "j", HEADER, resume=False)
    journal.add(Piece(1))
    before = (tmp_path / "j").read_bytes()

    class Full:
        """Takes half a line and then no more."""

        def __init__(self, file):
            self._file, self._left = file, 5

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content):
            if self._left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._left -= (n := self._file.write(content[: self._left]))
            return n

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = journal._file
    if step == "write":
        journal._file = Full(real)
    else:
        monkeypatch.setattr(files.os, "fsync", fail)
    for _ in range(2):
        with pytest.raises(Unfinished, match="cannot write the journal .*j: No space left on device; make room"):
            journal.add(Piece(2, "long" * 100))
        assert (tmp_path / "j").read_bytes() == before
    monkeypatch.undo()
    journal._file = real
    journal.add(Piece(3))
    journal.close()
    assert resumed(tmp_path / "j") == [Piece(1), Piece(3)]


def test_half_a_line_that_could_not_be_taken_back_is_not_glued_to_the_next(tmp_path):
    journal = Journal(tmp_path / "j", HEADER, resume=False)
    journal.add(Piece(1))
    with open(tmp_path / "j", "ab") as file:
        file.write(b'{"number":2,"na')
    journal.add(Piece(3))
    journal.close()
    assert resumed(tmp_path / "j") == [Piece(1), Piece(3)]


FILL = """
import resource, sys
import test_files as t
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
journal, added = t.Journal(sys.argv[1], t.HEADER, resume=True), 0
try:
    while True:
        journal.add(t.Piece(added, "x" * 50))
        added += 1
except t.Unfinished as error:
    print(added, error)
"""


def test_a_journal_at_a_real_limit_keeps_what_it_took(tmp_path):
    """The limit on the size of a file is the nearest to a full disk that needs no rights."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])}
    words = [sys.executable, "-c", FILL, str(tmp_path / "j")]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    added, _, message = done.stdout.partition(" ")
    assert 5 < int(added) < 20 and "File too large; make room" in message
    assert resumed(tmp_path / "j") == [Piece(i, "x" * 50) for i in range(int(added))]
