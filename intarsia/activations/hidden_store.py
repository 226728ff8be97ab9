"""Hidden states of a text at every depth, in memory within a budget or spilled to files.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from intarsia.errors import UserError

_SHARE_OF_FREE_MEMORY = 0.4
PREFIX = "intarsia-hidden-"
"""Prefix of folders with spilled hidden states."""


class MemoryBudget:
    """A memory budget, in bytes, shared by several stores.

    Attributes:
        memory_bytes: its size; by default two fifths of the memory that is free at the start.
        folder: for files of what does not fit; None for the system's temporary folder.
    """

    def __init__(self, memory_bytes: int | None = None, folder: Path | None = None) -> None:
        free = int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY)
        self.memory_bytes = free if memory_bytes is None else memory_bytes
        self.folder = folder
        self._left = self.memory_bytes

    def take(self, nbytes: int) -> bool:
        """Take bytes from the budget; False if too few are left."""
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        self._left += nbytes


class Spilled:
    """`[N, T, D]` hidden states in a raw file."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Create the file.

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
        """Unmap the pages; the file keeps their content."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        first = start * self._row_bytes // page * page
        length = stop * self._row_bytes - first
        if length > 0:
            self._pages.madvise(mmap.MADV_DONTNEED, first, length)


def reserve(path: Path, nbytes: int) -> None:
    """Create a file and allocate its space now, because a disk that fills up under a memory map kills the process.

    Raises:
        UserError: the disk is full.
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
        raise UserError(
            f"{path.parent} is on a full disk; hidden states that do not fit into memory need {nbytes / 1e9:.2f} GB.",
            "Free some space, use a run folder on another disk, more --memory, or fewer tokens.",
        ) from error


class HiddenStore:
    """Keeps `[N, T, D]` hidden states by depth.

    Buffers are created at the first write, in memory as long as the budget allows; the rest are memory-mapped files in
    a temporary folder (inside the folder of the budget, if it has one), which is deleted with the store.

    Attributes:
        held: the hidden states stored at `hold`, unchanged; None before that.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        memory_budget: MemoryBudget | None = None,  # shared with other stores; None for one of its own
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.memory_budget = memory_budget or MemoryBudget()
        self._buffers: dict[int, Tensor | Spilled] = {}
        self.held: HiddenStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def depth_bytes(self) -> int:
        """Bytes of the hidden states at one depth."""
        n, t, d = self.shape
        return n * t * d * self.dtype.itemsize

    def put(self, depth: int, start: int, h_BTD: Tensor) -> None:
        """Store the hidden states of sequences `start`, `start + 1`, ... at a depth."""
        buffer, h_BTD = self._buffer(depth), h_BTD.to("cpu")
        if isinstance(buffer, Spilled):
            buffer.write(start, h_BTD)
        else:
            buffer[start : start + h_BTD.shape[0]] = h_BTD

    def get(self, depth: int, start: int, stop: int, device: torch.device) -> Tensor:
        """The hidden states of sequences `start` .. `stop - 1` at a depth, on `device`."""
        buffer = self._find(depth)
        return (buffer.read(start, stop) if isinstance(buffer, Spilled) else buffer[start:stop]).to(device)

    def rows(self, depth: int, index: Sequence[int], device: torch.device) -> Tensor:
        """The hidden states of any sequences at a depth, on `device`: a copy."""
        buffer = self._find(depth)
        return (buffer.rows(list(index)) if isinstance(buffer, Spilled) else buffer[list(index)]).to(device)

    def depths(self) -> list[int]:
        """The stored depths, in order."""
        return sorted({*self._buffers, *(self.held.depths() if self.held is not None else ())})

    def hold(self) -> None:
        """Keep the current content: later writes hide it, and `restore` drops them.

        A depth that is written again must be complete before it is read.
        """
        assert self.held is None, "the content is held already"
        self.held = HiddenStore(self.shape, self.dtype, memory_budget=self.memory_budget)
        self.held._buffers, self._buffers = self._buffers, {}
        self.held._folder, self._folder = self._folder, None

    def only(self, sequences: int) -> None:
        """Store only this number of sequences from now on; only held content may exist."""
        assert not self._buffers, "something is stored already"
        self.shape = (sequences, *self.shape[1:])

    def restore(self) -> None:
        """Drop everything written since `hold`."""
        for depth in list(self._buffers):
            self.drop(depth)

    def drop(self, depth: int) -> None:
        self._free(self._buffers.pop(depth, None))

    def close(self) -> None:
        """Free every buffer and delete the files."""
        while self._buffers:
            self._free(self._buffers.popitem()[1])
        if self.held is not None:
            self.held.close()
            self.held = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __del__(self) -> None:
        if hasattr(self, "_folder"):
            self.close()

    def _free(self, buffer: Tensor | Spilled | None) -> None:
        if isinstance(buffer, Spilled):
            buffer.path.unlink(missing_ok=True)
        elif buffer is not None:
            self.memory_budget.give(self.depth_bytes)

    def _find(self, depth: int) -> Tensor | Spilled:
        return self._buffers[depth] if self.held is None or depth in self._buffers else self.held._find(depth)

    def _buffer(self, depth: int) -> Tensor | Spilled:
        if depth not in self._buffers:
            if self.memory_budget.take(self.depth_bytes):
                self._buffers[depth] = torch.empty(self.shape, dtype=self.dtype)
            else:
                self._folder = self._folder or tempfile.TemporaryDirectory(prefix=PREFIX, dir=self.memory_budget.folder)
                path = Path(self._folder.name) / f"depth-{depth}.bin"
                self._buffers[depth] = Spilled(path, self.shape, self.dtype)
        return self._buffers[depth]
