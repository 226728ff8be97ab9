"""Plan: look at a model on calibration text and write the ladder of recipes into a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import UserError
from intarsia.evaluation.memory import peak_memory_bytes
from intarsia.healing.closed_form import ClosedFormSettings
from intarsia.planning.beam import check_beam
from intarsia.planning.cost import Cost, predict
from intarsia.planning.finalists import check_finalists
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.ladder import METHODS, climb, planner_of, progressive_methods, settings_of
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.settings import ComeSettings, Settings
from intarsia.planning.sizes import Held, Sizes
from intarsia.progress import Progress, Silent
from intarsia.stages.calibration_text import pin_text
from intarsia.stages.plan_settings import first_recipe, identifying_settings
from intarsia.stages.setup import check_seq_len
from intarsia.stages.source import Source
from intarsia.stages.target import target_depth
from intarsia.stages.teaming import Workers, check_workers, deciding, team_of


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What a plan gave.

    Attributes:
        run: the run folder; None for a dry run.
        depths: the depths whose recipes it holds.
        losses: calibration loss in nats at each of them (None where the method does not measure it).
        layer_forwards: cost over the whole run; 1 is one layer over the calibration set.
        stopped: why the planner ended before the target, or None.
        predicted: cost and memory as predicted beforehand.
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
    predicted: Cost

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        data["run"] = None if self.run is None else str(self.run)
        data["ladder"] = [
            {"layers": depth, "calibration_loss": loss} for depth, loss in zip(self.depths, self.losses, strict=True)
        ]
        del data["depths"], data["losses"]
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
    scheduler: str | None = None,
    workers: int | None = None,
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
        method: one of `METHODS`.
        settings: of the method; its defaults where they are not given, or are another method's.
        heal_in_loop: repair what each step changes in closed form, before the next; for progressive methods.
        calibration: see `intarsia.calibration.corpus.load_corpus`.
        devices: lay the layers over several devices.
        stream: keep one layer in memory at a time, read from the files when it is needed.
        memory_bytes: what hidden states may take in memory; the rest goes to files in the run folder.
        scheduler, workers: give the calibration set to the Dask workers of a scheduler, or to so many processes on
            this machine; each holds a model of its own.
        dry_run: predict cost and memory, and do nothing.

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
        workers=None if scheduler is None and workers is None else Workers(scheduler=scheduler, count=workers),
    )


def check_method(method: str, *, heal_in_loop: bool = False) -> None:
    """Refuse what is not one of `METHODS`, or cannot repair as it goes.

    Raises:
        UserError: listing those that can.
    """
    if method not in METHODS:
        raise UserError.of(
            where="--method", expected=f"one of {', '.join(METHODS)}", found=repr(method), remedy="Choose one of them."
        )
    able = ", ".join(progressive_methods())
    if heal_in_loop and method not in progressive_methods():
        raise UserError.of(
            where="--heal-in-loop",
            expected=f"a progressive method, which measures the model after every step: {able}",
            found=f"{method}, which decides once on the whole model",
            remedy="Choose one of them, or leave it out: `compress` and `heal` repair afterwards what any method cuts.",
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
    workers: Workers | None = None,
) -> PlanResult:
    """`plan`, for a model that other stages of the same call work on too.

    Args:
        in_loop: how to repair what a step changes before the next, if at all.
        shared: gives the model to plan with, where it is shared with other plans; it is not closed then.
        workers: who measures the calibration set; this process, if it is not said.

    Raises:
        UserError: as `plan`.
    """
    begun = time.perf_counter()
    progress, checkpoint = source.progress, source.checkpoint
    own = settings_of(method, settings)
    check_beam(method, own, in_loop)
    check_finalists(method, own, in_loop)
    assert workers is None or shared is None, "a model that is shared is measured in this process"
    if workers is not None:
        check_workers(workers, method, own, in_loop, len(source.placement.devices))
    target = target_depth(checkpoint, layers=layers, sparsity=sparsity)
    check_seq_len(checkpoint, source.seq_len)
    predicted = predict(
        Sizes.of(checkpoint, source.dtype),
        method,
        own,
        target=target,
        tokens=source.tokens,
        seq_len=source.seq_len,
        held=Held.on(
            source.device,
            stream=source.placement.stream,
            memory_bytes=source.placement.memory_bytes,
            devices=len(source.placement.devices),
            batch_tokens=batch_tokens,
        ),
        in_loop=in_loop,
    )
    depth = checkpoint.anatomy.n_layers

    def result(folder: RunFolder | None, layer_forwards: float = 0.0, stopped: str | None = None) -> PlanResult:
        log = [] if folder is None else folder.log()
        return PlanResult(
            model=source.model,
            method=method,
            run=None if folder is None else folder.path,
            layers=depth,
            target=target,
            depths=tuple(entry["layers"] for entry in log),
            losses=tuple(entry["loss"] for entry in log),
            layer_forwards=sum(entry["layer_forwards"] for entry in log) or layer_forwards,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=peak_memory_bytes(),
            stopped=stopped,
            predicted=predicted,
        )

    if dry_run:
        return result(None)
    progress.say(predicted.words())
    _ = source.tokenizer  # read now: one that cannot be read must not be found out after the scan
    identifying = identifying_settings(
        source, run, method, own, in_loop=in_loop, batch_tokens=batch_tokens, target=target
    )
    folder = RunFolder.offer(run, identifying)
    if folder.depths() and folder.depths()[-1] <= target:
        progress.say(f"{run}: planned already")
        return result(folder)
    corpus = source.corpus
    # Only now: a run folder that a mistyped text leaves behind would not take the right one.
    folder = RunFolder.start(run, identifying)
    pin_text(folder, corpus)
    start = first_recipe(folder, source, identifying)
    behind_norm = measured_behind_norm(own)
    with team_of(workers, source, folder, batch_tokens=batch_tokens, behind_final_norm=behind_norm) as team:
        if shared is None:
            current = Intermediate(
                source.resident if team is None else deciding(source),
                corpus,
                start.layers,
                fitted=start.fitted,
                batch_tokens=batch_tokens,
                memory_bytes=source.placement.memory_bytes,
                folder=source.placement.room(folder.path).folder,
                behind_final_norm=behind_norm,
                team=team,
                progress=progress,
            )
        else:
            current = shared()
            current.become(start.layers, start.fitted)
        spent = current.layer_forwards
        try:
            stopped = climb(planner_of(method, own), current, start, target, folder, in_loop=in_loop)
        finally:
            if shared is None:
                current.close()
    if stopped is not None:
        progress.say(f"stopped at {current.depth} layers: {stopped}")
    return result(folder, current.layer_forwards - spent, stopped)


def measured_behind_norm(settings: Settings | None) -> bool:
    """Whether a method takes the last layer's output behind the final norm."""
    return isinstance(settings, ComeSettings) and settings.reference
