"""Least squares for an output projection with a norm after it (Gemma 2 and 3, OLMo 2 and 3).

What such a part adds is `s * g * y / rms(y)` with `y = W x`: not linear in W, so that the missing residual is not what
a change of W gives. Two steps, each taken only where it lowers the held-out error:

1. `g`, in which it is linear: one factor a row, by ridge regression of the missing residual on `s * y / rms(y)`.
2. `W`, by one Gauss-Newton step that takes rms(y) as given: `g * D` is regressed on `x / rms(y)`. The regression does
   not say how far this leads: the weight of every strength is measured after the norm, on held-out
   sequences.

Shape suffixes: `N` tokens, `C` features, `D` residual width, `K` strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intarsia.healing.ridge import Fit, Gram, require_finite

EVERY = 2
"""Every second strength is tried: each that is tried has a weight in memory while held-out tokens are run."""
_SMALL = 0.05  # of the root mean square of g: rows that the norm scales by less are hardly changed


@dataclass(frozen=True, kw_only=True)
class FitTokens:
    """The tokens of a batch that went through the layer."""

    # The output projection, and what goes into it.
    projection: nn.Module
    x_NC: Tensor
    # What is missing after the layer.
    missing_ND: Tensor
    # What a token counts.
    weight_N: Tensor
    # True at held-out tokens.
    held_N: Tensor

    @property
    def y_ND(self) -> Tensor:
        """What comes out of the output projection."""
        y_ND: Tensor = self.projection(self.x_NC)
        return y_ND


Passes = Callable[[], Iterator[FitTokens]]
"""Runs the layer over all batches, again every time it is called."""


class PostNorm:
    """The norm after an output projection, taken apart. `offset`: it multiplies by `weight + offset`; `scale`: the
    model's s."""

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
        """What the residual stream gets from the projection's output."""
        return self.scale * self.norm(y_ND).float()

    def unit(self, y_ND: Tensor) -> Tensor:
        """The projection's output, normalised and not yet multiplied."""
        own = self.weight
        try:
            self.norm.weight = nn.Parameter(torch.full_like(own, 1.0 - self.offset), requires_grad=False)
            plain = self.norm(y_ND).float()
            bias = getattr(self.norm, "bias", None)
            return plain if bias is None else plain - bias.float()
        finally:
            self.norm.weight = own


def fit_norm(norm: PostNorm, passes: Passes, ridges: Sequence[float], *, where: str) -> tuple[Tensor | None, Fit]:
    """The norm's weight that comes closest to what is missing, in its dtype; None where its own is best. One pass.

    Raises:
        UserError: activations are not finite.
    """
    own_D = norm.weight
    # Per row: squares of the features, features times residuals; squares of the residuals; tokens: fitted and held out.
    sums = [[torch.zeros(own_D.shape[0], dtype=torch.float64, device=own_D.device) for _ in range(2)] for _ in range(2)]
    squares, tokens = [0.0, 0.0], [0, 0]
    for batch in passes():
        feature_ND = norm.scale * norm.unit(batch.y_ND)
        for part, chosen_N in enumerate((~batch.held_N, batch.held_N)):
            weight_N1 = batch.weight_N[chosen_N][:, None]
            x_ND, r_ND = feature_ND[chosen_N], batch.missing_ND[chosen_N]
            sums[part][0] += (weight_N1 * x_ND.square()).sum(0).double()
            sums[part][1] += (weight_N1 * x_ND * r_ND).sum(0).double()
            squares[part] += float((weight_N1 * r_ND.square()).sum())
            tokens[part] += int((weight_N1 > 0).sum())
    (xx_D, xr_D), (held_xx_D, held_xr_D) = sums
    require_finite(sum(squares) + float(xr_D.sum() + held_xr_D.sum()), where)
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
    norm: PostNorm, own_DC: Tensor, passes: Passes, ridges: Sequence[float], *, where: str
) -> tuple[Tensor | None, Fit]:
    """The output projection's weight that comes closest to what is missing, in its dtype; None where its own is best.

    Two passes: one for the regression, one to measure. The fit holds no change: that would be a copy.

    Raises:
        UserError: activations are not finite.
    """
    width, features = own_DC.shape
    gram = Gram(features, width, own_DC.device)
    for batch in passes():
        chosen_N = ~batch.held_N
        if bool(chosen_N.any()):
            rms_N1 = batch.y_ND[chosen_N].float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            weight_N = batch.weight_N[chosen_N] * norm.scale**2
            gram.add(batch.x_NC[chosen_N].float() / rms_N1, batch.missing_ND[chosen_N] / norm.scale, weight_N)
    gram.require_finite(where)
    g_D = norm.weight.float() + norm.offset
    small = _SMALL * float(g_D.square().mean().sqrt())
    inverse_D = g_D / (g_D.square() + small**2) if small else torch.zeros_like(g_D)
    weights: dict[float, Tensor] = {}
    for ridge in ridges[::EVERY]:
        change_DC = gram.change(ridge)
        if change_DC is not None:  # as it would be stored: what is measured is what is kept
            weights[ridge] = (own_DC.float() + inverse_D[:, None] * change_DC).to(own_DC.dtype)
    del gram  # held-out tokens are run now
    before, after_K = _held_out_errors(norm, own_DC, list(weights.values()), passes)
    require_finite(before, where)
    best, kept = Fit(change_DC=None, ridge=None, error_before=before, error_after=before), None
    for (ridge, weight_DC), after in zip(weights.items(), after_K, strict=True):
        if math.isfinite(after) and after < best.error_after:
            best, kept = Fit(change_DC=None, ridge=ridge, error_before=before, error_after=after), weight_DC
    return kept, best


def _held_out_errors(
    norm: PostNorm, own_DC: Tensor, weights_KDC: Sequence[Tensor], passes: Passes
) -> tuple[float, list[float]]:
    """Weighted squared error per held-out token, with the weight as it is and with each of the others."""
    before, tokens = 0.0, 0
    after_K = [0.0] * len(weights_KDC)
    for batch in passes():
        chosen_N = batch.held_N
        if not bool(chosen_N.any()):
            continue
        x_NC, y_ND, missing_ND = batch.x_NC[chosen_N].float(), batch.y_ND[chosen_N], batch.missing_ND[chosen_N]
        weight_N1 = batch.weight_N[chosen_N][:, None]
        given_ND = norm.added(y_ND)
        before += float((weight_N1 * missing_ND.square()).sum())
        tokens += int((weight_N1 > 0).sum())
        for index, weight_DC in enumerate(weights_KDC):
            other_ND = y_ND.float() + x_NC @ (weight_DC.float() - own_DC.float()).T
            left_ND = missing_ND - (norm.added(other_ND.to(y_ND.dtype)) - given_ND)
            after_K[index] += float((weight_N1 * left_ND.square()).sum())
    return before / max(tokens, 1), [after / max(tokens, 1) for after in after_K]
