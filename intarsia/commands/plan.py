"""`intarsia plan`: measure a model, and write the recipe for every depth down to the target into a run folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from intarsia import progress
from intarsia.flags import Flag, Result
from intarsia.options import ModelRef, Runtime, Target, TextSpec
from intarsia.pruning.efforts import method_of, text_of
from intarsia.pruning.estimate import Estimate
from intarsia.registry import Planner
from intarsia.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class PlanResult(Result):
    """The result of a plan."""

    model: str
    method: str
    # The run folder; None for a dry run.
    run: Path | None
    # Layers of the model.
    layers: int
    target: int
    # The depths with a recipe in the run folder.
    depths: tuple[int, ...]
    # Calibration loss in nats at each of these depths; None if the method does not measure it.
    losses: tuple[float | None, ...]
    # Cost of the whole run; 1 is one layer over the calibration text.
    layer_forwards: float
    seconds: float = 0.0
    peak_memory_bytes: int
    # Why the method stopped before the target, or None.
    stopped: str | None
    # The estimate of its cost.
    estimate: Estimate

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        data["ladder"] = [
            {"layers": depth, "calibration_loss": loss} for depth, loss in zip(self.depths, self.losses, strict=True)
        ]
        del data["depths"], data["losses"]
        if self.run is not None:  # the work is done
            del data["estimate"]
        return data


def plan(
    model: ModelRef | str,
    run: Annotated[Path, Flag(metavar="DIR", help="Run folder: progress, log and ladder.")],
    target: Target,
    *,
    method: Planner = None,
    text: TextSpec = TextSpec(),
    runtime: Runtime = Runtime(),
    dry_run: Annotated[bool, Flag(help="Print an estimate of the cost; write nothing.")] = False,
) -> PlanResult:
    """Plan the pruning: one recipe for every depth down to the target. Nothing is built.

    Give either --layers or --sparsity. `intarsia build RUN --layers N` builds any of the depths later. The same command
    resumes an interrupted plan, and continues a finished one with fewer --layers.

    Raises:
        UserError: the input cannot be used; nothing was written.
    """
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.commands.job import Job
    from intarsia.commands.planning import Planning
    from intarsia.disk import check_no_input

    started = time.perf_counter()
    check_no_input(Path(run), inputs_of(models=[model], texts=text.sources))
    planning = Planning(Job(model, text_of(text, target.effort), runtime), target, method_of(method, target.effort))
    if dry_run:
        return planning.result()
    progress.current().say(planning.estimate.words())
    with planning.opened(RunDir(run)) as ladder:
        return replace(planning.work(ladder), seconds=time.perf_counter() - started)
