"""The ladder of a run folder: a recipe for every depth that a plan passed through.

A step is done when its line is in the log; its recipe is written before that. So log and ladder agree whenever a plan
is killed, and the same command resumes after the last logged step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import full_disk_named, read_json
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.run_dir import RunDir

_WANTED = "wanted.json"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The last requested depth of a plan."""

    layers: int
    # Why the method cannot reach it, if it cannot.
    stopped: str | None = None


class Ladder:
    """The recipes of a run folder, by depth.

    Attributes:
        run: the run folder; open it before adding steps.
    """

    def __init__(self, run: RunDir | Path) -> None:
        self.run = run if isinstance(run, RunDir) else RunDir(run)

    @classmethod
    def existing(cls, path: str | Path) -> Ladder:
        """The ladder of an existing run folder, for reading.

        Raises:
            UserError: there is no run folder.
        """
        return cls(RunDir.existing(path))

    @property
    def path(self) -> Path:
        return self.run.path

    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return self.run.pinned()

    def log(self) -> list[dict[str, Any]]:
        """The logged steps, in order."""
        return self.run.log().entries()

    def append(self, entry: Mapping[str, Any], recipe: Recipe) -> None:
        """Record a step: its recipe first, then its line.

        Raises:
            UserError: the disk is full; the step does not count.
        """
        path = self.run.artifact("ladder", self.recipe_path(len(recipe.layers)).name)
        with full_disk_named(self.path):
            schema.save(recipe, path)
        self.run.log().append(entry)

    def want(self, wanted: Wanted) -> None:
        """Record the requested depth, which may differ each time the plan is resumed.

        Raises:
            UserError: the disk is full.
        """
        if self.wanted() != wanted:
            self.run.write_json(_WANTED, wanted)

    def wanted(self) -> Wanted | None:
        """The requested depth; None if there is none yet.

        Raises:
            UserError: the file with it is damaged.
        """
        path = self.path / _WANTED
        if not path.exists():
            return None
        remedy = "Delete the file; the next `intarsia plan` with the same command writes it again."
        found = read_json(path, expected="the target depth of a plan", remedy=remedy)
        if not isinstance(found.get("layers"), int):
            raise UserError(f"{path} does not hold the target depth of the plan.", remedy)
        return Wanted(layers=found["layers"], stopped=found.get("stopped"))

    def unfinished(self) -> str | None:
        """How far an unfinished plan is, in words; None if it reached its target, or none is known."""
        wanted, depths = self.wanted(), self.depths()
        if wanted is None or (depths and depths[-1] <= wanted.layers):
            return None
        reached = f"it has reached {depths[-1]} layers" if depths else "no step is done yet"
        why = "" if wanted.stopped is None else f" and stopped: {wanted.stopped}"
        return f"{reached} on the way down to {wanted.layers}{why}"

    def recipe_path(self, layers: int) -> Path:
        """The path of the recipe for a depth, existing or not."""
        return self.path / "ladder" / f"layers-{layers:03d}.yaml"

    def depths(self) -> list[int]:
        """Depths with a recipe, deepest model first."""
        return [int(entry["layers"]) for entry in self.log()]

    def reaches(self, layers: int) -> bool:
        """Whether the plan reached a depth."""
        return bool(depths := self.depths()) and depths[-1] <= layers

    def recipe(self, layers: int) -> Recipe:
        """The recipe for a depth.

        Raises:
            UserError: the plan did not pass through that depth.
        """
        depths = self.depths()
        if layers in depths:
            return schema.load(self.recipe_path(layers))
        known, unfinished = ", ".join(map(str, depths)) or "none yet", self.unfinished()
        if unfinished is not None:
            raise UserError(
                f"{self.path} has no recipe for {layers} layers: the plan is not finished, {unfinished}.",
                f"Resume it with the same command, or choose one of: {known}.",
            )
        raise UserError(
            f"{self.path} has no recipe for {layers} layers.",
            f"Choose one of {known}, or plan further down with the same command and fewer --layers.",
        )
