"""Taking pieces out of tensors and joining them again. Pure functions.

Shape suffixes: `O` rows of a weight (outputs), `I` columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Linear, Part
from intarsia.recipe.recipe import Concat, LayerRef

_ROWS = 512


def positions(architecture: Architecture, linear: Linear, pieces: Sequence[int]) -> list[Tensor]:
    """Positions of pieces along a linear layer's cut axis, by segment.

    Args:
        pieces: indices of KV groups or channels, in the wanted order.

    Returns:
        One int64 tensor for each segment, of `len(pieces) * unit` positions.
    """
    total = architecture.n_pieces(linear.part)
    wanted = torch.tensor(list(pieces), dtype=torch.int64)
    found = []
    start = 0
    for segment in linear.segments:
        unit = architecture.unit(segment)
        found.append((start + wanted[:, None] * unit + torch.arange(unit)).reshape(-1))
        start += unit * total
    return found


def take(tensor: Tensor, where: Sequence[Tensor], axis: int) -> list[Tensor]:
    """The chosen rows (axis 0) or columns (axis 1) of a tensor, by segment."""
    return [tensor.index_select(axis, index.to(tensor.device)) for index in where]


def join(cuts: Sequence[Sequence[Tensor]], axis: int) -> Tensor:
    """Concatenate the cuts inside each segment, and then the segments.

    Args:
        cuts: for each source its tensors by segment.
    """
    segments = zip(*cuts, strict=True)
    return torch.cat([tensor for segment in segments for tensor in segment], dim=axis)


def blocks(tensor: Tensor, where: Tensor, axis: int) -> Iterator[tuple[slice, Tensor]]:
    """`take` of one segment in blocks of rows: the slice of the result, and its rows."""
    length = len(where) if axis == 0 else len(tensor)
    where = where.to(tensor.device)
    for start in range(0, length, _ROWS):
        rows = slice(start, min(start + _ROWS, length))
        yield rows, tensor.index_select(0, where[rows]) if axis == 0 else tensor[rows].index_select(1, where)


def fold_norm(
    weight_OI: Tensor, bias_O: Tensor | None, scale_I: Tensor | None, shift_I: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fold a norm's parameters exactly into the linear layer that reads it.

    With `n` the normalised input, `W (scale * n + shift) + b = (W scale) n + (W shift + b)`.

    Returns:
        Weight and bias in float32 (float64 for float64 input), for a norm without parameters.

    Raises:
        ValueError: the norm has a shift, and the linear layer has no bias to take it.
    """
    if shift_I is not None and bias_O is None:
        raise ValueError("a norm with a bias cannot be folded into a linear layer without one")
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OI = weight_OI.to(dtype)
    bias_O = None if bias_O is None else bias_O.to(dtype)
    if shift_I is not None and bias_O is not None:
        bias_O = bias_O + weight_OI @ shift_I.to(dtype)
    if scale_I is not None:
        weight_OI = weight_OI * scale_I.to(dtype)
    return weight_OI, bias_O


def fold_centred_norm(weight_OI: Tensor, scale_I: Tensor | None, shift_I: Tensor) -> Tensor:
    """Fold a layer norm's parameters exactly into a linear layer without a bias.

    The normalised input `n` has mean zero. If the norm adds 1 to each of its D entries, `n + 1` has sum D, so a
    constant row `W shift / D` gives `W shift`; the rest of the row may lose its mean.

    Returns:
        The weight in float32 or better, for a norm without scale whose bias is ones.
    """
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OI = weight_OI.to(dtype)
    constant_O1 = (weight_OI @ shift_I.to(dtype))[:, None] / weight_OI.shape[1]
    if scale_I is not None:
        weight_OI = weight_OI * scale_I.to(dtype)
    return weight_OI - weight_OI.mean(dim=1, keepdim=True) + constant_O1


_BLOCK = 1024  # discarded pieces compared at a time


def add_discarded(op: Concat, architecture: Architecture, read: Callable[[LayerRef, str], Tensor]) -> dict[str, Tensor]:
    """For each output projection, by name, the sum of scaled discarded pieces to add: float32 or better."""
    # Experts gate their own input, so that no expert is a multiple of another: none is added to one.
    parts = [part for part in PARTS if not architecture.is_mixture(part)]
    return {f"{architecture.writer(part).module}.weight": _addition(op, part, architecture, read) for part in parts}


def _addition(op: Concat, part: Part, architecture: Architecture, read: Callable[[LayerRef, str], Tensor]) -> Tensor:
    writer = architecture.writer(part)
    whole = architecture.n_pieces(part)
    unit = architecture.unit(writer.segments[0])
    kept = [_features(cut.source, cut.pieces(part), part, architecture, read) for cut in op.cuts if cut.pieces(part)]
    all_PF = torch.cat([features for features, _ in kept])
    linear_PF = torch.cat([features for _, features in kept])
    unit_PF = torch.nn.functional.normalize(all_PF, dim=1)
    total: Tensor | None = None
    for cut in op.cuts:
        weight = read(cut.source, f"{writer.module}.weight").to(all_PF.dtype)
        total = torch.zeros_like(weight) if total is None else total
        taken = set(cut.pieces(part))
        left = [piece for piece in range(whole) if piece not in taken]
        if not (cut.kv_groups or cut.channels):
            continue
        for first in range(0, len(left), _BLOCK):
            pieces = left[first : first + _BLOCK]
            features, linear = _features(cut.source, pieces, part, architecture, read)
            best_P = (torch.nn.functional.normalize(features, dim=1) @ unit_PF.T).argmax(dim=1)
            size_P = linear_PF[best_P].square().sum(dim=1)
            scale_P = (linear * linear_PF[best_P]).sum(dim=1) / torch.where(size_P > 0, size_P, torch.inf)
            columns = torch.cat(take(weight, positions(architecture, writer, pieces), 1), dim=1)
            columns = columns * scale_P.repeat_interleave(unit)
            (where,) = positions(architecture, writer, best_P.tolist())
            total.index_add_(1, where, columns)
    assert total is not None, "a concatenation has cuts"
    return total


def _features(
    source: LayerRef,
    pieces: Sequence[int],
    part: Part,
    architecture: Architecture,
    read: Callable[[LayerRef, str], Tensor],
) -> tuple[Tensor, Tensor]:
    """The input rows of pieces, `[P, F]`: all of them, and those of v or up, in which the output is linear."""
    norm = architecture.norm_before(part)
    scale = read(source, f"{norm.module}.weight").float() + norm.offset if norm and norm.weight else None

    def rows(linear: Linear) -> list[Tensor]:
        segments = take(read(source, f"{linear.module}.weight"), positions(architecture, linear, pieces), 0)
        folded = [fold_norm(segment, None, scale, None)[0] for segment in segments]
        return [segment.reshape(len(pieces), -1) for segment in folded]

    readers = architecture.readers(part)
    found = [segment for linear in readers for segment in rows(linear)]
    linear_PF = found[-1]
    if readers[-1].segments[-1] == "qkv":  # each group's values follow its queries and keys
        linear_PF = linear_PF[:, -architecture.head_dim * architecture.width :]
    return torch.cat(found, dim=1), linear_PF
