"""The header of a safetensors file, parsed and held against the file that it stands in.

The format: 8 bytes with the header's length (unsigned, little-endian), the header (a JSON object: tensor name ->
dtype, shape, begin and end of its bytes), then the bytes. A header is input like any other: everything that it
claims is checked here, so that reading a tensor later cannot go past the end of the file or into another tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

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
_LENGTH_BYTES = 8
# The bound that the safetensors library itself sets.
_LONGEST_HEADER = 100_000_000
# What torch can represent.
_MOST_AXES = 64
_MOST_ENTRIES = 2**60


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor of a checkpoint: what it is, and at which byte of which file it starts."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return prod(self.shape)


def _damaged(file: Path, expected: str, found: str) -> UserError:
    return UserError.of(where=str(file), expected=expected, found=found, remedy="Get this file again.")


def read_headers(file: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file, in the order of their bytes. No weight is read.

    Raises:
        UserError: the file cannot be read, is truncated, or its header does not describe it.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            first = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            data_start = _LENGTH_BYTES + length
            if len(first) < _LENGTH_BYTES:
                raise _damaged(file, "a safetensors file", f"a truncated file of {size} bytes")
            if length > _LONGEST_HEADER:
                raise _damaged(file, f"a header of at most {_LONGEST_HEADER:,} bytes", f"a length of {length:,}")
            if data_start > size:
                raise _damaged(file, f"{data_start:,} bytes of header", f"a truncated file of {size:,} bytes")
            text = stream.read(length)
    except OSError as error:
        raise _damaged(file, "a file that can be read", error.strerror or str(error)) from error
    headers = [_tensor(file, name, entry, data_start) for name, entry in _entries(file, text) if name != "__metadata__"]
    headers.sort(key=lambda header: (header.start, header.nbytes))
    _check_layout(file, headers, data_start, size)
    return headers


def _entries(file: Path, text: bytes) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []

    def keep_duplicates(found: list[tuple[str, Any]]) -> dict[str, Any]:
        # Called for the innermost object first, so what stays here is the header's own list of entries.
        pairs[:] = found
        return dict(found)

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=keep_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "a header in JSON", str(error)) from error
    if not isinstance(parsed, dict):
        raise _damaged(file, "a header that is a JSON object", type(parsed).__name__)
    if len(parsed) != len(pairs):
        raise _damaged(file, "every tensor once in the header", "a name that stands there twice")
    return pairs


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _possible(shape: list[int]) -> bool:
    # An extent of 0 hides how large the others are.
    return len(shape) <= _MOST_AXES and prod(max(extent, 1) for extent in shape) <= _MOST_ENTRIES


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError.of(
            where=f"{file}: {name}",
            expected=f"a dtype out of {', '.join(DTYPES)}",
            found=repr(kind),
            remedy="Use a checkpoint in an ordinary dtype, float16, bfloat16 or float32 for weights.",
        )
    if not isinstance(shape, list) or not all(_whole(extent) for extent in shape) or not _possible(shape):
        raise _damaged(file, f"a shape for {name}", repr(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(offset) for offset in offsets):
        raise _damaged(file, f"two byte offsets for {name}", repr(offsets))
    dtype = DTYPES[kind]
    begin, end = offsets
    nbytes = prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _damaged(file, f"{nbytes:,} bytes for {name} ({kind}, shape {shape})", f"offsets {begin} to {end}")
    return TensorHeader(name=name, dtype=dtype, shape=tuple(shape), file=file, start=data_start + begin, nbytes=nbytes)


def _check_layout(file: Path, headers: list[TensorHeader], data_start: int, size: int) -> None:
    """Tensors lie one behind the other without gaps, and the file ends where the last one does."""
    end = max((header.start + header.nbytes for header in headers), default=data_start)
    if end > size:
        raise _damaged(file, f"{end:,} bytes by its header", f"a truncated file of {size:,} bytes")
    at = data_start
    for header in headers:
        if header.start != at:
            kind = "overlaps the tensor before it" if header.start < at else "has a gap before it"
            raise _damaged(file, "tensors that lie one behind the other", f"{header.name}, which {kind}")
        at += header.nbytes
    if end < size:
        raise _damaged(file, f"{end:,} bytes by its header", f"{size:,} bytes")
