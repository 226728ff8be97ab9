"""Losses between a student and a teacher: of hidden states, and of next-token distributions. Pure functions.

`hidden_kl` is the loss of CoMe's distillation (arXiv 2510.15304): hidden states are read as unnormalised
log-probabilities. The other two of hidden states are additions. All are means over real tokens, in float32, teacher
first.

A few tokens carry massive activations (attention sinks): their norms are a hundred times the others', and dominate a
plain squared error. `weighting` sets the weight of such tokens:

- `relative`: every token's error is relative to its own norm;
- `clip`: a norm above `CLIP` times the batch's median counts as that much;
- `uniform`: all tokens have the same weight.

The losses of logits are functions of a block of rows. `over_rows` applies them to all tokens without holding all
logits: block by block it computes the loss and, at once, the gradient of the hidden state. The head is frozen, so no
other gradient is needed.

Shape suffixes: `N` tokens, `D` residual width, `V` vocabulary; `...` is any arrangement of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from intarsia.healing.settings import Weighting

CLIP = 4.0
_TINY = 1e-12


def hidden_kl(teacher: Tensor, student: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens of KL(softmax(h_T) || softmax(h_S)), in nats.

    Args:
        teacher, student: `[..., D]` hidden states of the same tokens.
        mask: `[...]`, True where a token is real; None where all are.
    """
    return masked_mean(logit_kl(teacher, student), mask)


def hidden_mse(
    teacher: Tensor, student: Tensor, mask: Tensor | None = None, *, weighting: Weighting = "relative"
) -> Tensor:
    """Squared error as a share of the teacher's squared norm: 0 for equal states, 1 for all zeros.

    sum_n w_n |s_n - t_n|^2 / sum_n w_n |t_n|^2 over real tokens n.
    """
    t, s = teacher.float(), student.float()
    size = t.square().sum(dim=-1)
    weight = token_weights(size, mask, weighting)
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
    """The weighted sum of the three; those with weight 0 are not computed."""
    total = torch.zeros((), device=student.device)
    if kl:
        total = total + kl * hidden_kl(teacher, student, mask)
    if mse:
        total = total + mse * hidden_mse(teacher, student, mask, weighting=weighting)
    if cosine:
        total = total + cosine * hidden_cosine(teacher, student, mask)
    return total


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of `values` where `mask` is True; 0 if it is nowhere."""
    if mask is None:
        return values.mean()
    # Values at padding may be anything, NaN too.
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def token_weights(size: Tensor, mask: Tensor | None, weighting: Weighting) -> Tensor:
    """The weight of each token; `size` is the teacher's squared norm."""
    if weighting == "relative":
        weight = size.clamp_min(_TINY).reciprocal()
    elif weighting == "clip":
        real = size.flatten() if mask is None else size[mask]
        weight = (CLIP**2 * real.median() / size.clamp_min(_TINY)).clamp_max(1.0)
    else:
        weight = torch.ones_like(size)
    return weight if mask is None else weight * mask


LossOfRows = Callable[[Tensor, slice], Tensor]
"""Maps float32 logits `[N, V]` of some rows, and the slice of these rows, to each row's loss `[N]`."""

_CPU_ROWS = 128
_CUDA_ROWS = 2048


def logit_kl(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(z_T / T) || softmax(z_S / T)) of each row, in nats: float32 `[N]`.

    T^2 keeps the gradient's size independent of the temperature (arXiv 1503.02531). Where only the teacher's likeliest
    tokens are known it is `Likeliest.divergence`, a lower bound.
    """
    log_t = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    log_s = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=-1)


def cross_entropy(student_NV: Tensor, target_N: Tensor) -> Tensor:
    """-log softmax(z_S)[target] of each row, in nats: float32 `[N]`."""
    return torch.nn.functional.cross_entropy(student_NV.float(), target_N, reduction="none")


def over_rows(hidden_ND: Tensor, head: Callable[[Tensor], Tensor], losses: LossOfRows, weight_N: Tensor) -> Tensor:
    """sum_n weight_n * loss_n, differentiable in `hidden_ND`; logits exist for one block of rows at a time.

    Args:
        hidden_ND: what the student's head reads.
        head: `[N, D] -> [N, V]`, row by row. Its parameters get no gradient.
        losses: each row's loss.
        weight_N: weight of each row; rows with 0 may hold anything finite.
    """
    total: Tensor = _OverRows.apply(hidden_ND, head, losses, weight_N)
    return total


class _OverRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head: Callable[[Tensor], Tensor], losses: LossOfRows, weight_N: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        step = _CPU_ROWS if hidden_ND.device.type == "cpu" else _CUDA_ROWS
        for start in range(0, hidden_ND.shape[0], step):
            rows = slice(start, min(start + step, hidden_ND.shape[0]))
            with torch.set_grad_enabled(wanted):
                block = hidden_ND[rows].detach().requires_grad_(wanted)
                loss = (losses(head(block), rows) * weight_N[rows]).sum()
            if gradient_ND is not None:
                (gradient_ND[rows],) = torch.autograd.grad(loss, block)
            total += loss.detach()
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradient.to(gradient_ND.dtype), None, None, None
