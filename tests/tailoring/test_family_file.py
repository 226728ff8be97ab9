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
    TargetSpec,
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
        base=MemberSpec(model="demo"),
        variants={"math": MemberSpec(model="a/b"), "code": MemberSpec(model="c/d", revision="v1")},
        target=TargetSpec(layers=4),
        objectives=(ObjectiveSpec(name="prose", loss="news.txt"),),
    )
    assert parse().engine.name == "evolve" and list(parse().members) == ["base", "math", "code"]


def test_the_demo_family() -> None:
    found = read_family_file(RECIPES / "tailor-demo.yaml")
    assert found.target.layers == 23
    defaults = parse()
    assert found.operations == defaults.operations and found.methods == defaults.methods
    assert found.heal == "none"
    assert found.objectives[0] == ObjectiveSpec(
        name="science", task="../shared/data/tasks/arc_easy.jsonl", split=(0.0, 0.33)
    )
    assert found.search == SearchSpec(
        trials=60,
        min_budget=27,
        max_budget=81,
        warm_start=("random-middle", "sleb"),
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
        (
            {"operations": ["remove", "glue"]},
            [r"operations\[1\]: expected one of .*half-layers, stack.*found 'glue'"],
        ),
        ({"merge": {"methods": ["regmean"]}}, [r"merge.methods\[0\]: expected one of breadcrumbs, .*found 'regmean'"]),
        ({"merge": {"methods": ["ties", "ties"]}}, ["each once; found ties a second time"]),
        ({"merge": {"scale": [1.5, 0.0]}}, [r"merge.scale: expected \[lowest, highest\].*found \[1.5, 0.0\]"]),
        ({"merge": {"parts": "both"}}, ["merge.parts: expected one of 'together' or 'separate'"]),
        ({"operations": ["remove"], "merge": {}}, ["merge: expected 'merge' among the operations"]),
        ({"output_scale": [1.1, 1.2]}, ["output_scale: expected a range that contains 1"]),
        ({"target": {}}, ["target: expected either layers or sparsity; found neither"]),
        ({"target": {"layers": 3, "sparsity": 0.2}}, ["found both"]),
        ({"target": {"sparsity": 1.0}}, ["target.sparsity: expected .*less than 1; found 1.0"]),
        ({"variants": {"base": "x"}}, [r"variants.base: expected a name .*not 'base'"]),
        ({"variants": {"a:b": "x", 8: "y"}}, ["variants.a:b", "variants.*found 8"]),
        ({"objectives": []}, ["objectives: expected at least 1 entries; found 0"]),
        ({"objectives": [{"name": "a"}]}, [r"objectives\[0\]: expected exactly one of task, loss and kl; found none"]),
        ({"objectives": [{"name": "a", "task": "x", "loss": "y"}]}, ["found task, loss"]),
        ({"objectives": [{"name": "a", "loss": "y", "metric": "accuracy"}]}, ["a metric only for a task"]),
        (
            {"objectives": [{"name": "a", "task": "y", "metric": "luck"}]},
            ["metric: expected one of 'accuracy', 'margin'"],
        ),
        ({"objectives": [{"name": "a", "kl": "y"}, {"name": "a", "kl": "z"}]}, ["a unique name; found 'a'"]),
        ({"objectives": [{"name": "a", "kl": "y", "split": "0.5:0.2"}]}, ["a part of the file such as 0:0.33"]),
        ({"search": {"engine": "both"}}, ["search.engine: expected one of evolve, random, smac; found 'both'"]),
        ({"search": {"min_budget": 300}}, ["search.min_budget: expected at most max_budget; found 300 and 256"]),
        ({"search": {"trials": 0, "eta": 1}}, ["search.trials", "search.eta"]),
        ({"search": {"warm_start": ["best"]}}, [r"warm_start\[0\]: expected random-middle, angular.*found 'best'"]),
        (
            {"search": {"budget": 3}, "heal": "yes"},
            ["search.budget: expected one of engine, trials", "heal: expected one of 'none', 'finalists'"],
        ),
        ({"colour": "red", "base": 3}, ["colour: expected one of base, variants", "base: expected a mapping"]),
    ],
)
def test_mistakes(changes: dict[str, Any], messages: list[str]) -> None:
    for message in messages:
        with pytest.raises(UserError, match=message):
            parse(**changes)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_family({"variants": [], "operations": "remove", "search": 3, "target": 4}, where="f.yaml")
    places = {problem.message.partition(": expected ")[0] for problem in caught.value.problems}
    assert places >= {"f.yaml: base", "f.yaml: target", "f.yaml: variants", "f.yaml: operations", "f.yaml: search"}
    assert "Correct the file." in str(caught.value)


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


