"""What a user calls a model, taken apart.

A model is `demo`, a local folder, a local GGUF file, a hub id, or `OWNER/NAME/FILE.gguf` on the hub. In front of a
folder or hub id may stand `dequantize:`, which asks for weights of 8 bits to be read as ordinary ones; as a part of
the name it stays with the model wherever it is named again, in a recipe above all.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

DEMO = "demo"
DEQUANTIZE = "dequantize:"
GGUF = ".gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.-]+\.gguf)")


def wants_dequantizing(model: str) -> bool:
    """Whether the name asks for weights of 8 bits to be read as ordinary ones."""
    return model.startswith(DEQUANTIZE)


def bare(model: str) -> str:
    """The name without `dequantize:`."""
    return model.removeprefix(DEQUANTIZE)


def asked_for(model: str, *, dequantize: bool = False, gguf_file: str | None = None) -> str:
    """The name that says what options say beside it."""
    if gguf_file is not None:
        model = f"{model.rstrip('/')}/{gguf_file}"
    return f"{DEQUANTIZE}{model}" if dequantize and not wants_dequantizing(model) else model


def local_path(model: str) -> Path | None:
    """The file or folder of that name; None where there is none. `demo` is never one, but `./demo` is."""
    name = bare(model)
    path = Path(os.path.expanduser(name))
    return path if name and name != DEMO and path.exists() else None


def lasting(model: str) -> str:
    """The name as it may be kept: a local path is made absolute, as a recipe outlives the folder it was made in."""
    path = local_path(model)
    return model if path is None else asked_for(str(path.resolve()), dequantize=wants_dequantizing(model))


def hub_id(model: str) -> str | None:
    """The model's id on the hub; None for a local one and for what is no such id."""
    name = bare(model)
    if name == DEMO or local_path(model) is not None:
        return None
    found = hub_gguf(name)
    if found is not None:
        return found[0]
    return name if _HUB_ID.fullmatch(name) and not name.endswith((".safetensors", GGUF, ".json")) else None


def hub_gguf(model: str) -> tuple[str, str] | None:
    """Hub id and file name of a GGUF file on the hub."""
    found = _HUB_GGUF.fullmatch(model)
    return None if found is None else (found[1], found[2])
