"""What a plan takes, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intarsia.pruning.estimate import estimate
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.registry import planners
from tests.conftest import Opened
from tests.pruning.by_hand import planner_of


def test_sizes_follow_from_the_config(checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of("llama")
    architecture = checkpoint.architecture
    planner = planner_of("come")
    found = estimate(checkpoint, planner, 4, tokens=512, measured=512, seq_len=32, dtype=torch.bfloat16)
    assert found.parameters_before == checkpoint.parameters
    assert found.parameters_after == checkpoint.parameters - 2 * architecture.layer_parameters
    assert found.weight_bytes == 2 * checkpoint.parameters
    assert found.disk_bytes == 4 * found.parameters_after  # stored in float32
    assert found.hidden_bytes == 7 * 512 * architecture.width * 2
    planner = planner_of("come", ComeSettings(heal_in_loop=True))
    healed = estimate(checkpoint, planner, 4, tokens=512, measured=512, seq_len=32, dtype=torch.bfloat16)
    assert healed.hidden_bytes == 2 * found.hidden_bytes
    assert "at most 2.5 passes" in found.words() and "to heal" not in found.words()


@pytest.mark.parametrize(
    ("method", "forwards"),
    [
        ("reverse", 0),
        ("magnitude+", 0),
        ("shortgpt", 6),
        ("mka", 6),
        ("angular", 6),
        ("taylor", 6 * 4),
        ("come", 6 + 5 + 4),
        # Greedily 6 models of 5 layers, and 5 of 4: on 2 sequences of 16, 2 on 8, one on all. Then 5 + 4 blocks: on 2,
        # 3 on 8, 2 on all; then 4 mutations.
        (
            "evolve[generations=3,offspring=4]",
            6 + 5 * (6 / 8 + 2 / 2 + 1) + 4 * (5 / 8 + 2 / 2 + 1 + 9 / 8 + 3 / 2 + 2 + 3 * (4 / 8 + 1 / 2 + 1)),
        ),
        ("sleb[racing=false]", 6 + (15 + 5) + (10 + 4)),
        # Of 16 sequences six candidates see 2, three 2 more, two 4 and 8: at most all six 2, and then twice the mean.
        ("sleb", 6 + (15 * (12 + 2 * 30) / 96 + 5) + (10 * (10 + 2 * 30) / 80 + 4)),
    ],
)
def test_passes_of_a_method(method: str, forwards: int, checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of("llama")
    found = estimate(
        checkpoint, planners.choose(method).create(), 4, tokens=512, measured=512, seq_len=32, dtype=torch.float32
    )
    assert found.passes_at_most == pytest.approx(forwards / 6)
    assert (found.hidden_bytes == 0) == (forwards == 0)


def test_passes_of_what_come_p_tries(checkpoint_of: Opened) -> None:
    """Each ratio of each span re-runs all that may be after it; each removal what is after it."""
    settings = ComePSettings(granularity=4, spans=2, removals=True, racing=False)
    sizes: dict[str, Any] = {"tokens": 512, "measured": 512, "seq_len": 32, "dtype": torch.float32}
    found = estimate(checkpoint_of("llama"), planner_of("come-p", settings), 5, **sizes)
    assert found.passes_at_most == pytest.approx((6 + 2 * 5 * 5 + 15 + 5) / 6)


def test_a_part_of_the_text_is_a_part_of_a_pass(checkpoint_of: Opened) -> None:
    planner = planners.choose("shortgpt[plan-tokens=128,blocks=1]").create()
    sizes: dict[str, Any] = {"tokens": 1024, "seq_len": 32, "dtype": torch.float32}
    whole, half = (estimate(checkpoint_of("llama"), planner, 5, measured=n, **sizes) for n in (1024, 512))
    assert whole.passes_at_most - half.passes_at_most == pytest.approx(0.5)
    # All but the pass that measures the original compares blocks.
    assert 0 < whole.block_passes_at_most == pytest.approx(whole.passes_at_most - 1.0)
    state = checkpoint_of("llama").architecture.width * 4
    assert whole.hidden_bytes == 7 * (1024 + 128) * state and half.hidden_bytes == 7 * (512 + 128) * state
