"""From what a family.yaml asks for, and the family's depth, to the space that is searched.

Every number stands on a grid: a search gains nothing from the third decimal of a share, and candidates on a grid can be
counted and recognised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from intarsia.architecture.spec import Architecture
from intarsia.errors import Problem, UserError
from intarsia.tailoring.family_file import BASE, FamilyFile, Range
from intarsia.tailoring.menu import Menu
from intarsia.tailoring.space import Space

_STEP, _FINE = 0.1, 0.05
_LEADS: Range = (0.1, 0.9)


def grid(ends: Range, step: float) -> tuple[float, ...]:
    """The multiples of `step` in a range, and its ends; ascending, rounded to six decimals."""
    low, high = ends
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    inside = [round(index * step, 6) for index in range(first, last + 1)]
    return tuple(sorted({round(low, 6), round(high, 6), *inside}))


def target_layers(file: FamilyFile, depth: int) -> int:
    """The depth that is asked for. `sparsity` is the share of the base's layers to remove, as in arXiv 2506.20480."""
    if file.layers is not None:
        return file.layers
    assert file.sparsity is not None, "a family file has a target"
    return depth - math.ceil(file.sparsity * depth - 1e-9)


def space_of(file: FamilyFile, architecture: Architecture) -> Space:
    """The space that a family.yaml describes, for a base of this architecture.

    Raises:
        UserError: its target cannot be reached by its operations, or an operation finds nothing to work on.
    """
    depth = architecture.n_layers
    target = target_layers(file, depth)
    problems = [
        Problem(where=f"family: {where}", expected=expected, found=found, remedy=remedy)
        for where, expected, found, remedy in _misfits(file, depth, target)
    ]
    if problems:
        raise UserError(problems)
    menu = Menu(
        members=(BASE, *(spec.name for spec in file.variants)),
        select="select" in file.operations,
        methods=file.methods,
        grids={
            "lead": grid(_LEADS, _STEP),
            "lambda": grid(file.lambdas, _STEP),
            "density": grid(file.densities, _STEP),
        },
    )
    unused = [method for method in menu.methods if method not in menu.usable]
    menu = replace(menu, methods=menu.usable)
    if unused and not menu.methods:
        raise UserError.of(
            where="family: merge.methods",
            expected="a method for as many models as there are",
            found=f"{', '.join(unused)}, and {len(file.variants)} variants",
            remedy="Add variants, or choose other methods.",
        )
    return Space(
        depth=depth,
        target=target,
        menu=menu,
        shares=grid(file.shares, _STEP) if "concat" in file.operations else (),
        scales=tuple(sorted({1.0, *grid(file.scales, _FINE)})),
        separate=file.separate,
        groups=file.groups,
        layer_types=architecture.layer_types,
    )


def _misfits(file: FamilyFile, depth: int, target: int) -> Iterator[tuple[str, str, str, str]]:
    where = "target.layers" if file.layers is not None else "target.sparsity"
    given = str(file.layers if file.layers is not None else file.sparsity)
    if target < 1:
        yield where, f"at least one of {depth} layers to stay", given, "Ask for less."
    elif target < depth and "remove" not in file.operations:
        yield where, f"the base's {depth} layers, for 'remove' is not among the operations", given, "Add remove."
    elif target > depth and "stack" not in file.operations:
        yield where, f"at most {depth}, the base's depth, without the operation 'stack'", given, "Add stack."
    elif target > 2 * depth:
        yield where, f"at most {2 * depth}: each layer stands there twice at most", given, "Ask for fewer layers."
    if "stack" in file.operations and target <= depth:
        yield "operations", f"no stack for a target of {target} of {depth} layers", "stack", "Remove it."
    if "concat" in file.operations and target >= depth:
        yield "operations", "no concat where no layer is removed", "concat", "Remove it."
    if file.groups is not None and target != depth:
        yield "fusion.groups", f"groups only at full depth, {depth} layers", f"a target of {target}", "Remove them."
    elif file.groups is not None and file.groups > depth:
        yield "fusion.groups", f"at most {depth}, the base's layers", str(file.groups), "Use fewer groups."
    if not file.variants and {"select", "merge"} & set(file.operations) and "concat" not in file.operations:
        yield "variants", "at least one variant to select or merge", "none", "Add one, or search with remove alone."
    if file.lambdas == (0.0, 0.0) and file.methods:
        yield "merge.scale", "something other than 0, which adds nothing", "0", "Widen the range."
