"""Which output layers heal stages change, and what a fit of them takes.

An output layer gets the original's hidden states before its span and should give those after it: H^start and H^stop of
`recipe.spans`. So a teacher needs the base's depth, width and vocabulary; by default it is the base itself.
"""

from __future__ import annotations

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.errors import check
from intarsia.healing.layer_fit import passes
from intarsia.healing.settings import ClosedFormSettings, Layers
from intarsia.recipe.recipe import Op, Recipe, Select, Span, identity

MOST_PASSES = 3
"""Passes of the whole model over the tokens that a fit with optional output projections may take."""


def trainable(op: Op, span: Span) -> bool:
    """Whether an output layer has something to learn: it stands for several layers, or is no original layer as it was.

    A layer that stands for none has nothing to learn from.
    """
    start, stop = span
    return stop - start > 1 or (stop > start and not isinstance(op, Select))


def changed_layers(recipe: Recipe) -> list[int]:
    """The output layers that have something to learn."""
    layers = zip(recipe.layers, recipe.spans, strict=True)
    return [index for index, (op, span) in enumerate(layers) if trainable(op, span)]


def taught(recipe: Recipe, layers: Layers) -> list[int]:
    """Output layers that a heal stage changes. One that stands for none of the original has no target."""
    changed = changed_layers(recipe)
    if layers == "after" and changed:
        after = range(changed[0], len(recipe.spans))
        return [index for index in after if recipe.spans[index][1] > recipe.spans[index][0]]
    return changed


def check_teacher(recipe: Recipe, base: Architecture, teacher: Architecture, *, name: str) -> None:
    """Check that a teacher fits a recipe.

    Args:
        base: the architecture of the recipe's base.
        name: what the user calls the teacher.

    Raises:
        UserError: with everything in which the two differ.
    """
    compared = (
        ("vocabulary", base.vocabulary, teacher.vocabulary),
        ("width", base.width, teacher.width),
        ("number of layers", recipe.depth, teacher.n_layers),
    )
    hint = "Leave --teacher out to learn from the recipe's own base, or name a fine-tune of it."
    check(
        *(
            (ours == theirs, f"The teacher {name} has {what} {theirs}, the recipe's base {ours}.", hint)
            for what, ours, theirs in compared
        )
    )


def fitted_parts(
    recipe: Recipe, settings: ClosedFormSettings, architecture: Architecture
) -> dict[int, tuple[Part, ...]]:
    """The parts that the closed form fits on each output layer, in order."""
    changed = changed_layers(recipe)
    found = {
        index: settings.changed if index in changed else settings.unchanged[:1]
        for index in taught(recipe, settings.layers)
    }
    left = MOST_PASSES * recipe.depth - _forwards(recipe, found, architecture)
    more = passes(architecture, settings.unchanged) - passes(architecture, settings.unchanged[:1])
    for index in found:
        if index not in changed and more <= left:
            found[index] = settings.unchanged
            left -= more
    return found


def fit_forwards(recipe: Recipe, settings: ClosedFormSettings, architecture: Architecture) -> int:
    """Layer-forwards of a fit: the teacher's, the student's from where it differs, and those of each projection."""
    return _forwards(recipe, fitted_parts(recipe, settings, architecture), architecture)


def fit_passes_at_most(architecture: Architecture) -> int:
    """Passes of the whole model that a fit with the default parts takes, whatever was pruned: 3 for most families.

    The teacher runs once; each layer that is kept once, and for one projection; each changed one for two more, and
    there are no more changed layers than removed ones.
    """
    return 1 + 2 * max(passes(architecture, (part,)) for part in PARTS)


def _forwards(recipe: Recipe, parts: dict[int, tuple[Part, ...]], architecture: Architecture) -> int:
    if not parts:
        return 0
    indices = list(parts)
    own = zip(recipe.layers[: indices[0]], identity(recipe.variant(recipe.base), recipe.depth).layers, strict=False)
    differs = (index for index, (op, theirs) in enumerate(own) if op != theirs or index in recipe.fitted)
    first = next(differs, min(indices[0], recipe.depth))
    fits = sum(passes(architecture, some) for some in parts.values())
    return max(recipe.spans[index][1] for index in indices) + indices[-1] + 1 - first + fits
