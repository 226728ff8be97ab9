"""Where training runs: one process or several, through Accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_LONGEST_WAIT = timedelta(days=7)
"""Other processes wait while the first one does what only one can do."""


def rank() -> int:
    """Which of the launched processes this is; 0 where there is one only. Needs nothing to be imported."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: torch.device) -> torch.device:
    """The device of this process: where several were launched on GPUs, each has its own."""
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def barrier(device: torch.device) -> Callable[[], None]:
    """Waits for all launched processes; nothing where there is one only."""
    if world_size() == 1:
        return lambda: None
    wait: Callable[[], None] = accelerator(device=device).wait_for_everyone
    return wait


def accelerator(*, device: torch.device, log: str | None = None, folder: Path | None = None) -> Any:
    """An `accelerate.Accelerator` for this process.

    Precision is ours (`Distiller`), so that it is the same on one CPU and under FSDP.

    Args:
        log: a tracker that Accelerate knows (see `stages.end_to_end.check`).
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    # It warns that a tied head is stored once, at every snapshot.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    return Accelerator(
        cpu=device.type == "cpu",
        log_with=log,
        project_config=None if folder is None else ProjectConfiguration(project_dir=str(folder)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
