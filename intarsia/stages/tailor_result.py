"""What a search over a family has found, for whoever called it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.stages.tailor_input import Predicted
from intarsia.tailoring.history import Trial
from intarsia.tailoring.pareto import Front


@dataclass(frozen=True, kw_only=True)
class TailorResult:
    """What a search has found.

    Attributes:
        run: its folder; None for a dry run.
        trials: how many trials it has made; `failed` of them.
        front: the Pareto front; `knee` the number of its incumbent's trial.
        judged: the incumbent beside the uncut base on what the search never saw; None where it was not judged.
        best: the folder of the built incumbent; `report` the page about the search.
        stopped: why the search ended before it had made as many trials as were asked for, or None.
    """

    run: Path | None
    predicted: Predicted
    trials: int = 0
    failed: int = 0
    front: Front | None = None
    judged: Mapping[str, Any] | None = None
    best: Path | None = None
    report: Path | None = None
    stopped: str | None = None
    layer_forwards: float = 0.0
    trial_seconds: float = 0.0
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        if self.run is None:
            return {**self.predicted.to_dict(), "seconds": self.seconds}
        front = self.front
        return {
            "run": str(self.run),
            "front": [] if front is None else [_row(front, trial) for trial in front.points],
            "budget": None if front is None else front.budget,
            "knee": None if front is None else front.knee.number,
            "judged": self.judged,
            "trials": self.trials,
            "failed": self.failed,
            "stopped": self.stopped,
            "best": None if self.best is None else str(self.best),
            "report": None if self.report is None else str(self.report),
            "layer_forwards": self.layer_forwards,
            "trial_seconds": self.trial_seconds,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _row(front: Front, trial: Trial) -> dict[str, Any]:
    marks = [name for name in front.objectives if front.best(name) is trial] + ["knee"] * (front.knee is trial)
    costs = dict(zip(front.objectives, trial.costs or (), strict=True))
    return {"trial": trial.number, **costs, "best": ", ".join(marks), "engine": trial.engine, "origin": trial.origin}
