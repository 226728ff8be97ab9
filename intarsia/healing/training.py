"""Shared by both kinds of training: text, schedule, early stopping, state on disk and the loss curve.

The schedule gives each step its data, learning rate and measurements. It is a pure function, so that a restart needs no
state. A *step* is one of the optimiser, counted from 0 over all epochs.

State is replaced at once or not at all. Nothing is pickled: a state file is data like a checkpoint.

Shape suffixes: `N` sequences, `T` tokens.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from intarsia.data.conversations import Turns, answers_in
from intarsia.data.corpus import Corpus
from intarsia.disk import damage_named, full_disk_named, replaced, write_whole
from intarsia.errors import UserError
from intarsia.flags import plain
from intarsia.healing.settings import Pace
from intarsia.healing.stages.end_to_end import EndToEndSettings


@dataclass(frozen=True, kw_only=True)
class Text:
    """Training and held-out sequences together, the held-out ones last."""

    ids_NT: Tensor
    # True at real tokens; None where all are.
    mask_NT: Tensor | None
    # Number of training sequences.
    train: int
    # True where losses count on the next token; None for everywhere.
    counted_NT: Tensor | None = None

    @classmethod
    def of(cls, corpus: Corpus, held_out: Corpus, *, turns: Turns | None = None) -> Text:
        """Two corpora as one text.

        Args:
            turns: how the assistant's tokens are marked, if losses count on them alone.

        Raises:
            UserError: no token is the assistant's.
        """
        assert corpus.seq_len == held_out.seq_len
        masks = [
            part.mask if part.mask is not None else torch.ones_like(part.input_ids, dtype=torch.bool)
            for part in (corpus, held_out)
        ]
        ids_NT, counted_NT = torch.cat([corpus.input_ids, held_out.input_ids]), None
        if turns is not None:
            counted_NT = answers_in(ids_NT, turns).roll(-1, dims=1)
            counted_NT[:, -1] = False
            for part, counted in ((corpus, counted_NT[: len(corpus)]), (held_out, counted_NT[len(corpus) :])):
                if not bool(counted.any()):
                    raise UserError(
                        f"--loss-on assistant: no token of {part.description} is the assistant's.",
                        "Give conversations as text, or leave it out.",
                    )
        return cls(
            ids_NT=ids_NT,
            counted_NT=counted_NT,
            mask_NT=None if corpus.mask is None and held_out.mask is None else torch.cat(masks),
            train=len(corpus),
        )

    @property
    def held_out(self) -> int:
        """Sequences that are not trained on."""
        return len(self.ids_NT) - self.train

    @property
    def seq_len(self) -> int:
        """Tokens a sequence, with padding."""
        return int(self.ids_NT.shape[1])


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of a training.

    The sequences that are left over at the end of an epoch, fewer than a batch, are not seen in that epoch.
    """

    # Training sequences.
    sequences: int
    # Sequences of a step.
    batch: int
    pace: Pace

    @property
    def steps_an_epoch(self) -> int:
        """Steps in which every sequence is seen once."""
        return self.sequences // self.batch

    @property
    def steps(self) -> int:
        return self.steps_an_epoch * self.pace.epochs

    @property
    def every(self) -> int:
        """Steps between two measurements of the held-out loss."""
        return max(1, math.ceil(self.steps / self.pace.evaluations))

    def is_measured_after(self, step: int) -> bool:
        """Whether the held-out loss is measured once this step is done."""
        return (step + 1) % self.every == 0 or step + 1 == self.steps

    def lr(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to `least_lr` of the peak."""
        warm = math.ceil(self.pace.warmup * self.steps)
        if step < warm:
            return self.pace.peak * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        least = self.pace.least_lr
        return self.pace.peak * (least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done)))

    def rows(self, step: int) -> list[int]:
        """The sequences of a step: every epoch has an order of its own, drawn from the seed."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = torch.randperm(
            self.sequences, generator=torch.Generator().manual_seed(self.pace.seed * 100_003 + epoch)
        )
        return sorted(order[place * self.batch : (place + 1) * self.batch].tolist())


