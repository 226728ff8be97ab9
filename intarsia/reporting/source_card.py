"""The card of the model that another one was made from: what of its front matter holds for that one too."""

from __future__ import annotations

import re
from typing import Any

import yaml

_INHERITED = ("license", "license_name", "license_link", "language")
_MAX_FRONT_MATTER = 64 * 1024


def inherited(card: str | None) -> dict[str, Any]:
    """Licence and languages from the front matter of another model's card; empty where there is none to read."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card or "", flags=re.DOTALL)
    if found is None or len(found[1]) > _MAX_FRONT_MATTER:
        return {}
    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    return {key: fields[key] for key in _INHERITED if _is_plain(fields.get(key))}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str) and bool(value.strip())
