"""Where tensors wait that a fit does not need for a while: in memory, or in a file without a name.

A streamed model has memory for a layer or two, and moments of one read-out may take more than these. The file is read
and written as files are, not mapped, so that none of its pages count as memory of the process; it goes with the pile.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from intarsia.disk import full_disk_named


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Where piles are made: `in_files` on the disk of `folder` (None: of temporary files), else in memory."""

    in_files: bool = False
    folder: Path | None = None


IN_MEMORY = Scratch()


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Where a tensor is in a file, and what it was."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Pile:
    """Tensors in the order in which they were put here. One that is in memory is the very tensor that was put."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._entries: list[Tensor | _Written] = []
        self._file: IO[bytes] | None = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tensor: Tensor) -> None:
        """Put a tensor on top.

        Raises:
            UserError: the disk is full.
        """
        if not self._scratch.in_files:
            self._entries.append(tensor)
            return
        with full_disk_named(self._scratch.folder or Path(tempfile.gettempdir())):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._scratch.folder)  # noqa: SIM115 - closed with the pile
            self._file.seek(self._end)
            self._file.write(_bytes(tensor.cpu().contiguous()))
            self._file.flush()
        entry = _Written(start=self._end, shape=tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self._entries.append(entry)
        self._end += tensor.nbytes

    def get(self, index: int) -> Tensor:
        """A tensor that was put here; it may be the pile's own."""
        return self._read(self._entries[index])

    def joined(self) -> Tensor:
        """All of them in one, one behind the other. Each is let go of as it is copied; the pile is empty afterwards."""
        first = self.get(0)
        found = first.new_empty(sum(entry.shape[0] for entry in self._entries), *first.shape[1:])
        del first
        at = 0
        while self._entries:
            part = self._read(self._entries.pop(0))
            found[at : at + len(part)] = part
            at += len(part)
        return found

    def _read(self, entry: Tensor | _Written) -> Tensor:
        if isinstance(entry, Tensor):
            return entry
        assert self._file is not None
        found = torch.empty(entry.shape, dtype=entry.dtype)
        self._file.seek(entry.start)
        read = self._file.readinto(_bytes(found))  # type: ignore[attr-defined] # typeshed's IO knows no readinto
        assert read == found.nbytes, "a file without a name was cut short"
        return found.to(entry.device)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy().data
