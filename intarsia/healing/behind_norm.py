"""Least squares for a read-out with a norm behind it (Gemma 2 and 3, OLMo 2 and 3).

What such a part adds is `s * g * y / rms(y)` with `y = W x`: not linear in W, so that the missing residual is not what
a change of W gives. Two steps, each taken only where it lowers the held-out error:

1. `g`, in which it is linear: one factor a row, by ridge regression of the missing residual on `s * y / rms(y)`.
2. `W`, by one Gauss-Newton step that takes rms(y) as given: `g * D` is regressed on `x / rms(y)`. How far this leads is
   not asked of the regression: every strength's change is put in, and judged by what the norm makes of it on held-out
   sequences.

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` features, `D` residual width, `K` strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intarsia.errors import UserError
from intarsia.healing.few_tokens import blocks
from intarsia.healing.ridge import Fit, Gram
from intarsia.healing.scratch import IN_MEMORY, Scratch

EVERY = 2
"""Every how-manieth strength is tried: each that is tried has a weight in memory while held-out tokens are run."""
_ROWS = 1024  # of a weight, converted at a time
_SMALL = 0.05  # of the root mean square of g: rows that the norm scales by less are hardly changed


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A batch behind the layer, its real tokens in a row.

    `x_NC` goes into the read-out, `y_ND` comes out of it; `missing_ND` is missing behind the layer; `weight_N` is
    what a token counts; `held_N` tells held-out tokens.
    """

    x_NC: Tensor
    y_ND: Tensor
    missing_ND: Tensor
    weight_N: Tensor
    held_N: Tensor


Passes = Callable[[], Iterator[Passed]]
"""Runs the layer over all batches, again every time it is called."""


class NormBehind:
    """The norm behind a read-out, taken apart. `offset`: it multiplies by `weight + offset`; `scale`: the model's s."""

    def __init__(self, norm: nn.Module, *, offset: float, scale: float) -> None:
        self.norm = norm
        self.offset = offset
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The norm's own weight."""
        weight = self.norm.weight
        assert isinstance(weight, Tensor)
        return weight

    def added(self, y_ND: Tensor) -> Tensor:
        """What the residual stream gets from the read-out's output."""
        return self.scale * self.norm(y_ND).float()

    def unit(self, y_ND: Tensor) -> Tensor:
        """The read-out's output, normalised and not yet multiplied."""
        own = self.weight
        try:
            self.norm.weight = nn.Parameter(torch.full_like(own, 1.0 - self.offset), requires_grad=False)
            plain = self.norm(y_ND).float()
            bias = getattr(self.norm, "bias", None)
            return plain if bias is None else plain - bias.float()
        finally:
            self.norm.weight = own

    def set_weight(self, weight_D: Tensor) -> None:
        """Give the norm another weight."""
        self.norm.weight = nn.Parameter(weight_D, requires_grad=False)


def fit_norm(behind: NormBehind, passes: Passes, ridges: Sequence[float], *, where: str) -> tuple[Tensor | None, Fit]:
    """The norm's weight that comes closest to what is missing, in its dtype; None where its own is best. One pass.

    Raises:
        UserError: activations are not finite.
    """
    own_D = behind.weight
    # Per row: squares of the features, features times residuals; squares of the residuals; tokens: fitted and held out.
    sums = [[torch.zeros(own_D.shape[0], dtype=torch.float64, device=own_D.device) for _ in range(2)] for _ in range(2)]
    squares, tokens = [0.0, 0.0], [0, 0]
    for passed in passes():
        feature_ND = behind.scale * behind.unit(passed.y_ND)
        for part, chosen in enumerate((~passed.held_N, passed.held_N)):
            weight_N1 = passed.weight_N[chosen][:, None]
            x_ND, r_ND = feature_ND[chosen], passed.missing_ND[chosen]
            sums[part][0] += (weight_N1 * x_ND.square()).sum(0).double()
            sums[part][1] += (weight_N1 * x_ND * r_ND).sum(0).double()
            squares[part] += float((weight_N1 * r_ND.square()).sum())
            tokens[part] += int((weight_N1 > 0).sum())
    (xx_D, xr_D), (held_xx_D, held_xr_D) = sums
    _require_finite(sum(squares) + float(xr_D.sum() + held_xr_D.sum()), where)
    before = squares[1] / max(tokens[1], 1)
    best, kept = Fit(change_DC=None, ridge=None, error_before=before, error_after=before), None
    scale = float(xx_D.mean())
    for ridge in ridges if scale > 0.0 else ():
        weight_D = (own_D.double() + xr_D / (xx_D + ridge * scale)).to(own_D.dtype)
        change_D = weight_D.double() - own_D.double()
        fitted = float((change_D * (change_D * held_xx_D - 2.0 * held_xr_D)).sum())
        after = (squares[1] + fitted) / max(tokens[1], 1)
        if after < best.error_after:
            best, kept = Fit(change_DC=None, ridge=ridge, error_before=before, error_after=after), weight_D
    return kept, best


