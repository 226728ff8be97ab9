"""What a closed-form fit takes, in layer-forwards over its tokens, known before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.anatomy.spec import Anatomy, Part
from intarsia.healing.closed_form import ClosedFormSettings
from intarsia.healing.correspond import taught
from intarsia.healing.layer_fit import passes
from intarsia.recipe.recipe import Recipe, identity


def closed_form_cost(recipe: Recipe, settings: ClosedFormSettings, anatomy: Anatomy | None = None) -> int:
    """Layer-forwards over its tokens that a fit takes: the teacher's, the student's from where it differs, and those of
    each read-out.

    Args:
        anatomy: of the model; without it, every read-out is taken to be one matrix with no norm behind it.
    """
    indices = taught(recipe, settings.layers)
    if not indices:
        return 0
    own = zip(recipe.layers[: indices[0]], identity(recipe.variant(recipe.base), recipe.depth).layers, strict=False)
    differs = (index for index, (op, theirs) in enumerate(own) if op != theirs or index in recipe.fitted)
    first = next(differs, min(indices[0], recipe.depth))
    fits = sum(_passes(settings.parts(recipe, index), anatomy) for index in indices)
    return max(recipe.spans[index][1] for index in indices) + indices[-1] + 1 - first + fits


def closed_form_cost_at_most(
    depth: int, target: int, settings: ClosedFormSettings, anatomy: Anatomy | None = None
) -> int:
    """The same for any way to cut `depth` layers down to `target`: each changed layer stands for a removed one."""
    changed = min(target, depth - target)
    unchanged = target - changed if settings.layers == "behind" else 0
    fits = changed * _passes(settings.changed, anatomy) + unchanged * _passes(settings.unchanged, anatomy)
    return depth + target + fits


def _passes(parts: Sequence[Part], anatomy: Anatomy | None) -> int:
    return len(parts) if anatomy is None else passes(anatomy, parts)
