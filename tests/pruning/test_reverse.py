"""Reverse order: the last layer first."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import InMemory
from tests.pruning.by_hand import kept_layers, ladder_of
from tests.pruning.conftest import corpus_of


def test_from_the_end(resident_of: InMemory, tmp_path: Path) -> None:
    run, stopped, model = ladder_of("reverse", resident_of("llama"), corpus_of(), tmp_path / "run", 2)
    assert stopped is None and model.layer_forwards == 0
    assert [kept_layers(run, depth) for depth in (5, 4, 3, 2)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
        [0, 1, 2],
        [0, 1],
    ]
