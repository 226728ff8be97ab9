"""Files and folders that appear whole or not at all; damaged files and full disks as user errors.

A folder is filled in a staging folder beside its destination, flushed to disk, and published by one rename. An error, a
full disk or an interrupt removes the staging folder; the next run for the same destination removes one left by a killed
process. A lock on the staging folder shows whether its run is alive.
"""

from __future__ import annotations

import errno
import glob
import json
import mmap
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors import SafetensorError

from intarsia.errors import UserError, check, in_words, mismatch

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEXT_TO_NOTHING = 2**20
_SPARE_BYTES = 64 * 2**20


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, from any library, into a user error.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch report a failed write only in the message; then look at the disk itself.
        known = isinstance(error, OSError) and error.errno in _FULL
        guessed = not isinstance(error, OSError) and (
            "No space left" in str(error) or ("write" in str(error) and _free(folder) < _NEXT_TO_NOTHING)
        )
        if not (known or guessed):
            raise
        raise UserError(
            f"{folder} is on a full disk.",
            "Free some space and run the same command again; finished work is kept.",
        ) from error


def require_room(folder: Path, nbytes: int, what: str, *, where: Path | None = None, option: str = "") -> None:
    """Refuse a disk that is too small, before any work.

    Args:
        folder: the place of `what`; it need not exist yet.
        where: the place in the message, if it differs.
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
    """Yield a temporary file beside `path` that replaces it if the block succeeds, and is deleted if it fails.

    Raises:
        UserError: the disk is full; `path` is unchanged.
    """
    with full_disk_named(path.parent):
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}")
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
def damage_named(file: str | Path, *, expected: str, remedy: str) -> Iterator[None]:
    """Turn errors of reading or parsing `file` into a user error.

    Raises:
        UserError: with what was found; one raised inside passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        found = error.strerror if isinstance(error, OSError) else None
        raise UserError([mismatch(file, expected, found or in_words(error), remedy)]) from error


def read_json(file: Path, *, expected: str, remedy: str) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    with damage_named(file, expected=expected, remedy=remedy):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError([mismatch(file, expected, f"a {type(found).__name__}", remedy)])
    return found


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; it is on disk when this returns.

    Raises:
        UserError: the disk is full; the log is unchanged.
    """
    data = memoryview(f"{line}\n".encode())
    # Unbuffered, so that closing the file cannot fail.
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


@contextmanager
def staged_folder(
    out: Path,
    *,
    overwrite: bool = False,
    nbytes: int = 0,
    sign: str = "config.json",
    inputs: Collection[Path] = (),
) -> Iterator[Path]:
    """Yield a staging folder, which becomes `out` if the block ends without an error.

    Args:
        out: the folder; missing parents are created.
        overwrite: replace an existing folder, once the new one is complete.
        nbytes: its size, to refuse a disk that is too small before any work.
        sign: `overwrite` only replaces folders that are empty or hold a file of this name.
        inputs: files and folders that the command reads, which `out` must not touch.

    Raises:
        UserError: `out` exists, is an input, cannot be created, or the disk is full.
    """
    place = Path(os.path.realpath(out))
    check_no_input(out, inputs)
    try:
        _recover(place)
    except OSError as error:
        raise _cannot_write(place, error) from error
    check_out(out, overwrite=overwrite, nbytes=nbytes, sign=sign, inputs=inputs)
    parents = [parent for parent in place.parents if not os.path.exists(parent)]
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            staging, lock = _make_staging(place)
        except OSError as error:
            raise _cannot_write(place, error) from error
        try:
            yield staging
            _sync(staging)
            _publish(staging, place, replace=overwrite)
        except OSError as error:
            if error.errno in _FULL:
                raise _cannot_write(place, error) from error
            raise
        finally:
            # After the rename there is nothing left under this name.
            shutil.rmtree(staging, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except BaseException:
        for parent in parents:
            with suppress(OSError):
                parent.rmdir()
        raise


def check_out(
    out: Path,
    *,
    overwrite: bool = False,
    nbytes: int = 0,
    sign: str = "config.json",
    inputs: Collection[Path] = (),
) -> None:
    """Check that `out` can be written, before any work.

    Raises:
        UserError: see `staged_folder`.
    """
    place = Path(os.path.realpath(out))
    check_no_input(out, inputs)
    if os.path.lexists(place):
        try:
            _check_replaceable(out, place, overwrite, sign)
        except OSError as error:
            raise _cannot_write(place, error) from error
    if nbytes:
        check_room(out, nbytes)


def check_file(out: Path, *, overwrite: bool, nbytes: int = 0) -> None:
    """Check that a file can be written, before any work.

    Raises:
        UserError: it exists already, is a folder, or the disk is too small.
    """
    check(
        (not out.is_dir(), f"The output {out} is a folder.", "Name a file."),
        (
            overwrite or out.is_dir() or not out.exists(),
            f"The output file {out} exists already.",
            "Choose another one, or pass --overwrite to replace it.",
        ),
    )
    if nbytes:
        check_room(out, nbytes)


def check_no_input(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is an input, contains one or lies in one, by any link or name.

    Raises:
        UserError: it is.
    """
    place = Path(os.path.realpath(out))
    for path in inputs:
        if not path.exists():
            continue
        # Replacing a folder deletes the links in it, even if their targets are elsewhere.
        link = Path(os.path.realpath(path.parent)) / path.name
        around = place in Path(os.path.realpath(path)).parents or place in (link, *link.parents)
        # One folder may have several names without a link: mounted twice, or on a file system that ignores case.
        if around or any(os.path.samefile(above, path) for above in (place, *place.parents) if above.exists()):
            raise UserError(
                f"The output {out} is, contains or lies in the input {path}.", "Choose a place outside of it."
            )


