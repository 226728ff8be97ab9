"""family.yaml: what it may say, and every mistake at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intarsia.errors import UserError
from intarsia.tailoring.family_file import (
    FamilyFile,
    MemberSpec,
    ObjectiveSpec,
    SearchSpec,
    parse_family,
    read_family_file,
)
from intarsia.tailoring.space import grid, space_of, target_layers
from tests.tailoring.conftest import make_architecture

RECIPES = Path(__file__).parents[2] / "recipes"

MINIMAL: dict[str, Any] = {
    "base": "demo",
    "variants": {"math": "a/b", "code": {"model": "c/d", "revision": "v1"}},
    "target": {"layers": 4},
    "objectives": [{"name": "prose", "loss": "news.txt"}],
}


def parse(**changes: Any) -> FamilyFile:
    return parse_family({**MINIMAL, **changes}, where="family.yaml")


def test_defaults() -> None:
    assert parse() == FamilyFile(
        base=MemberSpec(name="base", model="demo"),
        variants=(MemberSpec(name="math", model="a/b"), MemberSpec(name="code", model="c/d", revision="v1")),
        layers=4,
        sparsity=None,
        operations=("remove", "select", "merge"),
        methods=("task_arithmetic",),
        objectives=(ObjectiveSpec(name="prose", kind="loss", source="news.txt"),),
    )


def test_the_demo_family() -> None:
    found = read_family_file(RECIPES / "tailor-demo.yaml")
    assert found.layers == 23
    assert found.operations == ("remove", "select", "merge", "concat")
    assert found.methods == ("task_arithmetic", "linear", "slerp", "ties")
    assert found.objectives[0] == ObjectiveSpec(
        name="science", kind="task", source="../shared/data/tasks/arc_easy.jsonl", split=(0.0, 0.33)
    )
    assert found.search == SearchSpec(
        trials=200, min_budget=16, max_budget=256, eta=3, warm_start=("random-middle", "shortgpt", "sleb", "come")
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("tailor-*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    found = read_family_file(path)
    depth = 40 if "13b" in path.stem else 30
    space = space_of(found, make_architecture(num_hidden_layers=depth))
    assert space.log10_size > 10


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"operations": ["remove", "glue"]}, [r"operations\[1\]: expected one of remove, select.*found 'glue'"]),
        ({"merge": {"methods": ["regmean"]}}, [r"merge.methods\[0\]: expected one of linear, slerp.*found 'regmean'"]),
        ({"merge": {"methods": ["ties", "ties"]}}, ["each once; found ties a second time"]),
        ({"merge": {"scale": [1.5, 0.0]}}, [r"merge.scale: expected \[lowest, highest\].*found \[1.5, 0.0\]"]),
        ({"merge": {"parts": "both"}}, ["merge.parts: expected together or separate"]),
        ({"operations": ["remove"], "merge": {}}, ["merge: expected 'merge' among the operations"]),
        ({"output_scale": [1.1, 1.2]}, ["output_scale: expected a range with 1 in it"]),
        ({"target": {}}, ["target: expected either layers or sparsity; found neither"]),
        ({"target": {"layers": 3, "sparsity": 0.2}}, ["found both"]),
        ({"target": {"sparsity": 1.0}}, ["between 0 and 1; found 1.0"]),
        ({"variants": {"base": "x"}}, [r"variants.base: expected a name .*not 'base'"]),
        ({"variants": {"a:b": "x", 8: "y"}}, ["variants.a:b", "variants.8"]),
        ({"objectives": []}, ["objectives: expected a list of 1 to 100"]),
        ({"objectives": [{"name": "a"}]}, [r"objectives\[0\]: expected exactly one of task, loss and kl; found none"]),
        ({"objectives": [{"name": "a", "task": "x", "loss": "y"}]}, ["found task, loss"]),
        ({"objectives": [{"name": "a", "loss": "y", "metric": "accuracy"}]}, ["a metric only for a task"]),
        ({"objectives": [{"name": "a", "task": "y", "metric": "luck"}]}, ["accuracy or margin or likelihood"]),
        ({"objectives": [{"name": "a", "kl": "y"}, {"name": "a", "kl": "z"}]}, ["a name of its own; found 'a'"]),
        ({"objectives": [{"name": "a", "kl": "y", "split": "0.5:0.2"}]}, ["a part of the file such as 0:0.33"]),
        ({"search": {"engine": "both"}}, ["search.engine: expected smac or evolve or random; found 'both'"]),
        ({"search": {"min_budget": 300}}, ["search.min_budget: expected at most max_budget; found 300 and 256"]),
        ({"search": {"trials": 0, "eta": 1}}, ["search.trials", "search.eta"]),
        (
            {"search": {"warm_start": ["best"]}},
            [r"warm_start\[0\]: expected random-middle, angular, come.*found 'best'"],
        ),
        (
            {"search": {"budget": 3}, "heal": "yes"},
            ["search: expected only the keys", "heal: expected none or finalists"],
        ),
        ({"colour": "red", "base": 3}, ["only the keys base, variants", "base: expected a mapping"]),
    ],
)
def test_mistakes(changes: dict[str, Any], messages: list[str]) -> None:
    for message in messages:
        with pytest.raises(UserError, match=message):
            parse(**changes)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_family({"variants": [], "operations": "remove", "search": 3, "target": 4}, where="f.yaml")
    places = {problem.where for problem in caught.value.problems}
    assert places >= {"f.yaml", "f.yaml: target", "f.yaml: variants", "f.yaml: operations", "f.yaml: search"}
    assert "Mend the file." in str(caught.value)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a family file; found no such file"):
        read_family_file(tmp_path / "family.yaml")
    (tmp_path / "family.yaml").write_text("base: [", encoding="utf-8")
    with pytest.raises(UserError, match="expected YAML"):
        read_family_file(tmp_path / "family.yaml")


def test_an_earlier_run_as_warm_start(tmp_path: Path) -> None:
    assert parse(search={"warm_start": [str(tmp_path)]}).search.warm_start == (str(tmp_path),)
    assert parse(search={"warm_start": []}).search.warm_start == ()


def test_grids() -> None:
    assert grid((0.0, 0.3), 0.1) == (0.0, 0.1, 0.2, 0.3)
    assert grid((0.25, 0.5), 0.1) == (0.25, 0.3, 0.4, 0.5)
    assert grid((1.0, 1.0), 0.05) == (1.0,)
    assert grid((0.33, 0.34), 0.1) == (0.33, 0.34)


@pytest.mark.parametrize(
    ("sparsity", "depth", "layers"), [(0.25, 40, 30), (0.2, 30, 24), (0.21, 30, 23), (0.3, 10, 7), (0.99, 10, 0)]
)
def test_sparsity_is_a_share_of_the_layers(sparsity: float, depth: int, layers: int) -> None:
    assert target_layers(parse(target={"sparsity": sparsity}), depth) == layers


def test_space_by_hand() -> None:
    file = parse(
        operations=["remove", "select", "merge", "concat"],
        merge={"methods": ["ties", "slerp"], "scale": [0.0, 0.2], "density": 0.5},
        concat={"share": [0.4, 0.6]},
        output_scale=[0.95, 1.0],
    )
    found = space_of(file, make_architecture())
    assert (found.depth, found.target, found.kind) == (6, 4, "cut")
    assert found.shares == (0.4, 0.5, 0.6) and found.scales == (0.95, 1.0)
    # 3 whole; ties: 3 sets of variants, 1 density, lambda 0.1 and 0.2; slerp: 3 pairs, 9 shares.
    assert found.menu.count() == 3 + 3 * 2 + 3 * 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"layers": 5}, "operations": ["select"]}, "'remove' is not among the operations; found 5"),
        ({"target": {"layers": 7}}, "at most 6, the base's depth, without the operation 'stack'; found 7"),
        ({"target": {"layers": 13}, "operations": ["select", "stack"]}, "at most 12: each layer stands there twice"),
        ({"target": {"sparsity": 0.9}}, "at least one of 6 layers to stay; found 0.9"),
        ({"target": {"layers": 6}, "operations": ["select", "concat"]}, "no concat where no layer is removed"),
        ({"operations": ["remove", "stack"]}, "no stack for a target of 4 of 6 layers"),
        ({"fusion": {"groups": 2}}, "groups only at full depth, 6 layers; found a target of 4"),
        ({"target": {"layers": 6}, "fusion": {"groups": 7}}, "at most 6, the base's layers; found 7"),
        ({"variants": {}}, "at least one variant to select or merge; found none"),
        ({"merge": {"scale": 0.0}}, "something other than 0"),
        ({"variants": {"math": "a"}, "merge": {"methods": ["model_stock"]}}, "found model_stock, and 1 variants"),
    ],
)
def test_targets_and_operations_that_do_not_meet(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(parse(**changes), make_architecture())
