"""From an op to the tensors of an output layer, and between tensors in files and parameters in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Linear, Norm, Part
from intarsia.building.operators import linear as weighted_sum
from intarsia.building.operators import wide
from intarsia.building.slicing import add_discarded, blocks, fold_centred_norm, fold_norm, join, positions, take
from intarsia.recipe.methods import METHODS
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Mix, Op, Select

Read = Callable[[LayerRef, str], Tensor]
"""Reads a source layer's tensor by its name inside the layer."""


def scale_output(tensors: dict[str, Tensor], part: Part, scale: float, architecture: Architecture) -> None:
    """Scale the output of a part at its last step, because a norm would undo an earlier scale."""
    after = architecture.norm_after(part)
    writers = [linear for linear in architecture.linears if linear.part == part and linear.side == "writes"]
    modules = [module for linear in writers for module in architecture.modules(linear)]
    modules = modules if after is None else [after.module]
    known = architecture.layer_shapes()
    for name in (f"{module}.{kind}" for module in modules for kind in ("weight", "bias")):
        if name not in known:
            continue
        offset = 0.0 if after is None or name.endswith(".bias") else after.offset
        tensors[name] = ((wide(tensors[name]) + offset) * scale - offset).to(tensors[name].dtype)


def parts_of_tensors(architecture: Architecture) -> dict[str, Part]:
    """The part of each tensor of a layer, by its name inside the layer."""
    parts = {norm.module: norm.part for norm in architecture.norms} | {
        module: linear.part for linear in architecture.linears for module in architecture.modules(linear)
    }
    return {f"{module}.{kind}": part for module, part in parts.items() for kind in ("weight", "bias")}


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A generator that depends only on the seed and the names."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _mixed(op: Merge, mix: Mix, name: str, read: Read) -> Tensor:
    method = METHODS[mix.method]
    counted = [index for index, weight in enumerate(mix.weights) if weight] or [0]
    weights = [mix.weights[index] for index in counted]
    tensors = [read(op.sources[index], name) for index in counted]
    base = None
    if method.base:
        assert op.base is not None, "a checked merge on differences has a base"
        base = read(op.base, name)
    given: dict[str, Any] = method.arguments(mix.params)
    if method.random:
        # A variant's name must not affect the model, so it does not seed the generator.
        seed = int(mix.params["seed"])
        given["generators"] = [generator_for(seed, op.sources[index].layer, name, index) for index in counted]
    found: Tensor = method.function(tensors, weights, base, **given)
    first = tensors[0] if counted[0] == 0 else read(op.sources[0], name)
    return found.to(first.dtype)


_Fold: TypeAlias = "Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]"


