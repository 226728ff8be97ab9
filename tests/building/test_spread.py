"""Which device gets which layers."""

from __future__ import annotations

import pytest

from intarsia.building.offload import blocks


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        ([1] * 6, [10.0, 10.0], [0, 0, 0, 1, 1, 1]),
        ([1] * 6, [20.0, 10.0], [0, 0, 0, 0, 1, 1]),
        ([1] * 6, [5.0, 10.0, 15.0], [0, 1, 1, 2, 2, 2]),
        ([1] * 4, [-3.0, 10.0], [1, 1, 1, 1]),  # embeddings alone fill the first
        ([1] * 4, [0.0, 0.0], [0, 0, 1, 1]),
        ([3, 1, 1, 1], [10.0, 10.0], [0, 1, 1, 1]),
        ([1], [1.0, 1.0, 1.0], [1]),
    ],
)
def test_blocks_follow_the_memory_that_is_free(sizes: list[int], free: list[float], expected: list[int]) -> None:
    found = blocks(sizes, free)
    assert found == expected
    assert found == sorted(found), "blocks are contiguous"
