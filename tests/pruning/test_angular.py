"""The contiguous block against the distances of the residual stream, worked out from hooks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import kept_layers, ladder_of, real_tokens, residual_stream
from tests.pruning.conftest import corpus_of


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "mistral"])
def test_the_best_block_at_every_depth(family: str, padded: bool, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    states = residual_stream(resident, corpus)
    last = [int(row.sum()) - 1 for row in real_tokens(corpus)]
    run, stopped, _ = ladder_of("angular", resident, corpus, tmp_path / "run", 1)
    assert stopped is None and run.depths() == [5, 4, 3, 2, 1]
    for n in range(1, families.DEPTH):
        distances = []
        for start in range(families.DEPTH - n + 1):
            angles = [
                math.acos(float(torch.cosine_similarity(states[start][row, end], states[start + n][row, end], dim=0)))
                for row, end in enumerate(last)
            ]
            distances.append(sum(angles) / len(angles) / math.pi)
        assert run.log()[0]["evidence"]["distances"][n - 1] == pytest.approx(distances, abs=1e-6)
        best = distances.index(min(distances))
        kept = [layer for layer in range(families.DEPTH) if not best <= layer < best + n]
        assert kept_layers(run, families.DEPTH - n) == kept


def test_blocks_need_not_be_nested(resident_of: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer: the fifth. Two: the first and second."""
    table = [[9.0, 9, 9, 9, 1, 9], [1.0, 9, 9, 9, 9], [9.0, 9, 9, 1], [9.0, 1, 9], [9.0, 1]]
    monkeypatch.setattr("intarsia.pruning.methods.angular.distances", lambda model: table)
    resident, corpus, folder = resident_of("llama"), corpus_of(), tmp_path / "run"
    run, _, _ = ladder_of("angular", resident, corpus, folder, 5)
    monkeypatch.undo()
    run, _, model = ladder_of("angular", resident, corpus, folder, 1)  # goes on from what is recorded
    assert model.layer_forwards == 0
    kept = [[0, 1, 2, 3, 5], [2, 3, 4, 5], [0, 1, 2], [0, 5], [0]]
    assert [kept_layers(run, depth) for depth in (5, 4, 3, 2, 1)] == kept
    assert run.recipe(4).spans == ((0, 3), (3, 4), (4, 5), (5, 6))
