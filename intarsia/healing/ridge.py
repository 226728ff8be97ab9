"""Ridge regression from streamed Gram matrices. Pure tensor functions.

A linear layer `y = W x` is changed by `D` so that `(W + D) x` comes closer to a target: with the residual
`r = target - W x`, minimise `sum_n w_n |r_n - D x_n|^2 + ridge * s * |D|^2`. `s` is the mean of the features' weighted
second moments, so `ridge` is relative to their scale. As `ridge` grows `D` goes to zero: shrinkage is toward the
current weights.

Shape suffixes: `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.activations.statistics import require_finite

USUAL = 0.3
"""Where the search for a strength starts: most fits of the demo model's layers choose it or a neighbour."""

_BLOCKS, _LEAST_BLOCK = 8, 256


class Gram:
    """Weighted second moments of features and residuals: products in float32, or another dtype; summed in float64."""

    def __init__(self, features: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.tokens = 0
        self.dtype = dtype
        self.rr = 0.0
        self._device = device
        # MPS has no float64.
        home = torch.device("cpu") if device.type == "mps" else device
        self._xx_CC = torch.zeros(features, features, dtype=torch.float64, device=home)
        self._xr_CD = torch.zeros(features, width, dtype=torch.float64, device=home)
        step = max(_LEAST_BLOCK, math.ceil(features / _BLOCKS))
        self._blocks = [slice(start, min(start + step, features)) for start in range(0, features, step)]
        self._mirrored = True

    def add(self, x_NC: Tensor, r_ND: Tensor, weight_N: Tensor) -> None:
        """Add a batch of tokens: features, missing residuals, and weights (0 ignores a token)."""
        root_N1 = weight_N.to(self.dtype).sqrt()[:, None]
        x_NC, r_ND = x_NC.to(self.dtype) * root_N1, r_ND.to(self.dtype) * root_N1
        for rows in self._blocks:  # the upper triangle alone: half of the products
            self._xx_CC[rows, rows.start :] += (x_NC[:, rows].T @ x_NC[:, rows.start :]).to(self._xx_CC.device)
            self._xr_CD[rows] += (x_NC[:, rows].T @ r_ND).to(self._xr_CD.device)
        self._mirrored = False
        self.rr += float(r_ND.square().sum(dim=1).cpu().double().sum())
        self.tokens += int((weight_N > 0).sum())

    def moments(self) -> tuple[Tensor, Tensor]:
        """Second moments of the features `[C, C]`, and moments of features and residuals `[C, D]`, in float64."""
        if not self._mirrored:
            for rows in self._blocks:
                self._xx_CC[rows.stop :, rows] = self._xx_CC[rows, rows.stop :].T
            self._mirrored = True
        return self._xx_CC, self._xr_CD

    def error(self, change_DC: Tensor | None = None) -> float:
        """Weighted squared error per token after a change of the weights (None: without one)."""
        total = self.rr
        if change_DC is not None:
            xx_CC, xr_CD = self.moments()
            change_CD = change_DC.to(xx_CC.device, torch.float64).T
            total += float(((xx_CC @ change_CD).sub_(xr_CD, alpha=2.0)).mul_(change_CD).sum())
        return total / max(self.tokens, 1)

    def change(self, ridge: float) -> Tensor | None:
        """The change `[D, C]` of least error with one ridge strength, float32.

        None where there is nothing to fit, or the strength is too small for a factorisation in floating point.
        Statistics must be finite.
        """
        xx_CC, xr_CD = self.moments()
        diagonal_C = xx_CC.diagonal().clone()
        scale = float(diagonal_C.mean())
        if scale <= 0.0:
            return None
        xx_CC.diagonal().add_(ridge * scale)  # in place: a copy of many features takes a gigabyte
        factor_CC, failed = torch.linalg.cholesky_ex(xx_CC)
        xx_CC.diagonal().copy_(diagonal_C)
        if int(failed):
            return None
        return torch.cholesky_solve(xr_CD, factor_CC).T.to(self._device, torch.float32)

    def require_finite(self, where: str) -> None:
        """Refuse statistics of activations that overflowed.

        Raises:
            UserError: they are not finite.
        """
        # No product of two features is larger than the square of the larger one; the same holds with residuals.
        require_finite(self._xx_CC.diagonal().sum() + self.rr, where)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A chosen change of a linear layer, or none. Errors are weighted squared residuals per held-out token."""

    # None where no ridge strength lowered the held-out error.
    change_DC: Tensor | None
    ridge: float | None
    error_before: float
    error_after: float

    def applied(self, own_DC: Tensor) -> Tensor | None:
        """The new weight, in the dtype of the old one; None where there is no better one."""
        return None if self.change_DC is None else (own_DC.float() + self.change_DC).to(own_DC.dtype)


def choose(fit: Gram, held_out: Gram, ridges: Sequence[float], *, where: str) -> Fit:
    """The change of the ridge strength with the least held-out error, or no change.

    The error falls and then rises with the strength, so the search starts at the usual one, walks down along `ridges`
    (ascending), and stops where neither neighbour is better: three or four are tried. A strength too small to solve for
    counts as the worst.

    Raises:
        UserError: the statistics are not finite.
    """
    fit.require_finite(where)
    held_out.require_finite(where)
    before = held_out.error()
    best = Fit(change_DC=None, ridge=None, error_before=before, error_after=before)
    errors: dict[int, float] = {-1: math.inf, len(ridges): math.inf}

    def error(index: int) -> float:
        nonlocal best
        if index not in errors:
            change_DC = fit.change(ridges[index])
            after = errors[index] = math.inf if change_DC is None else held_out.error(change_DC)
            if after < best.error_after:
                best = Fit(change_DC=change_DC, ridge=ridges[index], error_before=before, error_after=after)
        return errors[index]

    at = min(range(len(ridges)), key=lambda index: abs(ridges[index] - USUAL))
    while error(at) == math.inf and at < len(ridges) - 1:
        at += 1
    step = -1 if error(at - 1) < error(at) else 1
    while error(at + step) < error(at):
        at += step
    return best
