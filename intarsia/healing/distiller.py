"""The student with its losses as one module: a batch and what the teacher says of it in, losses out.

One module, so that every wrapper that Accelerate may put around it sees a single forward and no large outputs. Logits
exist for a few rows at a time, the teacher's as well as the student's.

Shape suffixes: `B` sequences, `T` tokens, `N` = B * T, `D` residual width, `V` vocabulary, `K` kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.anatomy.spec import Anatomy
from intarsia.healing.logit_losses import cross_entropy, logit_kl, over_rows, top_k_kl
from intarsia.healing.losses import hidden_mse
from intarsia.healing.read_out import ReadOut
from intarsia.healing.settings import EndToEndSettings

PARTS = ("loss", "logits", "hidden", "text")
"""What a forward gives: the total, and its parts before they are weighted."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What the teacher says of a batch.

    `rows`: what its head reads, `[N, D]`; or `top_k`: log-probabilities and tokens, `[N, K]` each; or neither, where
    logits are not learnt from. `hidden`: its hidden states at the ends of the spans, `[B, T, D]` each.
    """

    rows: Tensor | None = None
    top_k: tuple[Tensor, Tensor] | None = None
    hidden: tuple[Tensor, ...] = ()


class Distiller(nn.Module):
    """The student and what it is to learn."""

    def __init__(
        self,
        student: PreTrainedModel,
        anatomy: Anatomy,
        settings: EndToEndSettings,
        *,
        layers: Sequence[int],
        teacher_head: Callable[[Tensor], Tensor] | None,
        autocast: bool,
    ) -> None:
        """`layers`: the output layers behind which hidden states are compared."""
        super().__init__()
        self.student = student
        # Which layers FSDP may wrap by themselves.
        self._no_split_modules = getattr(student, "_no_split_modules", None)
        self.settings = settings
        self.layers = tuple(layers)
        self.autocast = autocast
        self.read_out = ReadOut(student, anatomy)
        self.teacher_head = teacher_head

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None, lesson: Lesson) -> Tensor:
        """The losses of `PARTS`, `[4]`, means over real tokens."""
        with self._precision(ids_BT.device):
            rows, hidden = self.read_out.trunk(ids_BT, mask_BT, hidden=bool(lesson.hidden))
        logits, text = self._through_head(rows, ids_BT, mask_BT, lesson)
        between = torch.zeros((), device=ids_BT.device)
        if lesson.hidden:
            pairs = zip(self.layers, lesson.hidden, strict=True)
            found = [hidden_mse(theirs, hidden[index + 1], mask_BT) for index, theirs in pairs]
            between = torch.stack(found).mean()
        total = logits.total + self.settings.hidden * between
        return torch.stack([total, logits.part, between.detach(), text])

    def _through_head(
        self, rows: Tensor, ids_BT: Tensor, mask_BT: Tensor | None, lesson: Lesson
    ) -> tuple[_Logits, Tensor]:
        settings, temperature = self.settings, self.settings.temperature
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        # Position t predicts token t + 1; both must be real.
        next_BT = torch.cat([real_BT[:, :-1] & real_BT[:, 1:], torch.zeros_like(real_BT[:, :1])], dim=1)
        target_N = torch.cat([ids_BT[:, 1:], ids_BT[:, :1]], dim=1).reshape(-1)
        real_N = real_BT.reshape(-1).float() / real_BT.sum().clamp_min(1)
        next_N = next_BT.reshape(-1).float() / next_BT.sum().clamp_min(1)
        sums = torch.zeros(2, device=rows.device)
        taught = lesson.rows is not None or lesson.top_k is not None

        def losses(logits_NV: Tensor, part: slice) -> Tensor:
            total = torch.zeros(logits_NV.shape[0], device=logits_NV.device)
            if taught:
                if lesson.top_k is not None:
                    log_p, index = (kept[part] for kept in lesson.top_k)
                    kl_N = top_k_kl(log_p, index, logits_NV, temperature)
                else:
                    assert lesson.rows is not None and self.teacher_head is not None
                    with torch.no_grad():
                        theirs = self.teacher_head(lesson.rows[part])
                    kl_N = logit_kl(theirs, logits_NV, temperature)
                kl_N = torch.where(real_N[part] > 0, kl_N, 0.0) * real_N[part]
                sums[0] += kl_N.detach().sum()
                total = total + settings.logits * kl_N
            if settings.cross_entropy:
                text_N = cross_entropy(logits_NV, target_N[part])
                text_N = torch.where(next_N[part] > 0, text_N, 0.0) * next_N[part]
                sums[1] += text_N.detach().sum()
                total = total + settings.cross_entropy * text_N
            return total

        def head(block: Tensor) -> Tensor:
            with self._precision(block.device):
                logits_NV: Tensor = self.read_out.head(block)
            return logits_NV

        rows_ND = rows.reshape(-1, rows.shape[-1])
        if not taught and not settings.cross_entropy:
            total = torch.zeros((), device=rows.device)
        else:
            total = over_rows(rows_ND, head, losses, torch.ones(len(rows_ND), device=rows.device))
        return _Logits(total=total, part=sums[0]), sums[1]

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.autocast else nullcontext()


@dataclass(frozen=True, kw_only=True)
class _Logits:
    """Weighted total of what goes through the head, and the distillation's part of it."""

    total: Tensor
    part: Tensor
