"""Ridge regression from streamed Gram matrices. Pure tensor functions.

A linear layer `y = W x` is changed by `D` so that `(W + D) x` comes closer to a target: with the residual
`r = target - W x`, minimise `sum_n w_n |r_n - D x_n|^2 + ridge * s * |D|^2`. `s` is the mean of the features' weighted
second moments, so `ridge` is relative to their scale. As `ridge` grows `D` goes to zero: shrinkage is towards the
weights as they are.

Shape suffixes: `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import UserError
from intarsia.healing.few_tokens import Change, Rows, changed, whole

_USUAL = 0.3
"""Most fits of the demo model's layers choose a strength near this one."""

_BLOCK, _BLOCKS = 256, 8  # features at least, and blocks at most


class Gram:
    """Weighted second moments of features and residuals, accumulated in float64 from float32 products.

    As long as tokens are no more than half the features they are kept as they are (`intarsia.healing.few_tokens`). Of
    the symmetric matrix only blocks on the diagonal and right of it are summed up; reading it copies the others.
    """

    def __init__(self, features: int, width: int, device: torch.device) -> None:
        # MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.rr = 0.0
        self.tokens = 0
        self.rows: Rows | None = Rows(features // 2)
        self._features, self._width, self._device = features, width, device
        self._xx_CC: Tensor | None = None
        self._xr_CD: Tensor | None = None
        self._mirrored = True

    @property
    def xx_CC(self) -> Tensor:
        """Second moments of the features."""
        self._sum_up()
        assert self._xx_CC is not None
        if not self._mirrored:
            for block in self._blocks():
                self._xx_CC[block.stop :, block] = self._xx_CC[block, block.stop :].T
            self._mirrored = True
        return self._xx_CC

    @xx_CC.setter
    def xx_CC(self, moments: Tensor) -> None:
        self._sum_up()
        self._xx_CC = moments

    @property
    def xr_CD(self) -> Tensor:
        """Moments of features and residuals."""
        self._sum_up()
        assert self._xr_CD is not None
        return self._xr_CD

    @xr_CD.setter
    def xr_CD(self, moments: Tensor) -> None:
        self._sum_up()
        self._xr_CD = moments

    def add(self, x_NC: Tensor, r_ND: Tensor, weight_N: Tensor) -> None:
        """Count a batch of tokens: features, residuals that are missing, and weights (0 leaves a token out)."""
        root_N = weight_N.float().sqrt()[:, None]
        x_NC = x_NC.to(torch.float32, copy=True).mul_(root_N)
        r_ND = r_ND.to(torch.float32, copy=True).mul_(root_N)
        if self.rows is None or not self.rows.take(x_NC, r_ND):
            self._sum_up()
            self._add(x_NC, r_ND)
        self.rr += float(r_ND.square().sum(dim=1).cpu().double().sum())
        self.tokens += int((weight_N > 0).sum())

    def error(self, change: Change | None = None) -> float:
        """Weighted squared error a token that is left when the weights change by so much (None: not at all)."""
        if change is None:
            return self.rr / max(self.tokens, 1)
        if self.rows is not None:
            return (self.rr + self.rows.fitted(change)) / max(self.tokens, 1)
        change_CD = whole(change).T.to(self.dtype)
        fitted = (change_CD * (self.xx_CC @ change_CD - 2.0 * self.xr_CD)).sum()
        return (self.rr + float(fitted)) / max(self.tokens, 1)

    def require_finite(self, where: str) -> None:
        """Refuse statistics of activations that overflowed.

        Raises:
            UserError: they are not finite.
        """
        if self.rows is not None:
            finite = self.rows.is_finite()
        else:
            finite = bool(torch.isfinite(self.xx_CC).all() and torch.isfinite(self.xr_CD).all())
        if not (finite and math.isfinite(self.rr)):
            raise UserError.of(
                where=where,
                expected="finite activations",
                found="NaN or infinity",
                remedy="The model overflows in this dtype; try --dtype bfloat16 or float32.",
            )

    def zeros(self) -> Tensor:
        """No change at all, `[D, C]`."""
        return torch.zeros(self._width, self._features, dtype=self.dtype, device=self._device)

    def _sum_up(self) -> None:
        """From now on moments alone are kept."""
        if self.rows is None:
            return
        rows, self.rows = self.rows, None
        features = self._features
        self._xx_CC = torch.zeros(features, features, dtype=self.dtype, device=self._device)
        self._xr_CD = torch.zeros(features, self._width, dtype=self.dtype, device=self._device)
        for x_NC, r_ND in rows.parts:
            self._add(x_NC, r_ND)

    def _add(self, x_NC: Tensor, r_ND: Tensor) -> None:
        assert self._xx_CC is not None and self._xr_CD is not None
        for block in self._blocks():
            self._xx_CC[block, block.start :] += x_NC[:, block].T @ x_NC[:, block.start :]
        self._xr_CD += x_NC.T @ r_ND
        self._mirrored = False

    def _blocks(self) -> Iterator[slice]:
        """Features, so many at a time that little more than half of the matrix is computed."""
        size = max(_BLOCK, math.ceil(self._features / _BLOCKS))
        for start in range(0, self._features, size):
            yield slice(start, min(start + size, self._features))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A chosen change of a linear layer, or none.

    `change_DC` is None where no ridge strength lowered the held-out error. Errors are weighted squared
    residuals a token, on held-out tokens.
    """

    change_DC: Change | None
    ridge: float | None
    error_before: float
    error_after: float

    def applied(self, own_DC: Tensor) -> Tensor | None:
        """The new weight, in the dtype of the one that it replaces; None where nothing was better."""
        return None if self.change_DC is None else changed(own_DC, self.change_DC)


def solve(gram: Gram, ridge: float, *, where: str) -> Tensor:
    """The change `[D, C]` for one ridge strength.

    Raises:
        UserError: the statistics are not finite.
    """
    gram.require_finite(where)
    return whole(_solved(gram, ridge))


def _solved(gram: Gram, ridge: float) -> Change:
    if gram.rows is not None:
        found = gram.rows.solve(ridge, gram.dtype) if gram.rows.parts else None
        return gram.zeros() if found is None else found
    scale = float(gram.xx_CC.diagonal().mean())
    if scale <= 0.0:
        return gram.zeros()
    system = gram.xx_CC.clone()
    system.diagonal().add_(ridge * scale)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return torch.linalg.lstsq(system, gram.xr_CD).solution.T
    return torch.cholesky_solve(gram.xr_CD, factor).T


def choose(fit: Gram, held_out: Gram, ridges: Sequence[float], *, where: str) -> Fit:
    """The strength whose change leaves the least error on held-out tokens, or no change at all.

    The error falls and then rises with the strength, so the search walks down along `ridges` (ascending), from where
    most fits end, and stops where neither neighbour is better: three or four of them are tried.

    Raises:
        UserError: the statistics are not finite.
    """
    fit.require_finite(where)
    held_out.require_finite(where)  # no comparison with NaN holds: the fit would be left out without a word
    before = held_out.error()
    best = Fit(change_DC=None, ridge=None, error_before=before, error_after=before)
    errors: dict[int, float] = {}

    def error(index: int) -> float:
        nonlocal best
        if not 0 <= index < len(ridges):
            return math.inf
        if index not in errors:
            change = _solved(fit, ridges[index])
            after = errors[index] = held_out.error(change)
            if after < best.error_after:
                best = Fit(change_DC=change, ridge=ridges[index], error_before=before, error_after=after)
        return errors[index]

    at = min(range(len(ridges)), key=lambda index: abs(ridges[index] - _USUAL))
    step = -1 if error(at - 1) < error(at) else 1
    while error(at + step) < error(at):
        at += step
    return best
