from __future__ import annotations

from dataclasses import replace

import pytest

from intarsia.errors import UserError
from intarsia.healing.layer_map import changed_layers, check_teacher
from tests.conftest import Opened
from tests.healing.conftest import Cut
from tests.recipes_by_hand import recipe_of, select


def test_merged_and_gap_covering_layers_are_trained(cut: Cut) -> None:
    _, recipe = cut("llama")
    assert changed_layers(recipe) == [2, 3]


def test_a_first_layer_stands_for_those_removed_before_it() -> None:
    assert changed_layers(recipe_of("model", [select(2), select(3), select(4), select(5)])) == [0]


def test_a_layer_that_stands_for_nothing_is_left_alone() -> None:
    recipe = recipe_of("model", [select(0), select(3), select(1), select(2), select(4), select(5)])
    assert all(recipe.spans[index][1] > recipe.spans[index][0] for index in changed_layers(recipe))


def test_teacher_that_does_not_fit(cut: Cut, checkpoint_of: Opened) -> None:
    checkpoint, recipe = cut("llama")
    ours = checkpoint.architecture
    check_teacher(recipe, ours, checkpoint_of("qwen2").architecture, name="another family of the same shape")
    with pytest.raises(UserError) as caught:
        check_teacher(recipe, ours, replace(ours, vocabulary=7, width=8, n_layers=9), name="T")
    assert [problem.message for problem in caught.value.problems] == [
        f"The teacher T has vocabulary 7, the recipe's base {ours.vocabulary}.",
        f"The teacher T has width 8, the recipe's base {ours.width}.",
        "The teacher T has number of layers 9, the recipe's base 6.",
    ]
