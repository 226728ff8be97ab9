"""Fitted tensors (float32) and long index lists (int32) of a recipe, in the safetensors file beside it.

Arrays stay in files, mapped: what is fitted on the layers of a large model takes more memory, in float32, than some
layers of it.
"""

from __future__ import annotations

import hashlib
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
from safetensors import SafetensorError, safe_open

from intarsia.disk import full_disk_named
from intarsia.errors import UserError

# One entry alone: safetensors writes several in an order that changes from one writing to the next.
_MARK = {"intarsia": "recipe"}
_DTYPES = {"I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
_SMALL = 2**24  # bytes; a smaller array is kept in memory

Arrays = dict[str, npt.NDArray[Any]]


def tensors_hash(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
        digest.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        digest.update(tensor.data)
        let_go(tensors[name])
    return digest.hexdigest()


def read_tensors(path: Path) -> Arrays:
    """The tensors of a side file, mapped.

    Raises:
        OSError, SafetensorError: there is no such file, or it is damaged.
        ValueError: a tensor has another dtype than int32 and float32; the error is its name.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file")
    with safe_open(path, framework="numpy") as file:
        kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise ValueError(name)
            kinds[name] = _DTYPES[entry.get_dtype()], tuple(entry.get_shape())
    found: Arrays = {}
    whole = np.memmap(path, dtype=np.uint8, mode="c")
    # Tensors fill the file to its last byte, in the order of their offsets.
    start = len(whole) - sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())
    for name, (dtype, shape) in kinds.items():
        stop = start + dtype.itemsize * math.prod(shape)
        found[name] = whole[start:stop].view(dtype).reshape(shape)
        start = stop
    return found


def write_tensors(tensors: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write a side file, one tensor at a time, in the order of names."""
    header: dict[str, Any] = {"__metadata__": _MARK}
    kinds = {dtype.name: kind for kind, dtype in _DTYPES.items()}
    start = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": kinds[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            tensor = np.ascontiguousarray(tensors[name])
            file.write(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).data)
            let_go(tensors[name])


def refuse_foreign(path: Path) -> None:
    """Never replace a file that is not a recipe's (a model's weights, say)."""
    if not path.exists():
        return
    try:
        with safe_open(path, framework="numpy") as file:
            ours = (file.metadata() or {}).get("intarsia") == _MARK["intarsia"]
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise UserError(
            f"{path} exists and is not a recipe's side file.",
            "Give the recipe another name.",
        )


def spooled(
    parts: Iterable[npt.NDArray[np.float32]], shape: tuple[int, ...], folder: Path | None
) -> npt.NDArray[np.float32]:
    """An array in a file without a name, which is deleted with the array.

    Args:
        parts: the array's rows, some at a time: it need never be in memory as a whole.
        folder: on whose disk; None for that of temporary files.

    Raises:
        UserError: the disk is full.
    """
    dtype = np.dtype(np.float32)
    if math.prod(shape) * dtype.itemsize < _SMALL:
        return np.concatenate(list(parts))
    with full_disk_named(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        return np.memmap(file, dtype=dtype, mode="c", shape=shape)


def let_go(array: npt.NDArray[Any]) -> None:
    """Release the pages of a mapped array; they are read again when they are needed."""
    inner: Any = array
    while inner is not None:
        pages = getattr(inner, "_mmap", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
            return
        inner = getattr(inner, "base", None)
