"""One layer, trained from given inputs towards given outputs. Knows nothing of the other layers.

The layer computes in the dtype that it will be stored in; its parameters and the optimiser's state are float32. So the
held-out loss, by which the best state is chosen, is that of the tensors as they will be built. Nothing is random but
the order of the data: whole, or continued after a kill, the result is the same.

Shape suffixes: `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intarsia.errors import UserError
from intarsia.healing.layer_task import LayerReport, LayerTask, Tell, Trained, finished, on_device, state_path
from intarsia.healing.losses import hidden_loss
from intarsia.healing.training import Patience, load_state, save_state, schedule_of


def train_layer(task: LayerTask, tell: Tell | None = None) -> Trained:
    """Train one layer, or continue where a killed run saved its state.

    Raises:
        UserError: the loss is not finite before the first step, or the disk is full.
    """
    done = finished(task.folder, task.index)
    if done is not None:
        return done
    training = _Training(task)
    training.run(tell)
    found = training.result()
    if task.folder is not None:
        tensors = {name: torch.from_numpy(array) for name, array in found.tensors.items()}
        save_state(state_path(task.folder, task.index, "done"), tensors, asdict(found.report))
        state_path(task.folder, task.index, "state").unlink(missing_ok=True)
    return found


class _Training:
    def __init__(self, task: LayerTask) -> None:
        self.task = task
        self.settings = task.settings
        self.device = torch.device(task.device)
        self.module = copy.deepcopy(task.module).to(self.device).eval()
        self.module.requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        self.used = {name: parameters[name].requires_grad_(True) for name in task.names}
        self.dtype = next(iter(self.used.values())).dtype
        # A float32 layer is its own master copy.
        self.master = {
            name: parameter if self.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.used.items()
        }
        self.calls = {size: on_device(call, self.device, self.dtype) for size, call in task.calls.items()}
        self.optimiser = torch.optim.AdamW(
            self.master.values(), lr=self.settings.lr, betas=(0.9, 0.95), weight_decay=self.settings.weight_decay
        )
        self.schedule = schedule_of(self.settings, sequences=task.sequences - task.held_out, seq_len=task.seq_len)
        self.next = 0
        self.seconds = 0.0
        self.stopped: str | None = None
        self.best: dict[str, Tensor] = {}
        found = None if task.folder is None else load_state(state_path(task.folder, task.index, "state"))
        if found is None:
            first = self.held_out_loss()
            self.patience = Patience(self.settings.patience, first)
            if not math.isfinite(first):
                raise UserError.of(
                    where=f"layerwise training of output layer {task.index}, before the first step",
                    expected="a finite loss",
                    found=str(first),
                    remedy="The layer's weights or the teacher's hidden states are damaged; check the model.",
                )
        else:
            self._restore(*found)

    def run(self, tell: Tell | None) -> None:
        begun, before = time.perf_counter(), self.seconds
        tokens = self.schedule.batch * self.task.seq_len
        while self.next < self.schedule.steps and self.stopped is None:
            loss = self._step(self.next)
            if not math.isfinite(loss):
                self.stopped = f"the loss was {loss:.4g} at step {self.next + 1}"
                break
            if tell is not None:
                tell(tokens, loss)
            self.next += 1
            if self.schedule.is_measured_after(self.next - 1):
                self._measure()
                self.seconds = before + time.perf_counter() - begun
                self._save()
        self.seconds = before + time.perf_counter() - begun

    def result(self) -> Trained:
        report = LayerReport(
            layer=self.task.index,
            loss_before=self.patience.first,
            loss_after=self.patience.best,
            steps=self.next,
            tokens=self.next * self.schedule.batch * self.task.seq_len,
            seconds=self.seconds,
            stopped=self.stopped,
        )
        return Trained(report=report, tensors={name: np.asarray(tensor.numpy()) for name, tensor in self.best.items()})

    def held_out_loss(self) -> float:
        """Mean loss of the held-out sequences, each counting the same."""
        sums, count = [], self.task.held_out
        with torch.no_grad():
            for start in range(self.task.sequences - count, self.task.sequences, self.schedule.batch):
                rows = list(range(start, min(start + self.schedule.batch, self.task.sequences)))
                sums.append(float(self._loss(rows)) * len(rows))
        return math.fsum(sums) / count

    def _measure(self) -> None:
        loss = self.held_out_loss()
        if self.patience.diverged(loss):
            self.stopped = f"the held-out loss was {loss:.4g} at step {self.next}"
        elif self.patience.improved(loss):
            # On the CPU and float32 as it is, this would otherwise be the parameter itself.
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.master.items()}
        elif self.patience.over:
            self.stopped = (
                f"no better held-out loss in {self.patience.bad} measurements, one every {self.schedule.every} steps"
            )

    def _loss(self, rows: Sequence[int]) -> Tensor:
        h_BTD = self.task.inputs.rows(rows).to(self.device, self.dtype)
        wanted_BTD = self.task.targets.rows(rows).to(self.device)
        mask_BT = None if self.task.mask is None else self.task.mask[list(rows)].to(self.device)
        call = self.calls[len(rows)]
        out = self.module(h_BTD, *call.args, **call.kwargs)
        settings = self.settings
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
        facts = {
            "next": self.next,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "first": self.patience.first,
            "best": self.patience.best,
            "bad": self.patience.bad,
        }
        save_state(state_path(self.task.folder, self.task.index, "state"), tensors, facts)

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.next, self.seconds, self.stopped = facts["next"], facts["seconds"], facts["stopped"]
        self.patience = Patience(self.settings.patience, facts["first"], bad=facts["bad"], best=facts["best"])
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
