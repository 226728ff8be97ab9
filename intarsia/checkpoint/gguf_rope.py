"""What transformers leaves unread of a GGUF file's rotary embedding, put into the config or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from intarsia.checkpoint.rope import llama_3_parameters
from intarsia.errors import UserError

_TENSOR = "rope_freqs.weight"


def scaling_of(reader: Any, file: Path) -> dict[str, Any] | None:
    """The `rope_parameters` for the config, where a file scales its rotary embedding; None where it does not.

    Args:
        reader: a `gguf.GGUFReader`.

    Raises:
        UserError: the file scales it in a way that is not known here. Read without it, the model would be another.
    """
    fields = reader.fields
    architecture = str(fields["general.architecture"].contents())
    kind = fields.get(f"{architecture}.rope.scaling.type")
    named = "none" if kind is None else str(kind.contents())
    found = next((np.array(tensor.data) for tensor in reader.tensors if tensor.name == _TENSOR), None)
    if named == "linear":
        return {
            "rope_type": "linear",
            "rope_theta": _number(fields, architecture, "rope.freq_base", 10000.0),
            "factor": _number(fields, architecture, "rope.scaling.factor", 1.0),
        }
    if named != "none":
        raise _unknown(file, f"scaling of type {named}")
    if found is None or bool((found == 1).all()):
        return None
    theta = _number(fields, architecture, "rope.freq_base", 10000.0)
    parameters = llama_3_parameters(found.reshape(-1), head_dim=2 * found.size, theta=theta)
    if parameters is None:
        raise _unknown(file, f"{_TENSOR}, which is not that of Llama 3")
    return parameters


def _number(fields: Any, architecture: str, name: str, default: float) -> float:
    field = fields.get(f"{architecture}.{name}")
    return default if field is None else float(field.contents())


def _unknown(file: Path, found: str) -> UserError:
    return UserError.of(
        where=str(file),
        expected="a rotary embedding that is not scaled, or scaled linearly or as in Llama 3",
        found=found,
        remedy="Use the checkpoint that the file was made from.",
    )
