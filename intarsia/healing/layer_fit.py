"""One layer, fitted in closed form from given inputs towards given outputs. Knows nothing of the other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from intarsia.anatomy.spec import Anatomy, Part
from intarsia.calibration.stream import LayerStream
from intarsia.healing.part_fit import Batches, FitRule, PartFit
from intarsia.healing.scratch import IN_MEMORY, Scratch
from intarsia.recipe.side_file import spooled

_ROWS = 256  # of a fitted tensor, written at a time


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """What was fitted on one read-out. Errors are on held-out tokens; `ridge` is None where nothing was better."""

    layer: int
    module: str
    ridge: float | None
    error_before: float
    error_after: float


def fittable(parts: Sequence[Part], anatomy: Anatomy) -> tuple[Part, ...]:
    """The parts of which the read-out is fitted, in order. A mixture's is no single matrix: o_proj takes its place."""
    able: list[Part] = ["attention" if anatomy.is_mixture(part) else part for part in parts]
    return tuple(part for place, part in enumerate(able) if place == 0 or part != able[place - 1])


def passes(anatomy: Anatomy, parts: Sequence[Part]) -> int:
    """How often a layer is run to fit read-outs."""
    return sum(
        (1 if anatomy.norm_after(part) is None else 3) + _judged_anew(part, anatomy)
        for part in fittable(parts, anatomy)
    )


def _judged_anew(part: Part, anatomy: Anatomy) -> bool:
    """Whether the layer is run once more behind a fit: routing jumps with what it reads, and nothing is fitted then."""
    return part == "attention" and anatomy.is_mixture("mlp") and not anatomy.parallel


def kept(weight: Tensor, scratch: Scratch) -> npt.NDArray[np.float32]:
    """A fitted tensor as a recipe keeps it: in memory, or mapped from a file without a name (see `mapped_arrays`).

    Raises:
        UserError: the disk is full.
    """
    if not scratch.in_files:
        return weight.float().cpu().numpy()
    rows = (part.float().cpu().numpy() for part in weight.split(_ROWS))
    return spooled(rows, tuple(weight.shape), scratch.folder)


def fit_layer(
    module: nn.Module,
    parts: Sequence[Part],
    batches: Batches,
    *,
    index: int,
    stream: LayerStream,
    anatomy: Anatomy,
    rule: FitRule,
    scratch: Scratch = IN_MEMORY,
) -> tuple[dict[str, npt.NDArray[np.float32]], list[LayerFit]]:
    """Fit a layer's read-outs in place, one after the other, each towards what is then missing.

    A norm behind a read-out is fitted before it (see `behind_norm`).

    Args:
        module: its read-outs get new parameters, so it must be no layer that is to stay as it is (see `twin`).
        index: what the layer is called in reports and errors.
        scratch: where new tensors are kept, and moments wait that are not needed for a while.

    Returns:
        The new tensors by name, in float32 as rounded to the layer's dtype, and a report of every read-out.

    Raises:
        UserError: activations are not finite.
    """
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    fits: list[LayerFit] = []
    for part in fittable(parts, anatomy):
        fitter = PartFit(module, part, batches, stream=stream, anatomy=anatomy, rule=rule, scratch=scratch)
        steps = (fitter.norm, fitter.read_out) if anatomy.norm_after(part) else (fitter.read_out,)
        for step in steps:
            name, weight, found = step(f"closed form, layer {index}")
            if weight is not None and _judged_anew(part, anatomy):
                weight, found = fitter.judged(weight, found)
            if weight is not None:
                module.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
                tensors[f"{name}.weight"] = kept(weight, scratch)
            fits.append(
                LayerFit(
                    layer=index,
                    module=name,
                    ridge=found.ridge,
                    error_before=found.error_before,
                    error_after=found.error_after,
                )
            )
    return tensors, fits
