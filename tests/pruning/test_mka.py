"""MKA: the diffusion map and the similarity against their formulas, and the merges that follow."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.pruning.methods.mka import cells_of, diffusion_map, normalised_information
from intarsia.recipe.recipe import Merge
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import ladder_of, real_tokens, residual_stream
from tests.pruning.conftest import corpus_of


def embedding_by_hand(x: np.ndarray, coordinates: int) -> np.ndarray:
    squared = np.array([[np.sum((a - b) ** 2) for b in x] for a in x])
    kernel = np.exp(-squared / np.sort(squared[squared > 0])[(np.sum(squared > 0) - 1) // 2])
    density = kernel.sum(axis=1)
    kernel = kernel / np.sqrt(density[:, None] * density[None, :])
    # Right eigenvectors of the random walk, which the symmetric form stands for.
    walk = kernel / kernel.sum(axis=1, keepdims=True)
    values, vectors = np.linalg.eig(walk)
    order = np.argsort(-values.real)[1 : coordinates + 1]
    return vectors.real[:, order] * values.real[order]


def information_by_hand(first: list[Any], second: list[Any]) -> float:
    n = len(first)
    a, b, both = Counter(first), Counter(second), Counter(zip(first, second, strict=True))
    mutual = sum(count / n * math.log(count * n / a[x] / b[y]) for (x, y), count in both.items())
    entropies = [-sum(count / n * math.log(count / n) for count in counts.values()) for counts in (a, b)]
    return mutual / math.sqrt(entropies[0] * entropies[1])


def cells_by_hand(x: np.ndarray) -> list[tuple[int, ...]]:
    n, dims = x.shape
    parts = max(2, int((n / 5) ** (0.5 / dims)))
    ranks = [sorted(range(n), key=lambda i, d=d: x[i, d]) for d in range(dims)]
    return [tuple(ranks[d].index(i) * parts // n for d in range(dims)) for i in range(n)]


def test_the_diffusion_map_is_that_of_the_random_walk() -> None:
    x = np.random.default_rng(0).normal(size=(40, 7))
    found = diffusion_map(torch.from_numpy(x), 2).numpy()
    for mine, theirs in zip(found.T, embedding_by_hand(x, 2).T, strict=True):
        assert abs(np.corrcoef(mine, theirs)[0, 1]) == pytest.approx(1.0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60))
def test_information(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = normalised_information(torch.tensor(first), torch.tensor(second))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found == 1.0
    else:
        assert found == pytest.approx(information_by_hand(first, second), abs=1e-9)
        assert normalised_information(torch.tensor(first), torch.tensor(first)) == pytest.approx(1.0)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "opt"])
def test_the_last_two_are_merged_by_similarity(
    family: str, padded: bool, resident_of: InMemory, tmp_path: Path
) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    run, stopped, model = ladder_of("mka", resident, corpus, tmp_path / "run", 2)
    assert stopped is None and run.depths() == [5, 4, 3, 2]
    assert [entry["merged"] for entry in run.log()] == [[4, 6], [3, 5], [2, 4], [1, 3]]
    real = real_tokens(corpus)
    maps = [embedding_by_hand(h[real].numpy(), 2) for h in residual_stream(resident, corpus)[1:]]
    cells = [cells_by_hand(x) for x in maps]
    s = [information_by_hand(a, b) for a, b in pairwise(cells)]
    # Ties and signs of eigenvectors move a sample over a border at most.
    assert run.log()[0]["evidence"]["similarities"] == pytest.approx(s, abs=0.1)
    s = run.log()[0]["evidence"]["similarities"]
    op = run.recipe(2).layers[-1]
    assert isinstance(op, Merge)
    expected = {1: s[1], 2: (1 - s[1]) * s[2], 3: (1 - s[1]) * (1 - s[2]) * s[3]}
    expected |= {4: (1 - s[1]) * (1 - s[2]) * (1 - s[3]) * s[4]}
    expected |= {5: (1 - s[1]) * (1 - s[2]) * (1 - s[3]) * (1 - s[4])}
    assert dict(zip([source.layer for source in op.sources], op.weights, strict=True)) == pytest.approx(expected)
    # The last module is that sum of state dictionaries.
    for name, tensor in model.modules[-1].state_dict().items():
        total = sum(weight * resident.layers[layer].state_dict()[name] for layer, weight in expected.items())
        torch.testing.assert_close(tensor, total, rtol=1e-5, atol=1e-6)


def test_attention_types_do_not_mix(resident_of: InMemory, tmp_path: Path) -> None:
    """qwen3: full, full, sliding, sliding, full, full."""
    run, stopped, _ = ladder_of("mka", resident_of("qwen3"), corpus_of(), tmp_path / "run", 1)
    assert [entry["merged"] for entry in run.log()] == [[4, 6], [2, 4], [0, 2]]
    assert stopped is not None and "attention types" in stopped


def test_cells_are_equally_filled() -> None:
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cells = cells_of(x)
    assert int(cells.max()) == 8
    first = torch.bincount(cells // 3)
    assert int(first.max() - first.min()) <= 1
    assert families.DEPTH == 6
