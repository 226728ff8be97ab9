"""Recipes as files: exact round trips, short forms by hand, and files that are refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from intarsia.architecture.spec import Architecture
from intarsia.data_file import dump_yaml, parse_yaml
from intarsia.errors import UserError
from intarsia.recipe.recipe import (
    Concat,
    Cut,
    LayerRef,
    Merge,
    Mix,
    Op,
    Recipe,
    Select,
    Variant,
    format_ranges,
    identity,
    parse_ranges,
)
from intarsia.recipe.schema import content_hash, load, save, to_yaml_text
from intarsia.recipe.validate import check

Recipes = Callable[..., st.SearchStrategy[Recipe]]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)
BASE = Variant(name="base", model="demo")
HEAD = "version: 1\nmodel: demo\ndepth: 6\nlayers:\n"


def source(layer: int, variant: str = "base") -> LayerRef:
    return LayerRef(variant=variant, layer=layer)


def select(layer: int, variant: str = "base") -> Select:
    return Select(source=source(layer, variant))


def same(first: Recipe, second: Recipe) -> bool:
    """Equality that looks into fitted tensors."""
    arrays = [
        {(layer, name): tensor for layer, found in recipe.fitted.items() for name, tensor in found.items()}
        for recipe in (first, second)
    ]
    return (
        replace(first, fitted={}) == replace(second, fitted={})
        and arrays[0].keys() == arrays[1].keys()
        and all(arrays[0][key].tobytes() == arrays[1][key].tobytes() for key in arrays[0])
        and all(arrays[0][key].shape == arrays[1][key].shape for key in arrays[0])
    )


def long_recipe() -> Recipe:
    """One whose channels are too scattered for the text, with fitted tensors."""
    cuts = tuple(
        Cut(source=source(index), kv_groups=(index,), channels=tuple(range(index, 200, 2)), weights=weights)
        for index, weights in enumerate(({"attention": 0.1, "mlp": 0.3}, {"attention": 0.9, "mlp": 0.7}))
    )
    fitted = {0: {"mlp.down_proj.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7}}
    return replace(identity(BASE, 6).with_layers([Concat(cuts=cuts), select(5)]), fitted=fitted)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path)
    assert "\n" not in str(caught.value.problems[0])
    return caught.value


# Round trips


def test_round_trip_is_exact(architecture: Architecture, recipes_over: Recipes, tmp_path: Path) -> None:
    @settings(deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        recipe = data.draw(recipes_over(architecture))
        provenance = data.draw(st.dictionaries(TEXTS, PLAIN, max_size=4))
        sha256 = data.draw(st.none() | st.from_regex("[0-9a-f]{64}", fullmatch=True))
        variant = replace(recipe.variants[0], sha256=sha256, revision=data.draw(st.sampled_from([None, "main", "1e5"])))
        recipe = replace(recipe, variants=(variant, *recipe.variants[1:]), provenance=provenance)
        path = tmp_path / "recipe.yaml"
        save(recipe, path)
        again = load(path)
        assert same(again, recipe)
        assert content_hash(again) == content_hash(recipe)
        assert to_yaml_text(again) == to_yaml_text(recipe)
        check(again, {"base": architecture, "math": architecture})

    run()


@settings(deadline=None)
@given(PLAIN)
def test_yaml_round_trip(value: Any) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("text", ["no", "8:4", "2024-01-01", "1e-5", "0x1f", "null", "~", "", "1_000", "<<", "=", "on"])
def test_texts_that_look_like_something_else(text: str) -> None:
    assert parse_yaml(dump_yaml({text: [text]})) == {text: [text]}


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_ranges_round_trip(indices: list[int]) -> None:
    assert parse_ranges(format_ranges(indices), most=10**6) == tuple(indices)


def test_long_lists_and_fitted_tensors_are_in_the_side_file(tmp_path: Path) -> None:
    recipe = long_recipe()
    path = tmp_path / "long.yaml"
    save(recipe, path)
    assert sorted(os.listdir(tmp_path)) == ["long.safetensors", "long.yaml"]
    assert same(load(path), recipe)
    _, tensors = to_yaml_text(recipe)
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
        "layers.0.cuts.0.channels": "int32",
        "layers.0.cuts.1.channels": "int32",
        "fitted.0.mlp.down_proj.weight": "float32",
    }
    assert len(path.read_text(encoding="utf-8")) < 1000
    save(recipe, path)  # Again over itself.
    assert same(load(path), recipe)


def test_short_recipes_are_one_file(tmp_path: Path) -> None:
    save(identity(BASE, 6), tmp_path / "short.yaml")
    assert os.listdir(tmp_path) == ["short.yaml"]


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": np.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="another name"):
        save(long_recipe(), tmp_path / "model.yaml")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    save(identity(BASE, 6), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a full disk"):
        save(identity(BASE, 5), path)
    assert os.listdir(tmp_path) == ["recipe.yaml"]
    assert path.read_bytes() == before


# The hash


def test_hash_covers_what_decides_the_weights_and_nothing_else() -> None:
    recipe = identity(replace(BASE, sha256="a" * 64), 6).with_layers([select(0), select(3)])
    same_weights = [
        replace(recipe, provenance={"planner": "x"}),
        replace(recipe, spans=((0, 1), (1, 6))),
        replace(recipe, variants=(replace(recipe.variants[0], model="/elsewhere", revision="main"),)),
        replace(recipe, variants=(*recipe.variants, Variant(name="unused", model="x"))),
    ]
    assert {content_hash(other) for other in same_weights} == {content_hash(recipe)}
    renamed = identity(Variant(name="b", model="demo", sha256="a" * 64), 6).with_layers(
        [select(0, "b"), select(3, "b")]
    )
    assert content_hash(renamed) == content_hash(recipe)
    fitted = np.zeros(3, dtype=np.float32)
    merge = Merge(sources=(source(0), source(1)), weights=(0.5, 0.5))
    cuts = long_recipe().layers[0]
    assert isinstance(cuts, Concat)
    others = [
        recipe,
        replace(recipe, variants=(replace(recipe.variants[0], sha256="b" * 64),)),
        replace(recipe, variants=(BASE,)),
        replace(recipe, variants=(replace(BASE, revision="v2"),)),
        recipe.with_layers([select(0), select(4)]),
        recipe.with_layers([select(3), select(0)]),
        recipe.with_layers([select(0), merge]),
        recipe.with_layers([select(0), replace(merge, weights=(0.5, 0.25))]),
        recipe.with_layers([select(0), cuts]),
        recipe.with_layers([select(0), replace(cuts, norm="average")]),
        recipe.with_layers([select(0), replace(cuts, cuts=cuts.cuts[::-1])]),
        replace(recipe, fitted={0: {"x": fitted}}),
        replace(recipe, fitted={0: {"x": fitted + 1}}),
        replace(recipe, fitted={1: {"x": fitted}}),
    ]
    assert len({content_hash(other) for other in others}) == len(others)


# By hand


def test_short_forms(tmp_path: Path) -> None:
    text = """
