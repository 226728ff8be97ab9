"""From a `Merge` to the tensors of a layer: which operator works on which of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from intarsia.architecture.families import Stacked
from intarsia.architecture.spec import PARTS, Architecture, Linear, Norm, Part
from intarsia.building.operators import linear as weighted_sum
from intarsia.building.operators import wide
from intarsia.building.slicing import Joined, add_discarded, blocks, fold_centred_norm, fold_norm, join, positions, take
from intarsia.recipe.methods import METHODS
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Mix, Op, Select

Read = Callable[[LayerRef, str], Tensor]
"""Gives a source layer's tensor by its name inside the layer."""


def merge_tensors(op: Merge, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    """Every tensor of the layer that a merge describes, by its name inside the layer, in its first source's dtype."""
    parts = parts_of_tensors(architecture)
    tensors = {name: _mixed(op, op.mix(parts[name]), name, read) for name in architecture.layer_shapes()}
    if op.scale != 1.0:
        for part in PARTS:
            scale_output(tensors, part, op.scale, architecture)
    return tensors


def scale_output(tensors: dict[str, Tensor], part: Part, scale: float, architecture: Architecture) -> None:
    """Scale what a part adds to the residual stream, where that is done last: a norm takes back what stands before."""
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
    """Which part a layer's tensor belongs to, by its name inside the layer."""
    parts = {norm.module: norm.part for norm in architecture.norms} | {
        module: linear.part for linear in architecture.linears for module in architecture.modules(linear)
    }
    return {f"{module}.{kind}": part for module, part in parts.items() for kind in ("weight", "bias")}


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A generator that is the same whenever the seed and the names are, whatever was drawn before."""
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
        # A variant's name decides nothing about a model, so it does not decide what is drawn either.
        seed = int(mix.params["seed"])
        given["generators"] = [generator_for(seed, op.sources[index].layer, name, index) for index in counted]
    found: Tensor = method.function(tensors, weights, base, **given)
    first = tensors[0] if counted[0] == 0 else read(op.sources[0], name)
    return found.to(first.dtype)


_Fold: TypeAlias = "Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]"


def layer_tensors(op: Op, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    """Every tensor of the output layer that `op` describes, by its name inside the layer.

    Returns:
        Tensors in the dtype of their sources and of the shapes in `architecture.layer_shapes()`. For a `Select` they
        are the source's own tensors, not copies.
    """
    if isinstance(op, Select):
        return {name: read(op.source, name) for name in architecture.layer_shapes(op.source.layer)}
    if isinstance(op, Merge):
        return merge_tensors(op, architecture, read)
    tensors: dict[str, Tensor] = {}
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
    # A bias that no linear layer can take goes into their weights, which then read ones (`fold_centred_norm`).
    neutral = {"weight": 1.0 - norm.offset, "bias": 0.0 if architecture.shift_folds(norm.part) else 1.0}
    return {name: torch.full_like(read(op.cuts[0].source, name), neutral[kind]) for kind, name in names.items()}


def _only_source(norm: Norm, op: Concat, architecture: Architecture) -> LayerRef | None:
    """The layer whose pieces are all that reads a norm: the norm stays as it is, to the bit."""
    for cut in op.cuts:
        whole = all(len(cut.pieces(part)) == architecture.n_pieces(part) for part in norm.parts)
        if whole and not op.fuse and all(cut.weights.get(part) == 1.0 for part in norm.parts):
            return cut.source
    return None


def _rows(norm: Norm, segment: str, name: str, op: Concat, architecture: Architecture, read: Read) -> Tensor:
    """Entries of a norm that belong to rows of a projection, each with its piece."""
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
    shape = architecture.layer_shapes()[f"{linear.module}.weight"]
    weight, bias = Joined(shape, wanted, axis), Joined(shape[:1] if reads else shape[1:], wanted, 0)
    for number, cut in enumerate(cuts):
        source = read(cut.source, f"{linear.module}.weight")
        # The bias of a writing layer belongs to no piece; it is averaged below.
        offsets = read(cut.source, f"{linear.module}.bias") if linear.bias and reads else None
        fold = _fold(cut, linear, op, architecture, read)
        for segment, where in enumerate(wanted[number]):
            for rows, taken in blocks(source, where, axis):
                folded, entries = fold(taken, None if offsets is None else offsets[where[rows]])
                weight.put(number, segment, rows, folded)
                if entries is not None:
                    bias.put(number, segment, rows, entries)
    tensors = {f"{linear.module}.weight": weight.whole}
    if linear.bias:
        name = f"{linear.module}.bias"
        tensors[name] = bias.whole if reads else _average(name, linear, op, read)
    return tensors


def _expert_tensors(linear: Linear, op: Concat, architecture: Architecture, read: Read) -> dict[str, Tensor]:
    """The matrices of every expert that is kept, each under the number of its new place."""
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
    """The weighted average of a linear layer of which nothing is a piece, each with its own norm folded in."""
    folded = [_folded_linear(linear.module, linear, cut, op, architecture, read) for cut in op.cuts]
    shares = [cut.weights[linear.part] for cut in op.cuts]
    tensors = {f"{linear.module}.weight": weighted_sum([weight for weight, _ in folded], shares)}
    if linear.bias:
        tensors[f"{linear.module}.bias"] = weighted_sum([bias for _, bias in folded if bias is not None], shares)
    return tensors


def _folded_linear(
    module: str, linear: Linear, cut: Cut, op: Concat, architecture: Architecture, read: Read
) -> tuple[Tensor, Tensor | None]:
    """A whole linear layer of a source, with the norm of its own layer folded in, if it is to be."""
    weight = read(cut.source, f"{module}.weight")
    bias = read(cut.source, f"{module}.bias") if linear.bias else None
    return _fold(cut, linear, op, architecture, read)(weight, bias)


def _fold(cut: Cut, linear: Linear, op: Concat, architecture: Architecture, read: Read) -> _Fold:
    """How rows (and entries of their bias) take in the norm of their own layer, where it is to be folded in."""
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
    """The parameter in which a tensor of the files is in memory, both by names inside the layer."""
    if architecture.inspected is not None:
        return architecture.inspected.rows[local][0]
    for stacked in architecture.family.stacked:
        if local in _members(stacked, architecture):
            return stacked.parameter
    return _exchanged(local, architecture.family.renamed.items())


def tensor_names(parameter: str, architecture: Architecture) -> tuple[str, ...]:
    """The tensors of the files that a parameter holds, in the order of its rows."""
    if architecture.inspected is not None:
        held = [(row, name) for name, (owner, row) in architecture.inspected.rows.items() if owner == parameter]
        return tuple(name for _, name in sorted(held))
    for stacked in architecture.family.stacked:
        if stacked.parameter == parameter:
            return tuple(_members(stacked, architecture))
    return (_exchanged(parameter, ((memory, file) for file, memory in architecture.family.renamed.items())),)


def parameter_names(architecture: Architecture) -> tuple[str, ...]:
    """Every parameter of a layer in memory, in the order of the files' tensors; of some layers, where they differ."""
    if architecture.inspected is not None:
        return tuple(dict.fromkeys(parameter for parameter, _ in architecture.inspected.rows.values()))
    return tuple(dict.fromkeys(parameter_name(local, architecture) for local in _stems(architecture)))


def to_parameters(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """A layer's parameters in memory from its tensors in files; what is not stacked is the same tensor."""
    found = dict(tensors)
    if architecture.inspected is not None:
        return _joined_rows(found, architecture)
    for stacked in architecture.family.stacked if architecture.n_experts else ():
        experts = [
            torch.cat([found.pop(name.format(expert=expert)) for name in stacked.tensors])
            for expert in range(architecture.n_experts)
        ]
        found[stacked.parameter] = torch.stack(experts)
    return {_exchanged(name, architecture.family.renamed.items()): tensor for name, tensor in found.items()}


def to_tensors(parameters: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The way back: a layer's tensors as in files, from all of its parameters or some."""
    if architecture.inspected is not None:
        return _split_rows(parameters, architecture)
    shapes = architecture.layer_shapes()
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        stacked = next((entry for entry in architecture.family.stacked if entry.parameter == name), None)
        if stacked is None:
            found[tensor_names(name, architecture)[0]] = parameter
            continue
        for expert in range(architecture.n_experts):
            names = [part.format(expert=expert) for part in stacked.tensors]
            sizes = [shapes[part][0] for part in names]
            found |= zip(names, parameter[expert].split(sizes), strict=True)
    return found


def _joined_rows(tensors: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Parameters of a layer that can only be removed: where several tensors are rows of one, they are put together."""
    found: dict[str, Tensor] = {}
    assert architecture.inspected is not None
    used = (name for name in tensors if name in architecture.inspected.rows)
    for parameter in dict.fromkeys(parameter_name(name, architecture) for name in used):
        parts = [tensors[name] for name in tensor_names(parameter, architecture) if name in tensors]
        stacks = architecture.inspected.stacks.get(parameter, 0)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        found[parameter] = joined.unflatten(0, (stacks, -1)) if stacks else joined
    return found


def _split_rows(parameters: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The way back from `_joined_rows`."""
    assert architecture.inspected is not None
    found: dict[str, Tensor] = {}
    for parameter, tensor in parameters.items():
        names = tensor_names(parameter, architecture)
        starts = [architecture.inspected.rows[name][1] for name in names]
        flat = tensor.flatten(0, 1) if parameter in architecture.inspected.stacks else tensor
        stops = [*starts[1:], len(flat)]
        found |= {name: flat[start:stop] for name, start, stop in zip(names, starts, stops, strict=True)}
    return found


def _members(stacked: Stacked, architecture: Architecture) -> list[str]:
    return [name.format(expert=expert) for expert in range(architecture.n_experts) for name in stacked.tensors]


def _stems(architecture: Architecture) -> Iterable[str]:
    """Names of tensors, of the experts only the first one's: all of them are in the same parameters."""
    others = {module for linear in architecture.linears for module in architecture.modules(linear)[1:]}
    return (name for name in architecture.layer_shapes() if name.rpartition(".")[0] not in others)


def _exchanged(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for prefix, other in prefixes:
        if name == prefix or name.startswith(f"{prefix}."):
            return other + name[len(prefix) :]
    return name
