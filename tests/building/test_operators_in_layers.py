"""From a `Merge` to a layer: which operator on which tensors, and the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from intarsia.architecture.spec import Architecture
from intarsia.building.layer import generator_for, layer_tensors
from intarsia.building.materialize import materialize
from intarsia.building.operators import dare_linear, slerp, task_arithmetic, ties, trim
from intarsia.checkpoint.reader import Checkpoint
from intarsia.recipe.methods import METHODS, with_defaults
from intarsia.recipe.recipe import LayerRef, Merge, MergeMethod, Mix, Recipe, Select, Variant, derive_spans
from tests import families

Folder = Callable[[str], Path]
NAMES = ("base", "math", "code")


class Trio:
    """A tiny base with biases everywhere, and two variants of it."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root = root
        torch.manual_seed(5)
        model = families.make_model("llama-bias").to(dtype)
        for name in NAMES:
            if name != "base":
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
            families.save(model, root / name)
        self.checkpoints = {name: Checkpoint.open(root / name, model=str(root / name)) for name in NAMES}

    @property
    def architecture(self) -> Architecture:
        return self.checkpoints["base"].architecture

    def read(self, ref: LayerRef, local: str) -> Tensor:
        return self.checkpoints[ref.variant].layer_tensor(ref.layer, local)

    def three(self, local: str, layer: int = 2) -> list[Tensor]:
        return [self.read(LayerRef(variant=name, layer=layer), local) for name in NAMES]

    def recipe(self, *layers: Any) -> Recipe:
        variants = tuple(Variant(name=name, model=str(self.root / name)) for name in NAMES)
        return Recipe(variants=variants, base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio(tmp_path_factory.mktemp("trio"))


BASE = LayerRef(variant="base", layer=2)
MATH, CODE = (LayerRef(variant=name, layer=2) for name in ("math", "code"))


def merge(method: MergeMethod, weights: tuple[float, float] = (0.5, 0.5), **params: float) -> Merge:
    return Merge(
        sources=(MATH, CODE),
        weights=weights,
        method=method,
        params=with_defaults(method, params),
        base=BASE if METHODS[method].base else None,
    )


MATRIX, BIAS, NORM = "mlp.up_proj.weight", "mlp.up_proj.bias", "input_layernorm.weight"


def test_slerp_turns_matrices_and_not_vectors(trio: Trio) -> None:
    found = layer_tensors(merge("slerp", (0.7, 0.3)), trio.architecture, trio.read)
    _, math, code = trio.three(MATRIX)
    assert torch.equal(found[MATRIX], slerp([math, code], [0.7, 0.3]))
    for name in (BIAS, NORM):
        _, math, code = trio.three(name)
        torch.testing.assert_close(found[name], 0.7 * math + 0.3 * code)


@pytest.mark.parametrize("name", [MATRIX, BIAS, NORM])
def test_ties_trims_matrices_and_not_vectors(name: str, trio: Trio) -> None:
    op = merge("ties", (1.0, 1.0), density=0.3, **{"lambda": 0.8})
    base, *tuned = trio.three(name)
    expected = ties(tuned, [1.0, 1.0], base, density=0.3 if name == MATRIX else 1.0, lambda_=0.8)
    assert torch.equal(layer_tensors(op, trio.architecture, trio.read)[name], expected)
    kept = (trim(tuned[0] - base, 0.3) != 0).float().mean()
    assert abs(float(kept) - 0.3) < 0.03


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "task_arithmetic"])
def test_vectors_are_never_thinned(method: MergeMethod, trio: Trio) -> None:
    found = layer_tensors(merge(method), trio.architecture, trio.read)
    for name in (BIAS, NORM):
        base, math, code = trio.three(name)
        assert torch.equal(found[name], task_arithmetic([math, code], [0.5, 0.5], base))


