"""What happens at which step: order of the data, learning rate, measurements. Pure, so that a restart needs no state.

A *step* is one of the optimiser, counted from 0 over all epochs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from intarsia.errors import UserError
from intarsia.healing.settings import Pace


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The plan of a training: `sequences` are trained on, `batch` of them a step.

    The sequences that are left over at the end of an epoch, fewer than a batch, are not seen in that epoch.
    """

    sequences: int
    batch: int
    pace: Pace

    @property
    def steps_an_epoch(self) -> int:
        """Steps in which every sequence is seen once."""
        return self.sequences // self.batch

    @property
    def steps(self) -> int:
        """All steps."""
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
            return self.pace.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        least = self.pace.least_lr
        return self.pace.lr * (least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done)))

    def rows(self, step: int) -> list[int]:
        """The sequences of a step: every epoch has an order of its own, drawn from the seed."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = torch.randperm(
            self.sequences, generator=torch.Generator().manual_seed(self.pace.seed * 100_003 + epoch)
        )
        return sorted(order[place * self.batch : (place + 1) * self.batch].tolist())


def schedule_of(pace: Pace, *, sequences: int, seq_len: int, multiple: int = 1) -> Schedule:
    """The schedule for so many training sequences.

    Args:
        multiple: the sequences of a step are a multiple of this.

    Raises:
        UserError: there are fewer sequences than one step needs.
    """
    batch = max(1, pace.batch_tokens // (seq_len * multiple)) * multiple
    if sequences < batch:
        raise UserError.of(
            where="training text",
            expected=f"at least {batch} sequences of {seq_len} tokens beside the held-out ones: those of one step",
            found=str(sequences),
            remedy="Give more --tokens, or fewer tokens a step (--batch-tokens).",
        )
    return Schedule(sequences=sequences, batch=batch, pace=pace)


class Patience:
    """Notices when the held-out loss has not improved for too long."""

    def __init__(self, patience: int, first: float, *, bad: int = 0, best: float | None = None) -> None:
        self.patience = patience
        self.first = first
        self.best = first if best is None else best
        self.bad = bad

    def improved(self, loss: float) -> bool:
        """Count a measurement; whether it is a new best."""
        if loss < self.best:
            self.best, self.bad = loss, 0
            return True
        self.bad += 1
        return False

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self.bad >= self.patience

    def diverged(self, loss: float) -> bool:
        """Whether a held-out loss is not a number, or far above where it began."""
        return not math.isfinite(loss) or loss > 10.0 * self.first + 1e-6