def check_room(out: Path, nbytes: int) -> None:
    """Check that there is disk space for an `out` of `nbytes`.

    Raises:
        UserError: the disk is too small.
    """
    # A replaced folder may be on another disk, but the new one is created on its parent's disk.
    require_room(Path(os.path.realpath(out)).parent, nbytes, "the output", where=out)


def let_go(array: Any) -> None:
    """Release the pages of a mapped array; they are read again when needed."""
    inner: Any = array
    while inner is not None:
        pages = getattr(inner, "_mmap", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
            return
        inner = getattr(inner, "base", None)


def _check_replaceable(out: Path, place: Path, overwrite: bool, sign: str) -> None:
    remedy = "Choose another output folder."
    if not place.is_dir():
        raise UserError(f"The output {out} is a file.", remedy)
    if not overwrite:
        raise UserError(
            f"The output folder {out} exists already.",
            "Choose another one, or pass --overwrite to replace it.",
        )
    here = Path.cwd()
    if place == here or place in here.parents:
        raise UserError(f"The output {out} is or contains the working directory.", remedy)
    if any(place.iterdir()) and not (place / sign).exists():
        raise UserError(
            f"{out} has no {sign}, so --overwrite does not delete it.",
            remedy,
        )


def _cannot_write(place: Path, error: OSError) -> UserError:
    if error.errno in _FULL:
        return UserError(
            f"{place} is on a full disk.",
            "Nothing was left there. Free some space, or choose an output folder on another disk.",
        )
    return UserError(
        f"{place} cannot be written to: {error.strerror or error}.",
        "Choose another output folder.",
    )


def _lock(folder: Path) -> int | None:
    """A lock, released with this process at the latest; None if folders cannot be locked.

    Raises:
        BlockingIOError: a live process holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems
        os.close(handle)
        return None
    return handle


def _make_staging(place: Path) -> tuple[Path, int | None]:
    while True:
        staging = place.parent / f".{place.name}.staging-{token_hex(4)}"
        staging.mkdir()
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(staging)
            if staging.exists():
                return staging, lock
            # Another run removed it as a dead one's between mkdir and lock.
            if lock is not None:
                os.close(lock)


def _recover(place: Path) -> None:
    """Clean up after killed runs for the same destination."""
    for old in place.parent.glob(f".{glob.escape(place.name)}.old-*"):
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames
            old.rename(place)
    for staging in place.parent.glob(f".{glob.escape(place.name)}.staging-*"):
        with suppress(OSError):
            lock = _lock(staging)
            if lock is not None:
                shutil.rmtree(staging, ignore_errors=True)
                os.close(lock)


def _sync(folder: Path) -> None:
    for inner, _, names in os.walk(folder):
        for name in names:
            with (Path(inner) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(inner))


def _publish(staging: Path, place: Path, *, replace: bool) -> None:
    if replace and place.exists():
        old = place.parent / f".{place.name}.old-{token_hex(4)}"
        place.rename(old)
        try:
            staging.rename(place)
        except BaseException:
            if not place.exists():
                old.rename(place)
            raise
        sync_folder(place.parent)
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        staging.rename(place)
    except OSError as error:
        raise _cannot_write(place, error) from error
    sync_folder(place.parent)
