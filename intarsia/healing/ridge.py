"""Ridge regression from streamed Gram matrices. Pure tensor functions.

A linear layer `y = W x` is changed by `D` so that `(W + D) x` comes closer to a target: with the residual
`r = target - W x`, minimise `sum_n w_n |r_n - D x_n|^2 + ridge * s * |D|^2`. `s` is the mean of the features' weighted
second moments, so `ridge` is relative to their scale. As `ridge` grows `D` goes to zero: shrinkage is towards the
weights as they are.

Shape suffixes: `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import UserError


class Gram:
    """Weighted second moments of features and residuals, accumulated in float64 from float32 products."""

    def __init__(self, features: int, width: int, device: torch.device) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.xx_CC = torch.zeros(features, features, dtype=dtype, device=device)
        self.xr_CD = torch.zeros(features, width, dtype=dtype, device=device)
        self.rr = 0.0
        self.tokens = 0

    def add(self, x_NC: Tensor, r_ND: Tensor, weight_N: Tensor) -> None:
        """Count a batch of tokens: features, residuals that are missing, and weights (0 leaves a token out)."""
        root_N = weight_N.float().sqrt()[:, None]
        x_NC = x_NC.float() * root_N
        r_ND = r_ND.float() * root_N
        self.xx_CC += x_NC.T @ x_NC
        self.xr_CD += x_NC.T @ r_ND
        self.rr += float(r_ND.square().sum(dim=1).cpu().double().sum())
        self.tokens += int((weight_N > 0).sum())

    def error(self, change_DC: Tensor | None = None) -> float:
        """Weighted squared error a token that is left when the weights change by `change_DC` (None: not at all)."""
        if change_DC is None:
            return self.rr / max(self.tokens, 1)
        change_CD = change_DC.T.to(self.xx_CC.dtype)
        fitted = (change_CD * (self.xx_CC @ change_CD)).sum() - 2.0 * (change_CD * self.xr_CD).sum()
        return (self.rr + float(fitted)) / max(self.tokens, 1)

    def require_finite(self, where: str) -> None:
        """Refuse statistics of activations that overflowed.

        Raises:
            UserError: they are not finite.
        """
        if not bool(torch.isfinite(self.xx_CC).all() and torch.isfinite(self.xr_CD).all() and math.isfinite(self.rr)):
            raise UserError.of(
                where=where,
                expected="finite activations",
                found="NaN or infinity",
                remedy="The model overflows in this dtype; try --dtype bfloat16 or float32.",
            )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A chosen change of a linear layer, or none.

    `change_DC` is None where no ridge strength lowered the held-out error. Errors are weighted squared
    residuals a token, on held-out tokens.
    """

    change_DC: Tensor | None
    ridge: float | None
    error_before: float
    error_after: float


def solve(gram: Gram, ridge: float, *, where: str) -> Tensor:
    """The change `[D, C]` for one ridge strength.

    Raises:
        UserError: the statistics are not finite.
    """
    gram.require_finite(where)
    features = gram.xx_CC.shape[0]
    scale = float(gram.xx_CC.diagonal().mean())
    if scale <= 0.0:
        return torch.zeros(gram.xr_CD.shape[1], features, dtype=gram.xx_CC.dtype, device=gram.xx_CC.device)
    eye = torch.eye(features, dtype=gram.xx_CC.dtype, device=gram.xx_CC.device)
    system = gram.xx_CC + (ridge * scale) * eye
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return torch.linalg.lstsq(system, gram.xr_CD).solution.T
    return torch.cholesky_solve(gram.xr_CD, factor).T


def choose(fit: Gram, held_out: Gram, ridges: Sequence[float], *, where: str) -> Fit:
    """The strength whose change leaves the least error on held-out tokens, or no change at all.

    The error falls and then rises with the strength, so the search walks down from the middle of `ridges` (ascending)
    and stops where neither neighbour is better: about half of them are tried.

    Raises:
        UserError: the statistics are not finite.
    """
    held_out.require_finite(where)  # no comparison with NaN holds: the fit would be left out without a word
    before = held_out.error()
    best = Fit(change_DC=None, ridge=None, error_before=before, error_after=before)
    errors: dict[int, float] = {}

    def error(index: int) -> float:
        nonlocal best
        if not 0 <= index < len(ridges):
            return math.inf
        if index not in errors:
            change_DC = solve(fit, ridges[index], where=where)
            after = errors[index] = held_out.error(change_DC)
            if after < best.error_after:
                best = Fit(change_DC=change_DC, ridge=ridges[index], error_before=before, error_after=after)
        return errors[index]

    at = len(ridges) // 2
    step = -1 if error(at - 1) < error(at) else 1
    while error(at + step) < error(at):
        at += step
    return best
