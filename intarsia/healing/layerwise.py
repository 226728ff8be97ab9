"""Layerwise distillation: every output layer that needs it, fed the original H^start, is trained towards H^stop.

Layers are trained one after the other, and do not depend on one another, unless they are fed what the trained layers
before them give (`inputs="student"`). The teacher is run once, only as deep as the next layer needs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from intarsia.architecture.spec import Architecture
from intarsia.building.parameters import to_tensors
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.healing.layer_map import Correspondence, correspondences, taught
from intarsia.healing.layer_task import Trained, finished
from intarsia.healing.layer_training import train_layer
from intarsia.healing.layer_work import LayerWork
from intarsia.healing.settings import LayerwiseSettings
from intarsia.progress import Progress, Silent, Task
from intarsia.recipe.recipe import Recipe


def train(
    recipe: Recipe,
    resident: Resident,
    corpus: Corpus,
    held_out: Corpus,
    *,
    settings: LayerwiseSettings | None = None,
    teacher: Resident | None = None,
    folder: Path | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with trained tensors of the layers for which that lowered the held-out loss, and a report by layer.

    Args:
        recipe: what is fitted in it is the starting point.
        resident: the recipe's base.
        corpus, held_out: sequences of one length; the second are not trained on.
        teacher: the base itself by default; must fit (see `check_teacher`).
        folder: where state is kept, to continue after a kill. What it holds must be of the same call.
        memory_bytes: what hidden states may take in memory before they go to files.

    Raises:
        UserError: there is too little text, the disk is full, or numbers are not finite.
    """
    settings, progress, teacher = settings or LayerwiseSettings(), progress or Silent(), teacher or resident
    work = LayerWork(
        recipe=recipe,
        resident=resident,
        teacher=teacher,
        corpus=corpus,
        held_out=held_out,
        settings=settings,
        folder=folder,
        memory_bytes=memory_bytes,
    )
    found: dict[int, Trained] = {}
    todo: list[Correspondence] = []
    known = correspondences(recipe)
    for index in taught(recipe, settings.layers):
        earlier = finished(folder, index)
        if earlier is None:
            todo.append(known[index])
        else:
            found[index] = earlier
    try:
        _one_by_one(work, todo, found, progress)
    finally:
        work.close()
    reports = [asdict(found[index].report) for index in sorted(found)]
    return replace(recipe, fitted=with_trained(recipe, found, resident.architecture)), reports


def with_trained(
    recipe: Recipe, found: Mapping[int, Trained], architecture: Architecture
) -> dict[int, Mapping[str, npt.NDArray[np.float32]]]:
    """What is fitted in a recipe, with what was trained."""

    def stored(trained: Trained) -> dict[str, npt.NDArray[np.float32]]:
        parameters = {name: torch.from_numpy(array) for name, array in trained.tensors.items()}
        return {name: np.asarray(tensor.numpy()) for name, tensor in to_tensors(parameters, architecture).items()}

    fitted = {index: {**recipe.fitted.get(index, {}), **stored(trained)} for index, trained in found.items()}
    return {**recipe.fitted, **{index: tensors for index, tensors in fitted.items() if tensors}}


def _one_by_one(
    work: LayerWork, layers: Sequence[Correspondence], found: dict[int, Trained], progress: Progress
) -> None:
    """Train the layers in order; what comes of them is added to `found`."""
    if not layers:
        return
    with progress.task("layerwise training", len(layers) * work.units()) as task:
        for number, layer in enumerate(layers):
            if work.student is None:
                work.reach(layer.start, task)
                work.drop_before(layer.start)
                work.reach(layer.stop, task)
            else:
                work.reach(layer.stop, task)
                work.drop_before(layer.stop)
                task.note(f"the trained layers' hidden states before layer {layer.index}")
                work.student.reach(layer.index, with_trained(work.recipe, found, work.resident.architecture))
            meter = _Meter(task, f"layer {layer.index} ({number + 1} of {len(layers)})")
            trained = train_layer(work.task(layer), meter)
            found[layer.index] = trained
            task.advance(work.units() - meter.told)
            _tell(trained, progress)


class _Meter:
    """Turns steps into progress: the last losses' mean, and tokens a second."""

    def __init__(self, task: Task, title: str) -> None:
        self.task, self.title = task, title
        self.told = 0
        self.begun = time.perf_counter()
        self.loss: float | None = None

    def __call__(self, tokens: int, loss: float) -> None:
        self.told += tokens
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        speed = self.told / max(time.perf_counter() - self.begun, 1e-9)
        self.task.advance(tokens)
        self.task.note(f"{self.title}: loss {self.loss:.4g}, {speed:,.0f} tokens/s")


def _tell(trained: Trained, progress: Progress) -> None:
    report = trained.report
    if not trained.tensors:
        progress.say(f"layer {report.layer}: no training lowered the held-out loss; it stays as it was")
    if report.stopped is not None and "loss was" in report.stopped:
        progress.say(f"layer {report.layer} diverged: {report.stopped}; its best state before that is kept")
