"""Fit one layer in closed form, from given inputs toward given outputs, independently of the other layers.

With a norm after an output projection (Gemma 2 and 3, OLMo 2 and 3) the part adds `s * g * y / rms(y)` with `y = W x`,
which is not linear in W. So there are two steps, each accepted only if it lowers the held-out error:

1. `g`, in which it is linear: one factor a row, by ridge regression of the missing residual on `s * y / rms(y)`.
2. `W`, by one Gauss-Newton step that takes rms(y) as given: `g * D` is regressed on `x / rms(y)`. The regression does
not know the effect after the norm, so the weight of every strength is measured there, on held-out
sequences.

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` features, `D` residual width, `K` strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.activations.loop import Loop, Read
from intarsia.activations.statistics import require_finite, writer_of
from intarsia.architecture.spec import Architecture, Part
from intarsia.building.layer import tensor_names
from intarsia.building.loaded_model import Placed
from intarsia.checkpoint.files import give_back
from intarsia.healing.losses import token_weights
from intarsia.healing.ridge import Fit, Gram, choose
from intarsia.healing.settings import ClosedFormSettings
from intarsia.recipe.schema import spooled

EVERY = 2
"""Try every second strength only: each keeps a weight in memory while held-out tokens are run."""
_SMALL = 0.05  # of the root mean square of g: rows that the norm scales by less are hardly changed


@dataclass(frozen=True, kw_only=True)
class FitTokens:
    """The tokens of a batch that went through the layer."""

    # The output projection, and its input.
    projection: nn.Module
    x_NC: Tensor
    # The missing residual after the layer.
    missing_ND: Tensor
    # Weight of each token.
    weight_N: Tensor
    # True at held-out tokens.
    held_N: Tensor

    @property
    def y_ND(self) -> Tensor:
        """The output of the output projection."""
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
        weight = self.norm.weight
        assert isinstance(weight, Tensor)
        return weight

    def added(self, y_ND: Tensor) -> Tensor:
        """What is added to the residual stream for an output of the projection."""
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
    """The norm weight of least error, in its dtype; None where the current one is best. One pass.

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
    require_finite((xr_D + held_xr_D).sum() + sum(squares), where)  # no comparison with NaN holds
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
    """The output projection's weight of least error, in its dtype; None where the current one is best.

    Two passes: one for the regression, one to measure. The returned fit holds no change, which would be a copy.

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
        if change_DC is not None:  # rounded as stored: what is measured is what is kept
            weights[ridge] = (own_DC.float() + inverse_D[:, None] * change_DC).to(own_DC.dtype)
    del gram  # held-out tokens are run now
    before, after_K = _held_out_errors(norm, own_DC, list(weights.values()), passes)
    require_finite(torch.tensor(before), where)
    best, kept = Fit(change_DC=None, ridge=None, error_before=before, error_after=before), None
    for (ridge, weight_DC), after in zip(weights.items(), after_K, strict=True):
        if math.isfinite(after) and after < best.error_after:
            best, kept = Fit(change_DC=None, ridge=ridge, error_before=before, error_after=after), weight_DC
    return kept, best


def _held_out_errors(
    norm: PostNorm, own_DC: Tensor, weights_KDC: Sequence[Tensor], passes: Passes
) -> tuple[float, list[float]]:
    """Weighted squared error per held-out token, with the current weight and with each of the others."""
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


_ROWS = 256  # of a fitted tensor, written at a time


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """The fit of one module. Errors are on held-out tokens; `ridge` is None where no fit was better."""

    layer: int
    module: str
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True, kw_only=True)
class LayerText:
    """The text that a layer is fitted on. The layer is run over it once for every output projection."""

    loop: Loop
    # The hidden states before the layer, and its targets.
    inputs: Read
    targets: Read
    # The original layer whose other arguments (masks, positions) it takes.
    source: int
    # The sequences to fit on.
    sequences: slice


def fittable(parts: Sequence[Part], architecture: Architecture) -> tuple[Part, ...]:
    """The parts whose output projection is fitted, in order. A mixture has no single one: o_proj takes its place."""
    able: list[Part] = ["attention" if architecture.is_mixture(part) else part for part in parts]
    return tuple(part for place, part in enumerate(able) if place == 0 or part != able[place - 1])


def passes(architecture: Architecture, parts: Sequence[Part]) -> int:
    """How often a layer is run to fit output projections."""
    return sum(
        (1 if architecture.norm_after(part) is None else 3) + _measured_again(part, architecture)
        for part in fittable(parts, architecture)
    )


def fit_layer(
    module: nn.Module,
    parts: Sequence[Part],
    text: LayerText,
    *,
    index: int,
    settings: ClosedFormSettings,
    spool: Path | None = None,
) -> tuple[dict[str, npt.NDArray[np.float32]], list[LayerFit]]:
    """Fit a layer's output projections in place, one after the other, each toward the residual still missing.

    A norm after an output projection is fitted before it.

    Args:
        module: its output projections get new parameters, so pass a `twin` of a layer that must not change.
        index: the layer's number in reports and errors.
        spool: folder on whose disk new tensors are kept, in unnamed files; None keeps them in memory.

    Returns:
        The new tensors by name, in float32 as rounded to the layer's dtype, and a report of every module.
    """
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    fits: list[LayerFit] = []
    architecture = text.loop.resident.architecture
    for part in fittable(parts, architecture):
        if writer_of(module, part, architecture) is None:
            continue
        fitter = PartFit(module, part, text, settings)
        steps = (fitter.norm, fitter.projection) if architecture.norm_after(part) else (fitter.projection,)
        for step in steps:
            name, weight, found = step(f"closed form, layer {index}")
            if weight is not None and _measured_again(part, architecture):
                weight, found = fitter.measured(weight, found)
            if weight is not None:
                module.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
                tensors[tensor_names(f"{name}.weight", architecture)[0]] = _kept(weight, spool)
            errors = {"error_before": found.error_before, "error_after": found.error_after}
            fits.append(LayerFit(layer=index, module=name, ridge=found.ridge, **errors))
    return tensors, fits


class PartFit:
    """The output projection of one part. Each step gives a module's name, its new weight if it is better, and the
    fit."""

    def __init__(self, module: nn.Module, part: Part, text: LayerText, settings: ClosedFormSettings) -> None:
        self.module, self.part, self.text, self.settings = module, part, text, settings
        architecture = text.loop.resident.architecture
        writer = writer_of(module, part, architecture)
        assert writer is not None, "asked for parts with an output projection only"
        self.name, self.scale = writer
        target = module.get_submodule(self.name)
        assert isinstance(target, nn.Linear)
        self.target = target
        norm = architecture.norm_after(part)
        self.norm_name = "" if norm is None else norm.module
        self.post_norm = (
            None if norm is None else PostNorm(module.get_submodule(norm.module), offset=norm.offset, scale=self.scale)
        )

    def norm(self, where: str) -> tuple[str, Tensor | None, Fit]:
        """The weight of the norm after the output projection."""
        assert self.post_norm is not None
        where = f"{where}, {self.norm_name}"
        return self.norm_name, *fit_norm(self.post_norm, self._tokens, self.settings.ridges, where=where)

    def projection(self, where: str) -> tuple[str, Tensor | None, Fit]:
        """The weight of the output projection."""
        own, ridges, where = self.target.weight, self.settings.ridges, f"{where}, {self.name}"
        if self.post_norm is not None:
            return self.name, *fit_weight(self.post_norm, own, self._tokens, ridges, where=where)
        found = choose(*self._moments(), ridges, where=where)
        give_back()
        return self.name, found.applied(own), replace(found, change_DC=None)  # as large as the weight in float32

    def measured(self, weight: Tensor, found: Fit) -> tuple[Tensor | None, Fit]:
        """An output projection's new weight with its measured error; None where that is no smaller than before."""
        own = self.target.weight
        self.target.weight = nn.Parameter(weight, requires_grad=False)
        total, tokens = 0.0, 0
        for batch in self._tokens():
            weight_N = batch.weight_N[batch.held_N]
            total += float((weight_N * batch.missing_ND[batch.held_N].square().sum(-1)).sum())
            tokens += int((weight_N > 0).sum())
        self.target.weight = own
        after = total / max(tokens, 1)
        if after < found.error_before:
            return weight, replace(found, error_after=after)
        return None, replace(found, change_DC=None, ridge=None, error_after=found.error_before)

    def _moments(self) -> tuple[Gram, Gram]:
        """Moments of inputs and missing residuals: of fitted and of held-out sequences."""
        width, features = self.target.weight.shape
        fitted, held_out = (Gram(features, width, self.text.loop.stream.device) for _ in range(2))
        for batch in self._tokens():
            for gram, chosen_N in ((fitted, ~batch.held_N), (held_out, batch.held_N)):
                if bool(chosen_N.any()):
                    weight_N = batch.weight_N[chosen_N] * self.scale**2
                    gram.add(batch.x_NC[chosen_N], batch.missing_ND[chosen_N] / self.scale, weight_N)
        return fitted, held_out

    def _tokens(self) -> Iterator[FitTokens]:
        """The text's tokens after the current layer, batch by batch."""
        text = self.text
        layer = Placed(self.module, text.source)
        for passed in text.loop.outputs(layer, text.inputs, sequences=text.sequences, inputs=(self.part,)):
            residual, x_BTC = text.loop.stream.residual, passed.inputs[self.part]
            wanted_BTD = residual(text.targets(passed.rows)).float()
            weight_BT = token_weights(wanted_BTD.square().sum(dim=-1), passed.mask, self.settings.weighting)
            missing_BTD = wanted_BTD - residual(passed.after).float()
            held_B = torch.arange(passed.rows.start, passed.rows.stop) % self.settings.held_out == 0
            yield FitTokens(
                projection=self.target,
                x_NC=x_BTC.reshape(-1, x_BTC.shape[-1]),
                missing_ND=missing_BTD.reshape(-1, missing_BTD.shape[-1]),
                weight_N=weight_BT.reshape(-1),
                held_N=held_B[:, None].expand(passed.ids.shape).reshape(-1).to(wanted_BTD.device),
            )


def _measured_again(part: Part, architecture: Architecture) -> bool:
    """Whether to run the layer again after a fit: a new o_proj changes the routing, which no regression foresees."""
    mixture = architecture.is_mixture("mlp") or architecture.removal_only
    return part == "attention" and mixture and not architecture.parallel


def _kept(weight: Tensor, spool: Path | None) -> npt.NDArray[np.float32]:
    """A fitted tensor in the form that recipes keep."""
    if spool is None:
        return weight.float().cpu().numpy()
    rows = (part.float().cpu().numpy() for part in weight.split(_ROWS))
    return spooled(rows, tuple(weight.shape), spool)
