"""The versions of what a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """What this was made with."""
    found = {name: version(name) for name in ("intarsia", "torch", "transformers", "safetensors")}
    return {**found, "python": platform.python_version()}
