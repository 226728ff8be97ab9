"""Arrays of a recipe that lie in files: memory holds only the pages that are being read.

What is fitted on the layers of a large model takes more memory, in float32, than some layers of it.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from intarsia.disk import full_disk_named

_LEAST = 2**24  # bytes; smaller arrays are simply read


def spooled(
    parts: Iterable[npt.NDArray[np.float32]], shape: tuple[int, ...], folder: Path | None
) -> npt.NDArray[np.float32]:
    """An array in a file without a name, which goes when the array does.

    Args:
        parts: the array's rows, some at a time: it need never be in memory as a whole.
        folder: on whose disk; None for that of temporary files.

    Raises:
        UserError: the disk is full.
    """
    dtype = np.dtype(np.float32)
    if math.prod(shape) * dtype.itemsize < _LEAST:
        return np.concatenate(list(parts))
    with full_disk_named(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        return np.memmap(file, dtype=dtype, mode="c", shape=shape)


def mapped(path: Path, names: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """The large ones of the arrays in a safetensors file.

    Args:
        names: numpy's names of the dtypes of those that may be mapped, by the names of dtypes in the file.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    found: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        start, stop = entry.get("data_offsets", (0, 0))
        if stop - start >= _LEAST and entry["dtype"] in names:
            shape, offset = tuple(entry["shape"]), 8 + length + start
            found[name] = np.memmap(path, dtype=names[entry["dtype"]], mode="c", offset=offset, shape=shape)
    return found


def write_safetensors(arrays: Mapping[str, npt.NDArray[Any]], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, an array at a time, in the order of names."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    kinds = {"float32": "F32", "int32": "I32"}
    at = 0
    for name in sorted(arrays):
        array = arrays[name]
        header[name] = {
            "dtype": kinds[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
            let_go(arrays[name])


def let_go(array: npt.NDArray[Any]) -> None:
    """The pages of a mapped array need not stay in memory; they are read again when they are needed."""
    inner: Any = array
    while inner is not None:
        pages = getattr(inner, "_mmap", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
            return
        inner = getattr(inner, "base", None)
