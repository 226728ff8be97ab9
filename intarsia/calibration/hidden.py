"""Hidden states of the calibration set at every depth, in memory or spilled to files.

Shape suffixes: `N` sequences, `T` tokens, `D` residual width.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from intarsia.errors import UserError

_SHARE_OF_FREE_MEMORY = 0.4


class HiddenStore:
    """Keeps `[N, T, D]` hidden states by depth.

    Buffers are made when first written. As many stay in memory as `memory_bytes` allows (by default two fifths of
    what is free when the store is made); the rest are memory-mapped files in a temporary folder (inside `folder`, if
    one is given), which is deleted with the store.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        memory_bytes: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        free = int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY)
        self.memory_bytes = free if memory_bytes is None else memory_bytes
        self._memory_left = self.memory_bytes
        self._buffers: dict[int, Tensor] = {}
        self._held: dict[int, Tensor] | None = None
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def depth_bytes(self) -> int:
        """Bytes of the hidden states at one depth."""
        n, t, d = self.shape
        return n * t * d * self.dtype.itemsize

    def put(self, depth: int, start: int, h_BTD: Tensor) -> None:
        """Store the hidden states of sequences `start`, `start + 1`, ... at a depth."""
        self._buffer(depth)[start : start + h_BTD.shape[0]] = h_BTD.to("cpu")

    def get(self, depth: int, start: int, stop: int, device: torch.device) -> Tensor:
        """The hidden states of sequences `start` .. `stop - 1` at a depth, on `device`."""
        return self._stored(depth)[start:stop].to(device)

    def rows(self, depth: int, index: Sequence[int], device: torch.device) -> Tensor:
        """The hidden states of any sequences at a depth, on `device`: a copy."""
        return self._stored(depth)[list(index)].to(device)

    def depths(self) -> list[int]:
        """Depths that are stored, in order."""
        return sorted({*self._buffers, *(self._held or {})})

    def hold(self) -> None:
        """Keep what is stored from now on: what is put later stands in front of it, and goes with `restore`.

        A depth that is put again must be put whole before it is read.
        """
        assert self._held is None, "what is stored is held already"
        self._held, self._buffers = self._buffers, {}

    def restore(self) -> None:
        """Forget what was put since `hold`."""
        for depth in list(self._buffers):
            self.drop(depth)

    def file(self, depth: int) -> Path | None:
        """The file that holds a depth, of `shape` and `dtype` without a header; None if it is in memory."""
        if self._folder is None or depth not in self.depths():
            return None
        path = self._path(depth, later=self._held is not None and depth in self._buffers)
        return path if path.exists() else None

    def drop(self, depth: int) -> None:
        """Free one depth."""
        path = self.file(depth)
        self._buffers.pop(depth, None)
        if path is None:
            self._memory_left += self.depth_bytes
        else:
            path.unlink()

    def close(self) -> None:
        """Free every buffer and delete the files."""
        self._buffers.clear()
        self._held = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __del__(self) -> None:
        if getattr(self, "_folder", None) is not None:
            self.close()

    def _stored(self, depth: int) -> Tensor:
        return self._buffers[depth] if self._held is None or depth in self._buffers else self._held[depth]

    def _path(self, depth: int, *, later: bool) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{'later' if later else 'depth'}-{depth}.bin"

    def _buffer(self, depth: int) -> Tensor:
        if depth not in self._buffers:
            if self.depth_bytes <= self._memory_left:
                self._memory_left -= self.depth_bytes
                self._buffers[depth] = torch.empty(self.shape, dtype=self.dtype)
            else:
                self._buffers[depth] = self._spilled(depth)
        return self._buffers[depth]

    def _spilled(self, depth: int) -> Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="intarsia-hidden-", dir=self._parent)
        n, t, d = self.shape
        path = self._path(depth, later=self._held is not None)
        _reserve(path, self.depth_bytes)
        flat = torch.from_file(str(path), shared=True, size=n * t * d, dtype=self.dtype)
        return flat.view(n, t, d)


def _reserve(path: Path, nbytes: int) -> None:
    """Take the space on disk now: a disk that runs full under a memory map kills the process.

    Raises:
        UserError: there is not enough.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError.of(
            where=str(path.parent),
            expected=f"{nbytes / 1e9:.2f} GB for hidden states that do not fit in memory",
            found="a full disk",
            remedy="Free some space, set TMPDIR to another disk, or use fewer tokens.",
        ) from error
