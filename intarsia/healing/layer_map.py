"""Which output layer stands for which span of the original, and whether a teacher can teach it.

Spans are in the coordinates of the recipe's base. An output layer gets H^start of the teacher and should give
H^stop, so a teacher needs the base's depth, width and vocabulary; by default it is the base itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.errors import check
from intarsia.healing.layer_fit import passes
from intarsia.healing.settings import ClosedFormSettings, Layers
from intarsia.recipe.ops import Op, Select
from intarsia.recipe.recipe import Recipe, Span, identity


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """Output layer `index` stands for the original layers `start` .. `stop - 1`."""

    index: int
    start: int
    stop: int
    # There is something to learn: it stands for more than one layer, or is not an original layer as it was. (A layer
    # that stands for none has nothing to learn from.)
    trainable: bool


def correspondences(recipe: Recipe) -> tuple[Correspondence, ...]:
    """One for every output layer, in order."""
    return tuple(
        Correspondence(index=index, start=span[0], stop=span[1], trainable=trainable(op, span))
        for index, (op, span) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    )


def trainable(op: Op, span: Span) -> bool:
    """Whether an output layer with that span has something to learn (see `Correspondence`)."""
    start, stop = span
    return stop - start > 1 or (stop > start and not isinstance(op, Select))


def taught(recipe: Recipe, layers: Layers) -> list[int]:
    """Output layers that a heal stage changes. One that stands for none of the original has no target."""
    known = correspondences(recipe)
    changed = [layer.index for layer in known if layer.trainable]
    if layers == "after" and changed:
        return [layer.index for layer in known[changed[0] :] if layer.stop > layer.start]
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
