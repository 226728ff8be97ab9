"""A `Merge` becomes tensors: which operator, on which tensors, with which parameters.

Norm weights and biases are small and none of their entries is idle, so nothing of them is left out: on tensors of one
axis TIES elects signs and averages without trimming, DARE and breadcrumbs add whole differences. Nor are they
directions: slerp interpolates them in a straight line. Everything else, model stock's angle included, is as for
matrices.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building import merging, merging_sparse
from intarsia.recipe.ops import LayerRef, Merge, Mix

Read = Callable[[LayerRef, str], Tensor]


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
    behind = architecture.norm_after(part)
    writers = [linear for linear in architecture.linears if linear.part == part and linear.side == "writes"]
    modules = [module for linear in writers for module in architecture.modules(linear)]
    modules = modules if behind is None else [behind.module]
    known = architecture.layer_shapes()
    for name in (f"{module}.{kind}" for module in modules for kind in ("weight", "bias")):
        if name not in known:
            continue
        offset = 0.0 if behind is None or name.endswith(".bias") else behind.offset
        tensors[name] = ((merging.wide(tensors[name]) + offset) * scale - offset).to(tensors[name].dtype)


def parts_of_tensors(architecture: Architecture) -> dict[str, Part]:
    """Which part a layer's tensor belongs to, by its name inside the layer."""
    parts = {norm.module: norm.part for norm in architecture.norms} | {
        module: linear.part for linear in architecture.linears for module in architecture.modules(linear)
    }
    return {f"{module}.{kind}": part for module, part in parts.items() for kind in ("weight", "bias")}


def _mixed(op: Merge, mix: Mix, name: str, read: Read) -> Tensor:
    counted = [index for index, weight in enumerate(mix.weights) if weight] or [0]
    weights = [mix.weights[index] for index in counted]
    refs = [op.sources[index] for index in counted]
    if mix.method == "linear":
        return _as_first(op, name, merging.linear((read(ref, name) for ref in refs), weights), counted, read)
    tuned = [read(ref, name) for ref in refs]
    if mix.method == "slerp":
        vector = tuned[0].ndim == 1
        found = merging.linear(tuned, weights) if vector else merging.slerp(tuned[0], tuned[1], weights[1])
        return _as_first(op, name, found, counted, read)
    assert op.base is not None, "a checked merge on differences has a base"
    return _as_first(op, name, _on_differences(mix, read(op.base, name), tuned, weights, op, counted, name), None, read)


def _on_differences(
    mix: Mix, base: Tensor, tuned: list[Tensor], weights: list[float], op: Merge, counted: list[int], name: str
) -> Tensor:
    params = mix.params
    vector = base.ndim == 1
    density = 1.0 if vector else params.get("density", 1.0)
    if mix.method == "task_arithmetic" or (vector and mix.method in ("dare_linear", "breadcrumbs")):
        return merging.task_arithmetic(base, tuned, weights)
    if mix.method == "model_stock":
        return merging.model_stock(base, tuned)
    if mix.method == "ties":
        return merging_sparse.ties(base, tuned, weights, density=density, scale=params["lambda"])
    if mix.method == "breadcrumbs":
        return merging_sparse.breadcrumbs(base, tuned, weights, bottom=params["bottom"], top=params["top"])
    # A variant's name decides nothing about a model, so it does not decide what is dropped either.
    generators = [
        merging_sparse.generator_for(int(params["seed"]), op.sources[index].layer, name, index) for index in counted
    ]
    if mix.method == "dare_linear":
        return merging_sparse.dare_linear(base, tuned, weights, density=density, generators=generators)
    assert mix.method == "dare_ties", mix.method
    return merging_sparse.dare_ties(
        base, tuned, weights, density=density, scale=params["lambda"], generators=generators
    )


def _as_first(op: Merge, name: str, found: Tensor, counted: list[int] | None, read: Read) -> Tensor:
    """In the dtype of the merge's first source, also where that is left out."""
    if counted is not None and counted[0] == 0:
        return found
    return found.to(read(op.sources[0], name).dtype)
