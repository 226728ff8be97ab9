"""Files that are written whole or not at all; damaged files and full disks as errors of the user's."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from intarsia.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEXT_TO_NOTHING = 2**20
_SPARE_BYTES = 64 * 2**20
_MOST_SHOWN = 300


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, whichever library raises it, into a user's error.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch report a failed write only in words; then look at the disk itself.
        known = isinstance(error, OSError) and error.errno in _FULL
        guessed = not isinstance(error, OSError) and (
            "No space left" in str(error) or ("write" in str(error) and _free(folder) < _NEXT_TO_NOTHING)
        )
        if not (known or guessed):
            raise
        raise UserError(
            f"{folder} is on a full disk.",
            "Free some space and give the same command again: what was finished is kept.",
        ) from error


def require_room(folder: Path, nbytes: int, what: str, *, where: Path | None = None, option: str = "") -> None:
    """Refuse a disk that is too small, before any work.

    Args:
        folder: where `what` will be; it need not exist yet.
        where: the place for the message, if it is another.
        option: the option that sets it, if there is one.

    Raises:
        UserError: less than `nbytes` and 64 MiB are free.
    """
    free, of = _free(folder), f" ({option})" if option else ""
    if free < nbytes + _SPARE_BYTES:
        raise UserError(
            f"{where or folder} has {free / 1e6:,.0f} MB of free disk space; {what} needs "
            f"{(nbytes + _SPARE_BYTES) / 1e6:,.0f} MB.",
            f"Free some space, or choose a place on another disk{of}.",
        )


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that replaces it when the block succeeds, and is deleted when it fails.

    Raises:
        UserError: the disk is full; `path` is unchanged.
    """
    with full_disk_named(path.parent):
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        # A plain open honours the umask, which mkstemp does not.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: without it a rename may be lost in a power failure."""
    with suppress(OSError):  # Windows and some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, whenever the process is killed.

    Raises:
        UserError: the disk is full.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def damage_named(file: Path, *, expected: str, remedy: str) -> Iterator[None]:
    """Turn errors of reading or parsing `file` into a user's error.

    Raises:
        UserError: with what was found; one that is raised inside stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        found = error.strerror or str(error)
        raise UserError(f"{file}: expected {expected}; found {found}.", remedy) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:_MOST_SHOWN]}"
        raise UserError(f"{file}: expected {expected}; found {found}.", remedy) from error


def read_json(file: Path, *, expected: str, remedy: str) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        UserError: there is no such file, or something else in it.
    """
    with damage_named(file, expected=expected, remedy=remedy):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected {expected}; found a {type(found).__name__}.", remedy)
    return found


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; it is on disk when this returns.

    Raises:
        UserError: the disk is full; the log is unchanged.
    """
    data = memoryview(f"{line}\n".encode())
    # Unbuffered: there is nothing left to flush, and to fail, when the file is closed.
    with full_disk_named(path.parent), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
            if before == 0:
                sync_folder(path.parent)
        except BaseException:
            file.truncate(before)
            raise


def _free(folder: Path) -> int:
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(place).free
