"""All that is in a small menu or space, listed one by one from what they say of themselves."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import pytest

from intarsia.recipe.methods import METHODS
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, Menu, single
from intarsia.tailoring.engines.evolve import crossover, layer_steps, mutate
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
    types = space.layer_types or ("full",) * space.depth

    def joins(at: int, positions: Sequence[int]) -> list[Choice]:
        last = min((other for other in positions if other > at), default=space.depth) - 1
        if last <= at or space.kind != "prune":
            return []
        shares: list[float | None] = [*(space.shares if types[at + 1] == types[at] else ())]
        shares += [None] * (space.half_layers and types[last] == types[at])
        return [
            Join(first=first, second=second, share=share) for first, second, share in product(singles, singles, shares)
        ]

    found = []
    for changed in combinations(range(space.depth), space.changes):
        positions = space.positions(changed)
        options: list[list[Choice]] = [[*keeps, *joins(at, positions)] for at in positions]
        found += [Candidate(positions=positions, choices=choices) for choices in product(*options)]
    return found


VALUES = {"lead": (0.25, 0.5, 0.75), "lambda": (0.0, 0.5, 1.0), "density": (0.2, 0.5)}
GRIDS = {method: {name: VALUES[name] for name in METHODS[method].search} for method in METHODS}
MENU = Menu(members=("base", "math", "code"), select=True, methods=("task_arithmetic", "slerp"), grids=GRIDS)
TINY = Menu(members=("base", "math"), select=True, methods=("task_arithmetic",), grids=GRIDS)


def space(menu: Menu = TINY, **changes: object) -> Space:
    settings = {"depth": 5, "target": 3, "menu": menu, "shares": (0.3, 0.7), **changes}
    return Space(**settings)  # type: ignore[arg-type]


def blend(*members: str, method: str | None = None, **values: float) -> Blend:
    named = {"lam": "lambda"}
    pairs = tuple((named.get(name, name), value) for name, value in values.items())
    return Blend(members=members, method=method, values=pairs)  # type: ignore[arg-type]


def test_menu_by_hand() -> None:
    """Of one variant and task arithmetic: the two layers as they are, and half of the difference."""
    assert TINY.count() == 3
    assert all_blends(TINY) == [
        blend("base"),
        blend("math"),
        blend("math", method="task_arithmetic", lam=0.5),
    ]


ALL = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "model_stock")


@pytest.mark.parametrize("methods", [(), *((method,) for method in ALL), ALL])
@pytest.mark.parametrize("members", [("base",), ("base", "a"), ("base", "a", "b"), ("base", "a", "b", "c")])
@pytest.mark.parametrize("select", [True, False])
def test_menu_count(methods: tuple[str, ...], members: tuple[str, ...], select: bool) -> None:
    menu = Menu(members=members, select=select, methods=methods, grids=GRIDS)  # type: ignore[arg-type]
    blends = all_blends(menu)
    assert len(blends) == len(set(blends)) == menu.count()
    assert all(menu.has(other) for other in blends)
    rng = random.Random(0)
    assert all(menu.has(menu.random(rng)) for _ in range(50))
    for other in blends:
        steps = [*menu.source_steps(other), *menu.merge_steps(other)]
        assert other not in steps and all(menu.has(step) for step in steps)


@pytest.mark.parametrize("methods", [ALL, *((method,) for method in ALL)])
def test_every_blend_can_be_reached(methods: tuple[str, ...]) -> None:
    menu = replace(MENU, methods=methods)  # type: ignore[arg-type]
    found, todo = set(), [blend("base")]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo += [*menu.source_steps(one), *menu.merge_steps(one)]
    assert found == set(all_blends(menu))


def test_what_the_menu_does_not_have() -> None:
    assert not MENU.has(
        blend("base", "math", method="task_arithmetic", lam=0.5)
    )  # the base has no difference to itself
    assert not MENU.has(blend("math", method="task_arithmetic", lam=1.0))  # that is math
    assert MENU.has(blend("math", "code", method="task_arithmetic", lam=1.0))
    assert not MENU.has(blend("math", "code", method="task_arithmetic", lam=0.0))  # that is the base
    assert not MENU.has(blend("code", "math", method="slerp", lead=0.5))  # another order
    assert not MENU.has(blend("math", "code", method="slerp", lead=0.4))
    assert not replace(MENU, select=False).has(blend("math"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shares": ()},
        {"target": 1},
        {"target": 4, "scales": (0.9, 1.0)},
        {"layer_types": ("full", "full", "sliding", "sliding", "full")},
        {"half_layers": True},
        {"half_layers": True, "shares": (), "target": 2},
        {"half_layers": True, "layer_types": ("full", "sliding", "full", "sliding", "sliding")},
        {"depth": 3, "target": 2, "separate": True},
        {"depth": 3, "target": 3, "shares": ()},
        {"depth": 5, "target": 5, "shares": (), "groups": 2, "separate": True},
        {"depth": 3, "target": 4, "shares": ()},
        {"depth": 2, "target": 4, "shares": ()},
        {"menu": replace(TINY, select=False, methods=())},
    ],
)
def test_size(changes: dict[str, object]) -> None:
    found = space(**changes)  # type: ignore[arg-type]
    everything = all_candidates(found)
    assert len(everything) == len(set(everything))
    assert found.log10_size == pytest.approx(math.log10(len(everything)), abs=1e-9)
    assert all(found.has(candidate) for candidate in everything)
    rng = random.Random(1)
    known = set(everything)
    assert all(found.random(rng) in known for _ in range(100))
    sample = rng.sample(everything, min(len(everything), 30))
    for candidate in sample:
        mutated = mutate(found, candidate, rng)
        assert mutated in known and (mutated != candidate or len(known) == 1)
        assert crossover(found, candidate, rng.choice(everything), rng) in known


def test_size_of_a_real_search() -> None:
    base_only = Space(depth=30, target=23, menu=replace(MENU, select=False, methods=()))
    assert base_only.log10_size == pytest.approx(math.log10(math.comb(30, 7)))
    assert Space(depth=30, target=23, menu=MENU, shares=(0.5,)).log10_size > 20


def test_moves_reach_the_whole_space() -> None:
    found = space(depth=4, target=2, shares=(0.3, 0.7), half_layers=True)
    rng = random.Random(0)
    seen, todo = set(), [found.plain((0, 1))]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += {mutate(found, one, rng) for _ in range(40)}
    assert seen == set(all_candidates(found))


def test_a_join_falls_apart_when_its_partner_is_kept() -> None:
    found = space()
    join = Join(first="math", second="base", share=0.3)
    candidate = found.arrange((2, 4), {(1, 0): join, (0, 0): join})
    assert candidate.choices[1] == join
    assert candidate.choices[0] == single("math")  # layer 1 is kept, so layer 0 cannot take of it
    assert not found.has(replace(candidate, choices=(join, *candidate.choices[1:])))


def test_a_half_layer_drop_follows_its_run() -> None:
    """The MLP is that of the last removed layer, of the same attention type."""
    found = space(depth=6, target=3, half_layers=True, layer_types=("full", "sliding", "full", "full", "full", "full"))
    half = Join(first="math", second="base")
    choices = {(0, 0): half, (3, 0): half}
    assert [type(choice) for choice in found.arrange((1, 2, 4), choices).choices] == [Join, Join, Keep]
    assert found.arrange((1, 4, 5), choices).choices[0] == single("math")  # layer 1 attends in another way
    steps = layer_steps(found, found.plain((1, 2, 4)), 0)["concat"]
    assert steps == [Join(first="base", second=member) for member in ("base", "math")]  # and is not concatenated


def test_one_form_for_equal_halves() -> None:
    found = space(separate=True)
    twice = Keep(attention=blend("math"), mlp=blend("math"))
    assert found.arrange((0, 1), {(2, 0): twice}).choices[0] == single("math")
    assert not found.has(Candidate(positions=(2, 3, 4), choices=(twice, single("base"), single("base"))))


def test_swap_keeps_what_others_are() -> None:
    found = space(MENU, shares=())
    choices = {(0, 0): single("math"), (3, 0): single("code"), (4, 0): single("math")}
    candidate = found.arrange((1, 2), choices)
    for _ in range(50):
        other = mutate(found, candidate, random.Random(_))
        for position, choice in other.items():
            if position in candidate.positions and other.positions != candidate.positions:
                assert choice == dict(candidate.items())[position]


def test_a_step_is_taken_by_all_layers_that_are_alike() -> None:
    """Sometimes, and only one from or to a merge; by one of them else. Layers that are otherwise stay as they are."""
    found = space(MENU, shares=(), scales=(0.9, 1.0))
    alike, other = Keep(attention=blend("math", "code", method="task_arithmetic", lam=0.5)), single("code")
    candidate = found.arrange((1, 2), {(0, 0): alike, (3, 0): other, (4, 0): alike})
    changed: Counter[tuple[int, ...]] = Counter()
    for seed in range(400):
        child = mutate(found, candidate, random.Random(seed))
        if child.positions == candidate.positions:
            differ = [at for at, choice in child.items() if choice != dict(candidate.items())[at]]
            assert len({dict(child.items())[at] for at in differ}) == 1
            changed[tuple(differ)] += 1
    assert set(changed) == {(0,), (4,), (0, 4), (3,)}
    plain = space(replace(MENU, methods=()), shares=())
    same = plain.arrange((1, 2), {(0, 0): other, (3, 0): other, (4, 0): other})
    children = [mutate(plain, same, random.Random(seed)) for seed in range(100)]
    assert {sum(a != b for a, b in zip(same.choices, child.choices, strict=True)) for child in children} <= {0, 1}
    assert 0.12 < changed[0, 4] / (changed[0, 4] + changed[0,] + changed[4,]) < 0.28


def test_crossover_takes_from_both() -> None:
    found = space(MENU, depth=8, target=5, shares=())
    mother = found.arrange((1, 2, 3), {(layer, 0): single("math") for layer in range(8)})
    father = found.arrange((1, 5, 6), {(layer, 0): single("code") for layer in range(8)})
    for seed in range(20):
        child = crossover(found, mother, father, random.Random(seed))
        removed = found.changed(child.positions)
        assert 1 in removed and set(removed) <= {1, 2, 3, 5, 6}
        for position, choice in child.items():
            allowed = [dict(parent.items()).get(position) for parent in (mother, father)]
            assert choice in allowed


def test_random_middle_leaves_both_ends() -> None:
    found = Space(depth=30, target=23, menu=MENU)
    removed = {
        layer for seed in range(40) for layer in found.changed(found.random_middle(random.Random(seed)).positions)
    }
    assert removed <= set(range(3, 27)) and len(removed) == 24
    assert set(found.random_middle(random.Random(0)).choices) == {single("base")}


def test_groups_share_a_choice() -> None:
    found = space(MENU, depth=7, target=7, shares=(), groups=3)
    assert [list(found.layers_of(start)) for start in found.starts] == [[0, 1], [2, 3], [4, 5, 6]]


def test_steps_of_a_layer_by_kind() -> None:
    found = space(scales=(0.9, 1.0, 1.1))
    candidate = found.plain((1, 4))
    steps = layer_steps(found, candidate, 0)
    assert steps["source"] == [single("math")]
    assert steps["merge"] == [Keep(attention=blend("math", method="task_arithmetic", lam=0.5))]
    assert [step.scale for step in steps["scale"] if isinstance(step, Keep)] == [0.9, 1.1]
    assert steps["concat"] == [Join(first="base", second=member, share=0.7) for member in ("base", "math")]
    assert "concat" not in layer_steps(found, candidate, 1)  # layer 3 is kept after layer 2
