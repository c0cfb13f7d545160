"""Files are replaced whole or not at all; journals go on where a kill left them."""

import os
import stat
import threading

import msgspec
import pytest

from planner import files
from planner.errors import BadInput
from planner.files import MAX_JSON_BYTES, Journal, check_writable, journal_path, read_bytes, write_whole


class Header(msgspec.Struct):
    run: str
    seed: int = 0


class Piece(msgspec.Struct):
    number: int
    name: str = ""


HEADER = Header("profile")


def resumed(path, header=HEADER):
    return list(Journal(path, header, resume=True).entries(Piece))


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
        raise OSError("disk full")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
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
    assert resumed(tmp_path / "j") == pieces


def test_a_resumed_journal_goes_on_and_can_be_resumed_again(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    Journal(tmp_path / "j", HEADER, resume=True).add(Piece(2))
    assert resumed(tmp_path / "j") == [Piece(1), Piece(2)]


def test_resuming_what_never_began_begins_it(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=True).add(Piece(1))
    assert resumed(tmp_path / "j") == [Piece(1)]


def test_without_resume_a_journal_starts_afresh(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    Journal(tmp_path / "j", HEADER, resume=False)
    assert resumed(tmp_path / "j") == []


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
        again = Journal(tmp_path / "cut", HEADER, resume=True)
        finished = sum(end <= size for end in ends)
        assert list(again.entries(Piece)) == [Piece(i, "x\ny") for i in range(finished)]
        again.add(Piece(99))  # not glued to the half line that the kill left
        assert resumed(tmp_path / "cut") == [*(Piece(i, "x\ny") for i in range(finished)), Piece(99)]


@pytest.mark.parametrize("other", [Header("profile", seed=1), Header("check")])
def test_the_journal_of_another_run_is_refused_and_kept(tmp_path, other):
    Journal(tmp_path / "j", HEADER, resume=False).add(Piece(1))
    with pytest.raises(BadInput, match="another run .*delete it or drop --resume"):
        Journal(tmp_path / "j", other, resume=True)
    assert resumed(tmp_path / "j") == [Piece(1)]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    Journal(tmp_path / "j", HEADER, resume=False)
    with open(tmp_path / "j", "ab") as file:
        file.write(b'{"number": "one"}\n{"number": 2}\n')
    with pytest.raises(BadInput, match="damaged: .*number.*; delete it"):
        resumed(tmp_path / "j")


def test_a_journal_lies_beside_what_the_run_writes(tmp_path):
    Journal(journal_path(tmp_path / "profile.json"), HEADER, resume=False)
    assert os.listdir(tmp_path) == ["profile.json.journal.jsonl"]
