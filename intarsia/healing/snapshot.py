"""The whole state of an end-to-end training, as Accelerate writes it, in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.disk import full_disk_named, write_whole

_FACTS = "facts.json"


def save_snapshot(accelerator: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write parameters, optimiser and random state of all processes, and drop the snapshot before.

    Raises:
        UserError: the disk is full. The snapshot before stays.
    """
    staging = folder / ".state.staging"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    with full_disk_named(folder):
        try:
            accelerator.save_state(str(staging))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_whole(staging / _FACTS, json.dumps(dict(facts)) + "\n")
        before = _snapshots(folder)
        with full_disk_named(folder):
            staging.rename(folder / f"state-{facts['next']:09d}")
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_snapshot(accelerator: Any, folder: Path) -> dict[str, Any] | None:
    """Put the newest snapshot's state back; its facts, or None where there is no snapshot."""
    found = _snapshots(folder)
    if not found:
        return None
    accelerator.load_state(str(found[-1]))
    facts: dict[str, Any] = json.loads((found[-1] / _FACTS).read_text(encoding="utf-8"))
    return facts


def _snapshots(folder: Path) -> list[Path]:
    """Complete snapshots, oldest first."""
    return sorted(path for path in folder.glob("state-*") if (path / _FACTS).exists())
