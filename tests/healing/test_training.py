"""Snapshots of a training and its loss curve, on a disk that runs full."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intarsia.data.conversations import Turns
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.settings import Pace
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import (
    Curve,
    Schedule,
    Standing,
    Text,
    load_snapshot,
    read_curve,
    save_snapshot,
    schedule_of,
)


def test_every_sequence_once_an_epoch_in_another_order() -> None:
    schedule = Schedule(sequences=12, batch=3, pace=Pace(epochs=2, seed=5))
    assert schedule.steps == 8
    epochs = [[schedule.rows(step) for step in range(start, start + 4)] for start in (0, 4)]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(12))
    assert epochs[0] != epochs[1]
    assert Schedule(sequences=12, batch=3, pace=Pace(epochs=2, seed=6)).rows(0) != schedule.rows(0)


def test_learning_rate_by_hand() -> None:
    schedule = Schedule(sequences=100, batch=1, pace=Pace(lr=1.0, least_lr=0.1, warmup=0.1))
    assert [schedule.lr(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert schedule.lr(55) == pytest.approx(0.55)
    assert schedule.lr(99) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))


def test_measured_so_often_and_at_the_end() -> None:
    schedule = Schedule(sequences=10, batch=1, pace=Pace(evaluations=4))
    assert [step for step in range(10) if schedule.is_measured_after(step)] == [2, 5, 8, 9]


def test_batch_is_a_multiple_and_no_more_than_the_text() -> None:
    assert schedule_of(Pace(batch_tokens=100), sequences=50, seq_len=16, multiple=4).batch == 4
    assert schedule_of(Pace(batch_tokens=100), sequences=50, seq_len=16).batch == 6
    assert schedule_of(Pace(batch_tokens=100), sequences=5, seq_len=16).batch == 5
    assert schedule_of(Pace(batch_tokens=640), sequences=7, seq_len=16, multiple=3).batch == 6
    with pytest.raises(UserError, match="has 2 sequences of 16 tokens"):
        schedule_of(Pace(batch_tokens=100), sequences=2, seq_len=16, multiple=3)


def test_text_in_which_the_assistant_says_nothing() -> None:
    turns = Turns(opening=(1,), to_assistant=(2, 3), to_user=(4,), enders=frozenset({4}))
    talk = Corpus.of(torch.tensor([[1, 9, 2, 3, 7, 4, 9, 9]]), description="talk", documents=1)
    plain = Corpus.of(torch.tensor([[9, 9, 9, 9, 2, 9, 3, 9]]), description="prose", documents=1)
    counted_NT = Text.of(talk, talk, turns=turns).counted_NT
    assert counted_NT is not None and counted_NT[0].nonzero()[:, 0].tolist() == [3, 4]  # which predict 7 and 4
    with pytest.raises(UserError, match="--loss-on assistant: no token of prose is the assistant's"):
        Text.of(talk, plain, turns=turns)


def test_standing() -> None:
    schedule = Schedule(sequences=10, batch=1, pace=Pace(evaluations=5, patience=2))
    standing = Standing.start(1.0, "it")
    assert [standing.measured(loss, schedule) for loss in (0.9, 0.95, 0.8, 0.8)] == [True, False, True, False]
    assert standing.stopped is None
    assert not standing.measured(0.81, schedule) and standing.best == 0.8
    assert standing.stopped == "no better held-out loss in 2 measurements, one every 2 steps"
    for loss, stops in ((9.0, False), (11.0, True), (math.nan, True), (math.inf, True)):
        standing = Standing.start(1.0, "it")
        assert not standing.measured(loss, schedule) and (standing.stopped is not None) == stops
    with pytest.raises(UserError, match="loss of it is nan before the first step"):
        Standing.start(math.nan, "it")


def test_bad_settings_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        LayerwiseSettings(epochs=0, lr=-1.0, kl=0.0, mse=0.0, weighting="loud")  # type: ignore[arg-type]
    assert [re.split(" is | takes ", problem.message)[0] for problem in caught.value.problems] == [
        "--epochs",
        "--layer-lr",
        "--layer-kl + --layer-mse + --layer-cosine",
        "--weighting",
    ]
    with pytest.raises(UserError) as caught:
        EndToEndSettings(temperature=0.0, top_k=0, logits=-1.0)
    assert [problem.message for problem in caught.value.problems] == [
        "--logits + --hidden + --cross-entropy is -1.0 + 0.0 + 0.0; "
        "it must be weights of 0 or more, at least one of them above 0.",
        "--temperature is 0.0; it must be a number above 0.",
        "--top-k is 0; it must be a whole number, 1 or more.",
    ]


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
