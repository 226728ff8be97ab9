"""The closed form in one call, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.healing.closed_form import fit
from intarsia.healing.teacher import TeacherStates
from intarsia.recipe.recipe import Recipe


def fit_on(
    recipe: Recipe,
    resident: LoadedModel,
    corpus: Corpus,
    *,
    batch_tokens: int | None = None,
    layers: Sequence[nn.Module] | None = None,
    **kwargs: Any,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The closed form toward the resident model's own hidden states, or those of other layers in it."""
    batches = Batches(corpus, resident.device, batch_tokens=batch_tokens)
    with TeacherStates(Loop(resident, batches), layers=layers) as teacher:
        return fit(recipe, teacher, **kwargs)
