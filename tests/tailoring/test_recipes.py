"""Every candidate is one valid recipe, and another one than that of any other candidate."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import materialize
from intarsia.data_file import parse_yaml
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.scores import part_scores
from intarsia.recipe import schema
from intarsia.recipe.recipe import Concat, LayerRef, Merge, Mix, Op, Select, Variant, identity
from intarsia.recipe.schema import content_hash, parse_recipe
from intarsia.recipe.validate import check
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, Menu, single
from intarsia.tailoring.engines.evolve import mutate
from intarsia.tailoring.engines.smac import ConfigurationMap
from intarsia.tailoring.family import Family
from intarsia.tailoring.recipes import Translator, load_scores, measure_scores, save_scores
from intarsia.tailoring.space import Space
from tests.pruning.conftest import corpus_of
from tests.tailoring.conftest import MEMBERS, make_translator


def ref(variant: str, layer: int) -> LayerRef:
    return LayerRef(variant=variant, layer=layer)


def op_of(choice: Choice, **changes: object) -> Op:
    """What layer 1 becomes, with layers 0 and 2 removed."""
    found = make_translator(**changes)
    return found.recipe(found.space.arrange((0, 2), {(1, 0): choice})).layers[0]


def blend(*members: str, method: str | None = None, **values: float) -> Blend:
    pairs = tuple(("lambda" if name == "lam" else name, value) for name, value in values.items())
    return Blend(members=members, method=method, values=pairs)  # type: ignore[arg-type]


BASE = ref("base", 1)


@pytest.mark.parametrize(
    ("choice", "op"),
    [
        (single("code"), Select(source=ref("code", 1))),
        (
            Keep(attention=blend("math"), scale=0.9),
            Merge(sources=(ref("math", 1),), weights=(1.0,), scale=0.9),
        ),
        (
            Keep(attention=blend("base", "code", method="linear", lead=0.3)),
            Merge(sources=(BASE, ref("code", 1)), weights=(0.3, 0.7)),
        ),
        (
            Keep(attention=blend(*MEMBERS, method="linear", lead=0.5)),
            Merge(sources=(BASE, ref("math", 1), ref("code", 1)), weights=(0.5, 0.25, 0.25)),
        ),
        (
            Keep(attention=blend("math", "code", method="task_arithmetic", lam=0.5)),
            Merge(sources=(ref("math", 1), ref("code", 1)), weights=(0.5, 0.5), method="task_arithmetic", base=BASE),
        ),
        (
            Keep(attention=blend("math", "code", method="ties", density=0.2, lam=0.5)),
            Merge(
                sources=(ref("math", 1), ref("code", 1)),
                weights=(1.0, 1.0),
                method="ties",
                params={"density": 0.2, "lambda": 0.5},
                base=BASE,
            ),
        ),
        (
            Keep(attention=blend("code", method="dare_linear", density=0.6, lam=0.5)),
            Merge(
                sources=(ref("code", 1),),
                weights=(0.5,),
                method="dare_linear",
                params={"density": 0.6, "seed": 5},
                base=BASE,
            ),
        ),
        (
            Keep(attention=blend("code", method="breadcrumbs", density=0.2, lam=0.5)),
            Merge(
                sources=(ref("code", 1),),
                weights=(0.5,),
                method="breadcrumbs",
                params={"bottom": 0.79, "top": 0.01},
                base=BASE,
            ),
        ),
    ],
)
def test_ops_by_hand(choice: Choice, op: Op) -> None:
    assert op_of(choice) == op


def test_halves_of_different_members() -> None:
    keep = Keep(attention=blend("math"), mlp=blend("math", "code", method="task_arithmetic", lam=0.5))
    assert op_of(keep, separate=True) == Merge(
        sources=(ref("math", 1), ref("code", 1)),
        weights=(1.0, 0.0),
        base=BASE,
        mlp=Mix(weights=(0.5, 0.5), method="task_arithmetic"),
    )


def test_a_join_takes_the_most_sensitive_pieces() -> None:
    found = make_translator()
    join = Join(first="math", second="base", share=0.8)
    op = found.recipe(found.space.arrange((0, 2), {(1, 0): join})).layers[0]
    assert isinstance(op, Concat) and op.norm == "fold"
    first, second = op.cuts
    assert (first.source, second.source) == (ref("math", 1), ref("base", 2))
    # 0.8 of 3 groups is 2 with the remainder to the larger share; of 20 channels 16.
    assert (len(first.kv_groups), len(second.kv_groups)) == (3, 0)
    assert (len(first.channels), len(second.channels)) == (16, 4)
    for cut, count in ((first, 16), (second, 4)):
        scores = found.scores[cut.source]["mlp"].tolist()
        assert set(cut.channels) == set(sorted(range(20), key=lambda channel: -scores[channel])[:count])
    assert first.weights == {"attention": 1.0, "mlp": 0.8}


@pytest.mark.parametrize("members", [("base", "base"), ("base", "math")])
def test_a_half_layer_drop_is_the_model_without_those_parts(
    members: tuple[str, str], pair: Callable[[str], Family], tmp_path: Path
) -> None:
    """The attention of layer 1 with the MLP of 3, which may be another member's: to the bit."""
    family = pair("llama")
    menu = Menu(members=("base", "math"), select=True, methods=(), grids={})
    space = Space(depth=6, target=4, menu=menu, half_layers=True)
    found = Translator(space=space, architecture=family.architecture, variants=family.variants(), scores={})
    half = Join(first=members[0], second=members[1])
    recipe = found.recipe(space.arrange((2, 3), {(1, 0): half}))
    assert recipe.spans == ((0, 1), (1, 4), (4, 5), (5, 6))
    materialize(recipe, family.checkpoints(), tmp_path / "out")
    without, other = (AutoModelForCausalLM.from_pretrained(member.model) for member in family.members)
    layers = without.model.layers
    if members[1] == "math":
        layers[3].load_state_dict(other.model.layers[3].state_dict())
    with torch.no_grad():
        for silent in (layers[1].mlp.down_proj, layers[2].self_attn.o_proj, layers[2].mlp.down_proj):
            silent.weight.zero_()
        layers[3].self_attn.o_proj.weight.zero_()
        ids = torch.arange(2, 26).reshape(2, 12)
        built = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert built.dtype == torch.float32
        assert torch.equal(built(input_ids=ids).logits, without(input_ids=ids).logits)


