"""One output layer's tensors from an op: the one place where ops become weights.

Used for building to disk and for building in memory, so that both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intarsia.anatomy.spec import Anatomy, Linear, Norm
from intarsia.building import merging
from intarsia.building.fusing import add_discarded
from intarsia.building.mixing import merge_tensors
from intarsia.building.slicing import fold_norm, join, positions, take
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, Op, Select

Read = Callable[[LayerRef, str], Tensor]
"""Gives a source layer's tensor by its name inside the layer."""


def layer_tensors(op: Op, anatomy: Anatomy, read: Read) -> dict[str, Tensor]:
    """Every tensor of the output layer that `op` describes, by its name inside the layer.

    Returns:
        Tensors in the dtype of their sources and of the shapes in `anatomy.layer_shapes()`. For a `Select` they
        are the source's own tensors, not copies.
    """
    if isinstance(op, Select):
        return {name: read(op.source, name) for name in anatomy.layer_shapes()}
    if isinstance(op, Merge):
        return merge_tensors(op, anatomy, read)
    tensors: dict[str, Tensor] = {}
    for norm in anatomy.norms:
        tensors.update(_norm_tensors(norm, op, read))
    for linear in anatomy.linears:
        tensors.update(_linear_tensors(linear, op, anatomy, read))
    if op.fuse:
        for name, addition in add_discarded(op, anatomy, read).items():
            tensors[name] = (tensors[name].to(addition.dtype) + addition).to(tensors[name].dtype)
    return tensors


def _average(name: str, part_of: Linear | Norm, op: Concat, read: Read) -> Tensor:
    """The weighted average over cuts of a parameter that belongs to no piece."""
    weights = [cut.weights[part_of.part] for cut in op.cuts]
    return merging.linear((read(cut.source, name) for cut in op.cuts), weights)


def _norm_tensors(norm: Norm, op: Concat, read: Read) -> dict[str, Tensor]:
    names = [f"{norm.module}.{kind}" for kind in ("weight", "bias") if getattr(norm, kind)]
    if norm.place == "inside" or op.norm == "average":
        return {name: _average(name, norm, op, read) for name in names}
    neutral = {"weight": 1.0 - norm.offset, "bias": 0.0}
    return {name: torch.full_like(read(op.cuts[0].source, name), neutral[name.rpartition(".")[2]]) for name in names}


def _linear_tensors(linear: Linear, op: Concat, anatomy: Anatomy, read: Read) -> dict[str, Tensor]:
    reads = linear.side == "reads"
    weights: list[list[Tensor]] = []
    biases: list[list[Tensor]] = []
    for cut in op.cuts:
        pieces = cut.pieces(linear.part)
        if not pieces:
            continue
        where = positions(anatomy, linear, pieces)
        segments = take(read(cut.source, f"{linear.module}.weight"), where, linear.cut_axis)
        # The bias of a writing layer belongs to no piece; it is averaged below.
        offsets = take(read(cut.source, f"{linear.module}.bias"), where, 0) if linear.bias and reads else []
        if reads and op.norm == "fold":
            segments, offsets = _folded(segments, offsets, cut, anatomy.norm_before(linear.part), read)
        weights.append(segments)
        biases.append(offsets)
    tensors = {f"{linear.module}.weight": join(weights, linear.cut_axis)}
    if linear.bias:
        name = f"{linear.module}.bias"
        tensors[name] = join(biases, 0) if reads else _average(name, linear, op, read)
    return tensors


def _folded(
    segments: list[Tensor], offsets: list[Tensor], cut: Cut, norm: Norm, read: Read
) -> tuple[list[Tensor], list[Tensor]]:
    scale = read(cut.source, f"{norm.module}.weight").float() + norm.offset if norm.weight else None
    shift = read(cut.source, f"{norm.module}.bias") if norm.bias else None
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for index, segment in enumerate(segments):
        weight, bias = fold_norm(segment, offsets[index] if offsets else None, scale, shift)
        weights.append(weight.to(segment.dtype))
        if bias is not None:
            biases.append(bias.to(segment.dtype))
    return weights, biases
