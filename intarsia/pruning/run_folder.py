"""A run on disk: settings, an append-only log, and the ladder's recipes.

A step counts as done when its line is in the log; its recipe is written before. So whatever instant a run is killed
at, the log and the ladder agree, and the same command continues behind the last logged step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import append_line, damage_named, full_disk_named, read_json, write_whole
from intarsia.errors import Problem, UserError
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe

_SETTINGS = "settings.json"
_LOG = "log.jsonl"
_LADDER = "ladder"
_WANTED = "wanted.json"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The depth that a plan was last asked for, and why its planner cannot come to it, where it cannot."""

    layers: int
    stopped: str | None = None


class RunFolder:
    """A folder in which a plan is made, continued, and looked up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def offer(cls, path: Path, settings: Mapping[str, Any]) -> RunFolder:
        """The run that `start` would begin or continue; nothing is written.

        Raises:
            UserError: the folder holds a run with other settings (every difference is listed), or something else.
        """
        run = cls(path)
        if run._file(_SETTINGS).exists():
            problems = differences(run.settings(), _as_json(settings), str(run._file(_SETTINGS)))
            if problems:
                raise UserError(problems)
        elif path.exists() and not (path.is_dir() and all(_is_leftover(entry) for entry in path.iterdir())):
            raise UserError.of(
                where=str(path),
                expected="a run folder, an empty folder, or nothing",
                found="something else",
                remedy="Give another --run.",
            )
        return run

    @classmethod
    def start(cls, path: Path, settings: Mapping[str, Any]) -> RunFolder:
        """Begin a run, or continue one that was begun with the same settings.

        Raises:
            UserError: as `offer`, or the disk is full.
        """
        run = cls.offer(path, settings)
        with full_disk_named(path):
            path.mkdir(parents=True, exist_ok=True)
            if not run._file(_SETTINGS).exists():
                write_whole(run._file(_SETTINGS), json.dumps(_as_json(settings), indent=2) + "\n")
            run._file(_LADDER).mkdir(exist_ok=True)
        return run

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """A run folder to read.

        Raises:
            UserError: there is none.
        """
        run = cls(path)
        if not run.is_one():
            raise UserError.of(
                where=str(path),
                expected=f"a run folder (with {_SETTINGS})",
                found="none" if not path.exists() else "a folder without it" if path.is_dir() else "a file",
                remedy="Make one with `intarsia plan MODEL --run DIR`.",
            )
        return run

    def is_one(self) -> bool:
        """Whether a run was begun here."""
        return self._file(_SETTINGS).is_file()

    def settings(self) -> dict[str, Any]:
        """The settings that the run was begun with."""
        return _read(self._file(_SETTINGS), "the settings of a run, in JSON")

    def pin(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record facts that become known when the work begins; a continued run must find the same ones.

        Raises:
            UserError: they differ from what was recorded.
        """
        path = self._file(f"{name}.json")
        if not path.exists():
            write_whole(path, json.dumps(_as_json(facts), indent=2) + "\n")
            return
        begun_with = _read(path, "what was recorded when the run was begun")
        if problems := differences(begun_with, _as_json(facts), str(path)):
            raise UserError(problems)

    def log(self) -> list[dict[str, Any]]:
        """The logged steps, in order. A last line that was cut off by a kill does not count."""
        path = self._file(_LOG)
        if not path.exists():
            return []
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, entry: Mapping[str, Any], recipe: Recipe) -> None:
        """Record a step: its recipe first, then its line.

        Raises:
            UserError: the disk is full. The step does not count then, and whatever was there before is as it was.
        """
        schema.save(recipe, self.recipe_path(len(recipe.layers)))
        path = self._file(_LOG)
        whole = "".join(json.dumps(line) + "\n" for line in self.log())
        if path.exists() and path.read_text(encoding="utf-8") != whole:
            write_whole(path, whole)  # drop the line that a kill cut off
        append_line(path, json.dumps(_as_json(entry)))

    def want(self, wanted: Wanted) -> None:
        """Record what is asked for: another depth may be, each time the run goes on.

        Raises:
            UserError: the disk is full.
        """
        if not self._file(_WANTED).exists() or self.wanted() != wanted:
            write_whole(self._file(_WANTED), json.dumps(asdict(wanted)) + "\n")

    def wanted(self) -> Wanted | None:
        """What was asked for; None before anything is.

        Raises:
            UserError: the file that tells it is damaged.
        """
        path = self._file(_WANTED)
        if not path.exists():
            return None
        remedy = "Delete the file; the next `intarsia plan` with the same command writes it again."
        with damage_named(path, expected="the depth that the plan is to come to", remedy=remedy):
            found = json.loads(path.read_text(encoding="utf-8"))
            return Wanted(layers=int(found["layers"]), stopped=found.get("stopped"))

    def unfinished(self) -> str | None:
        """How far a plan is that has not come to the depth it was asked for; None where it has, or none is known."""
        wanted, depths = self.wanted(), self.depths()
        if wanted is None or (depths and depths[-1] <= wanted.layers):
            return None
        reached = f"it has come to {depths[-1]} layers" if depths else "no step is done yet"
        why = "" if wanted.stopped is None else f" and goes no further: {wanted.stopped}"
        return f"{reached} on the way down to {wanted.layers}{why}"

    def recipe_path(self, layers: int) -> Path:
        """Where the recipe for a depth is (or will be)."""
        return self._file(_LADDER) / f"layers-{layers:03d}.yaml"

    def depths(self) -> list[int]:
        """Depths whose recipes are there, deepest first."""
        return [int(entry["layers"]) for entry in self.log()]

    def recipe(self, layers: int) -> Recipe:
        """The ladder's recipe for a depth.

        Raises:
            UserError: the run did not pass through that depth.
        """
        if layers not in self.depths():
            unfinished = self.unfinished()
            raise UserError.of(
                where=str(self.path),
                expected=f"a depth of the ladder: {', '.join(map(str, self.depths())) or 'none yet'}",
                found=str(layers) if unfinished is None else f"{layers}, and a plan that is not finished: {unfinished}",
                remedy="Choose one of them, or plan further down with the same command and fewer --layers."
                if unfinished is None
                else "Let `intarsia plan` or `compress` go on with the same command, or choose one of them.",
            )
        return schema.load(self.recipe_path(layers))

    def _file(self, name: str) -> Path:
        return self.path / name


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def _read(path: Path, expected: str) -> dict[str, Any]:
    return read_json(path, expected=expected, remedy="The run folder is damaged; delete it and plan again.")


def _is_leftover(entry: Path) -> bool:
    """Whether a kill left it before there were settings."""
    return entry.name.startswith(f".{_SETTINGS}.")


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str, prefix: str = "", *, option: str = "--run"
) -> list[Problem]:
    """Every setting in which a run that is to be continued was begun otherwise. `option` names the run folder."""
    problems: list[Problem] = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            problems += differences(before, now, where, f"{name}.", option=option)
        elif before != now:
            problems.append(
                Problem(
                    where=f"{where}: {name}",
                    expected=f"{before!r}, as the run was begun",
                    found=repr(now),
                    remedy=f"Use the same settings to continue, or another {option} for a new run.",
                )
            )
    return problems
