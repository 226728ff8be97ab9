"""Shapes of models that are not here: a config is enough to say what work on them would cost."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from intarsia.anatomy.detect import detect
from intarsia.anatomy.spec import Anatomy
from intarsia.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """Configs by the models' names."""
    text = files("intarsia.planning").joinpath("shapes.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = tomllib.loads(text)
    return found


def shape_of(name: str) -> Anatomy:
    """The anatomy of a model by its name in `shapes.toml`, or by its `config.json`.

    Raises:
        UserError: there is no such shape, or the config cannot be used.
    """
    shapes = known_shapes()
    if name.lower() in shapes:
        return detect(shapes[name.lower()], where=f"--shape {name}")
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.of(
            where="--shape",
            expected=f"one of {', '.join(shapes)}, or the path of a config.json",
            found=repr(name),
            remedy="Choose one of them, or name a file that can be read.",
        ) from error
    if not isinstance(config, dict):
        raise UserError.of(
            where=str(path), expected="a config.json", found="another kind of JSON", remedy="Name a model's config."
        )
    return detect(config, where=str(path))
