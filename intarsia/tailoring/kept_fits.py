"""What was fitted for trials that may be wanted again: a promotion to another budget, and the front at the end.

A folder with a healed recipe for each, called after the hash of the recipe as it was cut. Workers write into it; one
that does not see the folder, on another machine, keeps nothing, and what it fitted is fitted again where it is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Set
from pathlib import Path

from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe


class KeptFits:
    """The healed recipes in a folder; nothing is kept where there is no such folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, recipe: Recipe) -> Recipe | None:
        """A recipe as it was healed before, if it was."""
        path = self._path(schema.content_hash(recipe))
        if not path.exists():
            return None
        try:
            return schema.load(path)
        except UserError:  # a kill or a full disk left half of it
            return None

    def keep(self, recipe: Recipe, healed: Recipe) -> None:
        """Keep what was fitted. A disk that has no room for it costs no more than another fit."""
        if self._folder.is_dir():
            name = schema.content_hash(recipe)
            self._forget(name)  # half of a file would be refused as another's
            try:
                schema.save(healed, self._path(name))
            except (UserError, OSError):
                self._forget(name)

    def drop(self, hashes: Set[str]) -> None:
        """Let go of some of them."""
        for name in {path.stem for path in self._folder.glob("*")} & hashes:
            self._forget(name)

    def begin(self) -> None:
        """From now on keep what is fitted."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        """Let go of all of them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _forget(self, name: str) -> None:
        for suffix in (".yaml", ".safetensors"):
            self._path(name).with_suffix(suffix).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.yaml"
