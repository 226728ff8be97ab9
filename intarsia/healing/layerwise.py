"""Layerwise distillation: every output layer that needs it, fed the original H^start, is trained towards H^stop.

Layers do not depend on one another, so they are trained one after the other or as tasks on Dask workers, with the same
result; unless they are fed what the trained layers before them give (`inputs="student"`). The teacher is run once, only
as deep as the next layer needs, and a depth is dropped when no layer needs it any more: one by one, two depths are
stored at a time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from intarsia.anatomy.spec import Anatomy
from intarsia.building.parameters import parameter_names, to_tensors
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import PREFIX, Room
from intarsia.errors import UserError
from intarsia.healing.cluster import Cluster
from intarsia.healing.correspond import Correspondence, correspondences, taught
from intarsia.healing.layer_task import LayerTask, Trained, finished, trained_names
from intarsia.healing.layer_training import train_layer
from intarsia.healing.schedule import schedule_of
from intarsia.healing.settings import LayerwiseSettings
from intarsia.healing.state_file import require_room
from intarsia.healing.states import StatesFile, StatesInMemory, StudentStates, TeacherStates
from intarsia.healing.text import Text
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
    cluster: Cluster | None = None,
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
        cluster: trains the layers as Dask tasks; needs `folder`.
        memory_bytes: what hidden states may take in memory before they go to files.

    Raises:
        UserError: there is too little text, the disk is full, or numbers are not finite.
    """
    settings, progress, teacher = settings or LayerwiseSettings(), progress or Silent(), teacher or resident
    work = _Work(recipe, resident, teacher, corpus, held_out, settings, folder, cluster, memory_bytes)
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
        if cluster is None:
            work.one_by_one(todo, found, progress)
        else:
            found |= work.on_cluster(todo, cluster, progress)
    finally:
        work.close()
    reports = [asdict(found[index].report) for index in sorted(found)]
    return replace(recipe, fitted=with_trained(recipe, found, resident.anatomy)), reports


def with_trained(
    recipe: Recipe, found: Mapping[int, Trained], anatomy: Anatomy
) -> dict[int, Mapping[str, npt.NDArray[np.float32]]]:
    """What is fitted in a recipe, with what was trained."""

    def stored(trained: Trained) -> dict[str, npt.NDArray[np.float32]]:
        parameters = {name: torch.from_numpy(array) for name, array in trained.tensors.items()}
        return {name: np.asarray(tensor.numpy()) for name, tensor in to_tensors(parameters, anatomy).items()}

    fitted = {index: {**recipe.fitted.get(index, {}), **stored(trained)} for index, trained in found.items()}
    return {**recipe.fitted, **{index: tensors for index, tensors in fitted.items() if tensors}}


