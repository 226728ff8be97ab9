"""State of a training on disk: tensors and a little plain data in one safetensors file, replaced at once or not at all.

Nothing is pickled: a state file is data like a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from intarsia.disk import full_disk_named, replaced
from intarsia.errors import UserError

_SPARE_BYTES = 64 * 2**20


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state file.

    Raises:
        UserError: the disk is full. The file that was there before is as it was.
    """
    with full_disk_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as temporary:
        save_file(whole, temporary, metadata={"facts": json.dumps(facts)})


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