version: 1
variants: {general: demo, 8: {model: org/math, revision: main}}
base: general
depth: 6
layers:
  - select: 0-1
  - select: 8:4
  - concat:
      cuts:
        - {from: 2, kv_groups: [0, 1], channels: "0-4, 7"}
        - {from: 8:3, kv_groups: 2, channels: 5-6}
  - merge: {from: [4, general:5]}
"""
    text = text.replace("8: {", "'8': {")
    recipe = load(written(tmp_path, text))
    assert recipe.base == "general"
    assert recipe.variants[1] == Variant(name="8", model="org/math", revision="main")
    ops: list[Op] = [
        select(0, "general"),
        select(1, "general"),
        select(4, "8"),
        Concat(
            cuts=(
                Cut(
                    source=source(2, "general"),
                    kv_groups=(0, 1),
                    channels=(0, 1, 2, 3, 4, 7),
                    weights={"attention": 2 / 3, "mlp": 0.75},
                ),
                Cut(source=source(3, "8"), kv_groups=(2,), channels=(5, 6), weights={"attention": 1 / 3, "mlp": 0.25}),
            )
        ),
        Merge(sources=(source(4, "general"), source(5, "general")), weights=(0.5, 0.5)),
    ]
    assert recipe.layers == tuple(ops)
    assert recipe.spans == ((0, 1), (1, 4), (4, 4), (4, 4), (4, 6))


MERGES = """
version: 1
variants: {general: demo, math: m, code: c}
base: general
depth: 6
layers:
  - merge: {method: ties, from: [math:1, code:1], params: {density: 0.25}}
  - merge: {from: [math:2], weights: [1.0], scale: 1.5}
  - merge:
      method: task_arithmetic
      from: [math:3, code:4]
      weights: [0.5, 0]
      base: 3
      mlp: {method: dare_ties, weights: [1, 1], params: {seed: 7, density: 0.5, lambda: 2}}