class _Work:
    """The teacher's states, and tasks made from them."""

    def __init__(
        self,
        recipe: Recipe,
        resident: Resident,
        teacher: Resident,
        corpus: Corpus,
        held_out: Corpus,
        settings: LayerwiseSettings,
        folder: Path | None,
        cluster: Cluster | None,
        memory_bytes: int | None,
    ) -> None:
        self.recipe, self.resident, self.settings, self.folder = recipe, resident, settings, folder
        text = self.text = Text.of(corpus, held_out)
        self.schedule = schedule_of(settings, sequences=len(corpus), seq_len=corpus.seq_len)
        self.names = trained_names(parameter_names(resident.anatomy), settings.only)
        shape = (len(self.text.ids_NT), corpus.seq_len, resident.anatomy.width)
        room = Room(0 if cluster else memory_bytes, folder)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{PREFIX}*"):  # a killed run's
                shutil.rmtree(stale, ignore_errors=True)
            # A layer's masters, optimiser state and best tensors, as finished and as they are on the way.
            require_room(folder, 20 * resident.anatomy.layer_parameters, "the state of one layer's training")
        assert cluster is None or folder is not None, "workers read from the run folder"
        self.store = HiddenStore(shape, teacher.model.dtype, room=room)
        self.states = TeacherStates(teacher, text.ids_NT, self.store)
        self.student: StudentStates | None = None
        if settings.inputs == "student":
            if cluster is not None:
                raise UserError.of(
                    where="--layer-inputs student",
                    expected="no --scheduler: a layer is trained on what those before it give",
                    found="both",
                    remedy="Leave --scheduler out, or train on the teacher's hidden states.",
                )
            store = HiddenStore(shape, resident.model.dtype, room=room)
            self.student = StudentStates(recipe, resident, text.ids_NT, store)

    def close(self) -> None:
        """Free the hidden states."""
        self.store.close()
        if self.student is not None:
            self.student.store.close()

    def one_by_one(self, layers: Sequence[Correspondence], found: dict[int, Trained], progress: Progress) -> None:
        """Train the layers in order; what comes of them is added to `found`."""
        if not layers:
            return
        with progress.task("layerwise training", len(layers) * self._units()) as task:
            for number, layer in enumerate(layers):
                if self.student is None:
                    self._reach(layer.start, task)
                    self._drop_before(layer.start)
                    self._reach(layer.stop, task)
                else:
                    self._reach(layer.stop, task)
                    self._drop_before(layer.stop)
                    task.note(f"the trained layers' hidden states before layer {layer.index}")
                    self.student.reach(layer.index, with_trained(self.recipe, found, self.resident.anatomy))
                meter = _Meter(task, f"layer {layer.index} ({number + 1} of {len(layers)})")
                trained = train_layer(self._task(layer), meter)
                found[layer.index] = trained
                task.advance(self._units() - meter.told)
                _tell(trained, progress)

    def on_cluster(self, layers: Sequence[Correspondence], cluster: Cluster, progress: Progress) -> dict[int, Trained]:
        """Train the layers as tasks; each is sent as soon as the teacher has come to its depth."""
        found: dict[int, Trained] = {}
        waiting: dict[Any, Correspondence] = {}

        def take(done: Any) -> None:
            layer = waiting.pop(done)
            found[layer.index] = cluster.result(done, f"layerwise training of output layer {layer.index}")
            task.advance(self._units())
            _tell(found[layer.index], progress)
            self._drop_before(min((other.start for other in waiting.values()), default=layer.start))

        with progress.task("layerwise training", len(layers) * self._units()) as task:
            try:
                for number, layer in enumerate(layers):
                    self._reach(layer.start, task)
                    self._reach(layer.stop, task)
                    waiting[cluster.submit(train_layer, self._task(layer))] = layer
                    task.note(f"{number + 1} of {len(layers)} layers sent to the workers")
                    for done in [future for future in waiting if future.done()]:
                        take(done)
                for done in cluster.as_completed(list(waiting)):
                    take(done)
            finally:
                cluster.cancel(list(waiting))
        return found

    def _task(self, layer: Correspondence) -> LayerTask:
        op = self.recipe.layers[layer.index]
        donor = op.sources[0].layer
        # Always a module of its own: a plain `Select` is the original's module itself.
        with self.resident.awake(self.resident.module(op, self.recipe.fitted.get(layer.index))) as whole:
            module = self.resident.fresh(donor, dict(whole.named_parameters()))
        if next(module.parameters()).dtype == torch.float16:
            module = module.to(torch.bfloat16)  # gradients overflow in float16
        sizes = {
            self.schedule.batch,
            self.text.held_out % self.schedule.batch,
            min(self.schedule.batch, self.text.held_out),
        }
        return LayerTask(
            index=layer.index,
            module=module,
            inputs=self._source(layer.start)
            if self.student is None
            else StatesInMemory(store=self.student.store, depth=0),
            targets=self._source(layer.stop),
            sequences=len(self.text.ids_NT),
            held_out=self.text.held_out,
            seq_len=self.text.seq_len,
            mask=self.text.mask_NT,
            calls={size: self.states.call(donor, size) for size in sizes if size},
            names=self.names,
            settings=self.settings,
            folder=self.folder,
            device=str(self.resident.device),
        )

    def _source(self, depth: int) -> StatesFile | StatesInMemory:
        path = self.store.file(depth)
        if path is None:
            return StatesInMemory(store=self.store, depth=depth)
        return StatesFile(path=path.resolve(), shape=self.store.shape, dtype=self.store.dtype)

    def _reach(self, depth: int, task: Task) -> None:
        task.note(f"the original's hidden states behind layer {depth}")
        self.states.reach(depth)

    def _drop_before(self, depth: int) -> None:
        for stored in self.store.depths():
            if stored < depth:
                self.store.drop(stored)

    def _units(self) -> int:
        """Tokens that one layer is trained on, if it is not stopped early."""
        return self.schedule.steps * self.schedule.batch * self.text.seq_len


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
