"""Losses between a student's and a teacher's hidden states. Pure functions.

`hidden_kl` is the loss of CoMe's distillation (arXiv 2510.15304): hidden states are read as unnormalised
log-probabilities. The other two are additions. All are means over real tokens, in float32, teacher first.

A few tokens carry massive activations (attention sinks): their norms are a hundred times the others', and a plain
squared error serves them alone. `weighting` of the squared error decides what such a token counts:

- `relative`: every token's error is measured against its own norm;
- `clip`: a token longer than `CLIP` times the batch's median norm counts as if it were that long;
- `uniform`: every token's error counts as it is.

Shape suffixes: `D` residual width, `N` tokens; `...` is any arrangement of tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["relative", "clip", "uniform"]

CLIP = 4.0
_TINY = 1e-12


def hidden_kl(teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens of KL(softmax(h_T) || softmax(h_S)), in nats.

    Args:
        teacher, student: `[..., D]` hidden states of the same tokens.
        mask: `[...]`, True where a token is real; None where all are.
    """
    log_t = torch.log_softmax(teacher.float(), dim=-1)
    log_s = torch.log_softmax(student.float(), dim=-1)
    return masked_mean((log_t.exp() * (log_t - log_s)).sum(dim=-1), mask)


def hidden_mse(
    teacher: Tensor, student: Tensor, mask: Tensor | None = None, *, weighting: Weighting = "relative"
) -> Tensor:
    """Squared error as a share of the teacher's squared size: 0 is equal, 1 is as bad as all zeros.

    sum_n w_n |s_n - t_n|^2 / sum_n w_n |t_n|^2 over real tokens n.
    """
    t, s = teacher.float(), student.float()
    size = t.square().sum(dim=-1)
    weight = _token_weights(size, mask, weighting)
    error = (s - t).square().sum(dim=-1)
    return (weight * error).sum() / (weight * size).sum().clamp_min(_TINY)


def hidden_cosine(teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens of 1 - cos(h_T, h_S)."""
    cosine = torch.nn.functional.cosine_similarity(teacher.float(), student.float(), dim=-1)
    return masked_mean(1.0 - cosine, mask)


def hidden_loss(
    teacher: Tensor,
    student: Tensor,
    mask: Tensor | None = None,
    *,
    kl: float,
    mse: float,
    cosine: float,
    weighting: Weighting = "relative",
) -> Tensor:
    """The weighted sum of the three; one whose weight is 0 is not computed."""
    total = torch.zeros((), device=student.device)
    if kl:
        total = total + kl * hidden_kl(teacher, student, mask)
    if mse:
        total = total + mse * hidden_mse(teacher, student, mask, weighting=weighting)
    if cosine:
        total = total + cosine * hidden_cosine(teacher, student, mask)
    return total


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of `values` where `mask` is True; 0 where it is nowhere."""
    if mask is None:
        return values.mean()
    # Values at padding may be anything, NaN too.
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def _token_weights(size: Tensor, mask: Tensor | None, weighting: Weighting) -> Tensor:
    """What each token counts; `size` is the teacher's squared norm."""
    if weighting == "relative":
        weight = size.clamp_min(_TINY).reciprocal()
    elif weighting == "clip":
        real = size.flatten() if mask is None else size[mask]
        weight = (CLIP**2 * real.median() / size.clamp_min(_TINY)).clamp_max(1.0)
    else:
        weight = torch.ones_like(size)
    return weight if mask is None else weight * mask
