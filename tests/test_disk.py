"""Writing files whole, disks that are or run full, and files that are damaged."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from intarsia.disk import append_line, damage_named, full_disk_named, read_json, replaced, require_room, write_whole
from intarsia.errors import Problem, UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*_: object) -> None:
    raise FULL


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_whole(path, "one\n")
    write_whole(path, "two\n")
    assert path.read_text() == "two\n"
    assert os.listdir(tmp_path) == ["facts.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_rename_is_on_the_disk_and_no_other_thread_sees_another_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "umask", full)
    monkeypatch.setattr(os, "fsync", watched)
    write_whole(tmp_path / "facts.json", "one\n")
    append_line(tmp_path / "log.jsonl", "first")
    append_line(tmp_path / "log.jsonl", "second")
    # The file, then its folder; of a log the folder only when the log is new.
    assert synced == [False, True, False, True, False]


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_the_file_as_it_was(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    if there:
        write_whole(path, "one\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a full disk") as caught:
        write_whole(path, "two\n")
    assert str(tmp_path) in str(caught.value)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == (["one\n"] if there else [])


def test_an_interrupt_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "one")
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "a") as temporary:
        temporary.write_text("two")
        raise KeyboardInterrupt
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a", "one")]


class Small(io.FileIO):
    """A file on a disk with room for 14 bytes of it, which takes 5 at once."""

    def write(self, data: Any) -> int:
        memory_budget = 14 - self.seek(0, os.SEEK_END)
        if memory_budget <= 0:
            raise FULL
        return super().write(bytes(data)[: min(memory_budget, 5)])


def test_lines_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering=-1: Small(str(self), mode.replace("b", "")))
    append_line(path, "the first")  # in two parts
    with pytest.raises(UserError, match="a full disk"):
        append_line(path, "the second")
    assert path.read_bytes() == b"the first\n"
    append_line(path, "3rd")
    assert path.read_bytes() == b"the first\n3rd\n"


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail] No space left on device"),
    ],
)
def test_what_a_full_disk_looks_like(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Free some space") as caught, full_disk_named(tmp_path / "not" / "made"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("cannot write: no reason")])
def test_other_failures_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, full_disk_named(tmp_path):
        raise error
    assert caught.value is error


def test_too_little_room_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20 + 2_000_000))
    place = tmp_path / "not" / "made"
    require_room(place, 2_000_000, "the state")
    with pytest.raises(UserError) as caught:
        require_room(place, 3_000_000, "the state", option="--run")
    assert caught.value.problems == (
        Problem(
            f"{place} has 69 MB of free disk space; the state needs 70 MB.",
            "Free some space, or choose a place on another disk (--run).",
        ),
    )
    with pytest.raises(UserError, match=r"^OUT has .*on another disk\.$"):
        require_room(place, 3_000_000, "the state", where=Path("OUT"))


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (ValueError("line 1,\n  column 2"), "ValueError: line 1, column 2"),
        (KeyError("sha256"), "KeyError: 'sha256'"),
        (SafetensorError("header too large"), "SafetensorError: header too large"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_damage_is_named(error: Exception, found: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    with pytest.raises(UserError) as caught, damage_named(path, expected="facts", remedy="Delete it."):
        raise error
    wanted = Problem(f"{path}: expected facts; found {found}.", "Delete it.")
    assert caught.value.problems == (wanted,) and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("a.", "b."), ZeroDivisionError(), AssertionError()])
def test_what_is_no_damage_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, damage_named(tmp_path, expected="facts", remedy="Delete it."):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1]", "a list"),
        ("{", "JSONDecodeError: Expecting property name"),
        ("[" * 100_000, "RecursionError: "),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_json_object(text: str | None, found: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path, expected="facts", remedy="Delete it.")
    (problem,) = caught.value.problems
    assert problem.message.startswith(f"{path}: expected facts; found {found}") and problem.hint == "Delete it."
    path.write_text('{"a": [1, null]}')
    assert read_json(path, expected="facts", remedy="Delete it.") == {"a": [1, None]}
