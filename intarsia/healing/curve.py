"""The loss curve of a training: a line a step in a file, and a tracker if one is wanted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import full_disk_named, write_whole
from intarsia.healing.settings import EndToEndSettings


class Curve:
    """Written by the first process. After a restart the lines of steps that are done again are dropped."""

    def __init__(self, path: Path, accelerator: Any, settings: EndToEndSettings) -> None:
        self.path = path
        self.accelerator = accelerator
        self.settings = settings
        self.lr = 0.0

    def start(self, step: int) -> None:
        """Continue behind `step` finished steps."""
        if self.settings.log is not None:
            config = {key: value for key, value in self.settings.to_dict().items() if value is not None}
            self.accelerator.init_trackers("intarsia", config=config)
        if not self.accelerator.is_main_process:
            return
        kept = [line for line in read_curve(self.path) if 0 < step >= line["step"]]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, step: int, losses: Mapping[str, float], tokens: int) -> None:
        """A step is done."""
        self._write({"step": step, **losses, "lr": self.lr, "tokens": tokens}, step)

    def held_out(self, step: int, loss: float) -> None:
        """The held-out loss was measured."""
        self._write({"step": step, "held_out": loss if math.isfinite(loss) else None}, step)

    def end(self) -> None:
        """Nothing more comes."""
        if self.settings.log is not None:
            self.accelerator.end_training()

    def _write(self, line: dict[str, Any], step: int) -> None:
        if self.settings.log is not None:
            self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)
        if self.accelerator.is_main_process:
            with full_disk_named(self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a curve; one that a kill cut off does not count."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time of this process since `begun`, behind `done` steps that took an earlier one `seconds`."""

    done: int
    seconds: float
    begun: float

    @property
    def seconds_now(self) -> float:
        """Seconds of this process."""
        return time.perf_counter() - self.begun

    @property
    def all_seconds(self) -> float:
        """Seconds of all of them."""
        return self.seconds + self.seconds_now
