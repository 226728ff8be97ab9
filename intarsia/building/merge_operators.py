"""Merge operators: weight arithmetic over same-shaped tensors. Pure functions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.recipe.ops import LayerRef, Merge, Mix

_PARALLEL = 1e-6  # Of 1 - |cos|: below it sines are too small to divide by.


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which merging computes: float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def linear(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """The weighted sum of tensors of one shape, accumulated in float32 or better, in the first one's dtype."""
    total: Tensor | None = None
    dtype = torch.float32
    for tensor, weight in zip(tensors, weights, strict=True):
        if total is None:
            dtype = tensor.dtype
            total = torch.zeros_like(tensor, dtype=torch.promote_types(dtype, torch.float32))
        total.add_(tensor.to(total.dtype), alpha=weight)
    if total is None:
        raise ValueError("linear needs at least one tensor")
    return total.to(dtype)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical interpolation (Shoemake, SIGGRAPH 1985): `t` = 0 gives the first tensor, 1 the second.

    With A the angle between the tensors as vectors: sin((1-t) A) / sin(A) * first + sin(t A) / sin(A) * second. The
    tensors keep their lengths. Where A says nothing (a zero tensor), or is so near 0 or pi that the arc is a point or
    any half circle, it is the straight line between them.
    """
    a, b = wide(first), wide(second)
    length = float(a.double().norm()) * float(b.double().norm())
    cosine = float((a.double() * b.double()).sum()) / length if length > 0.0 else 1.0
    if 1.0 - abs(cosine) < _PARALLEL:
        return ((1.0 - t) * a + t * b).to(first.dtype)
    angle = math.acos(cosine)
    left, right = (math.sin(share * angle) / math.sin(angle) for share in (1.0 - t, t))
    return (left * a + right * b).to(first.dtype)


def task_arithmetic(base: Tensor, tuned: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Task arithmetic (arXiv 2212.04089): base + sum_i weights[i] (tuned[i] - base)."""
    start = wide(base)
    total = start.clone()
    for tensor, weight in zip(tuned, weights, strict=True):
        total.add_(wide(tensor) - start, alpha=weight)
    return total.to(base.dtype)


def model_stock(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Model stock (arXiv 2403.19522), one tensor at a time: t * mean(tuned) + (1 - t) * base.

    With cos the mean cosine between two differences to the base: t = k cos / (1 + (k - 1) cos), k tensors. The paper
    has no case for differences that point apart; t is then 0, as it is at right angles. A difference of zero is at
    right angles to any.
    """
    if len(tuned) < 2:
        raise ValueError("model stock needs at least two tensors, between which there is an angle")
    start = wide(base)
    deltas = [wide(tensor) - start for tensor in tuned]
    count = len(deltas)
    lengths = [float(delta.double().norm()) for delta in deltas]
    cosines = [
        float((deltas[i].double() * deltas[j].double()).sum()) / (lengths[i] * lengths[j])
        if lengths[i] * lengths[j] > 0.0
        else 0.0
        for i in range(count)
        for j in range(i)
    ]
    cosine = max(sum(cosines) / len(cosines), 0.0)
    t = count * cosine / (1.0 + (count - 1) * cosine)
    return (start + (t / count) * torch.stack(deltas).sum(dim=0)).to(base.dtype)


_EXACT = 1e-9  # A share such as 0.3 * 10 must not lose an entry to rounding.


def trim(delta: Tensor, density: float) -> Tensor:
    """The `density` share of entries of largest magnitude (at least one); zeros for the others."""
    keep = math.ceil(density * delta.numel() - _EXACT)
    if keep >= delta.numel():
        return delta
    size = delta.abs()
    return torch.where(size >= _smallest(size, delta.numel() - keep), delta, 0.0)


def without_extremes(delta: Tensor, *, bottom: float, top: float) -> Tensor:
    """Zeros for the `bottom` share of entries of least magnitude and the `top` share of largest (arXiv 2312.06795)."""
    size, count = delta.abs(), delta.numel()
    low, high = (int(share * count + _EXACT) for share in (bottom, top))
    if low + high >= count:
        raise ValueError("bottom and top leave nothing")
    kept = size >= _smallest(size, low)
    if high:
        kept &= size <= _smallest(size, count - high - 1)
    return torch.where(kept, delta, 0.0)


def _smallest(size: Tensor, index: int) -> float:
    """The entry that stands at `index` (from 0) when they are sorted, the least first."""
    # numpy partitions a hundred times faster than torch's kthvalue finds an entry.
    return float(np.partition(size.reshape(-1).cpu().numpy(), index)[index])


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (arXiv 2311.03099): each entry stays with probability `density`, and is then divided by it."""
    if density >= 1.0:
        return delta
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, 0.0)


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A generator that is the same whenever the seed and the names are, whatever was drawn before."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sign election and disjoint mean of TIES (arXiv 2306.01708).

    An entry's elected sign is that of sum_i w_i D_i; its value is the mean, weighted by w_i, of those D_i that are not
    0 and have this sign. Where no sign has the majority it is 0. With equal weights this is the paper's formula.
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    sign = total.sign_()
    upper, lower = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta * sign > 0).to(delta.dtype)
        upper.addcmul_(delta, agrees, value=weight)
        lower.add_(agrees, alpha=weight)
    return upper.div_(lower.masked_fill_(lower == 0, 1.0))


