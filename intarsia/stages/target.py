"""From what the user asks for to a depth."""

from __future__ import annotations

import math

from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError


def target_depth(checkpoint: Checkpoint, *, layers: int | None, sparsity: float | None) -> int:
    """The number of layers to keep.

    `sparsity` is the share of all parameters to remove: the result is the greatest depth that removes at least that
    much.

    Raises:
        UserError: not exactly one of the two is given, or it cannot be reached by depth.
    """
    return depth_for(checkpoint.architecture, checkpoint.parameters, layers=layers, sparsity=sparsity)


def depth_for(architecture: Architecture, parameters: int, *, layers: int | None, sparsity: float | None) -> int:
    """`target_depth`, of a model with so many parameters.

    Raises:
        UserError: as `target_depth`.
    """
    depth = architecture.n_layers
    if (layers is None) == (sparsity is None):
        raise UserError.of(
            where="target",
            expected="either --layers or --sparsity",
            found="both" if layers is not None else "neither",
            remedy="Give one of them.",
        )
    if layers is not None:
        if not 1 <= layers < depth:
            raise UserError.of(
                where="--layers",
                expected=f"a depth from 1 to {depth - 1} (the model has {depth} layers)",
                found=str(layers),
                remedy="Ask for fewer layers than the model has.",
            )
        return layers
    assert sparsity is not None
    if not 0.0 < sparsity < 1.0:
        raise UserError.of(
            where="--sparsity",
            expected="a number between 0 and 1 (neither of them)",
            found=str(sparsity),
            remedy="Give the share of all parameters to remove, such as 0.3.",
        )
    per_layer = architecture.layer_parameters / parameters
    removed = math.ceil(sparsity / per_layer - 1e-9)
    if removed >= depth:
        raise UserError.of(
            where="--sparsity",
            expected=f"at most {(depth - 1) * per_layer:.4f}: {depth} layers hold {depth * per_layer:.1%} of the "
            "parameters, and one has to stay",
            found=str(sparsity),
            remedy="Ask for less; embeddings are not cut.",
        )
    return depth - removed
