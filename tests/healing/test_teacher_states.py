"""What the original makes of a text, shared by fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import HiddenStore
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.closed_form import fit, fit_forwards
from intarsia.healing.settings import ClosedFormSettings, changed_layers
from intarsia.healing.teacher import TeacherStates, check_teacher
from intarsia.recipe.recipe import Recipe
from tests.closed_form_fits import fit_on
from tests.conftest import InMemory, Opened
from tests.families import WIDTH
from tests.healing.conftest import SEQ_LEN, Cut, Tokens
from tests.recipes_by_hand import recipe_of, select


def forwards(resident: LoadedModel, work: Any) -> tuple[Any, int]:
    """What some work gives, and how many sequences went through a layer meanwhile."""
    kind, sequences = type(resident.layers[0]), []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, kind) and args[0].shape[1] == SEQ_LEN:
            sequences.append(args[0].shape[0])

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        return work(), sum(sequences)
    finally:
        handle.remove()


def original_of(resident: LoadedModel, text: Corpus, **kwargs: Any) -> TeacherStates:
    return TeacherStates(Loop(resident, Batches(text, resident.device, batch_tokens=2 * SEQ_LEN)), **kwargs)


def test_depths_are_those_of_the_plain_model_and_none_is_computed_twice(resident_of: InMemory, tokens: Tokens) -> None:
    resident = resident_of("opt")
    text, _ = tokens()
    n = len(text)
    original = original_of(resident, text)
    with torch.inference_mode():
        assert forwards(resident, lambda: original.learn([2, 4]))[1] == 4 * n
        assert forwards(resident, lambda: original.learn([4]))[1] == 0
        assert forwards(resident, lambda: original.learn([5]))[1] == n  # from depth 4 on
        states = resident.model(text.input_ids, output_hidden_states=True).hidden_states
        for depth in (2, 4, 5):
            torch.testing.assert_close(original.at(depth, slice(0, n)), states[depth], rtol=0, atol=1e-5)
        original.forget(4)
        assert forwards(resident, lambda: original.learn([4]))[1] == 2 * n  # from depth 2 on
    original.close()


def test_what_is_known_is_read_and_passed_by(resident_of: InMemory, tokens: Tokens) -> None:
    resident = resident_of("opt")
    text, _ = tokens()
    n = len(text)
    whole, known = original_of(resident, text, keep=True), HiddenStore((n, SEQ_LEN, WIDTH), torch.float32)
    whole.learn([6])
    known.put(3, 0, whole.at(3, slice(0, n)))
    for keep in (False, True):
        original = original_of(resident, text, known=known, keep=keep)
        assert forwards(resident, lambda: original.learn([5]))[1] == 2 * n  # noqa: B023 - called at once
        assert forwards(resident, lambda: original.learn([1, 5]))[1] == n  # noqa: B023
        for depth in (1, 3, 5):
            torch.testing.assert_close(original.at(depth, slice(0, n)), whole.at(depth, slice(0, n)))
        if keep:
            assert forwards(resident, lambda: original.learn([4]))[1] == 0  # noqa: B023
        original.close()
    assert known.depths() == [3]


def test_fits_that_share_it_are_the_same_and_pay_for_the_teacher_once(
    cut: Cut, resident_of: InMemory, tokens: Tokens
) -> None:
    _, recipe = cut("llama")
    resident = resident_of("llama")
    text, _ = tokens()
    settings = ClosedFormSettings()
    shared = original_of(resident, text, keep=True)

    def fitted(teacher: TeacherStates) -> tuple[Recipe, int]:
        return forwards(resident, lambda: fit(recipe, teacher, settings=settings)[0])

    alone, cost = fitted(original_of(resident, text))
    assert cost == fit_forwards(recipe, settings, resident.architecture) * len(text)
    teacher = max(recipe.spans[index][1] for index in alone.fitted) * len(text)
    first, second = fitted(shared), fitted(shared)
    assert (first[1], second[1]) == (cost, cost - teacher)
    for again in (first[0], second[0]):
        assert again.fitted.keys() == alone.fitted.keys() != set()
        for index, tensors in alone.fitted.items():
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(again.fitted[index][name], tensor)
    shared.close()


def test_the_student_begins_where_it_differs(resident_of: InMemory, checkpoint_of: Opened, tokens: Tokens) -> None:
    resident, name = resident_of("opt"), str(checkpoint_of("opt").folder)
    text, _ = tokens()
    settings = ClosedFormSettings(layers="spans", changed=("mlp",))
    late = recipe_of(name, [select(0), select(1), select(2), select(4), select(5)])  # layer 2 stands for 3 too
    healed, spent = forwards(resident, lambda: fit_on(late, resident, text, settings=settings, batch_tokens=64)[0])
    assert spent == (4 + 1 + 1) * len(text)  # the teacher to depth 4, the fit and the student through layer 2
    assert fit_forwards(late, settings, resident.architecture) == 6
    # A layer before that is not the original's any more: the student begins there.
    tensors = {key: 0.9 * value for key, value in healed.fitted[2].items()}
    changed = replace(late, fitted={1: tensors})
    again, spent = forwards(resident, lambda: fit_on(changed, resident, text, settings=settings, batch_tokens=64)[0])
    assert spent == (4 + 2 + 1) * len(text) == fit_forwards(changed, settings, resident.architecture) * len(text)
    assert any(not np.array_equal(again.fitted[2][key], healed.fitted[2][key]) for key in healed.fitted[2])


def test_a_stack_that_repeats_layers_begins_at_its_first_repetition(
    resident_of: InMemory, checkpoint_of: Opened, tokens: Tokens
) -> None:
    resident, name = resident_of("opt"), str(checkpoint_of("opt").folder)
    text, _ = tokens()
    settings = ClosedFormSettings(layers="spans", changed=("mlp",))
    recipe = recipe_of(name, [select(n) for n in (0, 1, 2, 1, 2, 5)])
    trained = [index for index, (start, stop) in enumerate(recipe.spans) if stop - start > 1]
    assert trained == [4]
    healed, spent = forwards(resident, lambda: fit_on(recipe, resident, text, settings=settings, batch_tokens=64)[0])
    assert set(healed.fitted) <= {4}
    assert spent == fit_forwards(recipe, settings, resident.architecture) * len(text) == (5 + 2 + 1) * len(text)


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