"""


def test_merges_and_their_defaults(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, MERGES))
    ties, scaled, split = recipe.layers
    assert ties == Merge(
        sources=(source(1, "math"), source(1, "code")),
        weights=(0.5, 0.5),
        method="ties",
        params={"density": 0.25, "lambda": 1.0},
        base=source(1, "general"),
    )
    assert scaled == Merge(sources=(source(2, "math"),), weights=(1.0,), scale=1.5)
    assert split == Merge(
        sources=(source(3, "math"), source(4, "code")),
        weights=(0.5, 0.0),
        method="task_arithmetic",
        base=source(3, "general"),
        mlp=Mix(weights=(1.0, 1.0), method="dare_ties", params={"density": 0.5, "lambda": 2.0, "seed": 7}),
    )
    save(recipe, tmp_path / "again.yaml")
    again = load(tmp_path / "again.yaml")
    assert again == recipe
    assert content_hash(again) == content_hash(recipe)


def test_everything_about_a_merge_counts(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, MERGES))
    ties, scaled, split = recipe.layers
    assert isinstance(ties, Merge) and isinstance(scaled, Merge) and isinstance(split, Merge)
    assert split.mlp is not None
    others = [
        (replace(ties, params={"density": 0.5, "lambda": 1.0}), scaled, split),
        (replace(ties, base=source(2, "general")), scaled, split),
        (replace(ties, method="dare_ties"), scaled, split),
        (ties, replace(scaled, scale=1.0), split),
        (ties, scaled, replace(split, mlp=None)),
        (ties, scaled, replace(split, mlp=replace(split.mlp, weights=(1.0, 0.5)))),
    ]
    hashes = [content_hash(replace(recipe, layers=layers)) for layers in others]
    assert len({content_hash(recipe), *hashes}) == len(others) + 1


# Content hash, and the first half of the SHA-256 of the YAML and of the side file, as an earlier version gave them.
PINNED = {
    "concat-two-layers": ("8dc62eececeacff97b4c2d78d1ab5c61a43ba96644e12dbc93c692fa563f3a08", "5fa0c3f5e2a50f88", None),
    "drop-five-layers": ("6bf549fd7d262e22d1e29e558c46c9ec742583496fbd9046ac1056141f3e7c21", "f4b5ada8bde7e586", None),
    "merge-and-concat": ("e504230efee6d1559d5b1c3a9d43ab55c82e9591340cb57cb32cfc6d8f6721bd", "94917cde89e767b8", None),
    "merges": ("b5e3bf0c81a120e05bced2a96eb3e43e23d29a2528960e3dee2df28dfa67d78c", "56ca65610931fbd4", None),
    "long": (
        "8134c6ec80b9cfbe09d7e7f85fdf8ee86d2c62496dc8fe6d2aca14bc09b7923f",
        "d236a2a7c9ef1c38",
        "68364f60324e2b1e",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_hashes_and_files_of_older_versions_stay(name: str, tmp_path: Path) -> None:
    """A model built by an earlier version is recognised, and a saved recipe has the same bytes."""
    if name == "long":
        recipe = long_recipe()
    elif name == "merges":
        recipe = load(written(tmp_path, MERGES))
    else:
        recipe = load(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    save(recipe, tmp_path / "recipe.yaml")
    files = [tmp_path / "recipe.yaml", tmp_path / "recipe.safetensors"]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else None for file in files]
    assert (content_hash(recipe), *digests) == PINNED[name]


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("{from: [1, 2], method: ties}", "merge.base: expected the base layer of the differences of ties; found none"),
        (
            "{from: [1], method: ties, params: {density: 2}}",
            "params.density: expected a number above 0 up to 1; found 2",
        ),
        (f"{{from: [1], method: ties, params: {{density: 1{400 * '0'}}}}}", "params.density: .* found a huge number"),
        ("{from: [1], method: dare_linear, params: {seed: 0.5}}", "params.seed: expected a whole number"),
        ("{from: [1], params: {density: 0.5}}", r"merge.params: expected parameters of linear \(none\)"),
        ("{from: [1], method: regmean}", "merge.method: expected one of breadcrumbs, .*; found 'regmean'"),
        (
            "{from: [1], mlp: {from: [2]}}",
            "merge.mlp.from: expected one of method, weights, params; found the unknown key 'from'",
        ),
        # As the tags of unions look in errors of pydantic.
        ("{from: [1], ':from': 2}", "merge.:from: expected one of method, .*; found the unknown key ':from'"),
        ("{from: [1], '[key]': 2}", r"merge.\[key\]: expected one of method, .*; found the unknown key '\[key\]'"),
        ("{from: [1], mlp: {method: [linear]}}", "merge.mlp.method: expected a text"),
        ("{from: [1], scale: big}", "merge.scale: expected a number; found 'big'"),
    ],
)
def test_mistakes_in_a_merge(merge: str, message: str, tmp_path: Path) -> None:
    text = f"version: 1\nmodel: demo\ndepth: 6\nlayers:\n  - merge: {merge}\n"
    with pytest.raises(UserError, match=f"{tmp_path / 'recipe.yaml'}: .*{message}"):
        load(written(tmp_path, text))


def test_all_problems_with_their_places(tmp_path: Path) -> None:
    text = """
