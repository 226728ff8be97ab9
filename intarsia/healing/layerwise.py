"""Layerwise distillation: train each changed output layer from the original's H^start toward H^stop.

Layers are trained one after the other, and do not depend on one another, unless their inputs are those of the
trained layers before them (`inputs="student"`, the default). The teacher is run once, only as deep as the next layer
needs; a depth is dropped when no layer needs it any more, so that two depths are stored at a time.

The layer computes in the dtype that it will be stored in; its parameters and the optimiser's state are float32. So the
held-out loss, which chooses the best state, is that of the stored tensors. Only the order of the data is random: a
resumed training ends with the same result.

Padding is on the right and attention looks back only, so real tokens are the same with and without the padding mask. It
is left out, which makes a layer's arguments the same for every batch of a size; the losses skip padding.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import PREFIX, MemoryBudget
from intarsia.activations.loop import Loop
from intarsia.activations.stream import LayerCall
from intarsia.building.layer import parameter_names, to_tensors
from intarsia.building.loaded_model import LoadedModel, Placed
from intarsia.data.corpus import Corpus
from intarsia.disk import require_room
from intarsia.errors import UserError
from intarsia.healing.losses import hidden_loss
from intarsia.healing.settings import taught
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.healing.training import Standing, Text, load_state, save_state, schedule_of
from intarsia.progress import Task, current
from intarsia.recipe.recipe import Fitted, Recipe

AfterStep: TypeAlias = Callable[[Standing, float], None]
"""Called after every step with the state of the training and the loss of the step."""


class Trained(NamedTuple):
    """The new tensors of a layer, none where training did not improve it; and a report (see `Standing`)."""

    tensors: Mapping[str, Tensor]
    report: dict[str, Any]


def trained_names(parameters: Sequence[str], only: Sequence[str]) -> tuple[str, ...]:
    """The parameters of a layer that `only` names (all if it is empty): by tensor, by module, or by part of a name.

    Raises:
        UserError: a name fits none.
    """

    def fits(name: str, word: str) -> bool:
        return f".{word}." in f".{name}."

    for word in only:
        if not any(fits(name, word) for name in parameters):
            raise UserError(
                f"--only {word!r} names no tensor or module of a layer, which has {', '.join(parameters)}.",
                "Name one of them, or a part of a name, such as down_proj or mlp.",
            )
    return tuple(name for name in parameters if not only or any(fits(name, word) for word in only))


class LayerTraining:
    """The training of one layer that was reached, or the rest of it where a killed run saved its state."""

    def __init__(self, work: Work, index: int) -> None:
        self.index, self.text, self.settings, self.folder = index, work.text, work.settings, work.folder
        self.device = work.resident.device
        module, calls = work.layer(index)
        self.module = module.to(self.device).eval().requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        names = [name for name in work.names if name in parameters]
        self.dtype = parameters[names[0]].dtype
        self.master = {name: nn.Parameter(parameters[name].detach().float()) for name in names}
        self.calls = {size: call.on(self.device, self.dtype) for size, call in calls.items()}
        (start, stop), states, cpu = work.recipe.spans[index], work.teacher.store, torch.device("cpu")
        rows = partial(work.student.rows, 0) if self.settings.inputs == "student" else partial(states.rows, start)
        # The hidden states of some sequences before the layer, and those that it should give.
        self.inputs, self.targets = partial(rows, device=cpu), partial(states.rows, stop, device=cpu)
        self.optimiser = torch.optim.AdamW(
            self.master.values(), lr=self.settings.peak, betas=(0.9, 0.95), weight_decay=self.settings.weight_decay
        )
        self.schedule = work.schedule
        self.best: dict[str, Tensor] = {}
        found = None if self.folder is None else load_state(_state_path(self.folder, index, "state"))
        if found is None:
            self.standing = Standing.start(self._held_out_loss(), f"layerwise training of output layer {index}")
        else:
            self.standing = Standing(**found[1])
            self._restore(found[0])

    def run(self, after_step: AfterStep) -> Trained:
        standing, schedule = self.standing, self.schedule
        started = time.perf_counter() - standing.seconds
        while standing.next < schedule.steps and standing.stopped is None:
            loss = self._step(standing.next)
            standing.seconds = time.perf_counter() - started
            if not math.isfinite(loss):
                standing.failed(loss)
                break
            standing.next += 1
            after_step(standing, loss)
            if schedule.is_measured_after(standing.next - 1):
                if standing.measured(self._held_out_loss(), schedule):
                    # On the CPU this would otherwise be the parameter itself.
                    self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.master.items()}
                standing.seconds = time.perf_counter() - started
                self._save()
        report = {"layer": self.index, **standing.report(schedule.batch * self.text.seq_len)}
        if self.folder is not None:
            save_state(_state_path(self.folder, self.index, "done"), self.best, report)
            _state_path(self.folder, self.index, "state").unlink(missing_ok=True)
        return Trained(tensors=self.best, report=report)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean loss of the held-out sequences, all with equal weight."""
        text, sums = self.text, []
        for start in range(text.train, len(text.ids_NT), self.schedule.batch):
            rows = list(range(start, min(start + self.schedule.batch, len(text.ids_NT))))
            sums.append(float(self._loss(rows)) * len(rows))
        return math.fsum(sums) / text.held_out

    def _loss(self, rows: Sequence[int]) -> Tensor:
        call, settings, text = self.calls[len(rows)], self.settings, self.text
        h_BTD = self.inputs(rows).to(self.device, self.dtype)
        mask_NT = text.mask_NT if text.counted_NT is None else text.counted_NT
        # The layer computes with the master copy, rounded.
        rounded = {name: tensor.to(self.dtype) for name, tensor in self.master.items()}
        out = torch.func.functional_call(self.module, rounded, (h_BTD, *call.args), dict(call.kwargs))
        return hidden_loss(
            self.targets(rows).to(self.device),
            out[0] if isinstance(out, tuple) else out,
            None if mask_NT is None else mask_NT[list(rows)].to(self.device),
            kl=settings.kl,
            mse=settings.mse,
            cosine=settings.cosine,
            weighting=settings.weighting,
        )

    def _step(self, step: int) -> float:
        """One step; its loss, infinite where the gradient is not finite (nothing is changed then)."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._loss(self.schedule.rows(step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.master.values(), self.settings.clip)
        found = float(loss.detach())
        if not math.isfinite(float(norm)) or not math.isfinite(found):
            return found if not math.isfinite(found) else float("inf")
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.lr(step)
        self.optimiser.step()
        return found

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {f"master.{name}": tensor.detach().cpu() for name, tensor in self.master.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": torch.as_tensor(value).cpu() for key, value in state.items()}
        save_state(_state_path(self.folder, self.index, "state"), tensors, asdict(self.standing))

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.master.items():
                parameter.copy_(tensors[f"master.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name in (name for name in tensors if name.startswith("adam.")):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensors[name]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.best = {key.removeprefix("best."): tensor for key, tensor in tensors.items() if key.startswith("best.")}


def _state_path(folder: Path, index: int, kind: str) -> Path:
    """The file of a layer's state (kind `state`) or result (kind `done`)."""
    return folder / f"layer-{index:03d}.{kind}.safetensors"


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
    """The recipe with the trained tensors of all layers whose held-out loss dropped, and a report by layer.

    Args:
        recipe: its fitted tensors are the starting point.
        resident: the recipe's base.
        teacher: the base itself by default; must fit (see `check_teacher`).
        folder: where state is kept to resume after a kill; it must belong to the same call.
        memory_bytes: what hidden states may take in memory before they go to files.

    Raises:
        UserError: there is too little text, the disk is full, or numbers are not finite.
    """
    settings = settings or LayerwiseSettings()
    indices, found = taught(recipe, settings.layers), dict[int, Trained]()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{PREFIX}*"):  # a killed run's
            shutil.rmtree(stale, ignore_errors=True)
        # A layer's master weights, optimiser state and best tensors; the finished file and the state may both exist.
        most = 20 * resident.architecture.layer_parameters
        require_room(folder, most, "the state of one layer's training", option="--run")
        for index in indices:
            if (done := load_state(_state_path(folder, index, "done"))) is not None:
                found[index] = Trained(*done)
    todo = [index for index in indices if index not in found]
    work = Work(recipe, resident, teacher or resident, text, settings, folder, MemoryBudget(memory_bytes, folder))
    try:
        with current().task("layerwise training", len(todo) * work.tokens) as task:
            for number, index in enumerate(todo, start=1):
                work.reach(index, found, task)
                trained = LayerTraining(work, index).run(work.shown(task, f"layer {index} ({number} of {len(todo)})"))
                task.advance(work.tokens - trained.report["tokens"])
                found[index] = trained
                if not trained.tensors:
                    current().say(f"layer {index}: training did not lower the held-out loss; unchanged")
                stopped = trained.report["stopped"]
                if stopped is not None and "loss was" in stopped:
                    current().say(f"layer {index} diverged: {stopped}; its best state before that is kept")
    finally:
        work.close()
    return replace(recipe, fitted=work.fitted(found)), [found[index].report for index in sorted(found)]


