"""Scores of layers and pieces, and the counts and indices that follow from ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from intarsia.architecture.detect import detect
from intarsia.pruning.scores import (
    BINS,
    angular_distance,
    channel_sensitivity,
    counts,
    dominate,
    piece_scores,
    ratios,
    sensitivity_map,
    share_grid,
    top,
)

INFLUENCES = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=6)


@given(INFLUENCES, st.floats(0.0, 50.0))
def test_ratios_are_shares(influences: list[float], sharpness: float) -> None:
    found = ratios(influences, sharpness)
    assert math.fsum(found) == pytest.approx(1.0)
    assert all(share >= 0.0 for share in found)
    if sharpness > 0.0:
        largest = max(influences)
        assert found[influences.index(largest)] == max(found)


def test_ratios_by_hand() -> None:
    assert ratios([0.1, 0.3]) == pytest.approx([0.25, 0.75])
    assert ratios([0.1, 0.3], 2.0) == pytest.approx([0.1, 0.9])
    assert ratios([0.1, 0.3], 0.0) == [0.5, 0.5]
    assert ratios([0.0, 0.2]) == [0.0, 1.0]
    assert ratios([0.0, 0.0, 0.0]) == pytest.approx([1 / 3] * 3)
    assert ratios([-1e-9, 0.2]) == [0.0, 1.0]


def test_great_sharpness_gives_all_to_the_most_influential() -> None:
    """The powers themselves are too small for a float."""
    assert ratios([0.05, 0.06, 0.04], 1000.0) == pytest.approx([0.0, 1.0, 0.0])


@given(INFLUENCES.filter(lambda found: len(found) > 1), st.floats(0.0, 1.0))
def test_dominance(influences: list[float], floor: float) -> None:
    before = ratios(influences)
    found = dominate(before, floor)
    assert math.fsum(found) == pytest.approx(1.0)
    largest = before.index(max(before))
    assert found[largest] >= floor
    if before[largest] >= floor:
        assert found == before
    else:
        assert found[largest] == floor
        others = [(a, b) for index, (a, b) in enumerate(zip(before, found, strict=True)) if index != largest]
        scale = (1.0 - floor) / (1.0 - before[largest])
        assert all(b == pytest.approx(a * scale, abs=1e-12) for a, b in others)


def test_dominance_by_hand() -> None:
    assert dominate([0.5, 0.3, 0.2], 0.8) == pytest.approx([0.8, 0.12, 0.08])
    assert dominate([0.5, 0.5], 1.0) == [1.0, 0.0]
    assert dominate([0.1, 0.9], 0.8) == [0.1, 0.9]


@given(INFLUENCES, st.integers(1, 20_000))
def test_counts_sum_to_the_total(influences: list[float], total: int) -> None:
    shares = ratios(influences)
    found = counts(shares, total)
    assert sum(found) == total
    largest = shares.index(max(shares))
    for index, (share, count) in enumerate(zip(shares, found, strict=True)):
        if index == largest:
            assert count >= math.floor(share * total)
        else:
            # A share that is a whole number of pieces but for rounding is that number.
            assert count in (math.floor(share * total), round(share * total))
            assert count <= share * total + 1e-6


def test_counts_by_hand() -> None:
    assert counts([0.3, 0.7], 10) == [3, 7]
    assert counts([0.35, 0.65], 10) == [3, 7]
    assert counts([0.65, 0.35], 10) == [7, 3]
    assert counts([0.5, 0.5], 3) == [2, 1]
    assert counts([1.0, 0.0], 3) == [3, 0]
    assert counts([0.2, 0.8], 3) == [0, 3]
    assert counts([1 / 3] * 3, 10) == [4, 3, 3]


@pytest.mark.parametrize("whole", range(101))
def test_a_share_that_is_whole_loses_nothing_to_rounding(whole: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert counts([whole / 100, 1.0 - whole / 100], 100) == [whole, 100 - whole]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_top_keeps_the_highest(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    kept = top(torch.tensor(scores, dtype=torch.float32), count)
    assert len(set(kept)) == count
    assert list(kept) == sorted(kept)
    # Of equal scores the lower index: what sorting by (-score, index) gives.
    assert set(kept) == set(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])


def test_top_of_ties() -> None:
    assert top(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3) == (0, 1, 3)
    assert top(torch.zeros(4), 2) == (0, 1)


@given(st.integers(1, 4), st.integers(1, 12))
def test_the_grid_holds_every_split_once(layers: int, granularity: int) -> None:
    assume(layers * granularity <= 36)
    found = [tuple(round(share * granularity) for share in shares) for shares in share_grid(layers, granularity)]
    assert len(found) == len(set(found)) == math.comb(granularity + layers - 1, layers - 1)
    assert all(sum(whole) == granularity for whole in found)


def test_the_grid_by_hand() -> None:
    assert list(share_grid(2, 4)) == [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]


def test_channel_sensitivity_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 0.5, 0.0]])
    found = channel_sensitivity(torch.tensor([2.0, 4.0, 8.0]), weight)
    assert found.dtype == torch.float64
    assert found.tolist() == [2.0 * 4.0, 4.0 * 2.5, 0.0]


def test_sums_of_half_precision_weights_do_not_stall() -> None:
    weight = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert channel_sensitivity(torch.ones(2), weight).tolist() == [1000.0, 1000.0]


def test_a_kv_groups_score_is_the_mean_over_the_channels_of_its_query_heads() -> None:
    config = {"model_type": "llama", "hidden_size": 12, "num_hidden_layers": 1, "vocab_size": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 2, "intermediate_size": 5}
    architecture = detect({**config, **heads})
    sensitivity = np.random.default_rng(0).random(12)
    by_hand = [
        np.mean([sensitivity[head * 2 + i] for head in range(6) if head // 2 == group for i in range(2)])
        for group in range(3)
    ]
    np.testing.assert_allclose(piece_scores(torch.from_numpy(sensitivity), architecture, "attention"), by_hand)
    channels = torch.rand(5)
    assert torch.equal(piece_scores(channels, architecture, "mlp"), channels)


def test_angular_distance() -> None:
    cosine = torch.tensor([1.0, 0.0, -1.0, math.cos(math.pi / 3)])
    assert angular_distance(cosine).tolist() == pytest.approx([0.0, 0.5, 1.0, 1 / 3])


def test_groups_as_they_are_and_channels_from_least_to_most() -> None:
    channels = torch.arange(2 * BINS, dtype=torch.float64)
    shuffled = channels[torch.randperm(2 * BINS, generator=torch.Generator().manual_seed(0))]
    found = sensitivity_map([{"attention": torch.tensor([0.25, 1 / 3]), "mlp": shuffled}])
    assert found["kv_groups"] == [[0.25, 0.3333]]
    assert found["channels"] == [[2 * index + 0.5 for index in range(BINS)]]


def test_fewer_channels_than_bins() -> None:
    found = sensitivity_map([{"attention": torch.ones(1), "mlp": torch.tensor([3.0, 1.0, 2.0])}] * 2)
    assert found["channels"] == [[1.0, 2.0, 3.0]] * 2
