"""One layer, fitted in closed form from given inputs towards given outputs. Knows nothing of the other layers.

Shape suffixes: `B` sequences of a batch, `T` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.anatomy.spec import Anatomy, Part
from intarsia.calibration.stream import LayerCall, LayerStream
from intarsia.healing.ridge import Gram, choose


@dataclass(frozen=True, kw_only=True)
class FitBatch:
    """Sequences `rows`, as they go into a layer and as they should come out of it.

    `call` are the layer's other arguments. `mask` is True at real tokens; None where all are.
    """

    rows: slice
    h_BTD: Tensor
    wanted_BTD: Tensor
    call: LayerCall
    mask: Tensor | None


Batches = Callable[[], Iterable[FitBatch]]
"""Gives all batches, again every time it is called: a layer is run once for every read-out."""


@dataclass(frozen=True, kw_only=True)
class FitRule:
    """What a token counts, every how-manieth sequence is held out, and ridge strengths to choose from.

    `relative`: a token counts with 1 / |wanted|^2; `uniform`: all the same.
    """

    weighting: Literal["relative", "uniform"]
    held_out: int
    ridges: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """What was fitted on one read-out. Errors are on held-out tokens; `ridge` is None where nothing was better."""

    layer: int
    module: str
    ridge: float | None
    error_before: float
    error_after: float


def fit_layer(
    module: nn.Module,
    parts: Sequence[Part],
    batches: Batches,
    *,
    index: int,
    stream: LayerStream,
    anatomy: Anatomy,
    rule: FitRule,
) -> tuple[dict[str, npt.NDArray[np.float32]], list[LayerFit]]:
    """Fit a layer's read-outs in place, one after the other, each towards what is then missing.

    Args:
        module: its read-outs get new parameters, so it must be no layer that is to stay as it is (see `twin`).
        index: what the layer is called in reports and errors.

    Returns:
        The new tensors by name, in float32 as rounded to the layer's dtype, and a report of every read-out.

    Raises:
        UserError: activations are not finite.
    """
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    fits: list[LayerFit] = []
    for part in parts:
        name = anatomy.writer(part).module
        grams = moments(module, part, batches, stream=stream, anatomy=anatomy, rule=rule)
        found = choose(*grams, rule.ridges, where=f"closed form, layer {index}, {name}")
        fits.append(
            LayerFit(
                layer=index,
                module=name,
                ridge=found.ridge,
                error_before=found.error_before,
                error_after=found.error_after,
            )
        )
        if found.change_DC is not None:
            target = module.get_submodule(name)
            assert isinstance(target, nn.Linear)
            weight = (target.weight.float() + found.change_DC.float()).to(target.weight.dtype)
            target.weight = nn.Parameter(weight, requires_grad=False)
            tensors[f"{name}.weight"] = weight.float().cpu().numpy()
    return tensors, fits


def moments(
    module: nn.Module, part: Part, batches: Batches, *, stream: LayerStream, anatomy: Anatomy, rule: FitRule
) -> tuple[Gram, Gram]:
    """Moments of a read-out's inputs and of what is missing behind the layer: to fit on, and of held-out sequences."""
    linear = anatomy.writer(part)
    features = anatomy.cut_size(linear)
    fitted, held_out = (Gram(features, anatomy.width, stream.device) for _ in range(2))
    for batch in batches():
        with _inputs(module, linear.module) as x:
            out_BTD = stream.run(module, batch.h_BTD, batch.call)
        missing_BTD = batch.wanted_BTD.float() - out_BTD.float()
        weight_BT = _weights(batch, rule.weighting)
        held = torch.arange(batch.rows.start, batch.rows.stop, device=weight_BT.device) % rule.held_out == 0
        x_BTC = x[0].reshape(*batch.h_BTD.shape[:2], features)
        for gram, chosen in ((fitted, ~held), (held_out, held)):
            if bool(chosen.any()):
                gram.add(
                    x_BTC[chosen].reshape(-1, features),
                    missing_BTD[chosen].reshape(-1, anatomy.width),
                    weight_BT[chosen].reshape(-1),
                )
    return fitted, held_out


def _weights(batch: FitBatch, weighting: str) -> Tensor:
    if weighting == "relative":
        weight_BT = batch.wanted_BTD.float().square().sum(dim=-1).clamp_min(1e-12).reciprocal()
    else:
        weight_BT = torch.ones(batch.wanted_BTD.shape[:2], device=batch.wanted_BTD.device)
    return weight_BT if batch.mask is None else weight_BT * batch.mask


@contextmanager
def _inputs(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """What a read-out is given while the layer runs."""
    seen: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