class Work:
    """The layers to be trained, and the hidden states that they are trained with."""

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
        # Tokens that one layer is trained on without early stopping.
        self.tokens = self.schedule.steps * self.step_tokens
        self.names = trained_names(parameter_names(resident.architecture), settings.only)
        corpus = Corpus.of(text.ids_NT, description="training text", documents=1)
        self.teacher = TeacherStates(Loop(teacher, Batches(corpus, teacher.device), memory_budget=memory_budget))
        # Runs the trained layers, whose hidden states are stored at the depth that was reached.
        self.loop = Loop(resident, Batches(corpus, resident.device), memory_budget=memory_budget)
        self.student = self.loop.store()
        self.reached: int | None = None

    def close(self) -> None:
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

    def layer(self, index: int) -> tuple[nn.Module, dict[int, LayerCall]]:
        """A layer to be trained in place, and its other arguments by the number of sequences in a batch."""
        if self.loop.stream.by_tokens or self.loop.stream.state.size > self.resident.architecture.width:
            raise UserError(
                "Layers of this model read more than the hidden states before them (the tokens, or keys and values of "
                "other layers), which layerwise training does not keep.",
                "Heal with closed-form or end-to-end.",
            )
        op = self.recipe.layers[index]
        donor = op.sources[0].layer
        # Always a module of its own: a plain `Select` is the original's module itself.
        with self.resident.awake(self.resident.module(op, self.recipe.fitted.get(index))) as whole:
            module = self.resident.fresh(donor, dict(whole.named_parameters()))
        if next(module.parameters()).dtype == torch.float16:
            module = module.to(torch.bfloat16)  # gradients overflow in float16
        batch, held_out = self.schedule.batch, self.text.held_out
        sizes = {batch, held_out % batch, min(batch, held_out)} - {0}
        with torch.no_grad():
            return module, {size: self.loop.stream.calls(self.text.ids_NT[:size], None)[donor] for size in sizes}

    def shown(self, task: Task, title: str) -> AfterStep:
        """A callback that shows the steps of a layer's training; its first call counts the steps before a restart."""
        steps = 0

        def after_step(standing: Standing, loss: float) -> None:
            nonlocal steps
            task.advance((standing.next - steps) * self.step_tokens)
            steps = standing.next
            task.note(standing.note(title, loss, self.step_tokens))

        return after_step

    def fitted(self, found: Mapping[int, Trained]) -> Fitted:
        """The recipe's fitted tensors, updated with the trained ones."""
        fitted = dict(self.recipe.fitted)
        for index, trained in found.items():
            if trained.tensors:
                stored = to_tensors(dict(trained.tensors), self.resident.architecture)
                own = {name: np.asarray(tensor.numpy()) for name, tensor in stored.items()}
                fitted[index] = {**fitted.get(index, {}), **own}
        return fitted
