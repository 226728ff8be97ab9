"""Adding what a concatenation leaves out onto what it keeps.

Source: the parameter fusion that arXiv 2510.15304 tries and finds of little effect: each discarded piece is added,
scaled, onto the most similar kept one. What the paper leaves open is decided so: two pieces are as similar as the
rows with which they read (norms folded in, all reading layers together, by cosine); if piece j reads about s times
what piece k reads in the last reading layer (v_proj, up_proj), in which the output is linear, then s times j's
columns in the writing layer are added to k's. s is the least-squares factor. Sources that give no piece at all are
left out.

Shape suffixes: `P` pieces, `F` features of a piece, `I` columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Linear, Part
from intarsia.building.slicing import fold_norm, positions, take
from intarsia.recipe.ops import Concat, LayerRef

_BLOCK = 1024  # discarded pieces that are compared at once


def add_discarded(op: Concat, architecture: Architecture, read: Callable[[LayerRef, str], Tensor]) -> dict[str, Tensor]:
    """For each writing weight, by name, what the discarded pieces add to it: float32 or better."""
    # What an expert reads is gated by what it reads: one expert is no multiple of another, and none is added to one.
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
    """The rows with which pieces read, `[P, F]`: all of them, and those of v or up, in which the output is linear."""
    norm = architecture.norm_before(part)
    scale = read(source, f"{norm.module}.weight").float() + norm.offset if norm and norm.weight else None

    def rows(linear: Linear) -> list[Tensor]:
        segments = take(read(source, f"{linear.module}.weight"), positions(architecture, linear, pieces), 0)
        folded = [fold_norm(segment, None, scale, None)[0] for segment in segments]
        return [segment.reshape(len(pieces), -1) for segment in folded]

    readers = architecture.readers(part)
    found = [segment for linear in readers for segment in rows(linear)]
    linear_PF = found[-1]
    if readers[-1].segments[-1] == "qkv":  # each group's values stand behind its queries and keys
        linear_PF = linear_PF[:, -architecture.head_dim * architecture.width :]
    return torch.cat(found, dim=1), linear_PF
