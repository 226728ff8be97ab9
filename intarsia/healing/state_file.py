"""State of a training on disk: tensors and a little plain data in one safetensors file, replaced at once or not at all.

Nothing is pickled: a state file is data like a checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from intarsia.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE_BYTES = 64 * 2**20


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state file.

    Raises:
        UserError: the disk is full. The file that was there before is as it was.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    with full_disk_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(whole, staging, metadata={"facts": json.dumps(facts)})
            with staging.open("rb+") as file:
                os.fsync(file.fileno())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a state file; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, facts
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError.of(
            where=str(path),
            expected="a state file of a training",
            found=f"something else: {error}",
            remedy="Delete it; that part of the training is then done again.",
        ) from error


def require_room(folder: Path, nbytes: int, what: str) -> None:
    """Refuse a disk that is too small before any work.

    Raises:
        UserError: there is less room than `nbytes` and a little more.
    """
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes + _SPARE_BYTES:
        raise UserError.of(
            where=str(folder),
            expected=f"{(nbytes + _SPARE_BYTES) / 1e9:.2f} GB of free space for {what}",
            found=f"{free / 1e9:.2f} GB",
            remedy="Free some space, or put the run folder on another disk (--run).",
        )


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
            "No space left" in str(error) or ("write" in str(error) and shutil.disk_usage(folder).free < 2**20)
        )
        if not (told or guessed):
            raise
        raise UserError.of(
            where=str(folder),
            expected="room for the state of the training",
            found="a full disk",
            remedy="Free some space and give the same command again: it continues where it was.",
        ) from error
