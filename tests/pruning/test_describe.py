from __future__ import annotations

import pytest

from intarsia.pruning.step import describe, mlp_pieces, of_experts, step_line
from intarsia.recipe.recipe import Concat, Cut
from tests.recipes_by_hand import ref, select

HALVES = {"attention": 0.5, "mlp": 0.5}


@pytest.fixture
def joined() -> Concat:
    """Layers 1 and 2: one KV group of each, 3 and 5 pieces of the MLP."""
    return Concat(
        cuts=(
            Cut(source=ref(1), kv_groups=(0,), channels=(1, 2, 3), weights=HALVES),
            Cut(source=ref(2), kv_groups=(1,), channels=(0, 4, 5, 6, 7), weights=HALVES),
        )
    )


@pytest.mark.parametrize(("mixture", "name"), [(False, "channels"), (True, "experts")])
def test_a_step_for_a_person(mixture: bool, name: str, joined: Concat) -> None:
    line = step_line(5, 1, joined, 2.5, mixture=mixture)
    wanted = f"merged into 1 (1 groups, 3 {name}) + 2 (1 groups, 5 {name})"
    assert line == f"5 layers: at 1, {wanted}, calibration loss 2.5000"
    assert step_line(4, 3, None, None, mixture=mixture) == "4 layers: at 3, dropped"
    assert step_line(4, 3, select(3), None, mixture=mixture) == "4 layers: at 3, merged into 3 (whole)"


def test_the_log_has_the_codecs_own_word(joined: Concat) -> None:
    described = describe(joined)
    assert list(described.values()) == [{"kv_groups": 1, "channels": 3}, {"kv_groups": 1, "channels": 5}]


def test_a_recipe_says_whether_its_pieces_are_experts() -> None:
    assert of_experts({"mlp_pieces": mlp_pieces(True)})
    assert not of_experts({}) and not of_experts({"mlp_pieces": mlp_pieces(False)})