def layer_tensors(op: Op, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    """Every tensor of an op's output layer, by its name inside the layer.

    Returns:
        Tensors in the dtype of their sources, with the shapes in `architecture.layer_shapes()`. For a `Select` they are
        the source's own tensors, not copies.
    """
    if isinstance(op, Select):
        return {name: read(op.source, name) for name in architecture.layer_shapes(op.source.layer)}
    tensors: dict[str, Tensor] = {}
    if isinstance(op, Merge):
        parts = parts_of_tensors(architecture)
        tensors = {name: _mixed(op, op.mix(parts[name]), name, read) for name in architecture.layer_shapes()}
        for part in PARTS if op.scale != 1.0 else ():
            scale_output(tensors, part, op.scale, architecture)
        return tensors
    for norm in architecture.norms:
        tensors.update(_norm_tensors(norm, op, architecture, read))
    for linear in architecture.linears:
        tensors.update(_linear_tensors(linear, op, architecture, read))
    if op.fuse:
        for name, addition in add_discarded(op, architecture, read).items():
            tensors[name] = (tensors[name].to(addition.dtype) + addition).to(tensors[name].dtype)
    return tensors


def _average(name: str, part_of: Linear | Norm, op: Concat, read: Read) -> Tensor:
    """The weighted average over cuts of a parameter that belongs to no piece."""
    weights = [cut.weights[part_of.part] for cut in op.cuts]
    return weighted_sum((read(cut.source, name) for cut in op.cuts), weights)


def _norm_tensors(norm: Norm, op: Concat, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    names = {kind: f"{norm.module}.{kind}" for kind in ("weight", "bias") if getattr(norm, kind)}
    if norm.rows is not None:
        return {name: _rows(norm, norm.rows, name, op, architecture, read) for name in names.values()}
    if norm.place != "before" or op.norm == "average":
        return {name: _average(name, norm, op, read) for name in names.values()}
    source = _only_source(norm, op, architecture)
    if source is not None:
        return {name: read(source, name) for name in names.values()}
    # A bias that no linear layer can take is folded into their weights, and becomes ones (`fold_centred_norm`).
    neutral = {"weight": 1.0 - norm.offset, "bias": 0.0 if architecture.shift_folds(norm.part) else 1.0}
    return {name: torch.full_like(read(op.cuts[0].source, name), neutral[kind]) for kind, name in names.items()}


def _only_source(norm: Norm, op: Concat, architecture: Architecture) -> LayerRef | None:
    """The only layer whose pieces read a norm, which then stays bit-identical."""
    for cut in op.cuts:
        whole = all(len(cut.pieces(part)) == architecture.n_pieces(part) for part in norm.parts)
        if whole and not op.fuse and all(cut.weights.get(part) == 1.0 for part in norm.parts):
            return cut.source
    return None


def _rows(norm: Norm, segment: str, name: str, op: Concat, architecture: Architecture, read: Read) -> Tensor:
    """Entries of a norm that belong to rows of a projection, taken with their pieces."""
    rows = Linear(module=norm.module, part=norm.part, side="reads", segments=(segment,), bias=False)
    cuts = [(cut.source, cut.pieces(norm.part)) for cut in op.cuts if cut.pieces(norm.part)]
    return join([take(read(source, name), positions(architecture, rows, pieces), 0) for source, pieces in cuts], 0)


def _linear_tensors(linear: Linear, op: Concat, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    if linear.whole is not None:
        return _averaged_linear(linear, op, architecture, read)
    if linear.per_expert:
        return _expert_tensors(linear, op, architecture, read)
    reads, axis = linear.side == "reads", linear.cut_axis
    cuts = [cut for cut in op.cuts if cut.pieces(linear.part)]
    wanted = [positions(architecture, linear, cut.pieces(linear.part)) for cut in cuts]
    # Fill the tensor segment by segment, and each segment cut by cut.
    lengths = [len(where) for segment in zip(*wanted, strict=True) for where in segment]
    shape = architecture.layer_shapes()[f"{linear.module}.weight"]
    weight = bias = None
    for number, cut in enumerate(cuts):
        # Some rows of one source at a time, so that at most one matrix is in memory besides the result.
        source = read(cut.source, f"{linear.module}.weight")
        # The bias of a writing layer belongs to no piece; it is averaged below.
        offsets = read(cut.source, f"{linear.module}.bias") if linear.bias and reads else None
        fold = _fold(cut, linear, op, architecture, read)
        weight = _widened(weight, shape, source.dtype)
        bias = None if offsets is None else _widened(bias, shape[:1], offsets.dtype)
        for segment, where in enumerate(wanted[number]):
            place = segment * len(cuts) + number
            for rows, taken in blocks(source, where, axis):
                folded, entries = fold(taken, None if offsets is None else offsets[where[rows]])
                weight.split(lengths, axis)[place][rows] = folded
                if bias is not None and entries is not None:
                    bias.split(lengths)[place][rows] = entries
        del source  # a dequantised weight takes memory of its own
    assert weight is not None, "pieces of all sources fill a tensor"
    tensors = {f"{linear.module}.weight": weight}
    if linear.bias:
        name = f"{linear.module}.bias"
        tensors[name] = _average(name, linear, op, read) if bias is None else bias
    return tensors


def _widened(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor (an empty one for None) in the common dtype with another, as in `torch.cat`."""
    return torch.empty(shape, dtype=dtype) if tensor is None else tensor.to(torch.promote_types(tensor.dtype, dtype))


def _expert_tensors(linear: Linear, op: Concat, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    """The matrices of all kept experts, under their new numbers."""
    tensors: dict[str, Tensor] = {}
    modules = architecture.modules(linear)
    kept = [(cut, expert) for cut in op.cuts for expert in cut.pieces(linear.part)]
    for place, (cut, expert) in zip(modules, kept, strict=True):
        weight, bias = _folded_linear(modules[expert], linear, cut, op, architecture, read)
        tensors[f"{place}.weight"] = weight
        if bias is not None:
            tensors[f"{place}.bias"] = bias
    return tensors


def _averaged_linear(linear: Linear, op: Concat, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    """The weighted average of a linear layer without pieces, each with its own norm folded in."""
    folded = [_folded_linear(linear.module, linear, cut, op, architecture, read) for cut in op.cuts]
    shares = [cut.weights[linear.part] for cut in op.cuts]
    tensors = {f"{linear.module}.weight": weighted_sum([weight for weight, _ in folded], shares)}
    if linear.bias:
        tensors[f"{linear.module}.bias"] = weighted_sum([bias for _, bias in folded if bias is not None], shares)
    return tensors


def _folded_linear(
    module: str, linear: Linear, cut: Cut, op: Concat, architecture: Architecture, read: Read
) -> tuple[Tensor, Tensor | None]:
    """A whole linear layer of a source, with its own norm folded in, if norms are folded."""
    weight = read(cut.source, f"{module}.weight")
    bias = read(cut.source, f"{module}.bias") if linear.bias else None
    return _fold(cut, linear, op, architecture, read)(weight, bias)


def _fold(cut: Cut, linear: Linear, op: Concat, architecture: Architecture, read: Read) -> _Fold:
    """A function that folds the source's norm into rows and their bias entries, if norms are folded."""
    folds = linear.side == "reads" and op.norm == "fold"
    norm = architecture.norm_before(linear.part) if folds else None
    if norm is None or _only_source(norm, op, architecture) is not None:
        return lambda weight, bias: (weight, bias)
    scale = read(cut.source, f"{norm.module}.weight").float() + norm.offset if norm.weight else None
    shift = read(cut.source, f"{norm.module}.bias") if norm.bias else None

    def fold(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if shift is not None and not architecture.shift_folds(linear.part):
            return fold_centred_norm(weight, scale, shift).to(weight.dtype), bias
        folded, moved = fold_norm(weight, bias, scale, shift)
        return folded.to(weight.dtype), None if moved is None else moved.to(weight.dtype)

    return fold


def parameter_name(local: str, architecture: Architecture) -> str:
    """The parameter that holds a tensor of the files, both by names inside the layer."""
    return _held(architecture)[0][local][0]


def tensor_names(parameter: str, architecture: Architecture) -> tuple[str, ...]:
    """The tensors of the files that a parameter holds, in the order of its rows."""
    rows = _held(architecture)[0]
    return tuple(sorted((name for name in rows if rows[name][0] == parameter), key=lambda name: rows[name][1]))


def parameter_names(architecture: Architecture) -> tuple[str, ...]:
    """Every parameter of a layer in memory, in the order of the files' tensors; the union if layers differ."""
    return tuple(dict.fromkeys(parameter for parameter, _ in _held(architecture)[0].values()))


def to_parameters(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A layer's parameters in memory from its tensors in files; a single tensor is not copied."""
    rows, stacks = _held(architecture)
    parts: dict[str, dict[int, Tensor]] = {}
    for name in (name for name in tensors if name in rows):
        parameter, start = rows[name]
        parts.setdefault(parameter, {})[start] = tensors[name]
    found = {
        parameter: torch.cat([own[start] for start in sorted(own)]) if len(own) > 1 else own.popitem()[1]
        for parameter, own in parts.items()
    }
    return {name: each.unflatten(0, (stacks[name], -1)) if name in stacks else each for name, each in found.items()}


def to_tensors(parameters: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The inverse: a layer's tensors in files from all or some of its parameters."""
    rows, stacks = _held(architecture)
    found: dict[str, Tensor] = {}
    for parameter, tensor in parameters.items():
        names = tensor_names(parameter, architecture)
        flat = tensor.flatten(0, 1) if parameter in stacks else tensor
        starts = [rows[name][1] for name in names[1:]]
        found |= zip(names, flat.tensor_split(starts) if starts else (flat,), strict=True)
    return found


def _held(architecture: Architecture) -> tuple[Mapping[str, tuple[str, int]], Mapping[str, int]]:
    """For each tensor of a layer in files its parameter and first row there; and the number of matrices in
    three-dimensional parameters."""
    if architecture.inspected is not None:
        return architecture.inspected.rows, architecture.inspected.stacks
    shapes, family, stacks = architecture.layer_shapes(), architecture.family, dict[str, int]()
    rows = {name: (_renamed(name, family.renamed), 0) for name in shapes}
    for stacked in family.stacked if architecture.n_experts else ():
        stacks[stacked.parameter], start = architecture.n_experts, 0
        for name in (
            each.format(expert=expert) for expert in range(architecture.n_experts) for each in stacked.tensors
        ):
            rows[name] = stacked.parameter, start
            start += shapes[name][0]
    return rows, stacks


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, other in prefixes.items():
        if name == prefix or name.startswith(f"{prefix}."):
            return other + name[len(prefix) :]
    return name
