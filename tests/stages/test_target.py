from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import UserError
from intarsia.stages.target import target_depth
from tests import families
from tests.conftest import Opened


@pytest.mark.parametrize("layers", range(1, families.DEPTH))
def test_layers_are_taken_as_they_are(layers: int, checkpoint_of: Opened) -> None:
    assert target_depth(checkpoint_of("llama"), layers=layers, sparsity=None) == layers


@settings(deadline=None)  # the first of a family is made on the way
@given(sparsity=st.floats(0.001, 0.999), family=st.sampled_from(families.FAMILIES))
def test_the_greatest_depth_that_removes_at_least_the_share(
    checkpoint_of: Opened, sparsity: float, family: str
) -> None:
    checkpoint = checkpoint_of(family)
    share = checkpoint.architecture.layer_parameters / checkpoint.parameters
    enough = [depth for depth in range(1, families.DEPTH) if (families.DEPTH - depth) * share >= sparsity - 1e-9]
    if enough:
        assert target_depth(checkpoint, layers=None, sparsity=sparsity) == max(enough)
    else:
        with pytest.raises(UserError, match="one has to stay"):
            target_depth(checkpoint, layers=None, sparsity=sparsity)


@pytest.mark.parametrize("removed", range(1, families.DEPTH))
def test_the_exact_share_of_some_layers_is_reached(removed: int, checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of("llama")
    sparsity = removed * checkpoint.architecture.layer_parameters / checkpoint.parameters
    assert target_depth(checkpoint, layers=None, sparsity=sparsity) == families.DEPTH - removed


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"layers": 0}, "0"),
        ({"layers": -1}, "-1"),
        ({"layers": 6}, "6"),
        ({"layers": 7}, "7"),
        ({"sparsity": 0.0}, "0.0"),
        ({"sparsity": 1.0}, "1.0"),
        ({"sparsity": -0.1}, "-0.1"),
        ({"sparsity": 30.0}, "30.0"),
        ({"sparsity": float("nan")}, "nan"),
        ({"sparsity": 0.99}, "0.99"),
        ({"layers": 3, "sparsity": 0.3}, "both"),
        ({}, "neither"),
    ],
    ids=str,
)
def test_what_cannot_be_reached(asked: dict[str, Any], found: str, checkpoint_of: Opened) -> None:
    with pytest.raises(UserError) as caught:
        target_depth(checkpoint_of("llama"), **{"layers": None, "sparsity": None, **asked})
    (problem,) = caught.value.problems
    assert problem.found == found
    assert problem.remedy
