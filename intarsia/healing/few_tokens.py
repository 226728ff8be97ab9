"""Ridge regression where tokens are fewer than features: the same answer from a matrix of tokens by tokens.

With features X `[N, C]`, residuals R `[N, D]` and strength s, the change is R^T X (X^T X + s)^-1 and also
R^T (X X^T + s)^-1 X.
The first needs `[C, C]`, a gigabyte for a model of 7 billion parameters; the second `[N, N]`, and the rows themselves.

Shape suffixes: `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

_COLUMNS = 1024  # converted to float64 at a time
_BLOCK = 256  # rows of a change that are there at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A change that is a product of two small matrices; as one matrix it would be as large as a weight in float32."""

    left_ND: Tensor
    right_NC: Tensor

    def rows(self, some: slice) -> Tensor:
        """These rows of the change."""
        return self.left_ND[:, some].T @ self.right_NC


Change: TypeAlias = "Tensor | Product"
"""A change `[D, C]` of a linear layer."""


def blocks(change: Change) -> Iterator[tuple[slice, Tensor]]:
    """A change, some of its rows at a time."""
    width = change.left_ND.shape[1] if isinstance(change, Product) else len(change)
    for start in range(0, width, _BLOCK):
        rows = slice(start, min(start + _BLOCK, width))
        yield rows, change.rows(rows) if isinstance(change, Product) else change[rows]


def whole(change: Change) -> Tensor:
    """A change as one matrix."""
    return change.rows(slice(None)) if isinstance(change, Product) else change


def changed(own_DC: Tensor, change: Change) -> Tensor:
    """The changed weight in its own dtype. Nothing but the result is as large as the weight."""
    found_DC = torch.empty_like(own_DC)
    for rows, block in blocks(change):
        found_DC[rows] = block.float() + own_DC[rows]
    return found_DC


class Rows:
    """Weighted features and residuals, kept as they are; up to `most` tokens."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.parts: list[tuple[Tensor, Tensor]] = []
        self._kernel: Tensor | None = None

    def take(self, x_NC: Tensor, r_ND: Tensor) -> bool:
        """Keep these too, float32; False where they would be too many."""
        if sum(len(x) for x, _ in self.parts) + len(x_NC) > self.most:
            return False
        self.parts.append((x_NC, r_ND))
        self._kernel = None
        return True

    def is_finite(self) -> bool:
        """Whether all numbers are."""
        return all(bool(torch.isfinite(x).all() and torch.isfinite(r).all()) for x, r in self.parts)

    def fitted(self, change: Change) -> float:
        """By how much the sum of squared residuals changes with the weights."""
        outputs = [torch.empty_like(r_ND) for _, r_ND in self.parts]
        for rows, block in blocks(change) if self.parts else ():
            for (x_NC, _), y_ND in zip(self.parts, outputs, strict=True):
                y_ND[:, rows] = x_NC @ block.T.to(x_NC.dtype)
        total = 0.0
        for (_, r_ND), y_ND in zip(self.parts, outputs, strict=True):
            total += float((y_ND * (y_ND - 2.0 * r_ND)).sum(dim=1).cpu().double().sum())
        return total

    def solve(self, ridge: float, dtype: torch.dtype) -> Product | None:
        """The change for one relative strength, float32; None where all features are zero."""
        x_NC, r_ND = self._joined()
        if self._kernel is None:
            kernel_NN = torch.zeros(len(x_NC), len(x_NC), dtype=dtype, device=x_NC.device)
            for columns in x_NC.split(_COLUMNS, dim=1):
                wide = columns.to(dtype)
                kernel_NN += wide @ wide.T
            self._kernel = kernel_NN
        scale = float(self._kernel.diagonal().sum()) / x_NC.shape[1]
        if scale <= 0.0:
            return None
        system = self._kernel.clone()
        system.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(system)
        wide_ND = r_ND.to(dtype)
        if int(failed):
            found_ND = torch.linalg.lstsq(system, wide_ND).solution
        else:
            found_ND = torch.cholesky_solve(wide_ND, factor)
        return Product(left_ND=found_ND.to(x_NC.dtype), right_NC=x_NC)

    def _joined(self) -> tuple[Tensor, Tensor]:
        if len(self.parts) != 1:
            self.parts = [(torch.cat([x for x, _ in self.parts]), torch.cat([r for _, r in self.parts]))]
        return self.parts[0]
