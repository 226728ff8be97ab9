"""Files that are there whole or as they were before, and a full disk told as something that a user can mend."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from intarsia.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEXT_TO_NOTHING = 2**20


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """A disk that runs full inside becomes a user's error, whichever library met it.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch tell of a failed write in words alone; then the disk itself is asked.
        told = isinstance(error, OSError) and error.errno in _FULL
        guessed = not isinstance(error, OSError) and (
            "No space left" in str(error) or ("write" in str(error) and _free(folder) < _NEXT_TO_NOTHING)
        )
        if not (told or guessed):
            raise
        raise UserError.of(
            where=str(folder),
            expected="room for what is written here",
            found="a full disk",
            remedy="Free some space and give the same command again: what was finished is kept.",
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path`, which takes its place when the block ends well and else goes away.

    Raises:
        UserError: the disk is full; what was at `path` is as it was.
    """
    with full_disk_named(path.parent):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp gives the file to its owner alone
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was before, whatever instant a run is killed at.

    Raises:
        UserError: the disk is full.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; it is on the disk, and whole, when this returns.

    Raises:
        UserError: the disk is full; the log is as it was.
    """
    data = memoryview(f"{line}\n".encode())
    # Unbuffered: there is nothing left to flush, and to fail, when the file is closed.
    with full_disk_named(path.parent), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def _free(folder: Path) -> int:
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(place).free
