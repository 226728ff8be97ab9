from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from intarsia.architecture.detect import detect
from intarsia.pruning.scores import angular_distance, channel_sensitivity, piece_scores


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
