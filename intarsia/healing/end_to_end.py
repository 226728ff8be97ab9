"""End-to-end distillation: the whole student against the teacher, through Accelerate.

One command goes from one CPU to many devices. A run is saved at every measurement: killed at any step and started
again, it continues from there, and its loss curve is the one of an undisturbed run. The best held-out state is what
comes out; if none is better than the start, the recipe is not changed.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.building.loaded_model import fast_products
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import require_room, write_whole
from intarsia.healing.settings import changed_layers
from intarsia.healing.stages.end_to_end import TEACHER_PASSES, EndToEndSettings
from intarsia.healing.student import PARTS, Distiller, Lesson, build_student, load_student, with_trained
from intarsia.healing.teacher import Teacher, TopK, write_top_k
from intarsia.healing.training import (
    Curve,
    Standing,
    Text,
    load_snapshot,
    load_state,
    save_snapshot,
    save_state,
    schedule_of,
)
from intarsia.healing.training import accelerator as make_accelerator
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe

_DONE = "done.json"
BEST = "best.safetensors"
"""The trained parameters with the lowest held-out loss so far."""

_CPU_MICRO_TOKENS = 2048
_MICRO_TOKENS = 16384


def train(
    recipe: Recipe,
    variants: Mapping[str, Checkpoint],
    text: Text,
    teacher: Callable[[], Teacher],
    *,
    settings: EndToEndSettings | None = None,
    folder: Path,
    device: torch.device,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with trained tensors, if they lowered the held-out loss, and a report (a list of one).

    Every launched process calls this; each gets the same recipe.

    Args:
        variants: the opened checkpoints of the recipe.
        teacher: loads the teacher, with the depths of `lesson_depths`, if it is needed.
        folder: for the student and the state of the training. Its files must be of the same call.

    Raises:
        UserError: there is too little text, the disk is full, or the loss is not finite before the first step.
    """
    settings, student = settings or EndToEndSettings(), folder / "student"
    accelerator = make_accelerator(device=device, log=settings.log, folder=folder)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if not (folder / _DONE).exists():
        if accelerator.is_main_process:
            parameters = variants[recipe.base].parameters  # of one student, however many models it is made of
            nbytes = (22 if settings.lora is None else 4) * parameters  # of low-rank changes the state is small
            require_room(folder, nbytes, "the student and the state of its training", option="--run")
            with current().task("", 1, units=0.0):  # little beside the training
                build_student(recipe, variants, student)
        accelerator.wait_for_everyone()
        with current().task("", TEACHER_PASSES + settings.student_passes) as task:
            training = WholeTraining(recipe, text, teacher, settings, folder, accelerator)
            task.advance(TEACHER_PASSES)
            report = training.run()
        if accelerator.is_main_process:
            write_whole(folder / _DONE, json.dumps(report) + "\n")
    accelerator.wait_for_everyone()
    report = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    best = load_state(folder / BEST)
    if best is None or report["loss_after"] >= report["loss_before"]:
        current().say(
            "end-to-end training did not lower the held-out loss: the model is not changed; smaller steps may help"
        )
        return recipe, [report]
    opened = Checkpoint.open(student, model=str(student))
    return with_trained(recipe, opened.architecture, opened, best[0]), [report]


def lesson_depths(recipe: Recipe, settings: EndToEndSettings) -> tuple[int, ...]:
    """Depths of the teacher whose hidden states are learnt from."""
    return tuple(recipe.spans[index][1] for index in changed_layers(recipe)) if settings.hidden else ()


