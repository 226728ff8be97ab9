"""The layers of a family in memory, and what trials share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.building.layer import Read, layer_tensors
from intarsia.recipe.recipe import LayerRef, Merge, Op, Recipe, Select, Variant, derive_spans
from intarsia.tailoring.family import Family
from intarsia.tailoring.trial_run import ByteCache, FamilyModel, Prefixes, TrialFailed, layer_key, path_of

MATH = Select(source=LayerRef(variant="math", layer=2))
MERGED = Merge(
    sources=(LayerRef(variant="math", layer=3),),
    weights=(0.5,),
    method="task_arithmetic",
    base=LayerRef(variant="base", layer=3),
)


def made(family: Family, memory_bytes: int = 2**20, dtype: torch.dtype | None = None) -> FamilyModel:
    return FamilyModel(family, device=torch.device("cpu"), dtype=dtype, memory_bytes=memory_bytes)


def reader(family: Family) -> Read:
    members = family.checkpoints()
    return lambda ref, local: members[ref.variant].layer_tensor(ref.layer, local)


def test_tensors_are_those_that_are_built(trio: Family) -> None:
    layers = made(trio)
    names = list(trio.architecture.layer_shapes())
    ops: list[Op] = [Select(source=LayerRef(variant=name, layer=2)) for name in trio.names]
    for op in [*ops, MERGED]:
        expected = layer_tensors(op, trio.architecture, reader(trio))
        found = layers.module(op).state_dict()
        assert sorted(found) == sorted(names)
        assert all(torch.equal(found[name], expected[name]) for name in names)


def test_what_is_made_once(trio: Family) -> None:
    layers = made(trio)
    assert layers.module(Select(source=LayerRef(variant="base", layer=2))) is layers.layers[2]
    assert layers.made == 0
    first = layers.module(MATH)
    assert layers.module(MATH) is first and layers.made == 1
    layers.module(MERGED)
    assert layers.made == 2
    small = made(trio, memory_bytes=1000)
    assert small.module(MATH) is not small.module(MATH) and small.made == 2


def test_an_adapter_shares_what_it_leaves_alone(trio: Family) -> None:
    layers = made(trio)
    module = layers.module(Select(source=LayerRef(variant="lora", layer=2)))
    own = layers.layers[2]
    changed = {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"}
    for name, parameter in module.named_parameters():
        assert (parameter is own.get_parameter(name)) == (name not in changed)


def test_another_dtype_rounds_at_the_end(trio: Family) -> None:
    found = made(trio, dtype=torch.bfloat16).module(MERGED)
    expected = layer_tensors(MERGED, trio.architecture, reader(trio))["mlp.down_proj.weight"]
    assert torch.equal(found.get_parameter("mlp.down_proj.weight"), expected.to(torch.bfloat16))


def test_fitted_tensors(trio: Family) -> None:
    layers = made(trio)
    array = np.full(tuple(trio.architecture.layer_shapes()["mlp.down_proj.weight"]), 0.25, dtype=np.float32)
    base = Select(source=LayerRef(variant="base", layer=1))
    found = layers.module(base, {"mlp.down_proj.weight": array})
    assert torch.equal(found.get_parameter("mlp.down_proj.weight"), torch.from_numpy(array))
    assert found.get_parameter("mlp.up_proj.weight") is layers.layers[1].get_parameter("mlp.up_proj.weight")
    assert not torch.equal(layers.layers[1].get_parameter("mlp.down_proj.weight"), torch.from_numpy(array))


def test_a_layer_that_is_not_finite(broken: Callable[[], Family]) -> None:
    with pytest.raises(TrialFailed, match=r"down_proj.weight of the layer made from sick:4 is NaN or infinite"):
        made(broken()).module(Select(source=LayerRef(variant="sick", layer=4)))


def test_the_folder_is_left_as_it_is(trio: Family) -> None:
    files = [Path(member.checkpoint.folder) for member in trio.members if member.checkpoint is not None]
    before = [(file, file.stat().st_mtime_ns) for folder in files for file in folder.glob("*.safetensors")]
    layers = made(trio)
    layers.module(MATH)
    layers.clear()
    assert [(file, file.stat().st_mtime_ns) for file, _ in before] == before


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
    # The same layer after others is another state.
    moved = path_of(recipe(select(1), select(0), select(3)))
    assert not set(moved) & set(one)
    whole = recipe(select(0), select(1), select(3))
    fitted = replace(whole, fitted={1: {"x": np.ones(1, dtype=np.float32)}})
    assert path_of(fitted)[0] == one[0] and path_of(fitted)[1] != one[1]


def kept(prefixes: Prefixes, *, batch: int = 0, depths: int = 4) -> None:
    for depth in filter(prefixes.keeps, range(1, depths + 1)):
        prefixes.keep(depth, batch, state(depth))


def test_the_deepest_known_state() -> None:
    prefixes = Prefixes(1000)
    prefixes.start("abcd", 16)
    assert prefixes.deepest(0) == (0, None)
    kept(prefixes)
    prefixes.keep(1, 1, state(10))
    assert prefixes.states.nbytes == 4 * 16  # after the last layer nothing is kept
    prefixes.start("abxd", 16)
    depth, found = prefixes.deepest(0)
    assert depth == 2 and found is not None and found.tolist() == [2.0] * 4
    depth, found = prefixes.deepest(1)
    assert depth == 1 and found is not None and found.tolist() == [10.0] * 4
    assert prefixes.deepest(2) == (0, None)


def test_a_path_takes_a_quarter_at_most() -> None:
    prefixes = Prefixes(16 * 8)
    prefixes.start("abcdefgh", 16)  # eight depths, room for two: every fourth
    kept(prefixes, depths=8)
    assert prefixes.states.nbytes == 16 and prefixes.deepest(0)[0] == 4


def test_first_layers_stay_longest_and_what_was_used() -> None:
    prefixes = Prefixes(16 * 16)
    for path in ("abc", "def"):
        prefixes.start(path, 16)
        for batch in range(2):
            kept(prefixes, batch=batch)
    prefixes.start("abx", 16)  # is used again, and so newer than d, its first layer newer than its second
    assert [prefixes.deepest(batch)[0] for batch in range(2)] == [2, 2]
    for number in range(5):
        prefixes.start((f"new {number}", f"more {number}", "last"), 16)
        kept(prefixes)
    assert prefixes.states.nbytes == 16 * 16
    depths = {}
    for path in ("def", "abc"):
        prefixes.start(path, 16)
        depths[path] = [prefixes.deepest(batch)[0] for batch in range(2)]
    assert depths == {"def": [0, 2], "abc": [2, 2]}


def test_byte_cache() -> None:
    cache: ByteCache[str, int] = ByteCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 5)
    assert cache.get("b") is None and cache.get("a") == 1 and cache.get("c") == 3 and cache.nbytes == 9
    cache.put("d", 4, 11)
    assert cache.get("d") is None
    cache.put("a", 5, 1)
    assert cache.get("a") == 5 and cache.nbytes == 6
    cache.clear()
    assert cache.get("a") is None and cache.nbytes == 0
