"""Layerwise distillation: every output layer that needs it is trained from the original's H^start towards H^stop.

Layers are trained one after the other, and do not depend on one another, unless their inputs are those of the
trained layers before them (`inputs="student"`). The teacher is run once, only as deep as the next layer needs; a depth
is dropped when no layer needs it any more, so that two depths are stored at a time.

Padding is on the right and attention looks back only, so real tokens are the same with and without the padding mask. It
is left out, which makes a layer's arguments the same for every batch of a size; the losses skip padding.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import PREFIX, HiddenStore, MemoryBudget
from intarsia.activations.loop import Loop
from intarsia.architecture.spec import Architecture
from intarsia.building.layer import parameter_names, to_tensors
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.recipe_layers import Placed
from intarsia.data.corpus import Corpus
from intarsia.disk import require_room
from intarsia.errors import UserError
from intarsia.healing.layer_map import Correspondence, correspondences, taught
from intarsia.healing.layer_training import LayerTask, Trained, finished, train_layer, trained_names
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.healing.training import Text, schedule_of
from intarsia.progress import Progress, Silent, Task
from intarsia.recipe.recipe import Recipe


def train(
    recipe: Recipe,
    resident: LoadedModel,
    text: Text,
    *,
    settings: LayerwiseSettings | None = None,
    teacher: LoadedModel | None = None,
    folder: Path | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with trained tensors of the layers for which that lowered the held-out loss, and a report by layer.

    Args:
        recipe: what is fitted in it is the starting point.
        resident: the recipe's base.
        teacher: the base itself by default; must fit (see `check_teacher`).
        folder: where state is kept, to continue after a kill. What it holds must be of the same call.
        memory_bytes: what hidden states may take in memory before they go to files.

    Raises:
        UserError: there is too little text, the disk is full, or numbers are not finite.
    """
    settings, progress = settings or LayerwiseSettings(), progress or Silent()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{PREFIX}*"):  # a killed run's
            shutil.rmtree(stale, ignore_errors=True)
        # A layer's masters, optimiser state and best tensors, as finished and as they are on the way.
        most = 20 * resident.architecture.layer_parameters
        require_room(folder, most, "the state of one layer's training", option="--run")
    known = correspondences(recipe)
    found: dict[int, Trained] = {}
    todo: list[Correspondence] = []
    for index in taught(recipe, settings.layers):
        earlier = finished(folder, index)
        if earlier is None:
            todo.append(known[index])
        else:
            found[index] = earlier
    work = _Work(recipe, resident, teacher or resident, text, settings, folder, MemoryBudget(memory_bytes, folder))
    try:
        with progress.task("layerwise training", len(todo) * work.tokens) as task:
            for number, layer in enumerate(todo):
                work.reach(layer, found, task)
                meter = _Meter(task, f"layer {layer.index} ({number + 1} of {len(todo)})")
                trained = found[layer.index] = train_layer(work.task(layer), meter)
                task.advance(work.tokens - meter.tokens)
                _report(trained, progress)
    finally:
        work.close()
    reports = [asdict(found[index].report) for index in sorted(found)]
    return replace(recipe, fitted=_fitted(recipe, found, resident.architecture)), reports


def _fitted(
    recipe: Recipe, found: Mapping[int, Trained], architecture: Architecture
) -> dict[int, Mapping[str, npt.NDArray[np.float32]]]:
    """What is fitted in a recipe, with what was trained."""

    def stored(trained: Trained) -> dict[str, npt.NDArray[np.float32]]:
        parameters = {name: torch.from_numpy(array) for name, array in trained.tensors.items()}
        return {name: np.asarray(tensor.numpy()) for name, tensor in to_tensors(parameters, architecture).items()}

    fitted = {index: {**recipe.fitted.get(index, {}), **stored(trained)} for index, trained in found.items()}
    return {**recipe.fitted, **{index: tensors for index, tensors in fitted.items() if tensors}}