def test_sparsity_is_a_share_of_the_parameters() -> None:
    """The greatest depth that removes at least that share; embeddings count, and are not pruned."""
    architecture = make_architecture()
    layer, embeddings = architecture.layer_parameters, 2 * 50 * 48
    whole = 6 * layer + embeddings
    for removed in range(1, 6):
        share = removed * layer / whole
        assert target_layers(parse(target={"sparsity": share}), architecture) == 6 - removed
        assert target_layers(parse(target={"sparsity": share + 0.001}), architecture) == 5 - removed
        # With the embeddings counted in, the same number of layers are a smaller share.
        assert target_layers(parse(target={"sparsity": share}), architecture, 2 * whole) <= 5 - removed


def test_an_engine_with_options() -> None:
    chosen = parse(search={"engine": "evolve[parents=3]"}).engine
    assert (chosen.name, chosen.settings.parents, chosen.settings.initial) == ("evolve", 3, 8)
    with pytest.raises(UserError, match="there is no option forks"):
        parse(search={"engine": "evolve[forks=3]"})


def test_absolute_paths_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder keeps the file so that it says the same wherever it is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "news.txt").write_text("x")
    (tmp_path / "math").mkdir()
    changes = {"variants": {"math": "math"}, "merge": {"scale": [0.0, 1.0]}}
    objective = {"name": "prose", "loss": "news.txt", "split": "0:0.5"}
    found = parse(**changes, objectives=[objective]).absolute()
    assert found.variants["math"].model == str(tmp_path / "math")
    assert (found.objectives[0].source, found.objectives[0].split) == (str(tmp_path / "news.txt"), (0.0, 0.5))
    (tmp_path / "family.yaml").write_text(found.to_yaml(), encoding="utf-8")
    assert read_family_file(tmp_path / "family.yaml") == found


def test_space_by_hand() -> None:
    file = parse(
        operations=["remove", "select", "merge", "concat"],
        merge={"methods": ["ties", "slerp"], "scale": [0.0, 0.2], "density": 0.5},
        concat={"share": [0.4, 0.6]},
        output_scale=[0.95, 1.0],
    )
    found = space_of(file, make_architecture())
    assert (found.depth, found.target, found.kind) == (6, 4, "prune")
    assert found.shares == (0.4, 0.5, 0.6) and found.scales == (0.95, 1.0)
    # 3 whole; ties: 3 sets of variants, 1 density, lambda 0.1 and 0.2; slerp: 3 pairs, 9 shares.
    assert found.menu.count() == 3 + 3 * 2 + 3 * 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": {"layers": 5}, "operations": ["select"]},
            "layers is 5; the base has 6 layers, and 'remove' is not among",
        ),
        ({"target": {"layers": 7}}, "layers is 7; the base has 6 layers, and 'stack' is not among"),
        (
            {"target": {"layers": 13}, "operations": ["select", "stack"]},
            "layers is 13; a layer occurs twice at most, so 12",
        ),
        ({"target": {"sparsity": 0.9}}, "sparsity is 0.9; at least one of 6 layers must stay"),
        (
            {"target": {"layers": 6}, "operations": ["select", "concat"]},
            "'concat' is among the operations, and no layer is removed",
        ),
        (
            {"target": {"layers": 6}, "operations": ["select", "half-layers"]},
            "'half-layers' is among the operations, and no layer is removed",
        ),
        ({"operations": ["remove", "stack"]}, "'stack' is among the operations, and the target is 4 of 6 layers"),
        ({"fusion": {"groups": 2}}, "groups is 2, and the target is 4 of 6 layers"),
        ({"target": {"layers": 6}, "fusion": {"groups": 7}}, "groups is 7; the base has 6 layers"),
        ({"variants": {}}, "no variants to select or merge"),
        ({"merge": {"scale": 0.0}}, "merge.scale is 0, which adds nothing"),
        (
            {"variants": {"math": "a"}, "merge": {"methods": ["model_stock"]}},
            r"no method of merge.methods \(model_stock\) takes 1 variants",
        ),
    ],
)
def test_targets_and_operations_that_do_not_meet(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(parse(**changes), make_architecture())
