"""Snapshots of a training and its loss curve, on a disk that runs full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from intarsia.errors import UserError
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.training import Curve, load_snapshot, read_curve, save_snapshot


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def accelerator(save: Callable[[str], None] | None = None) -> SimpleNamespace:
    """What snapshots need of one: state is a file with one number in it."""
    state = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, value=0)

    def write(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "number").write_text(str(state.value))

    def read(folder: str) -> None:
        state.value = int((Path(folder) / "number").read_text())

    state.save_state, state.load_state = save or write, read
    return state


def test_the_newest_snapshot_is_the_one_that_is_kept(tmp_path: Path) -> None:
    one = accelerator()
    for step in (1, 2):
        one.value = step * 10
        save_snapshot(one, tmp_path, {"next": step})
    other = accelerator()
    assert load_snapshot(other, tmp_path) == {"next": 2} and other.value == 20
    assert [path.name for path in tmp_path.iterdir()] == ["state-000000002"]


@pytest.mark.parametrize("what", ["state", "facts"])
def test_a_full_disk_leaves_the_snapshot_before(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = accelerator()
    one.value = 10
    save_snapshot(one, tmp_path, {"next": 1})
    if what == "state":

        def half(folder: str) -> None:
            Path(folder).mkdir()
            (Path(folder) / "number").write_text("2")
            full()

        one.save_state = half
    with monkeypatch.context() as patched:
        if what == "facts":
            patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="a full disk"):
            save_snapshot(one, tmp_path, {"next": 2})
    other = accelerator()
    assert load_snapshot(other, tmp_path) == {"next": 1} and other.value == 10
    save_snapshot(other, tmp_path, {"next": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["state-000000002"]


def test_a_full_disk_leaves_the_curve_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curve.jsonl"
    curve = Curve(path, SimpleNamespace(is_main_process=True), EndToEndSettings())
    curve.start(0)
    for step in (1, 2, 3):
        curve.write(step, {"loss": 1.0 / step})
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="a full disk"):
            curve.start(2)
    assert path.read_bytes() == before
    curve.start(2)  # what comes after the second step is done again
    assert [line["step"] for line in read_curve(path)] == [1, 2]
    assert json.loads(path.read_text().splitlines()[1])["loss"] == 0.5
