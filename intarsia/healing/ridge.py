"""Ridge regression from streamed Gram matrices. Pure tensor functions.

A linear layer `y = W x` is changed by `D` so that `(W + D) x` comes closer to a target: with the residual
`r = target - W x`, minimise `sum_n w_n |r_n - D x_n|^2 + ridge * s * |D|^2`. `s` is the mean of the features' weighted
second moments, so `ridge` is relative to their scale. As `ridge` grows `D` goes to zero: shrinkage is towards the
weights as they are.

Shape suffixes: `N` tokens, `C` features, `D` residual width, `K` some of the residual width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import UserError
from intarsia.healing.few_tokens import Change, Rows, changed, whole
from intarsia.healing.scratch import IN_MEMORY, Pile, Scratch
from intarsia.healing.symmetric import Symmetric

_USUAL = 0.3
"""Most fits of the demo model's layers choose a strength near this one."""

SOLVED_AT_ONCE = 1024
"""Outputs that are solved for, or judged, at a time."""


def rows_at_most(features: int, *, held_out: bool = False) -> int:
    """How many tokens are kept as they are, and no moments of them.

    Of held-out tokens errors alone are asked for, which rows give with no more work than moments; as many as are kept
    take no more memory in a dtype of two bytes.
    """
    return 2 * features if held_out else features // 2


class Gram:
    """Weighted second moments of features and residuals, accumulated in float64 from float32 products.

    Few tokens are kept as they are instead (`intarsia.healing.few_tokens`): less memory, and no more work where what is
    asked of them is an error. Of the symmetric matrix little more than half is kept (`intarsia.healing.symmetric`).
    """

    def __init__(
        self,
        features: int,
        width: int,
        device: torch.device,
        *,
        held_out: bool = False,
        scratch: Scratch = IN_MEMORY,
    ) -> None:
        """
        Args:
            held_out: no change is asked for, errors alone.
            scratch: where waits what is not needed for a while.
        """
        # MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.rr = 0.0
        self.tokens = 0
        self.rows: Rows | None = Rows(rows_at_most(features, held_out=held_out), scratch)
        self._features, self._width, self._device, self._scratch = features, width, device, scratch
        self._xx: Symmetric | None = None
        self._xr: list[Tensor] = []  # moments with residuals `[C, K]`, of some of the residual width each
        self._waiting: Pile | None = None

    def add(self, x_NC: Tensor, r_ND: Tensor, weight_N: Tensor) -> None:
        """Count a batch of tokens: features, residuals that are missing, and weights (0 leaves a token out)."""
        r_ND, weight_N = r_ND.float(), weight_N.float()
        if self.rows is None or not self.rows.take(x_NC, r_ND, weight_N):
            self._sum_up()
            self._add(x_NC, r_ND, weight_N)
        self.rr += float((weight_N * r_ND.square().sum(dim=1)).cpu().double().sum())
        self.tokens += int((weight_N > 0).sum())

    def error(self, change: Change | None = None) -> float:
        """Weighted squared error a token that is left when the weights change by so much (None: not at all)."""
        if change is None:
            return self.rr / max(self.tokens, 1)
        if self.rows is not None:
            return (self.rr + self.rows.fitted(change)) / max(self.tokens, 1)
        assert self._xx is not None
        total, change_DC = self.rr, whole(change)
        for index, columns in enumerate(self._columns()):
            change_CK = change_DC[columns].T.to(self.dtype)
            fitted_CK = self._xx.times(change_CK).sub_(self._residuals(index), alpha=2.0)
            total += float(fitted_CK.mul_(change_CK).sum())
        return total / max(self.tokens, 1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Second moments of the features `[C, C]`, and moments of features and residuals `[C, D]`. No rows are kept
        from now on."""
        self._sum_up()
        assert self._xx is not None
        return self._xx.whole(), torch.cat([self._residuals(index) for index in range(len(self._xr))], dim=1)

    def require_finite(self, where: str) -> None:
        """Refuse statistics of activations that overflowed.

        Raises:
            UserError: they are not finite.
        """
        # No product of features is larger than the larger one's square, and so with residuals.
        finite = self.rows is not None and self.rows.is_finite
        if self._xx is not None:
            finite = bool(torch.isfinite(self._xx.diagonal()).all())
        if not (finite and math.isfinite(self.rr)):
            raise UserError.of(
                where=where,
                expected="finite activations",
                found="NaN or infinity",
                remedy="The model overflows in this dtype; try --dtype bfloat16 or float32.",
            )

    def change(self, ridge: float) -> Change:
        """The change of least error with one ridge strength, float32. Statistics must be finite."""
        if self.rows is not None:
            found = self.rows.solve(ridge, self.dtype) if self.rows.tokens else None
            return self._nothing() if found is None else found
        assert self._xx is not None
        scale = float(self._xx.diagonal().mean())
        if scale <= 0.0:
            return self._nothing()
        self._set_aside()
        self._xx.factorise(ridge * scale)
        change_DC = self._nothing()
        for index, columns in enumerate(self._columns()):
            change_DC[columns].copy_(self._xx.solve_(self._residuals(index)).T)
        return change_DC

    def _nothing(self) -> Tensor:
        return torch.zeros(self._width, self._features, device=self._device)

    def _sum_up(self) -> None:
        """From now on moments alone are kept."""
        if self.rows is None:
            return
        rows, self.rows = self.rows, None
        self._xx = Symmetric(self._features, dtype=self.dtype, device=self._device, scratch=self._scratch)
        self._xr = [
            torch.zeros(self._features, columns.stop - columns.start, dtype=self.dtype, device=self._device)
            for columns in self._columns()
        ]
        for x_NC, r_ND, weight_N in rows.parts():
            self._add(x_NC, r_ND, weight_N)

    def _add(self, x_NC: Tensor, r_ND: Tensor, weight_N: Tensor) -> None:
        assert self._xx is not None and self._waiting is None, "moments are whole once a change was asked for"
        root_N1 = weight_N.sqrt()[:, None]
        x_NC, r_ND = x_NC.to(torch.float32, copy=True).mul_(root_N1), r_ND * root_N1
        self._xx.add(x_NC)
        for columns, moments_CK in zip(self._columns(), self._xr, strict=True):
            for start in range(0, self._features, SOLVED_AT_ONCE):
                features = slice(start, start + SOLVED_AT_ONCE)
                moments_CK[features] += x_NC[:, features].T @ r_ND[:, columns]

    def _set_aside(self) -> None:
        """Moments with residuals go into a file, where there is one for what is not needed."""
        if self._scratch.in_files and self._waiting is None:
            self._waiting = Pile(self._scratch)
            while self._xr:
                self._waiting.put(self._xr.pop(0))

    def _residuals(self, index: int) -> Tensor:
        """A copy of moments with residuals."""
        return self._xr[index].clone() if self._waiting is None else self._waiting.get(index)

    def _columns(self) -> Iterator[slice]:
        for start in range(0, self._width, SOLVED_AT_ONCE):
            yield slice(start, min(start + SOLVED_AT_ONCE, self._width))


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
            change = fit.change(ridges[index])
            after = errors[index] = held_out.error(change)
            if after < best.error_after:
                best = Fit(change_DC=change, ridge=ridges[index], error_before=before, error_after=after)
        return errors[index]

    at = min(range(len(ridges)), key=lambda index: abs(ridges[index] - _USUAL))
    step = -1 if error(at - 1) < error(at) else 1
    while error(at + step) < error(at):
        at += step
    return best
