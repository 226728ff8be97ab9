"""One tensor of a file, with a memory map of its own: when the tensor is freed the map goes with it."""

from __future__ import annotations

import mmap
import os
from typing import BinaryIO
from weakref import WeakValueDictionary

import torch

from intarsia.checkpoint.header import TensorHeader
from intarsia.errors import UserError

_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""The maps of tensors that are in use, by where their bytes begin in memory."""


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
            # Touching pages behind the end would kill the process.
            raise UserError.of(
                where=str(header.file),
                expected="the file as it was when it was opened",
                found="a shorter one",
                remedy="Something writes to the model folder; let it finish and start again.",
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
    """The pages of a whole tensor of `map_tensor` need not stay in memory: they are mapped again when they are touched.

    What was written to it is lost. Nothing happens to a tensor that is not mapped.
    """
    pages = _MAPS.get(tensor.data_ptr())
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _opened(header: TensorHeader) -> BinaryIO:
    try:
        return header.file.open("rb")
    except OSError as error:
        raise UserError.of(
            where=str(header.file),
            expected="the weight file that was there when the model was opened",
            found=error.strerror or str(error),
            remedy="Put the file back and give the same command again.",
        ) from error
