"""Every mistake of a recipe is found, and all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.architecture.spec import Architecture, Part
from intarsia.errors import UserError
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Mix, Op, Recipe, Select, Variant, identity
from intarsia.recipe.schema import load
from intarsia.recipe.validate import check

# Files that begin with `tailor-` are families.
FOLDER = Path(__file__).parents[2] / "recipes"
EXAMPLES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("tailor-"))
MakeArchitecture = Callable[..., Architecture]


def select(layer: int, variant: str = "base") -> Select:
    return Select(source=LayerRef(variant=variant, layer=layer))


def cut(layer: int, kv_groups: Sequence[int], channels: Sequence[int], attention: float, mlp: float) -> Cut:
    weights: dict[Part, float] = {"attention": attention, "mlp": mlp}
    source = LayerRef(variant="base", layer=layer)
    return Cut(source=source, kv_groups=tuple(kv_groups), channels=tuple(channels), weights=weights)


GOOD = Concat(cuts=(cut(1, [0, 2], range(5), 0.6, 0.5), cut(2, [1], range(5, 8), 0.4, 0.5)))


def recipe_of(*layers: Op) -> Recipe:
    return identity(Variant(name="base", model="demo"), 6).with_layers(layers)


def refused(recipe: Recipe, architecture: Architecture, **others: Architecture) -> UserError:
    with pytest.raises(UserError) as caught:
        check(recipe, {"base": architecture, **others})
    return caught.value


def test_valid_recipes_pass(architecture: Architecture, recipes_over: Callable[..., st.SearchStrategy[Recipe]]) -> None:
    @settings(deadline=None)
    @given(recipes_over(architecture))
    def run(recipe: Recipe) -> None:
        check(recipe, {"base": architecture, "math": architecture})

    run()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_fit_the_demo_model(path: Path, architecture_with: MakeArchitecture) -> None:
    demo = architecture_with(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    recipe = load(path)
    check(recipe, {variant.name: demo for variant in recipe.variants})
    assert {variant.model for variant in recipe.variants} == {"demo"}
    assert len(recipe.layers) < 30


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(
    ("concat", "message"),
    [
        (Concat(cuts=()), "at least one cut"),
        (replace(GOOD, norm="sum"), "fold or average"),
        (Concat(cuts=(cut(1, [0, 3], range(5), 0.6, 0.5), GOOD.cuts[1])), "indices from 0 to 2; found 3"),
        (Concat(cuts=(cut(1, [0, -1], range(5), 0.6, 0.5), GOOD.cuts[1])), "indices from 0 to 2; found -1"),
        (Concat(cuts=(cut(1, [0, 2], range(6, 11), 0.6, 0.5), GOOD.cuts[1])), "found 8 and 2 more"),
        (Concat(cuts=(cut(1, [0, 0], range(5), 0.6, 0.5), GOOD.cuts[1])), "0 a second time"),
        (Concat(cuts=(cut(1, [0], range(5), 0.6, 0.5), GOOD.cuts[1])), "3 kv_groups in all cuts together; found 2"),
        (Concat(cuts=(cut(1, [0, 2], range(6), 0.6, 0.5), GOOD.cuts[1])), "8 channels in all cuts together; found 9"),
        (Concat(cuts=(cut(2, [0, 2], range(5), 0.6, 0.5), GOOD.cuts[1])), "a layer without another cut"),
        (Concat(cuts=(cut(1, [0, 2], range(5), 0.7, 0.5), GOOD.cuts[1])), "attention weights that sum to 1; found 1.1"),
        (Concat(cuts=(cut(1, [0, 2], range(5), 1.2, 0.5), cut(2, [1], range(5, 8), -0.2, 0.5))), "found -0.2"),
        (Concat(cuts=(cut(1, [0, 2], range(5), 0.6, math.nan), GOOD.cuts[1])), "weights.mlp: .* found nan"),
        (Concat(cuts=(cut(1, [0, 2], range(5), math.inf, 0.5), GOOD.cuts[1])), "found inf"),
        (Concat(cuts=(replace(GOOD.cuts[0], weights={"mlp": 0.5}), GOOD.cuts[1])), "weights.attention: .* found none"),
    ],
)
def test_wrong_concat(architecture: Architecture, concat: Concat, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(recipe_of(GOOD), layers=(concat,)), {"base": architecture})


def test_pieces_of_a_mixture_are_called_experts(architecture: Architecture) -> None:
    mixture = replace(architecture, n_experts=8)
    check(recipe_of(GOOD), {"base": mixture})
    wrong = Concat(cuts=(cut(1, [0, 2], range(6), 0.6, 0.5), GOOD.cuts[1]))
    with pytest.raises(UserError, match=r"expected 8 experts \(as channels\) in all cuts together; found 9"):
        check(recipe_of(wrong), {"base": mixture})


def test_weights_may_be_off_by_rounding(architecture: Architecture) -> None:
    check(recipe_of(Concat(cuts=(cut(1, [0, 2], range(5), 0.6 + 5e-7, 0.5), GOOD.cuts[1]))), {"base": architecture})


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (Merge(sources=(), weights=()), "at least one layer"),
        (Merge(sources=(LayerRef(variant="base", layer=1),), weights=(0.5, 0.5)), "1 weights, one per layer; found 2"),
        (Merge(sources=(LayerRef(variant="base", layer=1),), weights=(math.nan,)), "a finite number; found nan"),
        (
            Merge(sources=(LayerRef(variant="base", layer=1),), weights=(1.0,), method="glue"),
            "breadcrumbs, dare_linear",
        ),  # type: ignore[arg-type]
    ],
)
def test_wrong_merge(architecture: Architecture, merge: Merge, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(recipe_of(GOOD), layers=(merge,)), {"base": architecture})


ONE, TWO = LayerRef(variant="base", layer=1), LayerRef(variant="base", layer=2)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (Merge(sources=(ONE,), weights=(1.0,), method="slerp"), "exactly 2 layers with a weight other than 0"),
        (Merge(sources=(ONE, TWO), weights=(0.5, 0.6), method="slerp"), "that sum to 1 for slerp; found 0.5, 0.6"),
        (Merge(sources=(ONE,), weights=(1.0,), method="task_arithmetic"), "merge.base: .* found none"),
        (
            Merge(sources=(ONE,), weights=(1.0,), base=TWO, method="dare_linear", params={"seed": 0.5}),
            "params.seed: expected a whole number",
        ),
        (Merge(sources=(ONE,), weights=(1.0,), base=TWO), "no base, because linear takes no differences; found base:2"),
        (
            Merge(sources=(ONE,), weights=(1.0,), base=LayerRef(variant="base", layer=6), method="task_arithmetic"),
            "a layer from 0 to 5; found base:6",
        ),
        (
            Merge(sources=(ONE,), weights=(1.0,), base=TWO, method="ties", params={"density": 0.0, "lambda": 1.0}),
            "params.density: expected a number above 0 up to 1; found 0.0",
        ),
        (Merge(sources=(ONE,), weights=(1.0,), base=TWO, method="ties"), "params: expected density of ties; found"),
        (Merge(sources=(ONE,), weights=(1.0,), params={"t": 0.5}), r"parameters of linear \(none\); found 't'"),
        (Merge(sources=(ONE, TWO), weights=(0.4, 0.6), base=TWO, method="model_stock"), "equal weights"),
        (Merge(sources=(ONE, TWO), weights=(1.0, 0.0), base=TWO, method="model_stock"), "at least 2 layers"),
        (
            Merge(sources=(ONE,), weights=(1.0,), base=TWO, method="breadcrumbs", params={"bottom": 0.5, "top": 0.5}),
            "bottom and top with a sum below 1",
        ),
        (Merge(sources=(ONE,), weights=(1.0,), scale=math.inf), "merge.scale: expected a finite number; found inf"),
        (Merge(sources=(ONE,), weights=(1.0,), mlp=Mix(weights=(1.0, 2.0))), "mlp.weights: expected 1 weights"),
    ],
)
def test_wrong_methods_and_parameters(architecture: Architecture, merge: Merge, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(recipe_of(merge), {"base": architecture})


def test_layers_and_variants_that_are_not_there(architecture: Architecture) -> None:
    text = str(refused(recipe_of(select(5), select(6), select(0, "math")), architecture))
    assert "layers[1]: expected a layer from 0 to 5; found base:6" in text
    assert "layers[2]: expected a variant among base; found 'math'" in text
    assert "base: expected one of the variants base; found 'math'" in str(
        refused(replace(recipe_of(select(0)), base="math"), architecture)
    )
    # An architecture alone does not make a variant.
    assert "'math'" in str(refused(recipe_of(select(0, "math")), architecture, math=architecture))


def test_names_of_variants(architecture: Architecture) -> None:
    base = Variant(name="base", model="demo")
    recipe = replace(recipe_of(select(0)), variants=(base, base, Variant(name="a:b", model="x")))
    text = str(refused(recipe, architecture))
    assert "a second time" in text
    assert "'a:b'" in text


def test_depth_and_spans(architecture: Architecture) -> None:
    good = recipe_of(select(0), select(3))
    assert "depth: expected 6" in str(refused(identity(Variant(name="base", model="x"), 5), architecture))
    assert "spans: expected 2 spans" in str(refused(replace(good, spans=((0, 6),)), architecture))
    for spans, message in (
        (((0, 2), (3, 6)), "spans[1]: expected a span from 2 to 6; found 3-6"),
        (((1, 2), (2, 6)), "spans[0]: expected a span from 0 to at most 6; found 1-2"),
        (((0, 7), (7, 6)), "spans[0]: expected a span from 0 to at most 6; found 0-7"),
        (((0, 2), (2, 5)), "spans[1]: expected a span from 2 to 6; found 2-5"),
    ):
        assert message in str(refused(replace(good, spans=spans), architecture))
    assert "at least one layer" in str(refused(replace(good, layers=(), spans=()), architecture))


def test_fitted_tensors(architecture: Architecture) -> None:
    right = np.zeros((48, 8), dtype=np.float32)
    name = "mlp.down_proj.weight"
    good = recipe_of(select(0))
    check(replace(good, fitted={0: {name: right}}), {"base": architecture})
    bad = right.copy()
    bad[3, 3] = np.inf
    assert "NaN or infinity" in str(refused(replace(good, fitted={0: {name: bad}}), architecture))
    assert "shape [48, 8]" in str(refused(replace(good, fitted={0: {name: right.T}}), architecture))
    assert "float32" in str(refused(replace(good, fitted={0: {name: right.astype(np.float64)}}), architecture))  # type: ignore[dict-item]
    assert "one of input_layernorm.weight" in str(refused(replace(good, fitted={0: {"mlp.x": right}}), architecture))
    assert "an output layer from 0 to 0" in str(refused(replace(good, fitted={1: {name: right}}), architecture))


def test_layer_types_do_not_mix(architecture_with: MakeArchitecture) -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    mixed = architecture_with(model_type="mistral", layer_types=kinds)
    check(recipe_of(select(0), select(1)), {"base": mixed})
    assert "base:1 is sliding_attention, base:2 is full_attention" in str(refused(recipe_of(GOOD), mixed))


def test_variants_must_have_the_base_shape(architecture: Architecture, architecture_with: MakeArchitecture) -> None:
    recipe = replace(
        recipe_of(select(0), select(0, "math")),
        variants=(Variant(name="base", model="a"), Variant(name="math", model="b")),
    )
    check(recipe, {"base": architecture, "math": architecture_with(vocab_size=60)})
    assert "n_channels 8 as in 'base'; found 9" in str(
        refused(recipe, architecture, math=architecture_with(intermediate_size=9))
    )
    assert "family llama" in str(refused(recipe, architecture, math=architecture_with(model_type="qwen2")))
    assert "tensors" in str(refused(recipe, architecture, math=architecture_with(attention_bias=True)))


def test_all_problems_at_once(architecture: Architecture) -> None:
    broken = Concat(cuts=(cut(1, [0, 9], range(4), 0.6, 0.6), cut(1, [1, 1], range(5, 8), 0.4, 0.5)))
    recipe = replace(recipe_of(select(7), broken), depth=9, spans=((0, 1),))
    found = {problem.message.partition(": expected ")[0] for problem in refused(recipe, architecture).problems}
    assert found == {
        "depth",
        "spans",
        "layers[0]",
        "layers[1].concat",
        "layers[1].concat.cuts[1]",
        "layers[1].concat.cuts[0].kv_groups",
        "layers[1].concat.cuts[1].kv_groups",
    }


def test_many_problems_are_cut_short(architecture: Architecture) -> None:
    error = refused(recipe_of(*[select(99)] * 200), architecture)
    assert len(error.problems) == 51
    assert "more problems" in str(error)