def test_recipes_are_valid_and_each_is_of_one_candidate(translator: Translator) -> None:
    space = translator.space
    rng = random.Random(0)
    architectures = dict.fromkeys(MEMBERS, translator.architecture)
    seen: dict[str, Candidate] = {}
    for _ in range(60):
        candidate = space.random(rng)
        recipe = translator.recipe(candidate)
        check(recipe, {variant.name: architectures[variant.name] for variant in recipe.variants})
        assert len(recipe.layers) == space.target
        assert seen.setdefault(content_hash(recipe), candidate) == candidate
        text, tensors = schema.to_yaml_text(recipe)
        back = parse_recipe(parse_yaml(text), tensors, where="recipe")
        assert back == recipe and content_hash(back) == content_hash(recipe)


def test_what_is_a_step_away_is_another_model(translator: Translator) -> None:
    rng = random.Random(3)
    candidate = translator.space.random(rng)
    others = {mutate(translator.space, candidate, rng) for _ in range(200)}
    hashes = {content_hash(translator.recipe(other)) for other in others}
    assert len(hashes) == len(others) > 30
    assert content_hash(translator.recipe(candidate)) not in hashes


def test_configurations(translator: Translator) -> None:
    pytest.importorskip("ConfigSpace")
    words = ConfigurationMap(space=translator.space)
    configurations = words.configuration_space(seed=1)
    for configuration in configurations.sample_configuration(40):
        candidate = words.candidate(configuration)
        assert translator.space.has(candidate)
        assert words.candidate(dict(configuration)) == candidate
        assert words.candidate(words.configuration(candidate, configurations)) == candidate
    rng = random.Random(2)
    for _ in range(40):
        candidate = translator.space.random(rng)
        configuration = words.configuration(candidate, configurations)
        configuration.check_valid_configuration()
        assert words.candidate(configuration) == candidate


def test_only_what_means_something_is_active() -> None:
    pytest.importorskip("ConfigSpace")
    found = make_translator()
    words = ConfigurationMap(space=found.space)
    keep = Keep(attention=blend("math", "code", method="ties", density=0.2, lam=0.5))
    candidate = found.space.arrange((0, 2), {(1, 0): keep})
    active = dict(words.configuration(candidate, words.configuration_space()))
    assert {name: value for name, value in active.items() if name.startswith("001")} == {
        "001.layer": "kept",
        "001.op": "merge",
        "001.method": "ties",
        "001.with.math": "yes",
        "001.with.code": "yes",
        "001.density": 0.2,
        "001.lambda": 0.5,
        "001.scale": 1.0,
    }
    assert [name for name in active if name.startswith("000")] == ["000.layer"]


def test_flags_that_remove_too_much_or_too_little_are_corrected_the_same_way() -> None:
    words = ConfigurationMap(space=make_translator().space)
    for flagged in ((), (3,), (0, 1, 2, 4), (0, 1, 2, 3, 4, 5)):
        values = {f"{layer:03d}.layer": "removed" if layer in flagged else "kept" for layer in range(6)}
        removed = set(words.space.changed(words.candidate(values).positions))
        assert len(removed) == 2
        assert removed <= set(flagged) if len(flagged) > 2 else removed >= set(flagged)
        assert words.candidate(values) == words.candidate(values)


CPU = torch.device("cpu")


def test_what_is_measured_is_what_a_plan_measures(pair: Callable[[str], Family], tmp_path: Path) -> None:
    members, corpus = pair("qwen2").checkpoints(), corpus_of(padded=True)
    found = measure_scores(members, corpus, device=CPU, dtype=None)
    assert {str(ref) for ref in found} == {f"{name}:{layer}" for name in ("base", "math") for layer in range(6)}
    whole = identity(Variant(name="base", model="x"), 6)
    model = Intermediate(LoadedModel(members["base"], device=CPU), corpus, whole.layers)
    model.measure()
    expected = part_scores(model.measures[2].channels["mlp"], model.modules[2], model.architecture, "mlp")
    torch.testing.assert_close(found[LayerRef(variant="base", layer=2)]["mlp"], expected, rtol=1e-5, atol=0.0)
    path = tmp_path / "scores.safetensors"
    save_scores(found, path)
    loaded = load_scores(path)
    assert found.keys() == loaded.keys()
    assert all(torch.equal(found[ref][part], loaded[ref][part]) for ref in found for part in found[ref])
