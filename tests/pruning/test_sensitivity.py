from __future__ import annotations

import torch

from intarsia.pruning.scores import BINS, sensitivity_map


def test_groups_as_they_are_and_channels_from_least_to_most() -> None:
    channels = torch.arange(2 * BINS, dtype=torch.float64)
    shuffled = channels[torch.randperm(2 * BINS, generator=torch.Generator().manual_seed(0))]
    found = sensitivity_map([{"attention": torch.tensor([0.25, 1 / 3]), "mlp": shuffled}])
    assert found["kv_groups"] == [[0.25, 0.3333]]
    assert found["channels"] == [[2 * index + 0.5 for index in range(BINS)]]


def test_fewer_channels_than_bins() -> None:
    found = sensitivity_map([{"attention": torch.ones(1), "mlp": torch.tensor([3.0, 1.0, 2.0])}] * 2)
    assert found["channels"] == [[1.0, 2.0, 3.0]] * 2
