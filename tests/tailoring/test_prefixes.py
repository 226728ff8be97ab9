"""Keys of paths, and what is kept under them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from intarsia.recipe.ops import LayerRef, Merge, Op, Select
from intarsia.recipe.recipe import Recipe, Variant, derive_spans
from intarsia.tailoring.trial_run import ByteCache, Prefixes, layer_key, path_of


def select(layer: int, variant: str = "base") -> Select:
    return Select(source=LayerRef(variant=variant, layer=layer))


def merge(layer: int, share: float = 0.5, **params: float) -> Merge:
    sources = (LayerRef(variant="base", layer=layer), LayerRef(variant="math", layer=layer))
    return Merge(sources=sources, weights=(share, 1 - share), params=params)


def recipe(*layers: Op) -> Recipe:
    variants = (Variant(name="base", model="a"), Variant(name="math", model="b"))
    return Recipe(variants=variants, base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))


def state(value: float, size: int = 4) -> Tensor:
    return torch.full((size,), float(value))


def test_keys_say_what_a_layer_is() -> None:
    ops = [select(1), select(2), select(1, "math"), merge(1), merge(1, 0.4), merge(1, a=1.0, b=2.0)]
    assert len({layer_key(op) for op in ops}) == len(ops)
    assert layer_key(merge(1, a=1.0, b=2.0)) == layer_key(merge(1, b=2.0, a=1.0))
    fitted = {"down": np.ones((2, 2), dtype=np.float32)}
    other = {"down": np.array([[1.0, 1.0], [1.0, 1.5]], dtype=np.float32)}
    assert len({layer_key(select(1)), layer_key(select(1), fitted), layer_key(select(1), other)}) == 3


def test_paths_agree_as_far_as_recipes_do() -> None:
    one, two = path_of(recipe(select(0), select(1), select(3))), path_of(recipe(select(0), select(1), merge(3)))
    assert one[:2] == two[:2] and one[2] != two[2]
    # The same layer behind others is another state.
    moved = path_of(recipe(select(1), select(0), select(3)))
    assert not set(moved) & set(one)
    whole = recipe(select(0), select(1), select(3))
    fitted = replace(whole, fitted={1: {"x": np.ones(1, dtype=np.float32)}})
    assert path_of(fitted)[0] == one[0] and path_of(fitted)[1] != one[1]


def test_the_deepest_known_state() -> None:
    prefixes = Prefixes(1000)
    prefixes.begin("abcd", 16)
    assert prefixes.deepest(0) == (0, None)
    for depth in (1, 2, 3, 4):
        prefixes.keep(depth, 0, state(depth))
    prefixes.keep(1, 1, state(10))
    assert len(prefixes) == 3 and prefixes.nbytes == 4 * 16  # behind the last layer nothing is kept
    prefixes.begin("abxd", 16)
    depth, found = prefixes.deepest(0)
    assert depth == 2 and found is not None and found.tolist() == [2.0] * 4
    depth, found = prefixes.deepest(1)
    assert depth == 1 and found is not None and found.tolist() == [10.0] * 4
    assert prefixes.deepest(2) == (0, None)


def test_a_path_takes_a_quarter_at_most() -> None:
    prefixes = Prefixes(16 * 8)
    prefixes.begin("abcdefgh", 16)  # eight depths, room for two: every fourth
    for depth in range(1, 9):
        prefixes.keep(depth, 0, state(depth))
    assert prefixes.nbytes == 16 and prefixes.deepest(0)[0] == 4


def test_old_nodes_go_whole_and_never_those_of_the_path() -> None:
    prefixes = Prefixes(16 * 8)
    for path in ("ab", "cd", "ef", "gh"):
        prefixes.begin(path, 16)
        for batch in range(2):
            prefixes.keep(1, batch, state(batch))
    assert prefixes.nbytes == 16 * 8
    prefixes.begin("ax", 16)  # is used again, and so newer than c
    assert prefixes.deepest(1)[0] == 1
    prefixes.begin("ij", 16)
    prefixes.keep(1, 0, state(5))
    assert prefixes.nbytes == 16 * 7
    for path, depth in (("ab", 1), ("cd", 0), ("ef", 1), ("ij", 1)):
        prefixes.begin(path, 16)
        assert prefixes.deepest(0)[0] == depth
    # One that is run on more than there is room for keeps what it has.
    prefixes.begin("kl", 16)
    for batch in range(20):
        prefixes.keep(1, batch, state(batch))
    assert prefixes.nbytes == 16 * 8 and len(prefixes) == 1
    assert prefixes.deepest(7)[0] == 1 and prefixes.deepest(8)[0] == 0
    prefixes.clear()
    assert prefixes.nbytes == 0 and prefixes.deepest(0) == (0, None)


def test_byte_cache() -> None:
    cache: ByteCache[str, int] = ByteCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 5)
    assert cache.get("b") is None and cache.get("a") == 1 and cache.get("c") == 3 and cache.nbytes == 9
    cache.put("d", 4, 11)
    assert cache.get("d") is None and len(cache) == 2
    cache.put("a", 5, 1)
    assert cache.get("a") == 5 and cache.nbytes == 6
    cache.clear()
    assert len(cache) == 0 and cache.nbytes == 0
