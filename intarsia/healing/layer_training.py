"""One layer, trained from given inputs toward given outputs. Knows nothing of the other layers.

The layer computes in the dtype that it will be stored in; its parameters and the optimiser's state are float32. So the
held-out loss, by which the best state is chosen, is that of the tensors as they will be built. Nothing is random but
the order of the data: whole, or continued after a kill, the result is the same.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from intarsia.activations.stream import LayerCall
from intarsia.errors import UserError
from intarsia.healing.losses import hidden_loss
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import Standing, Text, load_state, save_state, schedule_of

Rows: TypeAlias = Callable[[Sequence[int]], Tensor]
"""Gives the hidden states of some sequences, `[B, T, D]`: a copy."""

AfterStep: TypeAlias = Callable[[Standing, float], None]
"""Called after every step with where the training stands, and the loss of the step."""


@dataclass(frozen=True, kw_only=True)
class LayerTask:
    """Everything that the training of one layer needs."""

    # Which output layer.
    index: int
    # Is trained in place.
    module: nn.Module
    # H^start and H^stop.
    inputs: Rows
    targets: Rows
    text: Text
    # The layer's arguments, by the number of sequences in a batch.
    calls: Mapping[int, LayerCall]
    # The layer's tensors that are trained.
    names: tuple[str, ...]
    settings: LayerwiseSettings
    # Where state is kept; None keeps none.
    folder: Path | None
    device: torch.device


class Trained(NamedTuple):
    """The new tensors of a layer, none where nothing was better than what it had; and a report (see `Standing`)."""

    tensors: Mapping[str, Tensor]
    report: dict[str, Any]


def train_layer(task: LayerTask, after_step: AfterStep | None = None) -> Trained:
    """Train one layer, or continue where a killed run saved its state."""
    done = finished(task.folder, task.index)
    if done is not None:
        return done
    found = _Training(task).run(after_step)
    if task.folder is not None:
        save_state(_state_path(task.folder, task.index, "done"), found.tensors, found.report)
        _state_path(task.folder, task.index, "state").unlink(missing_ok=True)
    return found


def finished(folder: Path | None, index: int) -> Trained | None:
    """What an earlier run has finished of a layer."""
    found = None if folder is None else load_state(_state_path(folder, index, "done"))
    return None if found is None else Trained(*found)


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
                f"--only {word!r} names no tensor or module of a layer; there are {', '.join(parameters)}.",
                "Name one of them, or a part of a name, such as down_proj or mlp.",
            )
    return tuple(name for name in parameters if not only or any(fits(name, word) for word in only))


class _Training:
    def __init__(self, task: LayerTask) -> None:
        self.task, self.settings, self.device = task, task.settings, task.device
        self.module = task.module.to(self.device).eval().requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        self.used = {name: parameters[name].requires_grad_(True) for name in task.names}
        self.dtype = next(iter(self.used.values())).dtype
        # A float32 layer is its own master copy.
        self.master = {
            name: parameter if self.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.used.items()
        }
        self.calls = {size: call.on(self.device, self.dtype) for size, call in task.calls.items()}
        self.optimiser = torch.optim.AdamW(
            self.master.values(), lr=self.settings.lr, betas=(0.9, 0.95), weight_decay=self.settings.weight_decay
        )
        self.schedule = schedule_of(self.settings, sequences=task.text.train, seq_len=task.text.seq_len)
        self.best: dict[str, Tensor] = {}
        found = None if task.folder is None else load_state(_state_path(task.folder, task.index, "state"))
        if found is None:
            self.standing = Standing.start(self._held_out_loss(), f"layerwise training of output layer {task.index}")
        else:
            self.standing = Standing(**found[1])
            self._restore(found[0])

    def run(self, after_step: AfterStep | None) -> Trained:
        standing, schedule = self.standing, self.schedule
        started = time.perf_counter() - standing.seconds
        while standing.next < schedule.steps and standing.stopped is None:
            loss = self._step(standing.next)
            standing.seconds = time.perf_counter() - started
            if not math.isfinite(loss):
                standing.failed(loss)
                break
            standing.next += 1
            if after_step is not None:
                after_step(standing, loss)
            if schedule.is_measured_after(standing.next - 1):
                if standing.measured(self._held_out_loss(), schedule):
                    # On the CPU and float32 as it is, this would otherwise be the parameter itself.
                    self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.master.items()}
                standing.seconds = time.perf_counter() - started
                self._save()
        report = standing.report(schedule.batch * self.task.text.seq_len)
        return Trained(tensors=self.best, report={"layer": self.task.index, **report})

    def _held_out_loss(self) -> float:
        """Mean loss of the held-out sequences, each counting the same."""
        text, sums = self.task.text, []
        with torch.no_grad():
            for start in range(text.train, len(text.ids_NT), self.schedule.batch):
                rows = list(range(start, min(start + self.schedule.batch, len(text.ids_NT))))
                sums.append(float(self._loss(rows)) * len(rows))
        return math.fsum(sums) / text.held_out

    def _loss(self, rows: Sequence[int]) -> Tensor:
        h_BTD = self.task.inputs(rows).to(self.device, self.dtype)
        wanted_BTD = self.task.targets(rows).to(self.device)
        text = self.task.text
        mask_NT = text.mask_NT if text.counted_NT is None else text.counted_NT
        mask_BT = None if mask_NT is None else mask_NT[list(rows)].to(self.device)
        call, settings = self.calls[len(rows)], self.settings
        out = self.module(h_BTD, *call.args, **call.kwargs)
        return hidden_loss(
            wanted_BTD,
            out[0] if isinstance(out, tuple) else out,
            mask_BT,
            kl=settings.kl,
            mse=settings.mse,
            cosine=settings.cosine,
            weighting=settings.weighting,
        )

    def _step(self, step: int) -> float:
        """One step; its loss, infinite where the gradient is not finite (nothing is changed then)."""
        loss = self._loss(self.schedule.rows(step))
        loss.backward()
        if self.dtype != torch.float32:
            for name, parameter in self.used.items():
                self.master[name].grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.master.values(), self.settings.clip)
        found = float(loss.detach())
        if not math.isfinite(float(norm)) or not math.isfinite(found):
            return found if not math.isfinite(found) else float("inf")
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.lr(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._publish()
        return found

    def _publish(self) -> None:
        """The layer computes with the master copy, rounded."""
        if self.dtype != torch.float32:
            with torch.no_grad():
                for name, parameter in self.used.items():
                    parameter.copy_(self.master[name])

    def _save(self) -> None:
        if self.task.folder is None:
            return
        tensors = {f"master.{name}": tensor.detach().cpu() for name, tensor in self.master.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.master.items():
            state = self.optimiser.state.get(parameter, {})
            tensors |= {f"adam.{key}.{name}": torch.as_tensor(value).cpu() for key, value in state.items()}
        save_state(_state_path(self.task.folder, self.task.index, "state"), tensors, asdict(self.standing))

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.master.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"master.{name}"])
            keys = {key.split(".")[1] for key in tensors if key.startswith("adam.") and key.endswith(f".{name}")}
            if keys:
                self.optimiser.state[parameter] = {
                    # AdamW keeps its step count on the CPU.
                    key: tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else self.device)
                    for key in keys
                }
        self.best = {key.removeprefix("best."): tensor for key, tensor in tensors.items() if key.startswith("best.")}
        self._publish()


def _state_path(folder: Path, index: int, kind: str) -> Path:
    """Where a layer's state (kind `state`), or what came of it (`done`), is kept."""
    return folder / f"layer-{index:03d}.{kind}.safetensors"
