"""The log is exact, survives a kill in the middle of a line, and is not touched by those who only look."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.tailoring.candidate import Candidate, from_plain, to_plain
from intarsia.tailoring.history import EARLIER, History, Trial
from intarsia.tailoring.translate import Translator


def make_trial(
    number: int, candidate: Candidate, *, budget: int = 16, costs: tuple[float, ...] | None = (1.5, 2.25)
) -> Trial:
    return Trial(
        number=number,
        engine="evolve",
        origin="mutation",
        candidate=candidate,
        recipe=f"{number:064x}",
        budget=budget,
        seed=3,
        status="failed" if costs is None else "ok",
        costs=costs,
        examples=() if costs is None else (16, 12),
        layer_forwards=3.5,
        seconds=0.25,
        worker="1",
        attempts=2 if costs is None else 1,
        reason="NaN in prose" if costs is None else None,
    )


def test_candidates_come_back(translator: Translator) -> None:
    rng = random.Random(0)
    for _ in range(50):
        candidate = translator.space.random(rng)
        assert from_plain(json.loads(json.dumps(to_plain(candidate)))) == candidate


def test_trials_come_back(translator: Translator, tmp_path: Path) -> None:
    rng = random.Random(1)
    trials = [make_trial(n, translator.space.random(rng), costs=None if n == 1 else (n / 3, 1e-17)) for n in range(3)]
    history = History(tmp_path / "trials.jsonl")
    for trial in trials:
        history.append(trial)
    assert History(tmp_path / "trials.jsonl").trials == tuple(trials)
    assert history.find((f"{1:064x}", 16)) == trials[1]
    assert history.find((f"{1:064x}", 32)) is None
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3


def test_a_line_that_was_cut_off(translator: Translator, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    rng = random.Random(2)
    trials = [make_trial(n, translator.space.random(rng)) for n in range(3)]
    history = History(path)
    history.append(trials[0])
    history.append(trials[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    cut = path.read_bytes()
    again = History(path)
    assert again.trials == (trials[0],)
    assert path.read_bytes() == cut
    again.append(trials[1])
    assert path.read_bytes() == whole
    again.append(trials[2])
    assert History(path).trials == tuple(trials)


def test_a_line_that_is_no_trial(translator: Translator, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    history = History(path)
    history.append(make_trial(0, translator.space.random(random.Random(3))))
    path.write_text(path.read_text() + '{"number": 1}\n')
    with pytest.raises(UserError) as caught:
        History(path)
    assert f"Line 2 of {path} is no trial" in str(caught.value)


def test_taken_over_trials_are_not_made(translator: Translator, tmp_path: Path) -> None:
    history = History(tmp_path / "trials.jsonl")
    one = make_trial(0, translator.space.random(random.Random(4)))
    history.append(Trial(**{**one.__dict__, "engine": EARLIER}))
    history.append(make_trial(1, translator.space.random(random.Random(5))))
    assert [trial.number for trial in history.made] == [1]
    assert len(history) == 2
