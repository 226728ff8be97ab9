"""The weight files of a model folder: names, headers, and tensors, each with its own memory map.

safetensors checks headers. For tensors, it maps a whole file on every request (340 us with 400 tensors, against 20 us
here), and keeps the map as long as any of its tensors. Here a map covers one tensor's bytes and is released with it, so
that a walk over a file larger than memory holds only the tensors in use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open

from intarsia.disk import read_json
from intarsia.errors import Problem, Problems, UserError, few
from intarsia.progress import current

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
"""The maps of tensors in use, by the address of their bytes."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_NAMED = 5
_OBJECT = "a file with one JSON object"


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """A tensor in a file, existing or planned."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorHeader(TensorPlan):
    """One tensor of a file."""

    file: Path
    # its first byte in the file
    start: int

    def tensor(self) -> torch.Tensor:
        """The tensor, memory-mapped: pages are read when they are touched.

        Writing to it changes memory only, never the file.

        Raises:
            UserError: the file has shrunk since its header was read, or was removed.
        """
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        with _opened(self.file) as stream:
            if os.fstat(stream.fileno()).st_size < self.start + self.nbytes:
                # Touching pages after the end would kill the process.
                raise UserError(
                    f"{self.file} has shrunk since it was opened.",
                    "Another program writes to the model folder; let it finish, and start again.",
                )
            if self.start % self.dtype.itemsize:
                # Kernels expect aligned entries; writers other than safetensors' own may leave them unaligned.
                stream.seek(self.start)
                return torch.frombuffer(bytearray(stream.read(self.nbytes)), dtype=self.dtype).view(self.shape)
            before = self.start % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(
                stream.fileno(), before + self.nbytes, access=mmap.ACCESS_COPY, offset=self.start - before
            )
        flat = torch.frombuffer(pages, dtype=self.dtype, count=self.numel, offset=before)
        _MAPS[flat.data_ptr()] = pages
        return flat.view(self.shape)


def read_headers(file: Path) -> list[TensorHeader]:
    """The tensors of a safetensors file, in the order of their bytes, without reading weights.

    Raises:
        UserError: the file cannot be read, is truncated, or its header does not describe it.
    """
    try:
        size = file.stat().st_size
        with safe_open(file, framework="pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            found = [(name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices]
    except OSError as error:
        raise _damaged(file, "a readable file", error.strerror or str(error)) from error
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(
            file, "a complete safetensors file", f"{size:,} bytes, truncated or damaged ({error})"
        ) from error
    unknown = [f"{name} in {kind}" for name, kind, _ in found if kind not in DTYPES]
    if unknown:
        raise UserError(
            f"{file} holds {unknown[0]}, which is not one of the known dtypes: {', '.join(DTYPES)}.",
            "Use a checkpoint with weights in float16, bfloat16 or float32.",
        )
    headers: list[TensorHeader] = []
    # The library refuses gaps, so the tensors are the last bytes of the file.
    end = size
    for name, kind, shape in reversed(found):
        end -= prod(shape) * DTYPES[kind].itemsize
        headers.append(TensorHeader(name=name, dtype=DTYPES[kind], shape=shape, file=file, start=end))
    return headers[::-1]


def _damaged(file: Path, expected: str, found: str) -> UserError:
    return UserError(f"{file}: expected {expected}; found {found}.", "Download this file again.")


def let_go(tensor: torch.Tensor) -> None:
    """Free the pages of a mapped tensor; they are read again when they are touched.

    Changes to it are lost. A tensor that is not mapped is unaffected.
    """
    pages = _MAPS.get(tensor.data_ptr())
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(
            f"{file} can no longer be read: {error.strerror or error}.",
            "Restore the file, and run the same command again.",
        ) from error


def give_back() -> None:
    """Return unused memory of the C library to the system, if it can."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def read_all_headers(folder: Path) -> dict[str, TensorHeader]:
    """All tensors of the folder: files in name order, tensors in the order of their bytes.

    Raises:
        UserError: there are no safetensors weights, or a file is missing, damaged or contradicts the index.
    """
    if (folder / SINGLE_FILE).exists():
        headers = {header.name: header for header in read_headers(folder / SINGLE_FILE)}
        if (folder / INDEX_FILE).exists():
            current().say(f"{folder} has {SINGLE_FILE} and {INDEX_FILE}: using the single file, as transformers does")
    elif (folder / INDEX_FILE).exists():
        index = _read_index(folder / INDEX_FILE)
        headers = _read_shards(folder, index["weight_map"])
        metadata, nbytes = index.get("metadata"), sum(header.nbytes for header in headers.values())
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated not in (None, nbytes):
            current().say(
                f"{folder / INDEX_FILE}: total_size is {stated}, but the files hold {nbytes} bytes: using the files"
            )
    else:
        raise _no_weights(folder)
    read = {header.file.name for header in headers.values()}
    others = sorted(
        file.name
        for file in folder.glob("*.safetensors")
        if file.name not in read and not file.name.startswith("adapter_")
    )
    if others:
        current().say(f"ignoring {few(others)} in {folder}: using {few(sorted(read))}")
    return headers


def _read_index(file: Path) -> dict[str, Any]:
    remedy = "Download the index again, or save the model again with save_pretrained()."
    index = read_json(file, expected=_OBJECT, remedy=remedy)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: weight_map names no tensors.", remedy)
    Problems(
        Problem(f"{file}: {name} is in {shard!r}, which is not the name of a shard in this folder.", remedy)
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors")
    ).raise_any(most=_MOST_NAMED)
    return index


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    problems = Problems()
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        if not file.exists():
            problems.add(f"{file}: this shard of the index is missing.", "Download this file again.")
            continue
        with problems:
            found = read_headers(file)
            headers |= {header.name: header for header in found if weight_map.get(header.name) == shard}
            strays = sorted({header.name for header in found} - headers.keys())
            if strays:
                current().say(f"{file} also holds {few(strays)}, which {INDEX_FILE} has elsewhere: using the index")
            absent = sorted({name for name, home in weight_map.items() if home == shard} - headers.keys())
            if absent:
                problems.add(
                    f"{file} lacks {few(absent)}, which it has according to the index.",
                    "Index and shards do not match; download the checkpoint again.",
                )
    problems.raise_any()
    return headers


def _no_weights(folder: Path) -> UserError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    others = [name for name in names if name.endswith(".safetensors")]
    load = "transformers.AutoModelForCausalLM.from_pretrained"
    if others:
        found, remedy = ", ".join(others[:_MOST_NAMED]), "Save the model with save_pretrained() of transformers."
    elif pickles:
        found = f"pickled weights only ({', '.join(pickles[:_MOST_NAMED])}), which can run code when they are loaded"
        remedy = (
            f"If you trust them, convert them once: {load}({str(folder)!r}, dtype='auto').save_pretrained(NEW), "
            "and copy the tokenizer files to NEW."
        )
    elif ggufs:
        found = f"GGUF ({', '.join(ggufs[:_MOST_NAMED])})"
        remedy = f"Give the file itself: {folder / ggufs[0]}."
    else:
        found, remedy = "no weights", "Download the .safetensors files of the model."
    return UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, but {found}.", remedy)
