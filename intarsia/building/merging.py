"""From a `Merge` to the tensors of a layer: which operator works on which of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.operators.linear import wide
from intarsia.recipe.methods import METHODS
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