version: 1
model: demo
depth: none
colour: red
layers:
  - select: -1
  - select: '4:'
  - pick: 3
  - concat:
      norm: sum
      cuts:
        - {from: 3, kv_groups: [0, x], channels: "5-2"}
        - {from: 4, channels: 1.5, weights: {attention: yes}}
  - merge: {from: [], method: glue}
spans: [[0, 1, 2], 5]
fitted: {0: [mlp.down_proj.weight, other]}
provenance: 7
"""
    found = {
        problem.message.partition(": expected ")[0].removeprefix(f"{tmp_path / 'recipe.yaml'}: ")
        for problem in refused(written(tmp_path, text)).problems
    }
    assert found >= {
        "colour",
        "depth",
        "layers[0].select",
        "layers[1].select",
        "layers[2].pick",
        "layers[3].concat.norm",
        "layers[3].concat.cuts[0].kv_groups[1]",
        "layers[3].concat.cuts[0].channels",
        "layers[3].concat.cuts[1].channels",
        "layers[3].concat.cuts[1].weights.mlp",
        "layers[3].concat.cuts[1].weights.attention",
        "layers[4].merge.from",
        "spans[0]",
        "spans[1]",
        "fitted.0[0]",
        "fitted.0[1]",
        "provenance",
    }
    text = HEAD + "- concat: {cuts: [{from: 3}, {from: 4, weights: {attention: 1, mlp: 1}}]}\n"
    assert "weights to every cut or to none" in str(refused(written(tmp_path, text)))


@pytest.mark.parametrize("version", ["2", "0", "1.0", "true", "'1'", "null", "[1]"])
def test_unknown_version_is_the_only_message(tmp_path: Path, version: str) -> None:
    error = refused(written(tmp_path, f"version: {version}\nsomething: else\n"))
    assert len(error.problems) == 1
    assert "has version" in error.problems[0].message


BILLION = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("just text", "a mapping"),
        ("- 1\n- 2\n", "a mapping"),
        (BILLION, "anchors and aliases"),
        ("a: *b\n", "anchors and aliases"),
        ("version: !!int 1\n", "tags"),
        ("version: !!python/object/apply:os.system ['true']\n", "tags"),
        ("version: 1\nversion: 1\n", "'version' appears twice"),
        ("? [1, 2]\n: 3\n", "a key must be"),
        ("a: 1\n---\nb: 2\n", "YAML"),
        ("a: [1\nb: 2\n", "YAML"),
        ("a: \x01\n", "YAML"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "too many digits"),
        (b"a: \xff\n", "UTF-8"),
        (b"\x00\x01", "YAML"),
        ("#" * (2**20 + 1), "more than 1048576"),
        (HEAD + "- select: 0-9999999999\n", "layers[0].select"),
        (HEAD + "- select: 0-99999\n", "layers[0].select"),
        (HEAD + "- concat: {cuts: [{from: 0, channels: 0-999999999}]}\n", "more than"),
        (HEAD + "- concat: {cuts: [{from: 0, channels: 99999999999999}]}\n", "a huge number"),
        (HEAD + "- concat: {cuts: []}\n", "layers[0].concat.cuts"),
        (HEAD + "- concat: {cuts: [{from: 0, weights: {attention: 1" + "0" * 400 + ", mlp: 1}}]}\n", "a huge number"),
        (HEAD.replace("layers:\n", "layers: []\n"), "layers"),
        (HEAD.replace("model: demo", "variants: {a: x, b: y}") + "- select: 0\n", "base"),
        (HEAD.replace("model: demo", "variants: {a:b: x}") + "- select: 0\n", "a name of"),
        (HEAD.replace("model: demo", "variants: {}") + "- select: 0\n", "variants"),
        (HEAD.replace("demo", '"a\\0b"') + "- select: 0\n", "model"),
        (HEAD + '- select: 0\nprovenance: {a: "\\ud800"}\n', "UTF-8"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in str(refused(written(tmp_path, text)))


def test_ranges_cannot_fill_the_memory(tmp_path: Path) -> None:
    cuts = ", ".join(f"{{from: {index}, channels: 0-999999}}" for index in range(1000))
    assert "indices" in str(refused(written(tmp_path, f"{HEAD}- concat: {{cuts: [{cuts}]}}\n")))


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    assert "no such file" in str(refused(tmp_path / "none.yaml"))
    assert "something else" in str(refused(tmp_path))


# The side file


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "x.bin", ".x.safetensors", "a\\b.safetensors"]
)
def test_side_file_is_a_plain_name(tmp_path: Path, name: str) -> None:
    text = HEAD + f"- select: 0\ntensors: {{file: '{name}'}}\n"
    assert "plain name" in str(refused(written(tmp_path, text)))


def test_side_file_of_another_recipe_missing_or_broken(tmp_path: Path) -> None:
    path, side = tmp_path / "long.yaml", tmp_path / "long.safetensors"
    save(long_recipe(), path)
    good = side.read_bytes()
    side.write_bytes(good[:-3])
    assert "tensors.file" in str(refused(path))
    side.write_bytes(good[:-3] + b"abc")
    assert "tensors.sha256" in str(refused(path))
    side.unlink()
    assert "no such file" in str(refused(path))
    text = path.read_text()
    path.write_text(text + "colour: red\n")
    assert [part in str(refused(path)) for part in ("no such file", "colour")] == [True, True]
    path.write_text(text.replace("  file: long.safetensors\n", ""))
    assert [problem.message.partition(" ")[2] for problem in refused(path).problems] == [
        "tensors.file: expected a value; found nothing."
    ]
    path.write_text(text)
    save_file({"x": np.zeros(3)}, side)
    assert "int32 and float32" in str(refused(path))


def test_side_file_must_hold_exactly_what_is_named(tmp_path: Path) -> None:
    save_file(
        {"more": np.zeros(1, dtype=np.float32), "c": np.zeros((1, 1), dtype=np.int32)}, tmp_path / "x.safetensors"
    )
    text = HEAD + "- concat: {cuts: [{from: 0, channels: {tensor: a}, kv_groups: {tensor: c}}]}\n"
    error = str(refused(written(tmp_path, text + "fitted: {0: [w]}\ntensors: {file: x.safetensors}\n")))
    for part in ("tensor 'a'", "tensor 'c'", "tensor 'fitted.0.w'", "'more'"):
        assert part in error
