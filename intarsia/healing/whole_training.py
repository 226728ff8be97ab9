"""The training loop of end-to-end distillation, as one of perhaps several processes sees it.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.healing.curve import Clock, Curve
from intarsia.healing.distiller import PARTS, Distiller, Lesson
from intarsia.healing.layer_map import correspondences
from intarsia.healing.schedule import Patience, schedule_of
from intarsia.healing.settings import EndToEndSettings
from intarsia.healing.snapshot import load_snapshot, save_snapshot
from intarsia.healing.state_file import save_state
from intarsia.healing.student import load_student
from intarsia.healing.teacher import Teacher, TopK, top_k_folder, write_top_k
from intarsia.healing.text import Text
from intarsia.progress import Progress, Task
from intarsia.recipe.recipe import Recipe

BEST = "best.safetensors"
"""The trained parameters with the least held-out loss so far."""

_CPU_MICRO_TOKENS = 2048
_MICRO_TOKENS = 16384


def lesson_depths(recipe: Recipe, settings: EndToEndSettings) -> tuple[int, ...]:
    """Depths of the teacher whose hidden states are learnt from."""
    return tuple(layer.stop for layer in correspondences(recipe) if layer.trainable) if settings.hidden else ()


class WholeTraining:
    """A student, its teacher and the state of its training."""

    def __init__(
        self,
        recipe: Recipe,
        text: Text,
        student: Path,
        folder: Path,
        teacher: Callable[[], Teacher],
        teacher_sha256: str,
        settings: EndToEndSettings,
        cache: Path | None,
        accelerator: Any,
        progress: Progress,
    ) -> None:
        self.text, self.folder, self.settings = text, folder, settings
        self.accelerator, self.progress = accelerator, progress
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        seq_len = text.ids_NT.shape[1]
        self.schedule = schedule_of(settings, sequences=text.train, seq_len=seq_len, multiple=self.world)
        self.tokens = self.schedule.batch * seq_len  # of a step
        usual = _CPU_MICRO_TOKENS if self.device.type == "cpu" else _MICRO_TOKENS
        self.micro = max(1, (settings.micro_tokens or usual) // seq_len)
        depths = lesson_depths(recipe, settings)
        self.teacher: Teacher | None = None
        self.top_k: TopK | None = None
        model, anatomy = load_student(student, settings, self.device)
        if settings.top_k is not None and settings.logits:
            place = top_k_folder(
                cache or folder,
                teacher_sha256=teacher_sha256,
                text_sha256=text.sha256,
                k=settings.top_k,
                temperature=settings.temperature,
            )
            if accelerator.is_main_process:
                write_top_k(
                    place, text, teacher, settings, vocabulary=anatomy.vocabulary, batch=self.micro, progress=progress
                )
            accelerator.wait_for_everyone()
            self.top_k = TopK(place)
        if depths or (settings.logits and self.top_k is None):
            self.teacher = teacher()
        stored = Checkpoint.open(student, model=str(student)).headers[f"{anatomy.family.embedding_module}.weight"].dtype
        distiller = Distiller(
            model,
            anatomy,
            settings,
            layers=[layer.index for layer in correspondences(recipe) if layer.trainable] if depths else [],
            teacher_head=None if self.teacher is None else self.teacher.read_out.head,
            autocast=settings.precision == "bf16" or (settings.precision == "auto" and stored != torch.float32),
        )
        self.names = [name for name, parameter in distiller.named_parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            [parameter for parameter in distiller.parameters() if parameter.requires_grad],
            lr=settings.lr,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self.model, self.optimiser = accelerator.prepare(distiller, optimiser)
        self.curve = Curve(folder / "curve.jsonl", accelerator, settings)

    def run(self) -> dict[str, Any]:
        """Train to the end; the report."""
        facts = load_snapshot(self.accelerator, self.folder) or self._beginning()
        patience = Patience(self.settings.patience, facts["first"], bad=facts["bad"], best=facts["best"])
        step, stopped = facts["next"], facts["stopped"]
        clock = Clock(done=step, seconds=facts["seconds"], begun=time.perf_counter())
        self.curve.start(step)
        if step == 0:
            self.curve.held_out(0, patience.first)
        with self.progress.task("end-to-end training", self.schedule.steps * self.tokens) as task:
            task.advance(step * self.tokens)
            while step < self.schedule.steps and stopped is None:
                parts = self._step(step)
                if patience.diverged(parts["loss"]):
                    stopped = f"the loss was {parts['loss']:.4g} at step {step + 1}"
                    break
                step += 1
                self._tell(task, step, parts, clock)
                if self.schedule.is_measured_after(step - 1):
                    stopped = self._judge(step, patience)
                    save_snapshot(self.accelerator, self.folder, _facts(step, stopped, patience, clock.all_seconds))
        self.curve.end()
        if stopped is not None:
            self.progress.say(f"end-to-end training stopped: {stopped}; its best state is kept")
        return {
            "loss_before": patience.first,
            "loss_after": patience.best,
            "steps": step,
            "tokens": step * self.tokens,
            "seconds": clock.all_seconds,
            "stopped": stopped,
        }

    def _beginning(self) -> dict[str, Any]:
        first = self._held_out_loss()
        if not math.isfinite(first):
            raise UserError.of(
                where="end-to-end training, before the first step",
                expected="a finite loss",
                found=str(first),
                remedy="The student or the teacher is damaged, or overflows in its dtype; check both.",
            )
        return _facts(0, None, Patience(self.settings.patience, first), 0.0)

    def _judge(self, step: int, patience: Patience) -> str | None:
        """Measure the held-out loss and keep the best state; why to stop, if that is so."""
        found = self._held_out_loss()
        self.curve.held_out(step, found)
        if patience.diverged(found):
            return f"the held-out loss was {found:.4g} at step {step}"
        if patience.improved(found):
            self._keep_best(step, found)
        elif patience.over:
            return f"no better held-out loss in {patience.bad} measurements, one every {self.schedule.every} steps"
        return None

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimiser; its losses. Where they or the gradient are not finite nothing is changed."""
        self.curve.lr = self.schedule.lr(step)
        share = self.schedule.rows(step)[self.rank :: self.world]
        total = torch.zeros(len(PARTS), device=self.device)
        for start in range(0, len(share), self.micro):
            rows = share[start : start + self.micro]
            last = start + self.micro >= len(share)
            with _sync(self.accelerator, self.model, last):
                parts = self._forward(rows)
                self.accelerator.backward(parts[0] * (len(rows) / len(share)))
            total += parts.detach() * (len(rows) / len(share))
        total = self.accelerator.reduce(total, reduction="mean")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        found = dict(zip(PARTS, total.tolist(), strict=True))
        if not torch.isfinite(torch.as_tensor(float(norm))):
            found["loss"] = found["loss"] if found["loss"] != found["loss"] else float("inf")
        elif torch.isfinite(total[0]):
            for group in self.optimiser.param_groups:
                group["lr"] = self.curve.lr
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return found

    def _forward(self, rows: list[int]) -> Tensor:
        ids_BT = self.text.ids_NT[rows].to(self.device)
        mask_BT = None if self.text.mask_NT is None else self.text.mask_NT[rows].to(self.device)
        lesson = Lesson()
        if self.teacher is not None:
            logits = bool(self.settings.logits) and self.top_k is None
            lesson = self.teacher.lesson(ids_BT, mask_BT, logits=logits)
        if self.top_k is not None:
            lesson = replace(lesson, top_k=self.top_k.rows(rows, self.device))
        losses: Tensor = self.model(ids_BT, mask_BT, lesson)
        return losses

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean over the held-out sequences; every process takes batches in turn, and equally many of them."""
        n = len(self.text.ids_NT)
        batches = [list(range(start, min(start + self.micro, n))) for start in range(self.text.train, n, self.micro)]
        sums = torch.zeros(2, device=self.device)
        for start in range(0, len(batches), self.world):
            mine = start + self.rank
            rows = batches[min(mine, len(batches) - 1)]
            weight = len(rows) if mine < len(batches) else 0
            sums += torch.stack(
                [self._forward(rows)[0].detach() * weight, torch.tensor(float(weight), device=self.device)]
            )
        sums = self.accelerator.reduce(sums, reduction="sum")
        return float(sums[0] / sums[1])

    def _keep_best(self, step: int, loss: float) -> None:
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            tensors = {name.removeprefix("student."): state[name].detach().cpu() for name in self.names}
            save_state(self.folder / BEST, tensors, {"step": step, "loss": loss})

    def _tell(self, task: Task, step: int, parts: dict[str, float], clock: Clock) -> None:
        task.advance(self.tokens)
        speed = (step - clock.done) * self.tokens / max(clock.seconds_now, 1e-9)
        task.note(f"step {step} of {self.schedule.steps}: loss {parts['loss']:.4f}, {speed:,.0f} tokens/s")
        self.curve.step(step, parts, step * self.tokens)


def _facts(step: int, stopped: str | None, patience: Patience, seconds: float) -> dict[str, Any]:
    """What a snapshot says beside the tensors."""
    return {
        "next": step,
        "stopped": stopped,
        "first": patience.first,
        "best": patience.best,
        "bad": patience.bad,
        "seconds": seconds,
    }


def _sync(accelerator: Any, model: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients travel between processes with the last part of a step alone."""
    return nullcontext() if last else accelerator.no_sync(model)
