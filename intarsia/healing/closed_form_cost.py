"""What a closed-form fit takes, in layer-forwards over its tokens, known before it starts; and what it can take in."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.anatomy.spec import Anatomy, Part
from intarsia.healing.layer_fit import passes
from intarsia.healing.layer_map import correspondences, taught
from intarsia.healing.settings import ClosedFormSettings
from intarsia.recipe.recipe import Recipe, identity

MOST_PASSES = 3
"""Of the whole model over the tokens: what a fit may cost for the sake of read-outs that need not be fitted."""


def read_outs(
    recipe: Recipe, settings: ClosedFormSettings, anatomy: Anatomy | None = None
) -> dict[int, tuple[Part, ...]]:
    """What is fitted on which output layers, in order.

    Args:
        anatomy: of the model; without it, every read-out is taken to be one matrix with no norm behind it.
    """
    known = correspondences(recipe)
    found = {
        index: settings.changed if known[index].trainable else settings.unchanged[:1]
        for index in taught(recipe, settings.layers)
    }
    left = MOST_PASSES * recipe.depth - _cost(recipe, found, anatomy)
    more = _passes(settings.unchanged, anatomy) - _passes(settings.unchanged[:1], anatomy)
    for index in found:
        if not known[index].trainable and more <= left:
            found[index] = settings.unchanged
            left -= more
    return found


def closed_form_cost(recipe: Recipe, settings: ClosedFormSettings, anatomy: Anatomy | None = None) -> int:
    """Layer-forwards over its tokens that a fit takes: the teacher's, the student's from where it differs, and those of
    each read-out."""
    return _cost(recipe, read_outs(recipe, settings, anatomy), anatomy)


def closed_form_cost_at_most(
    depth: int, target: int, settings: ClosedFormSettings, anatomy: Anatomy | None = None
) -> int:
    """The same for any way to cut `depth` layers down to `target`: each changed layer stands for a removed one."""
    changed = min(target, depth - target)
    unchanged = target - changed if settings.layers == "behind" else 0
    least = depth + target + changed * _passes(settings.changed, anatomy)
    first, every = (unchanged * _passes(parts, anatomy) for parts in (settings.unchanged[:1], settings.unchanged))
    return max(least + first, min(least + every, MOST_PASSES * depth))


def _cost(recipe: Recipe, parts: dict[int, tuple[Part, ...]], anatomy: Anatomy | None) -> int:
    if not parts:
        return 0
    indices = list(parts)
    own = zip(recipe.layers[: indices[0]], identity(recipe.variant(recipe.base), recipe.depth).layers, strict=False)
    differs = (index for index, (op, theirs) in enumerate(own) if op != theirs or index in recipe.fitted)
    first = next(differs, min(indices[0], recipe.depth))
    fits = sum(_passes(some, anatomy) for some in parts.values())
    return max(recipe.spans[index][1] for index in indices) + indices[-1] + 1 - first + fits


def _passes(parts: Sequence[Part], anatomy: Anatomy | None) -> int:
    return len(parts) if anatomy is None else passes(anatomy, parts)