def ties(base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], *, density: float, scale: float) -> Tensor:
    """TIES (arXiv 2306.01708): trim each difference, elect signs, disjoint mean; base + scale * mean."""
    start = wide(base)
    trimmed = [trim(wide(tensor) - start, density) for tensor in tuned]
    return (start + scale * disjoint_mean(trimmed, weights)).to(base.dtype)


def dare_linear(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """DARE, then task arithmetic (arXiv 2311.03099): base + sum_i w_i drop(D_i). One generator for each tensor."""
    start = wide(base)
    total = start.clone()
    for tensor, weight, generator in zip(tuned, weights, generators, strict=True):
        total.add_(drop(wide(tensor) - start, density, generator), alpha=weight)
    return total.to(base.dtype)


def dare_ties(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """DARE in place of the trimming, then the other steps of TIES: base + scale * disjoint_mean(drop(D_i))."""
    start = wide(base)
    dropped = [
        drop(wide(tensor) - start, density, generator) for tensor, generator in zip(tuned, generators, strict=True)
    ]
    return (start + scale * disjoint_mean(dropped, weights)).to(base.dtype)


def breadcrumbs(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], *, bottom: float, top: float
) -> Tensor:
    """Model breadcrumbs (arXiv 2312.06795): base + sum_i w_i (D_i without its smallest and its largest entries)."""
    start = wide(base)
    total = start.clone()
    for tensor, weight in zip(tuned, weights, strict=True):
        total.add_(without_extremes(wide(tensor) - start, bottom=bottom, top=top), alpha=weight)
    return total.to(base.dtype)


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
        tensors[name] = ((wide(tensors[name]) + offset) * scale - offset).to(tensors[name].dtype)


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
        return _as_first(op, name, linear((read(ref, name) for ref in refs), weights), counted, read)
    tuned = [read(ref, name) for ref in refs]
    if mix.method == "slerp":
        vector = tuned[0].ndim == 1
        found = linear(tuned, weights) if vector else slerp(tuned[0], tuned[1], weights[1])
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
        return task_arithmetic(base, tuned, weights)
    if mix.method == "model_stock":
        return model_stock(base, tuned)
    if mix.method == "ties":
        return ties(base, tuned, weights, density=density, scale=params["lambda"])
    if mix.method == "breadcrumbs":
        return breadcrumbs(base, tuned, weights, bottom=params["bottom"], top=params["top"])
    # A variant's name decides nothing about a model, so it does not decide what is dropped either.
    generators = [generator_for(int(params["seed"]), op.sources[index].layer, name, index) for index in counted]
    if mix.method == "dare_linear":
        return dare_linear(base, tuned, weights, density=density, generators=generators)
    assert mix.method == "dare_ties", mix.method
    return dare_ties(base, tuned, weights, density=density, scale=params["lambda"], generators=generators)


def _as_first(op: Merge, name: str, found: Tensor, counted: list[int] | None, read: Read) -> Tensor:
    """In the dtype of the merge's first source, also where that is left out."""
    if counted is not None and counted[0] == 0:
        return found
    return found.to(read(op.sources[0], name).dtype)
