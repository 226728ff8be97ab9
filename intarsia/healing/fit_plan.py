"""Which output projections the closed form fits, and how many layer-forwards over its tokens that takes.

All of them are fitted on layers that were changed. On unchanged layers after those the first one of the settings is
fitted, and the others only while the fit stays within `MOST_PASSES` passes of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.healing.layer_fit import passes
from intarsia.healing.layer_map import correspondences, taught
from intarsia.healing.settings import ClosedFormSettings
from intarsia.recipe.recipe import Recipe, identity

MOST_PASSES = 3
"""Passes of the whole model over the tokens that a fit with optional output projections may take."""


def fitted_parts(
    recipe: Recipe, settings: ClosedFormSettings, architecture: Architecture | None = None
) -> dict[int, tuple[Part, ...]]:
    """The parts that are fitted on each output layer, in order.

    Args:
        architecture: of the model; without it, every output projection is taken to be one matrix with no norm after it.
    """
    known = correspondences(recipe)
    found = {
        index: settings.changed if known[index].trainable else settings.unchanged[:1]
        for index in taught(recipe, settings.layers)
    }
    left = MOST_PASSES * recipe.depth - _forwards(recipe, found, architecture)
    more = _passes(settings.unchanged, architecture) - _passes(settings.unchanged[:1], architecture)
    for index in found:
        if not known[index].trainable and more <= left:
            found[index] = settings.unchanged
            left -= more
    return found


def fit_forwards(recipe: Recipe, settings: ClosedFormSettings, architecture: Architecture | None = None) -> int:
    """Layer-forwards of a fit: the teacher's, the student's from where it differs, and those of each projection."""
    return _forwards(recipe, fitted_parts(recipe, settings, architecture), architecture)


def fit_passes_at_most(architecture: Architecture) -> int:
    """Passes of the whole model that a fit with the default parts takes, whatever was pruned: 3 for most families.

    The teacher runs once; each layer that is kept once, and for one projection; each changed one for two more, and
    there are no more changed layers than removed ones.
    """
    return 1 + 2 * max(passes(architecture, (part,)) for part in PARTS)


def _forwards(recipe: Recipe, parts: dict[int, tuple[Part, ...]], architecture: Architecture | None) -> int:
    if not parts:
        return 0
    indices = list(parts)
    own = zip(recipe.layers[: indices[0]], identity(recipe.variant(recipe.base), recipe.depth).layers, strict=False)
    differs = (index for index, (op, theirs) in enumerate(own) if op != theirs or index in recipe.fitted)
    first = next(differs, min(indices[0], recipe.depth))
    fits = sum(_passes(some, architecture) for some in parts.values())
    return max(recipe.spans[index][1] for index in indices) + indices[-1] + 1 - first + fits


def _passes(parts: Sequence[Part], architecture: Architecture | None) -> int:
    return len(parts) if architecture is None else passes(architecture, parts)
