"""The family's layers as modules: the right tensors, shared where they can be, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from intarsia.building.layer import Read, layer_tensors
from intarsia.recipe.ops import LayerRef, Merge, Op, Select
from intarsia.tailoring.family import Family
from intarsia.tailoring.history import TrialFailed
from intarsia.tailoring.trial_run import ResidentFamily

MATH = Select(source=LayerRef(variant="math", layer=2))
MERGED = Merge(
    sources=(LayerRef(variant="math", layer=3),),
    weights=(0.5,),
    method="task_arithmetic",
    base=LayerRef(variant="base", layer=3),
)


def made(family: Family, memory_bytes: int = 2**20, dtype: torch.dtype | None = None) -> ResidentFamily:
    return ResidentFamily(family, device=torch.device("cpu"), dtype=dtype, memory_bytes=memory_bytes)


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
    assert layers.module(Select(source=LayerRef(variant="base", layer=2))) is layers.resident.layers[2]
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
    own = layers.resident.layers[2]
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
    assert found.get_parameter("mlp.up_proj.weight") is layers.resident.layers[1].get_parameter("mlp.up_proj.weight")
    assert not torch.equal(layers.resident.layers[1].get_parameter("mlp.down_proj.weight"), torch.from_numpy(array))


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
