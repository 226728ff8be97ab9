"""One output layer's tensors from an op: the one place where ops become weights.

Used for building to disk and for building in memory, so that both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intarsia.anatomy.spec import Anatomy, Linear, Norm, Part
from intarsia.building import merging
from intarsia.building.fusing import add_discarded
from intarsia.building.mixing import merge_tensors
from intarsia.building.slicing import fold_centred_norm, fold_norm, join, positions, take
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
        tensors.update(_norm_tensors(norm, op, anatomy, read))
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


def _norm_tensors(norm: Norm, op: Concat, anatomy: Anatomy, read: Read) -> dict[str, Tensor]:
    names = {kind: f"{norm.module}.{kind}" for kind in ("weight", "bias") if getattr(norm, kind)}
    if norm.rows is not None:
        return {name: _rows(norm, norm.rows, name, op, anatomy, read) for name in names.values()}
    if norm.place != "before" or op.norm == "average":
        return {name: _average(name, norm, op, read) for name in names.values()}
    # A bias that no linear layer can take goes into their weights, which then read ones (`fold_centred_norm`).
    neutral = {"weight": 1.0 - norm.offset, "bias": 0.0 if anatomy.shift_folds(norm.part) else 1.0}
    return {name: torch.full_like(read(op.cuts[0].source, name), neutral[kind]) for kind, name in names.items()}


def _rows(norm: Norm, segment: str, name: str, op: Concat, anatomy: Anatomy, read: Read) -> Tensor:
    """Entries of a norm that belong to rows of a projection, each with its piece."""
    rows = Linear(module=norm.module, part=norm.part, side="reads", segments=(segment,), bias=False)
    cuts = [(cut.source, cut.pieces(norm.part)) for cut in op.cuts if cut.pieces(norm.part)]
    return join([take(read(source, name), positions(anatomy, rows, pieces), 0) for source, pieces in cuts], 0)


def _linear_tensors(linear: Linear, op: Concat, anatomy: Anatomy, read: Read) -> dict[str, Tensor]:
    if linear.whole is not None:
        return _averaged_linear(linear, op, anatomy, read)
    if linear.per_expert:
        return _expert_tensors(linear, op, anatomy, read)
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
            segments, offsets = _folded(segments, offsets, cut, linear.part, anatomy, read)
        weights.append(segments)
        biases.append(offsets)
    tensors = {f"{linear.module}.weight": join(weights, linear.cut_axis)}
    if linear.bias:
        name = f"{linear.module}.bias"
        tensors[name] = join(biases, 0) if reads else _average(name, linear, op, read)
    return tensors


def _expert_tensors(linear: Linear, op: Concat, anatomy: Anatomy, read: Read) -> dict[str, Tensor]:
    """The matrices of every expert that is kept, each under the number of its new place."""
    tensors: dict[str, Tensor] = {}
    modules = anatomy.modules(linear)
    kept = [(cut, expert) for cut in op.cuts for expert in cut.pieces(linear.part)]
    for place, (cut, expert) in zip(modules, kept, strict=True):
        weights = [read(cut.source, f"{modules[expert]}.weight")]
        biases = [read(cut.source, f"{modules[expert]}.bias")] if linear.bias else []
        if linear.side == "reads" and op.norm == "fold":
            weights, biases = _folded(weights, biases, cut, linear.part, anatomy, read)
        tensors[f"{place}.weight"] = weights[0]
        tensors |= {f"{place}.bias": bias for bias in biases}
    return tensors


def _averaged_linear(linear: Linear, op: Concat, anatomy: Anatomy, read: Read) -> dict[str, Tensor]:
    """The weighted average of a linear layer of which nothing is a piece, each with its own norm folded in."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for cut in op.cuts:
        weight, bias = [read(cut.source, f"{linear.module}.weight")], []
        if linear.bias:
            bias = [read(cut.source, f"{linear.module}.bias")]
        if linear.side == "reads" and op.norm == "fold":
            weight, bias = _folded(weight, bias, cut, linear.part, anatomy, read)
        weights += weight
        biases += bias
    shares = [cut.weights[linear.part] for cut in op.cuts]
    tensors = {f"{linear.module}.weight": merging.linear(weights, shares)}
    if linear.bias:
        tensors[f"{linear.module}.bias"] = merging.linear(biases, shares)
    return tensors


def _folded(
    segments: list[Tensor], offsets: list[Tensor], cut: Cut, part: Part, anatomy: Anatomy, read: Read
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows (and entries of their bias) with the norm of their own layer folded in, if there is one."""
    norm = anatomy.norm_before(part)
    if norm is None:
        return segments, offsets
    scale = read(cut.source, f"{norm.module}.weight").float() + norm.offset if norm.weight else None
    shift = read(cut.source, f"{norm.module}.bias") if norm.bias else None
    if shift is not None and not anatomy.shift_folds(part):
        return [fold_centred_norm(segment, scale, shift).to(segment.dtype) for segment in segments], offsets
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for index, segment in enumerate(segments):
        weight, bias = fold_norm(segment, offsets[index] if offsets else None, scale, shift)
        weights.append(weight.to(segment.dtype))
        if bias is not None:
            biases.append(bias.to(segment.dtype))
    return weights, biases
