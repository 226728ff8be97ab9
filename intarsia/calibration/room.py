"""What hidden states may take in memory, shared by all stores of a piece of work, and where the rest goes."""

from __future__ import annotations

from pathlib import Path

import psutil

_SHARE_OF_FREE_MEMORY = 0.4
PREFIX = "intarsia-hidden-"
"""How folders of spilled hidden states are named."""


class Room:
    """A number of bytes that stores take from and give back to.

    Attributes:
        memory_bytes: all of them; by default two fifths of what is free when the room is made.
        folder: where files of what does not fit are made; None for the system's folder for temporary files.
    """

    def __init__(self, memory_bytes: int | None = None, folder: Path | None = None) -> None:
        free = int(psutil.virtual_memory().available * _SHARE_OF_FREE_MEMORY)
        self.memory_bytes = free if memory_bytes is None else memory_bytes
        self.folder = folder
        self._left = self.memory_bytes

    def take(self, nbytes: int) -> bool:
        """Take so many bytes; False where so many are not left."""
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Give back what was taken."""
        self._left += nbytes
