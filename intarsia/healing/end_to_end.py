"""End-to-end distillation: the whole student against the teacher, through Accelerate.

One command goes from one CPU to many devices. A run is saved at every measurement: killed at any step and started
again, it goes on from there, and its loss curve is the one of an undisturbed run. The best held-out state is what comes
out; where none is better than the beginning, the recipe stays as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from intarsia.calibration.corpus import Corpus
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import require_room, write_whole
from intarsia.healing.launch import accelerator as make_accelerator
from intarsia.healing.settings import EndToEndSettings
from intarsia.healing.state_file import load_state
from intarsia.healing.student import build_student, with_trained
from intarsia.healing.teacher import Teacher
from intarsia.healing.text import Text
from intarsia.healing.whole_training import BEST, WholeTraining
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Recipe

_DONE = "done.json"


def train(
    recipe: Recipe,
    variants: Mapping[str, Checkpoint],
    corpus: Corpus,
    held_out: Corpus,
    *,
    folder: Path,
    device: torch.device,
    teacher: Callable[[], Teacher],
    teacher_sha256: str,
    settings: EndToEndSettings | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with trained tensors, if they lowered the held-out loss, and a report (a list of one).

    Every launched process calls this; each gets the same recipe.

    Args:
        variants: the opened checkpoints of the recipe.
        folder: where the student and the state are kept. What it holds must be of the same call.
        teacher: gives the teacher, with the depths of `whole_training.lesson_depths`; only called when it is needed.
        cache: where the teacher's likeliest tokens are kept; in `folder` by default.

    Raises:
        UserError: there is too little text, the disk is full, or the loss is not finite before the first step.
    """
    settings, progress = settings or EndToEndSettings(), progress or Silent()
    text = Text.of(corpus, held_out)
    student = folder / "student"
    accelerator = make_accelerator(device=device, log=settings.log, folder=folder)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if not (folder / _DONE).exists():
        if accelerator.is_main_process:
            parameters = variants[recipe.base].parameters  # of one student, however many models it is made of
            require_room(folder, 22 * parameters, "the student and the state of its training", option="--run")
            build_student(recipe, variants, student)
        accelerator.wait_for_everyone()
        training = WholeTraining(
            recipe, text, student, folder, teacher, teacher_sha256, settings, cache, accelerator, progress
        )
        report = training.run()
        if accelerator.is_main_process:
            write_whole(folder / _DONE, json.dumps(report) + "\n")
    accelerator.wait_for_everyone()
    report = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    best = load_state(folder / BEST)
    if best is None or report["loss_after"] >= report["loss_before"]:
        progress.say(
            "end-to-end training did not lower the held-out loss: the model stays as it was; smaller steps may help"
        )
        return recipe, [report]
    opened = Checkpoint.open(student, model=str(student))
    return with_trained(recipe, opened.anatomy, opened, best[0]), [report]


def clear(folder: Path) -> None:
    """Delete what a finished training needs no more."""
    for path in [folder / "student", *folder.glob("state-*")]:
        shutil.rmtree(path, ignore_errors=True)