class _Work:
    """The hidden states that layers are trained with, and the training of each as a task."""

    def __init__(
        self,
        recipe: Recipe,
        resident: LoadedModel,
        teacher: LoadedModel,
        text: Text,
        settings: LayerwiseSettings,
        folder: Path | None,
        memory_budget: MemoryBudget,
    ) -> None:
        """Nothing is run yet.

        Raises:
            UserError: there is too little text.
        """
        self.recipe, self.resident, self.text, self.settings, self.folder = recipe, resident, text, settings, folder
        self.schedule = schedule_of(settings, sequences=text.train, seq_len=text.seq_len)
        # Tokens that one layer is trained on, if it is not stopped early.
        self.tokens = self.schedule.steps * self.schedule.batch * text.seq_len
        self.names = trained_names(parameter_names(resident.architecture), settings.only)
        self.teacher = TeacherStates(Loop(teacher, _without_mask(teacher, text), memory_budget=memory_budget))
        self.stream = self.teacher.loop.stream
        self.student: _StudentStates | None = None
        if settings.inputs == "student":
            store = HiddenStore(self.teacher.store.shape, resident.model.dtype, memory_budget=memory_budget)
            self.student = _StudentStates(recipe, resident, text, store)

    def close(self) -> None:
        """Free the hidden states."""
        self.teacher.close()
        if self.student is not None:
            self.student.store.close()

    def reach(self, layer: Correspondence, found: Mapping[int, Trained], task: Task) -> None:
        """Store a layer's inputs and targets."""
        if self.student is None:
            self._reach(layer.start, task)
            self._drop_before(layer.start)
            self._reach(layer.stop, task)
            return
        self._reach(layer.stop, task)
        self._drop_before(layer.stop)
        task.note(f"the trained layers' hidden states before layer {layer.index}")
        self.student.reach(layer.index, _fitted(self.recipe, found, self.resident.architecture))

    def task(self, layer: Correspondence) -> LayerTask:
        """The training of a layer that was reached."""
        op = self.recipe.layers[layer.index]
        donor = op.sources[0].layer
        # Always a module of its own: a plain `Select` is the original's module itself.
        with self.resident.awake(self.resident.module(op, self.recipe.fitted.get(layer.index))) as whole:
            module = self.resident.fresh(donor, dict(whole.named_parameters()))
        if next(module.parameters()).dtype == torch.float16:
            module = module.to(torch.bfloat16)  # gradients overflow in float16
        batch, held_out = self.schedule.batch, self.text.held_out
        sizes = {batch, held_out % batch, min(batch, held_out)} - {0}
        states, cpu = self.teacher.store, torch.device("cpu")
        inputs = partial(states.rows, layer.start, device=cpu)
        if self.student is not None:
            inputs = partial(self.student.store.rows, 0, device=cpu)
        if self.stream.by_tokens:
            raise UserError(
                "Layers of this model get arguments that depend on the tokens, which layerwise training does not keep.",
                "Heal with closed-form or end-to-end.",
            )
        own = {name for name, _ in module.named_parameters()}
        with torch.no_grad():
            calls = {size: self.stream.calls(self.text.ids_NT[:size], None)[donor] for size in sizes}
        return LayerTask(
            index=layer.index,
            module=module,
            inputs=inputs,
            targets=partial(states.rows, layer.stop, device=cpu),
            text=self.text,
            calls=calls,
            names=tuple(name for name in self.names if name in own),
            settings=self.settings,
            folder=self.folder,
            device=self.resident.device,
        )

    def _reach(self, depth: int, task: Task) -> None:
        task.note(f"the original's hidden states after layer {depth}")
        self.teacher.learn([depth])

    def _drop_before(self, depth: int) -> None:
        for stored in self.teacher.store.depths():
            if stored < depth:
                self.teacher.store.drop(stored)


class _StudentStates:
    """What the output layers before the next one give, on all sequences: one depth, overwritten as it gets deeper."""

    def __init__(self, recipe: Recipe, resident: LoadedModel, text: Text, store: HiddenStore) -> None:
        self.recipe = recipe
        self.resident = resident
        self.store = store
        self.loop = Loop(resident, _without_mask(resident, text))
        self.at: int | None = None

    @torch.no_grad()
    def reach(self, index: int, fitted: Mapping[int, Mapping[str, npt.NDArray[np.float32]]]) -> None:
        """Store the inputs of output layer `index`, with `fitted` in the layers before it.

        Raises:
            UserError: the hidden states are not finite, or the disk is full.
        """
        first = self.at or 0
        layers = [
            Placed(self.resident.module(op, fitted.get(number)), op.sources[0].layer)
            for number, op in enumerate(self.recipe.layers[first:index], first)
        ]
        if self.at is None:
            self.loop.embed(self.store)
        for _ in self.loop.through(
            layers,
            self.store,
            name=lambda number: f"the student's hidden states after layer {first + number}",
        ):
            pass
        self.at = index


def _without_mask(resident: LoadedModel, text: Text) -> Batches:
    return Batches(Corpus.of(text.ids_NT, description="training text", documents=1), resident.device)


class _Meter:
    """Turns steps into progress: a running mean of the losses, and tokens a second."""

    def __init__(self, task: Task, title: str) -> None:
        self.task, self.title = task, title
        self.tokens = 0
        self.started = time.perf_counter()
        self.loss: float | None = None

    def __call__(self, tokens: int, loss: float) -> None:
        self.tokens += tokens
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        speed = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        self.task.advance(tokens)
        self.task.note(f"{self.title}: loss {self.loss:.4g}, {speed:,.0f} tokens/s")


def _report(trained: Trained, progress: Progress) -> None:
    report = trained.report
    if not trained.tensors:
        progress.say(f"layer {report.layer}: no training lowered the held-out loss; it stays as it was")
    if report.stopped is not None and "loss was" in report.stopped:
        progress.say(f"layer {report.layer} diverged: {report.stopped}; its best state before that is kept")
