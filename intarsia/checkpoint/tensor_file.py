"""One safetensors file: what is in it, and its tensors, each with its own memory map.

The library checks the header. It maps a whole file for every tensor that it is asked for (340 us where 400 tensors
are in it, against 20 us here), and its map stays as long as one of its tensors does; here a map is of one tensor's
bytes and goes with it, so that a walk over a file larger than memory holds no more than the tensors in use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open

from intarsia.errors import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""The maps of tensors that are in use, by where their bytes begin in memory."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    # its first byte in the file
    start: int

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        return self.numel * self.dtype.itemsize


def read_headers(file: Path) -> list[TensorHeader]:
    """The tensors of a safetensors file, in the order of their bytes. No weight is read.

    Raises:
        UserError: the file cannot be read, is truncated, or its header does not describe it.
    """
    try:
        size = file.stat().st_size
        with safe_open(file, framework="pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            found = [(name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices]
    except OSError as error:
        raise _damaged(file, "a file that can be read", error.strerror or str(error)) from error
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(file, "a whole safetensors file", f"{size:,} bytes, truncated or damaged ({error})") from error
    unknown = [f"{name} in {kind}" for name, kind, _ in found if kind not in DTYPES]
    if unknown:
        raise UserError(
            f"{file} holds {unknown[0]}, which is none of the known dtypes: {', '.join(DTYPES)}.",
            "Use a checkpoint in an ordinary dtype, float16, bfloat16 or float32 for weights.",
        )
    headers: list[TensorHeader] = []
    # The library refuses gaps, so the tensors are the last bytes of the file.
    end = size
    for name, kind, shape in reversed(found):
        end -= prod(shape) * DTYPES[kind].itemsize
        headers.append(TensorHeader(name=name, dtype=DTYPES[kind], shape=shape, file=file, start=end))
    return headers[::-1]


def _damaged(file: Path, expected: str, found: str) -> UserError:
    return UserError(f"{file}: expected {expected}; found {found}.", "Get this file again.")


def map_tensor(header: TensorHeader) -> torch.Tensor:
    """A tensor, mapped from its file: pages are read when they are touched.

    Writing to it changes memory only, never the file.

    Raises:
        UserError: the file has become shorter since its header was read, or is not there any more.
    """
    if not header.nbytes:
        return torch.empty(header.shape, dtype=header.dtype)
    with _opened(header) as stream:
        if os.fstat(stream.fileno()).st_size < header.start + header.nbytes:
            # Touching pages after the end would kill the process.
            raise UserError(
                f"{header.file} has become shorter since it was opened.",
                "Something writes to the model folder; let it finish and start again.",
            )
        if header.start % header.dtype.itemsize:
            # Kernels expect aligned entries; writers other than safetensors' own may leave them unaligned.
            stream.seek(header.start)
            return torch.frombuffer(bytearray(stream.read(header.nbytes)), dtype=header.dtype).view(header.shape)
        before = header.start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            stream.fileno(), before + header.nbytes, access=mmap.ACCESS_COPY, offset=header.start - before
        )
    flat = torch.frombuffer(pages, dtype=header.dtype, count=header.numel, offset=before)
    _MAPS[flat.data_ptr()] = pages
    return flat.view(header.shape)


def let_go(tensor: torch.Tensor) -> None:
    """Free the pages of a whole tensor of `map_tensor`; they are read again when they are touched.

    What was written to it is lost. Nothing happens to a tensor that is not mapped.
    """
    pages = _MAPS.get(tensor.data_ptr())
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _opened(header: TensorHeader) -> BinaryIO:
    try:
        return header.file.open("rb")
    except OSError as error:
        raise UserError(
            f"{header.file} cannot be read any more: {error.strerror or error}.",
            "Put the file back and give the same command again.",
        ) from error


def give_back() -> None:
    """Where the C library can: what it keeps for later use counts as taken until then."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
