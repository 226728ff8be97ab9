"""Several closed-form fits, each kept in a folder until the best of all is known: what was killed goes on there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia.disk import full_disk_named
from intarsia.healing.starts import End, Start, best_end
from intarsia.recipe import codec
from intarsia.recipe.recipe import Recipe

Fits = list[dict[str, Any]]


def best_of(
    beginnings: Sequence[Start],
    fit: Callable[[Recipe], tuple[Recipe, Fits]],
    judge: Callable[[Recipe], float],
    folder: Path,
) -> End:
    """`best_end`; each of several fits is read from the folder where it is finished. `forget` clears it away.

    Raises:
        UserError: the disk is full.
    """
    if len(beginnings) == 1:
        return best_end(beginnings, fit, judge)

    def kept(start: Recipe) -> tuple[Recipe, Fits]:
        path = folder / f"{codec.content_hash(start)[:16]}.yaml"
        if path.exists():
            found = codec.load(path)
            return found, found.provenance["read_outs"]
        found, fits = fit(start)
        with full_disk_named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            codec.save(replace(found, provenance={"read_outs": fits}), path)
        return found, fits

    return best_end(beginnings, kept, judge)


def forget(folder: Path) -> None:
    """Delete what `best_of` kept."""
    shutil.rmtree(folder, ignore_errors=True)
