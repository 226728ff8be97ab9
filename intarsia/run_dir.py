"""The resumable folder of any job: pinned settings, append-only logs, artifacts, and a lock.

    run = RunDir(path, option="--run")
    run.check(settings)                      # before heavy work; writes nothing
    with run.opened(settings):               # from here on, this process alone
        run.pin("text", {"sha256": ...})
        log = run.log()
        for step in ...: log.append({...})   # after its artifacts

A step is done when its line is in the log; its artifacts are written before that. So the folder is consistent whenever
a job is killed, and the same command resumes after the last line. Runtime options (device, batch size, memory) are not
pinned: they may differ when a job resumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from intarsia.disk import append_line, damage_named, full_disk_named, read_json, write_whole
from intarsia.errors import Problem, UserError
from intarsia.flags import plain

SETTINGS = "settings"
_LOCK = ".lock"
_SCRATCH = "scratch"


class Log:
    """A file with one JSON object per line; an incomplete last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def entries(self) -> list[dict[str, Any]]:
        """All complete lines, in order; see `numbered`."""
        return [entry for _, entry in self.numbered()]

    def numbered(self) -> list[tuple[int, dict[str, Any]]]:
        """All complete lines with their numbers in the file, in order, without blank lines.

        Raises:
            UserError: a line is damaged.
        """
        if not self.path.exists():
            return []
        remedy = "Delete the folder and start again."
        with damage_named(self.path, expected="a log with one JSON object per line", remedy=remedy):
            text, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                remedy = "Delete this line, or delete the folder and start again."
                with damage_named(f"{self.path}, line {number}", expected="a JSON object", remedy=remedy):
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("not a JSON object")
                    found.append((number, entry))
        return found

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append a line; it is on disk when this returns.

        Raises:
            UserError: the disk is full; the log is unchanged.
            ValueError: a number in it is not finite.
        """
        line = json.dumps(plain(entry), allow_nan=False)
        if not self._whole and self.path.exists():  # a kill may have left half a line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self._whole = True
        append_line(self.path, line)


class RunDir:
    """The folder of a job, to run, resume and read it.

    Attributes:
        path: its path.
        option: its option on the command line, for errors.
    """

    def __init__(self, path: str | Path, *, option: str = "--run") -> None:
        self.path = Path(path)
        self.option = option

    @classmethod
    def existing(cls, path: str | Path, *, made_by: str = "intarsia plan MODEL --run DIR") -> RunDir:
        """An existing run folder, for reading.

        Raises:
            UserError: there is none.
        """
        run = cls(path)
        if not run.exists():
            raise UserError(f"{path} is not a run folder.", f"Make one with `{made_by}`.")
        return run

    def exists(self) -> bool:
        """Whether a job was started here."""
        return self._pin_path(SETTINGS).is_file()

    def check(self, settings: Mapping[str, Any], *, name: str = SETTINGS) -> None:
        """Check that a job with these settings could start or resume here; writes nothing.

        Args:
            settings: all that decide the result. A value of `...` is not known yet, and is not compared.

        Raises:
            UserError: the folder holds a job with other settings (with every difference), or something else.
        """
        if self._pin_path(name).is_file():
            if problems := list(differences(self.pinned(name), plain(settings), self.option)):
                raise UserError(problems)
        elif name == SETTINGS and self.path.exists() and not self._is_free():
            raise UserError(
                f"{self.path} exists and is not a run folder.", f"Give another {self.option}, or delete it."
            )

    @contextmanager
    def opened(self, settings: Mapping[str, Any] | None = None) -> Iterator[RunDir]:
        """Start or resume the job, and lock the folder for this process until the block ends.

        Args:
            settings: all that decide the result; None if the folder exists already.

        Raises:
            UserError: as in `check`; another process works in it; the disk is full.
        """
        if settings is not None:
            self.check(settings)
        with full_disk_named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK, timeout=0)  # the system releases it when the process dies
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"Another process works in the run folder {self.path}.",
                f"Wait until it has finished, or give another {self.option}.",
            ) from None
        try:
            shutil.rmtree(self.path / _SCRATCH, ignore_errors=True)
            if settings is not None:
                self.pin(SETTINGS, settings)
            yield self
        except BaseException as error:
            if not isinstance(error, UserError):  # Python 3.10 has no add_note
                note = f"run folder: {self.path} (the same command resumes)"
                error.__notes__ = [*getattr(error, "__notes__", ()), note]
            raise
        finally:
            shutil.rmtree(self.path / _SCRATCH, ignore_errors=True)
            lock.release()

    def pin(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record facts once; a resumed job must have the same.

        Raises:
            UserError: they differ; with every difference.
        """
        self.check(facts, name=name)
        if not self._pin_path(name).is_file():
            self.write_json(f"{name}.json", facts)

    def pinned(self, name: str = SETTINGS) -> dict[str, Any]:
        """The facts recorded under a name."""
        return self.read_json(f"{name}.json")

    def log(self, name: str = "log") -> Log:
        """A log of the job, `NAME.jsonl`."""
        return Log(self.path / f"{name}.jsonl")

    def artifact(self, *parts: str) -> Path:
        """The path of a file of the job; its parent folder is created.

        Write it through `intarsia.disk` (`write_whole`, `replaced`), so that it appears whole or not at all.
        """
        path = self.path.joinpath(*parts)
        with full_disk_named(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_json(self, name: str, value: Any) -> None:
        """Write an artifact as JSON, or replace it.

        Raises:
            UserError: the disk is full; the file is unchanged.
            ValueError: a number in it is not finite.
        """
        write_whole(self.artifact(name), json.dumps(plain(value), indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON artifact.

        Raises:
            UserError: it is missing, or damaged.
        """
        remedy = "The run folder is damaged; delete it and start again."
        return read_json(self.path / name, expected="a JSON object that a run wrote", remedy=remedy)

    @property
    def scratch(self) -> Path:
        """A folder for temporary files of the job, such as hidden states; for the holder of the lock."""
        return self.artifact(_SCRATCH, "-").parent

    def _pin_path(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _is_free(self) -> bool:
        """Whether it is empty, except for files that a kill at the start leaves."""
        left = (_LOCK, _SCRATCH)
        return self.path.is_dir() and all(
            entry.name in left or entry.name.startswith(f".{SETTINGS}.json.") for entry in self.path.iterdir()
        )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], option: str = "--run", *, prefix: str = ""
) -> Iterator[Problem]:
    """The problem of every setting that differs from the recorded one."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if now is ...:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, option, prefix=f"{prefix}{key}.")
        elif before != now:
            then, asked = ("unset" if each is None else json.dumps(each, ensure_ascii=False) for each in (before, now))
            yield Problem(
                f"This run was started with {prefix}{key} {then}, not {asked}.",
                f"Use the same settings to resume it, or another {option} for a new run.",
            )
