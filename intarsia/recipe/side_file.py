"""The safetensors file beside a recipe: index lists (int32) and fitted tensors (float32)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from intarsia.errors import UserError
from intarsia.recipe.mapped_arrays import let_go, mapped, write_safetensors
from intarsia.recipe.values import Values, shown

# One entry alone: safetensors writes several in an order that changes from one writing to the next.
_MARK = {"intarsia": "recipe"}
_DTYPES = {"I32": "<i4", "F32": "<f4"}

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


def write_tensors(tensors: Arrays, path: Path) -> None:
    """Write a side file."""
    write_safetensors(tensors, path, metadata=_MARK)


def read_tensors(path: Path, data: Any, values: Values) -> Arrays | None:
    """The tensors of the side file that a recipe's data names; None (and a problem) where it cannot be used."""
    given = data.get("tensors") if isinstance(data, dict) else None
    if given is None:
        return {}
    entry = values.mapping(given, "tensors", ("file", "sha256"), ("file",))
    if values.problems:
        return None
    name = entry["file"]
    if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\:\0") or name[0] == ".":
        values.wrong("tensors.file", "the plain name of a .safetensors file beside the recipe", shown(name))
        return None
    side = path.parent / name
    try:
        if not side.is_file():
            raise FileNotFoundError(2, "no such file")
        tensors: Arrays = {}
        with safe_open(side, framework="numpy") as file:
            tensors |= (large := mapped(side, _DTYPES))
            for key in sorted(file.keys()):
                if file.get_slice(key).get_dtype() not in _DTYPES:
                    values.wrong("tensors.file", "int32 and float32 tensors only", shown(key))
                    return None
                if key not in large:
                    tensors[key] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        values.wrong("tensors.file", f"the side file {name}", found, "Keep it beside the recipe, as it was written.")
        return None
    if "sha256" in entry and entry["sha256"] != tensors_hash(tensors):
        values.wrong("tensors.sha256", "the side file that belongs to this recipe", "another", "Copy both files.")
        return None
    return tensors


def refuse_foreign(side: Path) -> None:
    """Never replace a file that is not a recipe's (a model's weights, say)."""
    if not side.exists():
        return
    try:
        with safe_open(side, framework="numpy") as file:
            ours = (file.metadata() or {}).get("intarsia") == _MARK["intarsia"]
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise UserError.of(
            where=str(side),
            expected="no file, or the side file of an earlier recipe",
            found="another file",
            remedy="Give the recipe another name.",
        )
