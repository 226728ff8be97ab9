"""A symmetric matrix of which half is kept, and which its Cholesky factor replaces.

Kept are rows of blocks, on the diagonal and right of it: little more than half of the numbers. A factorisation
overwrites them; the matrix itself waits meanwhile, in memory or in a file (`intarsia.healing.scratch`). A library's
factorisation takes the whole square, and a copy of it for the factor.

Shape suffixes: `C` rows and columns, `K` right-hand sides, `N` rows of a factor of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from intarsia.healing.scratch import IN_MEMORY, Pile, Scratch

_BLOCK, _BLOCKS = 256, 16  # rows at least, and rows of blocks at most
_COLUMNS = 2048  # added at a time


def entries(size: int) -> int:
    """How many numbers are kept of so many rows and columns: all, up to a block of them; of many 17/32."""
    step = _step(size)
    return sum(min(step, size - start) * (size - start) for start in range(0, size, step))


def _step(size: int) -> int:
    return max(_BLOCK, math.ceil(size / _BLOCKS))


class Symmetric:
    """Begins as zero."""

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device, scratch: Scratch = IN_MEMORY) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._scratch = scratch
        step = _step(size)
        self._starts = range(0, size, step)
        self._rows = [
            torch.zeros(min(step, size - start), size - start, dtype=dtype, device=device) for start in self._starts
        ]
        self._waiting: Pile | None = None
        self._factor = False

    def add(self, x_NC: Tensor) -> None:
        """Add x^T x, made in the dtype of x."""
        self._restore()
        self._waiting = None
        for start, row in self._blocks():
            left_NC = x_NC[:, start : start + len(row)]
            # Some columns at a time: the sum holds what is added twice, in the dtype of x and in its own.
            for part, columns in zip(row.split(_COLUMNS, dim=1), x_NC[:, start:].split(_COLUMNS, dim=1), strict=True):
                part += left_NC.T @ columns

    def diagonal(self) -> Tensor:
        """A copy of the diagonal, `[C]`."""
        self._restore()
        return torch.cat([row.diagonal() for row in self._rows])

    def whole(self) -> Tensor:
        """All of it, `[C, C]`."""
        self._restore()
        found = torch.empty(self.size, self.size, dtype=self.dtype, device=self.device)
        for start, row in self._blocks():
            found[start : start + len(row), start:] = row
            found[start:, start : start + len(row)] = row.T
        return found

    def times(self, b_CK: Tensor) -> Tensor:
        """Its product with another matrix."""
        self._restore()
        found_CK = torch.zeros_like(b_CK)
        for start, row in self._blocks():
            stop = start + len(row)
            found_CK[start:stop] += row @ b_CK[start:]
            found_CK[stop:] += row[:, len(row) :].T @ b_CK[start:stop]
        return found_CK

    def factorise(self, shift: float) -> None:
        """Put the Cholesky factor of the matrix plus `shift` times the identity in its place.

        Where that is not positive in floating point, it is shifted a little more, until it is.

        Raises:
            UserError: the disk is full.
        """
        mean = float(self.diagonal().mean())
        assert mean > 0.0 and math.isfinite(mean), "a matrix of zeros, or of what is not finite, has no factor"
        least = mean * math.sqrt(torch.finfo(self.dtype).eps)
        while not self._factorised(shift):
            shift = max(least, 10.0 * shift)

    def solve_(self, b_CK: Tensor) -> Tensor:
        """Solve for right-hand sides, with the shift of the last `factorise`, in their place."""
        assert self._factor
        for start, row in self._blocks():  # U^T y = b
            size = len(row)
            part_CK = b_CK[start : start + size]
            part_CK.copy_(torch.linalg.solve_triangular(row[:, :size].T, part_CK, upper=False))
            b_CK[start + size :].addmm_(row[:, size:].T, part_CK, alpha=-1.0)
        for start, row in reversed(list(self._blocks())):  # U x = y
            size = len(row)
            part_CK = b_CK[start : start + size]
            part_CK.addmm_(row[:, size:], b_CK[start + size :], alpha=-1.0)
            part_CK.copy_(torch.linalg.solve_triangular(row[:, :size], part_CK, upper=True))
        return b_CK

    def _factorised(self, shift: float) -> bool:
        """Whether the factor U, of U^T U, could be made; U stands in the upper half then."""
        self._restore()
        if self._waiting is None:
            self._waiting = Pile(self._scratch)
            for row in self._rows:
                self._waiting.put(row if self._scratch.in_files else row.clone())
        self._factor = True
        for row in self._rows:
            row.diagonal().add_(shift)
        for index, (start, row) in enumerate(self._blocks()):
            size = len(row)
            corner, failed = torch.linalg.cholesky_ex(row[:, :size], upper=True)
            if int(failed):
                return False
            row[:, :size] = corner
            row[:, size:] = torch.linalg.solve_triangular(corner.T, row[:, size:], upper=False)
            for below, other in list(self._blocks())[index + 1 :]:
                column = below - start
                other.addmm_(row[:, column : column + len(other)].T, row[:, column:], alpha=-1.0)
        return True

    def _restore(self) -> None:
        """Put the matrix back where its factor is."""
        if self._factor:
            assert self._waiting is not None
            for index, row in enumerate(self._rows):
                row.copy_(self._waiting.get(index))
            self._factor = False

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        return zip(self._starts, self._rows, strict=True)
