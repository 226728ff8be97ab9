"""All that is in a small menu or space, listed one by one from what they say of themselves."""

from __future__ import annotations

from itertools import combinations, product

from intarsia.recipe.methods import METHODS
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, Menu
from intarsia.tailoring.space import Space


def all_blends(menu: Menu) -> list[Blend]:
    """Every blend of a menu once."""
    found = [Blend(members=(member,)) for member in (menu.members if menu.select else menu.members[:1])]
    for method in menu.methods:
        kind, names = METHODS[method], tuple(menu.grids[method])
        pool = menu.members[1:] if kind.base else menu.members
        for size in range(1, len(pool) + 1):
            if size < kind.least or size > (kind.most or size) or (size == 1 and not kind.base):
                continue
            grids = [menu.grids[method][name] for name in names]
            for members, values in product(combinations(pool, size), product(*grids)):
                settings = dict(zip(names, values, strict=True))
                share = settings.get("lambda")
                # Nothing is added; or the whole difference of one member, which is that member.
                if share != 0.0 and not (method == "task_arithmetic" and size == 1 and share == 1.0):
                    found.append(Blend(members=members, method=method, values=tuple(settings.items())))
    return found


def all_candidates(space: Space) -> list[Candidate]:
    """Every candidate of a space once."""
    blends, singles = all_blends(space.menu), space.menu.singles
    mlps: list[Blend | None] = [*blends] if space.separate else [None]
    keeps = [
        Keep(attention=blend, mlp=None if mlp == blend else mlp, scale=scale)
        for blend, mlp, scale in product(blends, mlps, space.scales)
    ]
    joins = [
        Join(first=first, second=second, share=at) for first, second, at in product(singles, singles, space.shares)
    ]
    found = []
    for changed in combinations(range(space.depth), space.changes):
        positions = space.positions(changed)
        options: list[list[Choice]] = [[*keeps, *(joins if space.joined(at, positions) else [])] for at in positions]
        found += [Candidate(positions=positions, choices=choices) for choices in product(*options)]
    return found
