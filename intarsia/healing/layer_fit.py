"""One layer, fitted in closed form from given inputs toward given outputs. Knows nothing of the other layers.

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.activations.hooks import writer_of
from intarsia.activations.loop import Loop, Read
from intarsia.architecture.spec import Architecture, Part
from intarsia.building.layer import tensor_names
from intarsia.building.recipe_layers import Placed
from intarsia.checkpoint.tensor_file import give_back
from intarsia.healing.post_norm_fit import FitTokens, PostNorm, fit_norm, fit_weight
from intarsia.healing.ridge import Fit, Gram, choose
from intarsia.healing.settings import ClosedFormSettings
from intarsia.recipe.side_file import spooled

_ROWS = 256  # of a fitted tensor, written at a time


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """What was fitted on one module. Errors are on held-out tokens; `ridge` is None where nothing was better."""

    layer: int
    module: str
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True, kw_only=True)
class LayerText:
    """The text that a layer is fitted on. The layer is run over it once for every output projection."""

    loop: Loop
    # The hidden states before the layer, and those that it should give.
    inputs: Read
    targets: Read
    # The original layer whose other arguments it takes.
    source: int
    # The sequences that may be used.
    sequences: Sequence[slice] = (slice(None),)


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
    """Fit a layer's output projections in place, one after the other, each toward what is then missing.

    A norm after an output projection is fitted before it (see `post_norm_fit`).

    Args:
        module: its output projections get new parameters, so it must be no layer that is to stay as it is (see `twin`).
        index: what the layer is called in reports and errors.
        spool: on whose disk new tensors are kept, in files without a name; None: in memory.

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
        """An output projection's new weight with the error that it really leaves; None where that is no less than
        before."""
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
        """Moments of the inputs and of what is missing: to fit on, and of held-out sequences."""
        width, features = self.target.weight.shape
        fitted, held_out = (Gram(features, width, self.text.loop.stream.device) for _ in range(2))
        for batch in self._tokens():
            for gram, chosen_N in ((fitted, ~batch.held_N), (held_out, batch.held_N)):
                if bool(chosen_N.any()):
                    weight_N = batch.weight_N[chosen_N] * self.scale**2
                    gram.add(batch.x_NC[chosen_N], batch.missing_ND[chosen_N] / self.scale, weight_N)
        return fitted, held_out

    def _tokens(self) -> Iterator[FitTokens]:
        """The text's tokens after the layer as it is now, batch by batch."""
        text = self.text
        layer = Placed(self.module, text.source)
        for passed in text.loop.outputs(layer, text.inputs, sequences=text.sequences, inputs=(self.part,)):
            residual, x_BTC = text.loop.stream.residual, passed.inputs[self.part]
            wanted_BTD = residual(text.targets(passed.rows)).float()
            missing_BTD = wanted_BTD - residual(passed.after).float()
            held_B = torch.arange(passed.rows.start, passed.rows.stop) % self.settings.held_out == 0
            yield FitTokens(
                projection=self.target,
                x_NC=x_BTC.reshape(-1, x_BTC.shape[-1]),
                missing_ND=missing_BTD.reshape(-1, missing_BTD.shape[-1]),
                weight_N=_weights(wanted_BTD, passed.mask, self.settings.weighting).reshape(-1),
                held_N=held_B[:, None].expand(passed.ids.shape).reshape(-1).to(wanted_BTD.device),
            )


def _measured_again(part: Part, architecture: Architecture) -> bool:
    """Whether the layer is run once more after a fit: the experts after o_proj are chosen by what they read, which no
    regression foresees, and are not fitted themselves."""
    mixture = architecture.is_mixture("mlp") or architecture.removal_only
    return part == "attention" and mixture and not architecture.parallel


def _kept(weight: Tensor, spool: Path | None) -> npt.NDArray[np.float32]:
    """A fitted tensor as a recipe keeps it."""
    if spool is None:
        return weight.float().cpu().numpy()
    rows = (part.float().cpu().numpy() for part in weight.split(_ROWS))
    return spooled(rows, tuple(weight.shape), spool)


def _weights(wanted_BTD: Tensor, mask: Tensor | None, weighting: str) -> Tensor:
    """What each token counts, `[B, T]`."""
    if weighting == "relative":
        weight_BT = wanted_BTD.square().sum(dim=-1).clamp_min(1e-12).reciprocal()
    else:
        weight_BT = torch.ones(wanted_BTD.shape[:2], device=wanted_BTD.device)
    return weight_BT if mask is None else weight_BT * mask
