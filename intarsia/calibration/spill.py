"""One block of hidden states in a file: pages are let go of as soon as they were written or read.

Pages of a mapped file count as memory of the process while they are mapped, so a spilled store that kept them would
need as much memory as one that did not spill.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from intarsia.errors import UserError


class Spilled:
    """`[N, T, D]` hidden states in a file of just their bytes."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Make the file.

        Raises:
            UserError: the disk is full.
        """
        n, t, d = shape
        self.path = path
        self._row_bytes = t * d * dtype.itemsize
        reserve(path, n * self._row_bytes)
        with path.open("r+b") as file:
            self._pages = mmap.mmap(file.fileno(), max(n * self._row_bytes, 1))
        self._all = torch.frombuffer(self._pages, dtype=dtype, count=n * t * d).view(shape)

    def write(self, start: int, h_BTD: Tensor) -> None:
        """Store sequences `start`, `start + 1`, ..."""
        self._all[start : start + h_BTD.shape[0]] = h_BTD
        self._let_go(start, start + h_BTD.shape[0])

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of sequences `start` .. `stop - 1`."""
        found = self._all[start:stop].clone()
        self._let_go(start, stop)
        return found

    def rows(self, index: list[int]) -> Tensor:
        """A copy of any sequences."""
        found = self._all[index]
        self._let_go(0, self._all.shape[0])
        return found

    def _let_go(self, start: int, stop: int) -> None:
        """Unmap the pages; what was written stays in the file."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        first = start * self._row_bytes // page * page
        length = stop * self._row_bytes - first
        if length > 0:
            self._pages.madvise(mmap.MADV_DONTNEED, first, length)


def reserve(path: Path, nbytes: int) -> None:
    """Make a file and take its space on disk now: a disk that runs full under a memory map kills the process.

    Raises:
        UserError: there is not enough.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate") and nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)
            file.truncate(max(nbytes, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path.unlink(missing_ok=True)
        raise UserError.of(
            where=str(path.parent),
            expected=f"{nbytes / 1e9:.2f} GB for hidden states that do not fit in memory",
            found="a full disk",
            remedy="Free some space, name a run folder on another disk, give more --memory, or use fewer tokens.",
        ) from error
