"""Layerwise distillation: every output layer that needs it is trained from the original's H^start toward H^stop.

Layers are trained one after the other, and do not depend on one another, unless their inputs are those of the
trained layers before them (`inputs="student"`, the default). The teacher is run once, only as deep as the next layer
needs; a depth is dropped when no layer needs it any more, so that two depths are stored at a time.

Padding is on the right and attention looks back only, so real tokens are the same with and without the padding mask. It
is left out, which makes a layer's arguments the same for every batch of a size; the losses skip padding.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import PREFIX, MemoryBudget
from intarsia.activations.loop import Loop
from intarsia.building.layer import parameter_names, to_tensors
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.recipe_layers import Placed
from intarsia.data.corpus import Corpus
from intarsia.disk import require_room
from intarsia.errors import UserError
from intarsia.healing.layer_map import taught
from intarsia.healing.layer_training import AfterStep, LayerTask, Trained, finished, train_layer, trained_names
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.healing.training import Standing, Text, schedule_of
from intarsia.progress import Task, current
from intarsia.recipe.recipe import Fitted, Recipe


def train(
    recipe: Recipe,
    resident: LoadedModel,
    text: Text,
    *,
    settings: LayerwiseSettings | None = None,
    teacher: LoadedModel | None = None,
    folder: Path | None = None,
    memory_bytes: int | None = None,
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
    settings = settings or LayerwiseSettings()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{PREFIX}*"):  # a killed run's
            shutil.rmtree(stale, ignore_errors=True)
        # A layer's masters, optimiser state and best tensors, as finished and as they are on the way.
        most = 20 * resident.architecture.layer_parameters
        require_room(folder, most, "the state of one layer's training", option="--run")
    indices = taught(recipe, settings.layers)
    found = {index: done for index in indices if (done := finished(folder, index)) is not None}
    todo = [index for index in indices if index not in found]
    work = _Work(recipe, resident, teacher or resident, text, settings, folder, MemoryBudget(memory_bytes, folder))
    try:
        with current().task("layerwise training", len(todo) * work.tokens) as task:
            for number, index in enumerate(todo, start=1):
                work.reach(index, found, task)
                trained = train_layer(work.task(index), work.shown(task, f"layer {index} ({number} of {len(todo)})"))
                task.advance(work.tokens - trained.report["tokens"])
                found[index] = trained
                if not trained.tensors:
                    current().say(f"layer {index}: no training lowered the held-out loss; it stays as it was")
                stopped = trained.report["stopped"]
                if stopped is not None and "loss was" in stopped:
                    current().say(f"layer {index} diverged: {stopped}; its best state before that is kept")
    finally:
        work.close()
    return replace(recipe, fitted=work.fitted(found)), [found[index].report for index in sorted(found)]


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
        """Nothing is run yet."""
        self.recipe, self.resident, self.text, self.settings, self.folder = recipe, resident, text, settings, folder
        self.schedule = schedule_of(settings, sequences=text.train, seq_len=text.seq_len)
        self.step_tokens = self.schedule.batch * text.seq_len
        # Tokens that one layer is trained on, if it is not stopped early.
        self.tokens = self.schedule.steps * self.step_tokens
        self.names = trained_names(parameter_names(resident.architecture), settings.only)
        corpus = Corpus.of(text.ids_NT, description="training text", documents=1)
        self.teacher = TeacherStates(Loop(teacher, Batches(corpus, teacher.device), memory_budget=memory_budget))
        # Runs the trained layers, whose hidden states are stored at the depth that was reached.
        self.loop = Loop(resident, Batches(corpus, resident.device), memory_budget=memory_budget)
        self.student = self.loop.store()
        self.reached: int | None = None

    def close(self) -> None:
        """Free the hidden states."""
        self.teacher.close()
        self.student.close()

    def reach(self, index: int, found: Mapping[int, Trained], task: Task) -> None:
        """Store a layer's inputs and targets."""
        follows, span = self.settings.inputs == "student", self.recipe.spans[index]
        needed = span[1:] if follows else span
        for depth in needed:
            task.note(f"the original's hidden states after layer {depth}")
            self.teacher.learn([depth])
            for stored in self.teacher.store.depths():
                if stored < needed[0]:
                    self.teacher.store.drop(stored)
        if follows:
            task.note(f"the trained layers' hidden states before layer {index}")
            self._follow(index, self.fitted(found))

    @torch.no_grad()
    def _follow(self, index: int, fitted: Fitted) -> None:
        """Store the hidden states before output layer `index`, with `fitted` in the layers before it."""
        first = self.reached or 0
        layers = [
            Placed(self.resident.module(op, fitted.get(number)), op.sources[0].layer)
            for number, op in enumerate(self.recipe.layers[first:index], first)
        ]
        if self.reached is None:
            self.loop.embed(self.student)

        def name(number: int) -> str:
            return f"the student's hidden states after layer {first + number}"

        for _ in self.loop.through(layers, self.student, name=name):
            pass
        self.reached = index

    def task(self, index: int) -> LayerTask:
        """The training of a layer that was reached."""
        op, (start, stop) = self.recipe.layers[index], self.recipe.spans[index]
        donor = op.sources[0].layer
        # Always a module of its own: a plain `Select` is the original's module itself.
        with self.resident.awake(self.resident.module(op, self.recipe.fitted.get(index))) as whole:
            module = self.resident.fresh(donor, dict(whole.named_parameters()))
        if next(module.parameters()).dtype == torch.float16:
            module = module.to(torch.bfloat16)  # gradients overflow in float16
        batch, held_out = self.schedule.batch, self.text.held_out
        sizes = {batch, held_out % batch, min(batch, held_out)} - {0}
        if self.loop.stream.by_tokens or self.loop.stream.state.size > self.resident.architecture.width:
            raise UserError(
                "Layers of this model read more than the hidden states before them (the tokens, or keys and values of "
                "other layers), which layerwise training does not keep.",
                "Heal with closed-form or end-to-end.",
            )
        trained = {name for name, _ in module.named_parameters()}
        with torch.no_grad():
            calls = {size: self.loop.stream.calls(self.text.ids_NT[:size], None)[donor] for size in sizes}
        states, cpu = self.teacher.store, torch.device("cpu")
        own = partial(self.student.rows, 0, device=cpu)
        return LayerTask(
            index=index,
            module=module,
            inputs=own if self.settings.inputs == "student" else partial(states.rows, start, device=cpu),
            targets=partial(states.rows, stop, device=cpu),
            text=self.text,
            calls=calls,
            names=tuple(name for name in self.names if name in trained),
            settings=self.settings,
            folder=self.folder,
            device=self.resident.device,
        )

    def shown(self, task: Task, title: str) -> AfterStep:
        """Shows the steps of a layer's training, those of an earlier process with the first one."""
        steps = 0

        def after_step(standing: Standing, loss: float) -> None:
            nonlocal steps
            task.advance((standing.next - steps) * self.step_tokens)
            steps = standing.next
            task.note(standing.note(title, loss, self.step_tokens))

        return after_step

    def fitted(self, found: Mapping[int, Trained]) -> Fitted:
        """What is fitted in the recipe, with what was trained."""
        fitted = dict(self.recipe.fitted)
        for index, trained in found.items():
            if trained.tensors:
                stored = to_tensors(dict(trained.tensors), self.resident.architecture)
                own = {name: np.asarray(tensor.numpy()) for name, tensor in stored.items()}
                fitted[index] = {**fitted.get(index, {}), **own}
        return fitted