def test_dare_is_decided_by_seed_layer_and_name(trio: Trio) -> None:
    op = merge("dare_linear", density=0.5, seed=3)
    found = layer_tensors(op, trio.architecture, trio.read)
    base, math, code = trio.three(MATRIX)
    generators = [generator_for(3, 2, MATRIX, index) for index in range(2)]
    expected = dare_linear([math, code], [0.5, 0.5], base, density=0.5, generators=generators)
    assert torch.equal(found[MATRIX], expected)
    torch.rand(3)  # what else was drawn decides nothing
    again = layer_tensors(op, trio.architecture, trio.read)
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = layer_tensors(replace(op, params={"density": 0.5, "seed": 4}), trio.architecture, trio.read)
    assert not torch.equal(found[MATRIX], other[MATRIX])
    gate = trio.architecture.layer_shapes()["mlp.gate_proj.weight"]
    assert gate == trio.architecture.layer_shapes()[MATRIX]
    delta = [found[name] == trio.three(name)[0] for name in (MATRIX, "mlp.gate_proj.weight")]
    assert not torch.equal(delta[0], delta[1])


def test_names_of_variants_decide_nothing(trio: Trio) -> None:
    op = merge("dare_ties", (1.0, 1.0))
    renamed = replace(
        op,
        sources=tuple(replace(ref, variant=f"x{ref.variant}") for ref in op.sources),
        base=replace(BASE, variant="xbase"),
    )
    found = layer_tensors(op, trio.architecture, trio.read)
    again = layer_tensors(
        renamed, trio.architecture, lambda ref, local: trio.read(replace(ref, variant=ref.variant[1:]), local)
    )
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.least == 1])
def test_a_weight_of_zero_leaves_a_layer_out(method: MergeMethod, trio: Trio) -> None:
    alone = merge(method)
    alone = replace(alone, sources=(MATH,), weights=(0.5,))
    found = layer_tensors(merge(method, (0.5, 0.0)), trio.architecture, trio.read)
    expected = layer_tensors(alone, trio.architecture, trio.read)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_each_part_in_its_own_way(trio: Trio) -> None:
    op = replace(merge("linear", (1.0, 0.0)), mlp=Mix(weights=(0.0, 1.0)))
    found = layer_tensors(op, trio.architecture, trio.read)
    for name, tensor in found.items():
        _, math, code = trio.three(name)
        attention = name.startswith(("self_attn", "input_layernorm"))
        assert torch.equal(tensor, math if attention else code), name


def test_scale_multiplies_what_is_written(trio: Trio) -> None:
    plain = layer_tensors(Merge(sources=(MATH,), weights=(1.0,)), trio.architecture, trio.read)
    scaled = layer_tensors(Merge(sources=(MATH,), weights=(1.0,), scale=1.5), trio.architecture, trio.read)
    for name, tensor in scaled.items():
        written = name.startswith(("self_attn.o_proj", "mlp.down_proj"))
        assert torch.equal(tensor, plain[name] * 1.5 if written else plain[name]), name


def test_the_base_is_the_one_at_the_sources_index(trio: Trio) -> None:
    """The output stands at index 0; differences are taken at index 2, where the sources are."""
    recipe = trio.recipe(merge("task_arithmetic", (1.0, 1.0)))
    found = layer_tensors(recipe.layers[0], trio.architecture, trio.read)
    base, math, code = trio.three(MATRIX)
    torch.testing.assert_close(found[MATRIX], math + code - base)


def test_without_differences_every_method_gives_the_base(trio: Trio) -> None:
    for method, kind in METHODS.items():
        weights = (0.5, 0.5) if kind.weights == "sum 1" or method == "linear" else (1.0, 1.0)
        op = replace(merge(method, weights), sources=(BASE, BASE))
        found = layer_tensors(op, trio.architecture, trio.read)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, trio.read(BASE, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_twice_in_any_order_are_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    trio = Trio(tmp_path / "models", dtype)
    ops = [merge(method, (0.5, 0.5)) for method in METHODS]
    recipe = trio.recipe(Select(source=MATH), *ops)
    materialize(recipe, trio.checkpoints, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert len(model.model.layers) == 1 + len(METHODS)
    assert model.dtype == dtype
    state = model.state_dict()
    for index in reversed(range(len(recipe.layers))):
        tensors = layer_tensors(recipe.layers[index], trio.architecture, trio.read)
        for name, tensor in tensors.items():
            assert torch.equal(state[f"model.layers.{index}.{name}"], tensor)
    model(torch.tensor([[3, 4, 5]]))
