"""One tensor of a file, with a memory map of its own: when the tensor is freed the map goes with it."""

from __future__ import annotations

import mmap
import os
from typing import BinaryIO

import torch

from intarsia.checkpoint.header import TensorHeader
from intarsia.errors import UserError


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
    return flat.view(header.shape)


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
