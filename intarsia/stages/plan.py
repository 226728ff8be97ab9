"""Plan: look at a model on calibration text and write the ladder of recipes into a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.healing.settings import ClosedFormSettings
from intarsia.progress import Progress, Silent
from intarsia.pruning.estimate import Estimate
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.run_folder import RunFolder
from intarsia.pruning.settings import ComeSettings, Settings
from intarsia.stages.calibration_text import pin_text
from intarsia.stages.plan_input import asked, check_method
from intarsia.stages.plan_settings import first_recipe, identifying_settings
from intarsia.stages.plan_work import climbed
from intarsia.stages.source import Source


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What a plan gave.

    Attributes:
        run: the run folder; None for a dry run.
        depths: the depths whose recipes it holds.
        losses: calibration loss in nats at each of them (None where the method does not measure it).
        layer_forwards: cost over the whole run; 1 is one layer over the calibration set.
        stopped: why the planner ended before the target, or None.
        estimate: what it takes, as known before.
    """

    model: str
    method: str
    run: Path | None
    layers: int
    target: int
    depths: tuple[int, ...]
    losses: tuple[float | None, ...]
    layer_forwards: float
    seconds: float
    peak_memory_bytes: int
    stopped: str | None
    estimate: Estimate

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        data["run"] = None if self.run is None else str(self.run)
        data["ladder"] = [
            {"layers": depth, "calibration_loss": loss} for depth, loss in zip(self.depths, self.losses, strict=True)
        ]
        del data["depths"], data["losses"]
        if self.run is not None:  # the work is done
            del data["estimate"]
        return data


def plan(
    model: str,
    run: Path,
    *,
    layers: int | None = None,
    sparsity: float | None = None,
    method: str = "come",
    calibration: str | Sequence[str] = "self",
    tokens: int = 65536,
    seq_len: int = 512,
    settings: Settings | None = None,
    heal_in_loop: bool = False,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    devices: Sequence[str] = (),
    stream: bool = False,
    memory_bytes: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PlanResult:
    """Make the recipes for every depth from the model's down to the target.

    A run that was stopped continues behind its last finished step; one that is finished is only read. A deeper
    target continues the same run.

    Args:
        model: a local folder, a hub id, or `demo`.
        run: the run folder, new or begun with the same settings.
        layers, sparsity: the target, one of the two (see `target_depth`).
        method: one of `intarsia.pruning.ladder.METHODS`.
        settings: of the method; its defaults where they are not given, or are another method's.
        heal_in_loop: repair what each step changes in closed form, before the next; for progressive methods.
        calibration: see `intarsia.options.TextSpec`.
        devices: lay the layers over several devices.
        stream: keep one layer in memory at a time, read from the files when it is needed.
        memory_bytes: what hidden states may take in memory; the rest goes to files in the run folder.
        dry_run: estimate what it takes, and do nothing.

    Raises:
        UserError: something about the input cannot be used. Nothing has been written then.
    """
    check_method(method, heal_in_loop=heal_in_loop)
    source = Source(
        model,
        revision=revision,
        calibration=calibration,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        devices=devices,
        stream=stream,
        memory_bytes=memory_bytes,
        progress=progress or Silent(),
    )
    return plan_source(
        source,
        Path(run),
        layers=layers,
        sparsity=sparsity,
        method=method,
        settings=settings,
        in_loop=ClosedFormSettings() if heal_in_loop else None,
        batch_tokens=batch_tokens,
        dry_run=dry_run,
    )


def plan_source(
    source: Source,
    run: Path,
    *,
    layers: int | None,
    sparsity: float | None,
    method: str,
    settings: Settings | None,
    batch_tokens: int | None,
    dry_run: bool,
    in_loop: ClosedFormSettings | None = None,
    shared: Callable[[], Intermediate] | None = None,
) -> PlanResult:
    """`plan`, for a model that other stages of the same call work on too.

    Args:
        in_loop: how to repair what a step changes before the next, if at all.
        shared: gives the model to plan with, where it is shared with other plans; it is not closed then.

    Raises:
        UserError: as `plan`.
    """
    begun = time.perf_counter()
    progress = source.progress
    wanted = asked(
        source,
        method,
        settings,
        layers=layers,
        sparsity=sparsity,
        in_loop=in_loop,
        batch_tokens=batch_tokens,
    )

    def result(folder: RunFolder | None, layer_forwards: float = 0.0, stopped: str | None = None) -> PlanResult:
        log = [] if folder is None else folder.log()
        return PlanResult(
            model=source.model,
            method=method,
            run=None if folder is None else folder.path,
            layers=source.checkpoint.architecture.n_layers,
            target=wanted.target,
            depths=tuple(entry["layers"] for entry in log),
            losses=tuple(entry["loss"] for entry in log),
            layer_forwards=sum(entry["layer_forwards"] for entry in log) or layer_forwards,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=peak_memory_bytes(),
            stopped=stopped,
            estimate=wanted.estimate,
        )

    if dry_run:
        return result(None)
    progress.say(wanted.estimate.words())
    _ = source.tokenizer  # read now: one that cannot be read must not be found out after the scan
    identifying = identifying_settings(source, run, wanted)
    folder = RunFolder.offer(run, identifying)
    if folder.depths() and folder.depths()[-1] <= wanted.target:
        progress.say(f"{run}: planned already")
        return result(folder)
    corpus = source.corpus
    # Only now: a run folder that a mistyped text leaves behind would not take the right one.
    folder = RunFolder.start(run, identifying)
    pin_text(folder, corpus)
    start = first_recipe(folder, source, identifying)
    behind_norm = measured_behind_norm(wanted.settings)
    spent, stopped = climbed(source, folder, start, wanted, behind_final_norm=behind_norm, shared=shared)
    return result(folder, spent, stopped)


def measured_behind_norm(settings: Settings | None) -> bool:
    """Whether a method takes the last layer's output behind the final norm."""
    return isinstance(settings, ComeSettings) and settings.reference
