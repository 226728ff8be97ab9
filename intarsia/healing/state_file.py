"""State of a training on disk: tensors and a little plain data in one safetensors file, replaced at once or not at all.

Nothing is pickled: a state file is data like a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from intarsia.disk import damage_named, full_disk_named, replaced


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
    remedy = "Delete it; that part of the training is then done again."
    with (
        damage_named(path, expected="a state file of a training", remedy=remedy),
        safe_open(path, framework="pt") as file,
    ):
        facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, facts
