"""Names of models: `demo`, a local folder or GGUF file, or a hub id; handled without reading files.

A GGUF file on the hub is `OWNER/NAME/FILE.gguf`. The prefix `dequantize:` of a folder or hub id reads 8-bit weights as
ordinary ones; recipes of the first version have it in their models' names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from intarsia.errors import UserError

DEMO = "demo"
GGUF = ".gguf"
_DEQUANTIZE = "dequantize:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.-]+\.gguf)")


def check_model(model: str) -> None:
    """Refuse names that are no folder, GGUF file or hub id, and not `demo`.

    Raises:
        UserError: it is none of these.
    """
    path = local_path(model)
    is_here = path is not None and (path.is_dir() or path.suffix == GGUF)
    if plain_name(model) != DEMO and not is_here and (path is not None or hub_id(model) is None):
        raise UserError(
            f"There is no model {model!r}: it is "
            f"{'not a local file or folder' if path is None else 'a file, but not GGUF'}, nor a hub id, nor `demo`.",
            "Check the path; a model is the folder that holds config.json and the .safetensors files.",
        )


def require_folder(folder: Path) -> None:
    """Refuse a path that is not a folder.

    Raises:
        UserError: it is a file, or does not exist.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} {'is a file, not a model folder' if folder.exists() else 'does not exist'}.",
            "Give the folder that holds config.json and the .safetensors files.",
        )


def plain_name(model: str) -> str:
    """A model's name without the prefix `dequantize:`."""
    return model.removeprefix(_DEQUANTIZE)


def local_path(model: str) -> Path | None:
    """The file or folder of a name; None if there is none. `demo` is never one, but `./demo` is."""
    name = plain_name(model)
    path = Path(os.path.expanduser(name))
    return path if name and name != DEMO and path.exists() else None


def lasting(model: str) -> str:
    """The name for a recipe: local paths become absolute."""
    path = local_path(model)
    return plain_name(model) if path is None else str(path.resolve())


def hub_id(model: str) -> str | None:
    """The model's id on the hub; None for a local model and for invalid ids."""
    name = plain_name(model)
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