def schedule_of(pace: Pace, *, sequences: int, seq_len: int, multiple: int = 1) -> Schedule:
    """The schedule of a training. A text shorter than a step is one step.

    Args:
        multiple: number of processes; the sequences of a step are a multiple of it.

    Raises:
        UserError: there are fewer sequences than processes.
    """
    batch = max(1, min(pace.batch_tokens // (seq_len * multiple), sequences // multiple)) * multiple
    if sequences < batch:
        raise UserError(
            f"The training text has {sequences} sequences of {seq_len} tokens besides the held-out ones, and"
            f" {multiple} processes train.",
            "Give more --tokens, or start fewer processes.",
        )
    return Schedule(sequences=sequences, batch=batch, pace=pace)


@dataclass(kw_only=True)
class Standing:
    """The state of a training: steps done, losses, patience."""

    # The held-out loss before the first step, and the least one so far.
    first: float
    best: float
    # Finished steps.
    next: int = 0
    # Measurements since the best one.
    bad: int = 0
    # Why the training stopped early, if it did.
    stopped: str | None = None
    # Over all restarts.
    seconds: float = 0.0

    @classmethod
    def start(cls, loss: float, what: str) -> Standing:
        """Before the first step.

        Raises:
            UserError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise UserError(
                f"The loss of {what} is {loss} before the first step.",
                "The model or the teacher is damaged, or overflows in its dtype; check both.",
            )
        return cls(first=loss, best=loss)

    def failed(self, loss: float) -> None:
        """Stop: the loss of the step after the last one is not finite."""
        self.stopped = f"the loss was {loss:.4g} at step {self.next + 1}"

    def measured(self, loss: float, schedule: Schedule) -> bool:
        """Count a measurement of the held-out loss; True if it is a new best. Stop if training is hopeless."""
        if not math.isfinite(loss) or loss > 10.0 * self.first + 1e-6:
            self.stopped = f"the held-out loss was {loss:.4g} at step {self.next}"
            return False
        if loss < self.best:
            self.best, self.bad = loss, 0
            return True
        self.bad += 1
        if self.bad >= schedule.pace.patience:
            every = f"one every {schedule.every} steps"
            self.stopped = f"no better held-out loss in {self.bad} measurements, {every}"
        return False

    def report(self, step_tokens: int) -> dict[str, Any]:
        """A report of the training, as plain data."""
        return {
            "loss_before": self.first,
            "loss_after": self.best,
            "steps": self.next,
            "tokens": self.next * step_tokens,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def note(self, what: str, loss: float, step_tokens: int) -> str:
        """The progress line after a step."""
        return f"{what}: loss {loss:.4g}, {self.next * step_tokens / max(self.seconds, 1e-9):,.0f} tokens/s"


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state file.

    Raises:
        UserError: the disk is full; an existing file is unchanged.
    """
    with full_disk_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as temporary:
        save_file(whole, temporary, metadata={"facts": json.dumps(facts)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a state file; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    if not path.exists():
        return None
    remedy = "Delete it; that part of the training then runs again."
    with (
        damage_named(path, expected="a state file of a training", remedy=remedy),
        safe_open(path, framework="pt") as file,
    ):
        facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, facts


_FACTS = "facts.json"


def save_snapshot(accelerator: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write parameters, optimiser and random state of all processes, and delete the previous snapshot.

    Raises:
        UserError: the disk is full; the previous snapshot stays.
    """
    staging = folder / ".state.staging"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    with full_disk_named(folder):
        try:
            accelerator.save_state(str(staging))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_whole(staging / _FACTS, json.dumps(dict(facts)) + "\n")
        before = _snapshots(folder)
        with full_disk_named(folder):
            staging.rename(folder / f"state-{facts['next']:09d}")
        for path in before:
            shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_snapshot(accelerator: Any, folder: Path) -> dict[str, Any] | None:
    """Restore the newest snapshot and return its facts; None if there is none."""
    found = _snapshots(folder)
    if not found:
        return None
    accelerator.load_state(str(found[-1]))
    facts: dict[str, Any] = json.loads((found[-1] / _FACTS).read_text(encoding="utf-8"))
    return facts


def _snapshots(folder: Path) -> list[Path]:
    """Complete snapshots, oldest first."""
    return sorted(path for path in folder.glob("state-*") if (path / _FACTS).exists())


class Curve:
    """Losses by step, written by the first process. A restart removes the lines of steps that run again."""

    def __init__(self, path: Path, accelerator: Any, settings: EndToEndSettings) -> None:
        self.path, self.accelerator, self.settings = path, accelerator, settings

    def start(self, step: int) -> None:
        """Continue after `step` finished steps."""
        if self.settings.log is not None:
            config = {key: value for key, value in plain(self.settings).items() if value is not None}
            self.accelerator.init_trackers("intarsia", config=config)
        if self.accelerator.is_main_process:
            kept = [line for line in read_curve(self.path) if 0 < step >= line["step"]]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        if self.settings.log is not None:
            self.accelerator.log(dict(line), step=step)
        if self.accelerator.is_main_process:
            with full_disk_named(self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")

    def end(self) -> None:
        if self.settings.log is not None:
            self.accelerator.end_training()


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a curve; one that a kill cut off does not count."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


_LONGEST_WAIT = timedelta(days=7)
"""Other processes wait while the first one does what only one can do."""


def rank() -> int:
    """The rank of this process, from the environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: torch.device) -> torch.device:
    """The device of this process: where several were launched on GPUs, each has its own."""
    if device.type == "cuda" and world_size() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def barrier(device: torch.device) -> Callable[[], None]:
    """A function that waits for all launched processes; it does nothing for one."""
    if world_size() == 1:
        return lambda: None
    wait: Callable[[], None] = accelerator(device=device).wait_for_everyone
    return wait


def accelerator(*, device: torch.device, log: str | None = None, folder: Path | None = None) -> Any:
    """An `accelerate.Accelerator` for this process.

    `Distiller` sets the precision, so that it is the same on one CPU and under FSDP.

    Args:
        log: a tracker that Accelerate knows (see `stages.end_to_end.check`).
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    # Accelerate warns at every snapshot that a tied head is stored once.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    return Accelerator(
        cpu=device.type == "cpu",
        log_with=log,
        project_config=None if folder is None else ProjectConfiguration(project_dir=str(folder)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