class WholeTraining:
    """A student, its teacher and the state of its training."""

    def __init__(
        self,
        recipe: Recipe,
        text: Text,
        teacher: Callable[[], Teacher],
        settings: EndToEndSettings,
        folder: Path,
        accelerator: Any,
    ) -> None:
        """The student is in the folder already."""
        self.text, self.folder, self.accelerator = text, folder, accelerator
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        usual = _CPU_MICRO_TOKENS if self.device.type == "cpu" else _MICRO_TOKENS
        self.micro = max(1, (settings.micro_tokens or usual) // text.seq_len)
        depths = lesson_depths(recipe, settings)
        student = folder / "student"
        model, architecture = load_student(student, settings, self.device)
        low_rank = any(".lora_" in name for name, _ in model.named_parameters())
        # Without a linear module that could have low-rank changes, all parameters are trained.
        self.settings = settings = settings if low_rank else replace(settings, lora=None)
        self.schedule = schedule_of(settings, sequences=text.train, seq_len=text.seq_len, multiple=self.world)
        self.tokens = self.schedule.batch * text.seq_len  # of a step
        self.top_k = (
            self._top_k(teacher, architecture.vocabulary) if settings.top_k is not None and settings.logits else None
        )
        needed = depths or (settings.logits and self.top_k is None)
        self.teacher = teacher() if needed else None
        stored = Checkpoint.open(student, model=str(student)).dtype
        fast = stored != torch.float32 and fast_products(torch.bfloat16, self.device)
        distiller = Distiller(
            model,
            architecture,
            settings,
            layers=changed_layers(recipe) if depths else [],
            teacher_head=None if self.teacher is None else self.teacher.split.head,
            autocast=settings.precision == "bf16" or (settings.precision == "auto" and fast),
        )
        self.names = [name for name, parameter in distiller.named_parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            [parameter for parameter in distiller.parameters() if parameter.requires_grad],
            lr=settings.peak,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self.model, self.optimiser = accelerator.prepare(distiller, optimiser)
        self.curve = Curve(folder / "curve.jsonl", accelerator, settings)

    def _top_k(self, teacher: Callable[[], Teacher], vocabulary: int) -> TopK:
        place = self.folder / "likeliest"
        if self.accelerator.is_main_process:
            write_top_k(place, self.text, teacher, self.settings, vocabulary=vocabulary, batch=self.micro)
        self.accelerator.wait_for_everyone()
        return TopK(place)

    def run(self) -> dict[str, Any]:
        """Train to the end; the report."""
        facts = load_snapshot(self.accelerator, self.folder)
        standing = Standing(**facts) if facts else Standing.start(self._held_out_loss(), "end-to-end training")
        started = time.perf_counter() - standing.seconds
        self.curve.start(standing.next)
        if standing.next == 0:
            self.curve.write(0, {"held_out": standing.first})
        steps, passes = self.schedule.steps, self.settings.student_passes
        with current().task("end-to-end training", steps * self.tokens, units=passes) as task:
            task.advance(standing.next * self.tokens)
            while standing.next < steps and standing.stopped is None:
                losses = self._step(standing.next)
                standing.seconds = time.perf_counter() - started
                if not math.isfinite(losses["loss"]):
                    standing.failed(losses["loss"])
                    break
                lr = self.schedule.lr(standing.next)
                standing.next += 1
                task.advance(self.tokens)
                title = f"step {standing.next} of {steps}"
                task.note(standing.note(title, losses["loss"], self.tokens))
                self.curve.write(standing.next, {**losses, "lr": lr, "tokens": standing.next * self.tokens})
                if self.schedule.is_measured_after(standing.next - 1):
                    self._measure(standing)
                    standing.seconds = time.perf_counter() - started
                    save_snapshot(self.accelerator, self.folder, asdict(standing))
        self.curve.end()
        if standing.stopped is not None:
            current().say(f"end-to-end training stopped: {standing.stopped}; its best state is kept")
        return standing.report(self.tokens)

    def _measure(self, standing: Standing) -> None:
        """Measure the held-out loss, and keep the best state."""
        loss = self._held_out_loss()
        self.curve.write(standing.next, {"held_out": loss if math.isfinite(loss) else None})
        if standing.measured(loss, self.schedule):
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                tensors = {name.removeprefix("student."): state[name].detach().cpu() for name in self.names}
                save_state(self.folder / BEST, tensors, {"step": standing.next, "loss": loss})

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimiser; its losses. Where they or the gradient are not finite nothing is changed."""
        share = self.schedule.rows(step)[self.rank :: self.world]
        total = torch.zeros(len(PARTS), device=self.device)
        for start in range(0, len(share), self.micro):
            rows = share[start : start + self.micro]
            last = start + self.micro >= len(share)
            # Gradients travel between processes with the last part of a step alone.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
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
                group["lr"] = self.schedule.lr(step)
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
        if self.text.counted_NT is not None:
            lesson = replace(lesson, counted_BT=self.text.counted_NT[rows].to(self.device))
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
