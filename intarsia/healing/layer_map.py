"""Which output layer stands for which span of the original, and whether a teacher can teach it.

Spans are in the coordinates of the recipe's base. An output layer is fed H^start of the teacher and should give
H^stop, so a teacher needs the base's depth, width and vocabulary; by default it is the base itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.architecture.spec import Architecture
from intarsia.errors import Problem, UserError
from intarsia.healing.settings import Layers
from intarsia.recipe.ops import Op, Select
from intarsia.recipe.recipe import Recipe, Span


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
        Correspondence(
            index=index,
            start=start,
            stop=stop,
            trainable=trainable(op, (start, stop)),
        )
        for index, (op, (start, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    )


def trainable(op: Op, span: Span) -> bool:
    """Whether an output layer with that span has something to learn (see `Correspondence`)."""
    start, stop = span
    return stop - start > 1 or (stop > start and not isinstance(op, Select))


def taught(recipe: Recipe, layers: Layers) -> list[int]:
    """Output layers that a heal stage changes. One that stands for none of the original has no target."""
    known = correspondences(recipe)
    changed = [layer.index for layer in known if layer.trainable]
    if layers == "behind" and changed:
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
        ("number of layers (the spans of the recipe count them)", recipe.depth, teacher.n_layers),
    )
    problems = [
        Problem(
            where=f"teacher {name}: {what}",
            expected=f"{ours}, as in the recipe's base",
            found=str(theirs),
            remedy="Leave --teacher out to learn from the recipe's own base, or name a fine-tune of it.",
        )
        for what, ours, theirs in compared
        if ours != theirs
    ]
    if problems:
        raise UserError(problems)