def fit_weight(
    behind: NormBehind,
    own_DC: Tensor,
    passes: Passes,
    ridges: Sequence[float],
    *,
    where: str,
    scratch: Scratch = IN_MEMORY,
) -> tuple[Tensor | None, Fit]:
    """The read-out's weight that comes closest to what is missing, in its dtype; None where its own is best.

    Two passes: one for the regression, one to judge. Every other strength is tried. The fit holds no change: that
    would be a copy.

    Raises:
        UserError: activations are not finite.
    """
    width, features = own_DC.shape
    gram = Gram(features, width, own_DC.device, scratch=scratch)
    for passed in passes():
        chosen = ~passed.held_N
        if not bool(chosen.any()):
            continue
        rms_N1 = passed.y_ND[chosen].float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        weight_N = passed.weight_N[chosen] * behind.scale**2
        gram.add(passed.x_NC[chosen].float() / rms_N1, passed.missing_ND[chosen] / behind.scale, weight_N)
    gram.require_finite(where)
    g_D = behind.weight.double() + behind.offset
    small = _SMALL * float(g_D.square().mean().sqrt())
    inverse_D = (g_D / (g_D.square() + small**2)).to(gram.dtype) if small else torch.zeros_like(g_D)
    steps = list(ridges[::EVERY]) if gram.tokens else []
    weights_KDC = [_stepped(own_DC, gram, ridge, inverse_D) for ridge in steps]
    del gram  # held-out tokens are run now
    before, after_K = _judge(behind, own_DC, weights_KDC, passes)
    _require_finite(before, where)
    best, kept = Fit(change_DC=None, ridge=None, error_before=before, error_after=before), None
    for ridge, weight_DC, after in zip(steps, weights_KDC, after_K, strict=True):
        if math.isfinite(after) and after < best.error_after:
            best, kept = Fit(change_DC=None, ridge=ridge, error_before=before, error_after=after), weight_DC
    return kept, best


def _stepped(own_DC: Tensor, gram: Gram, ridge: float, inverse_D: Tensor) -> Tensor:
    """The weight behind a step, as it would be stored: what is judged is what is kept."""
    found_DC = torch.empty_like(own_DC)
    for rows, block in blocks(gram.change(ridge)):
        found_DC[rows] = (own_DC[rows].to(gram.dtype) + inverse_D[rows, None] * block).to(own_DC.dtype)
    return found_DC


def _require_finite(total: float, where: str) -> None:
    """No comparison with NaN holds: a fit would be left out without a word."""
    if not math.isfinite(total):
        raise UserError.of(
            where=where,
            expected="finite activations",
            found="NaN or infinity",
            remedy="The model overflows in this dtype; try --dtype bfloat16 or float32.",
        )


def _judge(
    behind: NormBehind, own_DC: Tensor, weights_KDC: Sequence[Tensor], passes: Passes
) -> tuple[float, list[float]]:
    """Weighted squared error a held-out token, with the weight as it is and with each of the others."""
    before, tokens = 0.0, 0
    after_K = [0.0] * len(weights_KDC)
    for passed in passes():
        chosen = passed.held_N
        if not bool(chosen.any()):
            continue
        x_NC, y_ND, missing_ND = passed.x_NC[chosen], passed.y_ND[chosen], passed.missing_ND[chosen]
        weight_N1 = passed.weight_N[chosen][:, None]
        given_ND = behind.added(y_ND)
        before += float((weight_N1 * missing_ND.square()).sum())
        tokens += int((weight_N1 > 0).sum())
        for index, weight_DC in enumerate(weights_KDC):
            other_ND = y_ND.to(torch.float32, copy=True)
            for start in range(0, len(own_DC), _ROWS):
                rows = slice(start, start + _ROWS)
                other_ND[:, rows] += x_NC.float() @ (weight_DC[rows].float() - own_DC[rows].float()).T
            left_ND = missing_ND - (behind.added(other_ND.to(y_ND.dtype)) - given_ND)
            after_K[index] += float((weight_N1 * left_ND.square()).sum())
    return before / max(tokens, 1), [after / max(tokens, 1) for after in after_K]
