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

from intarsia.healing.scratch import IN_MEMORY, Pile, Scratch
from intarsia.healing.symmetric import Symmetric

_COLUMNS = 1024  # converted at a time
_BLOCK = 256  # rows of a change that are there at once
_TOKENS = 512  # converted at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A change that is a product of two small matrices; as one matrix it would be as large as a weight in float32."""

    left_ND: Tensor
    right_NC: Tensor

    def rows(self, some: slice) -> Tensor:
        """These rows of the change."""
        left_ND = self.left_ND[:, some].T
        return torch.cat([left_ND @ part.to(left_ND.dtype) for part in self.right_NC.split(_COLUMNS, dim=1)], dim=1)


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
    """Features, residuals and weights of tokens, kept as they are; up to `most` tokens."""

    def __init__(self, most: int, scratch: Scratch = IN_MEMORY) -> None:
        self.most = most
        self.tokens = 0
        self.is_finite = True
        self._scratch = scratch
        self._features, self._residuals = Pile(scratch), Pile(scratch)
        self._weights: list[Tensor] = []
        self._kernel: Symmetric | None = None
        self._in_one = False

    def take(self, x_NC: Tensor, r_ND: Tensor, weight_N: Tensor) -> bool:
        """Keep these too; False where they would be too many."""
        if self.tokens + len(x_NC) > self.most:
            return False
        self.is_finite &= bool(torch.isfinite(x_NC).all() and torch.isfinite(r_ND).all())
        assert not self._in_one, "tokens are whole once a change was asked for"
        self._features.put(x_NC)
        self._residuals.put(r_ND)
        self._weights.append(weight_N.float())
        self.tokens += len(x_NC)
        return True

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What was taken, as it was taken: features, residuals, weights."""
        for index, weight_N in enumerate(self._weights):
            yield self._features.get(index), self._residuals.get(index), weight_N

    def fitted(self, change: Change) -> float:
        """By how much the weighted sum of squared residuals changes with the weights."""
        pieces = blocks(change) if isinstance(change, Product) else [(slice(None), change)]
        total = 0.0
        for rows, block in pieces if self.tokens else ():
            for part in self.parts():
                for x_NC, r_ND, weight_N in zip(*(tensor.split(_TOKENS) for tensor in part), strict=True):
                    y_ND = x_NC.float() @ block.T
                    total += float((weight_N * (y_ND * (y_ND - 2.0 * r_ND[:, rows])).sum(dim=1)).cpu().double().sum())
        return total

    def solve(self, ridge: float, dtype: torch.dtype) -> Product | None:
        """The change for one relative strength, float32; None where all features are zero."""
        x_NC, r_ND, weight_N = self._joined()
        root_N1 = weight_N.sqrt()[:, None]
        if self._kernel is None:
            self._kernel = Symmetric(len(x_NC), dtype=dtype, device=x_NC.device, scratch=self._scratch)
            for columns in x_NC.split(_COLUMNS, dim=1):
                self._kernel.add((columns.float() * root_N1).to(dtype).T)
        scale = float(self._kernel.diagonal().sum()) / x_NC.shape[1]
        if scale <= 0.0:
            return None
        self._kernel.factorise(ridge * scale)
        found_ND = self._kernel.solve_((r_ND * root_N1).to(dtype))
        return Product(left_ND=found_ND.float() * root_N1, right_NC=x_NC)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it in one part, in memory: every strength needs it."""
        if not self._in_one:
            self._in_one = True
            self._weights = [torch.cat(self._weights)]
            piles = (self._features, self._residuals)
            self._features, self._residuals = Pile(IN_MEMORY), Pile(IN_MEMORY)
            self._features.put(piles[0].joined())
            self._residuals.put(piles[1].joined())
        return next(self.parts())
