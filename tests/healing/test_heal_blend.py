"""Healing what was made of several models: towards the same blend with no layer removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import intarsia
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.build import open_variants
from intarsia.commands.heal import BLEND, over_its_blend
from intarsia.commands.job import load_tokenizer
from intarsia.data.text import draw
from intarsia.errors import UserError
from intarsia.healing import closed_form, end_to_end
from intarsia.healing.stages.closed_form import FinalFitSettings
from intarsia.options import TextSpec
from intarsia.recipe import schema
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import Concat, LayerRef, Merge, Op, Recipe, Select, Variant, derive_spans
from tests import families
from tests.closed_form_fits import fit_on
from tests.healing.conftest import heal
from tests.recipes_by_hand import shared

ALL = ("closed-form", "layerwise", "end-to-end")


@pytest.fixture(scope="session")
def members(learned: tuple[Path, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A model that has learnt a little, a full variant of it, and an adapter for it."""
    peft = pytest.importorskip("peft")
    base, folder = learned[0], tmp_path_factory.mktemp("members")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.add_(0.01 * torch.randn(parameter.shape))
    families.save(model, folder / "math")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    wrapped.save_pretrained(str(folder / "lora"))
    return {"base": base, "math": folder / "math", "lora": folder / "lora"}


def ref(layer: int, variant: str = "base") -> LayerRef:
    return LayerRef(variant=variant, layer=layer)


def select(layer: int, variant: str = "base") -> Select:
    return Select(source=ref(layer, variant))


def average(layer: int, scale: float = 1.0) -> Merge:
    return Merge(sources=(ref(layer, "math"), ref(layer, "lora")), weights=(0.5, 0.5), method="linear", scale=scale)


def recipe_of(members: Mapping[str, Path], *layers: Op, names: tuple[str, ...] = ("base", "math", "lora")) -> Recipe:
    variants = tuple(Variant(name=name, model=str(members[name])) for name in names)
    return Recipe(variants=variants, base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))


def joined(members: Mapping[str, Path]) -> Concat:
    """Pieces of layer 2 of one member and of layer 3 of another."""
    made = shared(Checkpoint.open(members["base"], model="base").architecture, (2, 3), seed=3)
    cuts = tuple(
        replace(cut, source=ref(cut.source.layer, "math" if cut.source.layer == 3 else "base")) for cut in made.cuts
    )
    return replace(made, cuts=cuts)


def saved(recipe: Recipe, folder: Path) -> Path:
    schema.save(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def test_all_stages(members: Mapping[str, Path], text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    made = recipe_of(members, average(0), select(1, "lora"), joined(members), average(4, 0.9))
    text = [f"{text_file}#0.9:1"]
    found = heal(
        saved(made, tmp_path),
        tmp_path / "out",
        stages=ALL,
        data=str(text_file),
        eval_text=text,
        tokens=4096,
    )
    perplexities = [row["held_out_perplexity"] for row in found.stages]
    assert [row["stage"] for row in found.stages] == ["pruned", *ALL]
    assert perplexities == sorted(perplexities, reverse=True) and perplexities[0] > perplexities[-1]
    assert found.teacher == BLEND
    # The result is a recipe over its own members; the blend is deleted.
    kept = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml")
    assert (kept.variants[0].name, kept.layers, kept.spans, kept.base) == ("base", made.layers, made.spans, "base")
    assert [variant.name for variant in kept.variants] == ["base", "math", "lora"] and kept.fitted
    assert not (tmp_path / "out.heal" / "unpruned").exists()
    built = intarsia.build(tmp_path / "out" / "recipe" / "recipe.yaml", tmp_path / "again")
    assert built.recipe_sha256 == found.recipe_sha256
    alone = intarsia.evaluate_perplexity(str(tmp_path / "out"), text[0], seq_len=32, windows=4)
    assert found.stages[-1][f"perplexity of {text_file.name}#0.9:1"] == pytest.approx(alone.value, rel=1e-5)
    # Finished already: the same again.
    again = heal(
        saved(made, tmp_path),
        tmp_path / "out",
        stages=ALL,
        data=str(text_file),
        eval_text=text,
        overwrite=True,
        tokens=4096,
    )
    assert again.recipe_sha256 == found.recipe_sha256


def test_the_closed_form_is_the_one_towards_the_blend(
    members: Mapping[str, Path], text_file: Path, tmp_path: Path
) -> None:
    made = recipe_of(members, select(0, "math"), average(1), select(3, "lora"), select(5))
    heal(saved(made, tmp_path), tmp_path / "out", data=str(text_file), tokens=4096, seq_len=32)
    found = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").fitted
    variants = open_variants(made)
    others = {name: checkpoint for name, checkpoint in variants.items() if name != "base"}
    resident = LoadedModel(variants["base"], device=torch.device("cpu"), others=others)
    corpus = draw(
        TextSpec(sources=(str(text_file),), tokens=4096, seq_len=32), load_tokenizer(variants["base"])
    ).calibration
    train = corpus.split(15 / 16)[0]
    # A merged layer that stands for itself is the teacher's own: it is fitted as others after the cut are.
    teacher = [resident.module(op) for op in reference_layers(made)]
    simple, checkpoints = over_its_blend(made, variants, tmp_path / "blend")
    assert [op.sources[0].variant for op in simple.layers] == ["unpruned"] * 4
    expected = fit_on(
        replace(made, layers=simple.layers),
        _named(resident, "unpruned", teacher),
        train,
        settings=FinalFitSettings(),
        layers=teacher,
    )[0].fitted
    assert found.keys() == expected.keys() and found
    for index, tensors in expected.items():
        assert found[index].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(found[index][name], tensor, rtol=1e-4, atol=1e-5)
    assert checkpoints["unpruned"].architecture.n_layers == 6


def _named(resident: LoadedModel, name: str, layers: list[torch.nn.Module]) -> LoadedModel:
    """The same, whose own layers are others."""
    resident.layers = layers
    return resident


def test_a_cut_of_one_member_is_healed_as_a_cut_of_that_model(
    members: Mapping[str, Path], text_file: Path, tmp_path: Path
) -> None:
    kept = (0, 1, 4, 5)
    made = recipe_of(members, *(select(layer, "math") for layer in kept), names=("base", "math"))
    alone = recipe_of({"base": members["math"]}, *(select(layer) for layer in kept), names=("base",))
    for name, recipe in (("family", made), ("alone", alone)):
        (tmp_path / name).mkdir()
        heal(saved(recipe, tmp_path / name), tmp_path / name / "out", data=str(text_file), tokens=4096, seq_len=32)
    first, second = (
        schema.load(tmp_path / name / "out" / "recipe" / "recipe.yaml").fitted for name in ("family", "alone")
    )
    assert first.keys() == second.keys() and first
    for index, tensors in second.items():
        for name, tensor in tensors.items():
            assert np.array_equal(first[index][name], tensor)


def test_with_nothing_removed_there_is_nothing_to_heal(
    members: Mapping[str, Path], text_file: Path, tmp_path: Path
) -> None:
    made = recipe_of(members, *(average(layer) if layer % 2 else select(layer, "lora") for layer in range(6)))
    found = heal(saved(made, tmp_path), tmp_path / "out", data=str(text_file), tokens=2048, seq_len=32)
    assert [row["error_before"] for row in found.layers] == [0.0] * 6
    assert not schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").fitted


def test_what_cannot_be_a_layer_of_the_blend_stays(members: Mapping[str, Path], tmp_path: Path) -> None:
    """Joins, scaled merges and layers out of their place are made from the members as before."""
    made = recipe_of(members, average(0), joined(members), average(4, 0.9), select(5, "math"))
    variants = open_variants(made)
    found, checkpoints = over_its_blend(made, variants, tmp_path)
    assert [op.sources[0].variant for op in found.layers] == ["unpruned", "base", "math", "unpruned"]
    assert found.layers[1:3] == made.layers[1:3] and found.spans == made.spans
    assert set(checkpoints) == {"unpruned", "base", "math", "lora"}


def test_a_recipe_is_checked_before_weights_are_hashed(
    members: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intarsia.checkpoint.hashing.scan", lambda checkpoint: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="expected a layer from 0 to 5; found math:6"):
        open_variants(recipe_of(members, select(0), select(6, "math")))


def test_a_folder_of_something_else_is_left_alone(members: Mapping[str, Path], text_file: Path, tmp_path: Path) -> None:
    made = saved(recipe_of(members, select(0, "math"), select(2, "lora"), select(5)), tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("", encoding="utf-8")
    (tmp_path / "unpruned" / "unpruned").mkdir(parents=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for run in (tmp_path / "mine", tmp_path / "unpruned", tmp_path / "file"):
        with pytest.raises(UserError, match="not a run folder"):
            heal(made, tmp_path / "out", data=str(text_file), tokens=2048, seq_len=32, run=run)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert [path.name for path in (tmp_path / "unpruned").iterdir()] == ["unpruned"]
    # Other work of ours, with other settings: nothing of it is touched either.
    given: dict[str, Any] = {"data": str(text_file), "seq_len": 32, "run": tmp_path / "run"}
    heal(made, tmp_path / "out", tokens=2048, **given)
    (tmp_path / "run" / "unpruned").mkdir()
    with pytest.raises(UserError, match="tokens"):
        heal(made, tmp_path / "out", tokens=4096, overwrite=True, **given)
    assert (tmp_path / "run" / "unpruned").exists() and not any((tmp_path / "run" / "unpruned").iterdir())


def test_a_mistake_leaves_nothing(members: Mapping[str, Path], text_file: Path, tmp_path: Path) -> None:
    made = saved(recipe_of(members, select(0, "math"), select(2, "lora"), select(5)), tmp_path)
    with pytest.raises(UserError):
        heal(made, tmp_path / "out", data=str(tmp_path / "nothing.txt"), tokens=2048, seq_len=32)
    assert not (tmp_path / "out.heal").exists()


def killed(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_members_that_change_are_noticed(
    members: Mapping[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blend stands in the run folder already when the run is resumed: it would be that of the old members."""
    shutil.copytree(members["math"], tmp_path / "math")
    here = {**members, "math": tmp_path / "math"}
    made = saved(recipe_of(here, select(0, "math"), select(2, "lora"), select(5)), tmp_path)
    given: dict[str, Any] = {"data": str(text_file), "tokens": 2048, "seq_len": 32}
    with monkeypatch.context() as stopped:
        stopped.setattr(closed_form, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            heal(made, tmp_path / "out", **given)
    assert (tmp_path / "out.heal" / "unpruned" / "config.json").exists()
    shutil.copy(members["base"] / "model.safetensors", tmp_path / "math" / "model.safetensors")
    with pytest.raises(UserError, match=r"members\.math"):
        heal(made, tmp_path / "out", **given)
    shutil.copy(members["math"] / "model.safetensors", tmp_path / "math" / "model.safetensors")
    found = heal(made, tmp_path / "out", **given)
    undisturbed = heal(made, tmp_path / "other", **given)
    assert found.recipe_sha256 == undisturbed.recipe_sha256


def test_killed_while_the_blend_is_deleted(
    members: Mapping[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(recipe_of(members, select(0, "math"), select(2, "lora"), select(5)), tmp_path)
    given: dict[str, Any] = {"data": str(text_file), "tokens": 2048, "seq_len": 32}

    def half(path: Path, **kwargs: Any) -> None:
        if "unpruned" in Path(path).name and (Path(path) / "config.json").exists():
            (Path(path) / "config.json").unlink()
            raise KeyboardInterrupt
        remove(path, **kwargs)

    remove = shutil.rmtree
    with monkeypatch.context() as stopped:
        stopped.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            heal(made, tmp_path / "out", **given)
    first = schema.content_hash(schema.load(tmp_path / "out" / "recipe" / "recipe.yaml"))
    assert heal(made, tmp_path / "out", overwrite=True, **given).recipe_sha256 == first
    assert not [path for path in (tmp_path / "out.heal").iterdir() if "unpruned" in path.name]


def test_text_that_the_blend_writes(members: Mapping[str, Path], tmp_path: Path) -> None:
    """`--data self` is the blend's own text: kept as another model's than the base's."""
    made = recipe_of(members, average(0), average(1), average(5))
    given: dict[str, Any] = {"data": "self", "tokens": 512, "seq_len": 16}
    heal(saved(made, tmp_path), tmp_path / "out", **given)
    base = recipe_of(members, select(0), select(1), select(5), names=("base",))
    (tmp_path / "base").mkdir()
    heal(saved(base, tmp_path / "base"), tmp_path / "base" / "out", **given)
    texts = [
        json.loads((folder / "text.json").read_text(encoding="utf-8"))["train"]["sha256"]
        for folder in (tmp_path / "out.heal", tmp_path / "base" / "out.heal")
    ]
    assert texts[0] != texts[1]


def test_the_student_of_several_models_is_one_model(
    members: Mapping[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that end-to-end training asks for does not grow with the family."""
    pytest.importorskip("accelerate")
    asked: list[int] = []
    monkeypatch.setattr(end_to_end, "require_room", lambda folder, nbytes, *rest, **options: asked.append(nbytes))
    for name, names in (("one", ("base",)), ("three", ("base", "math", "lora"))):
        (tmp_path / name).mkdir()
        layers = [select(0, names[-1]), select(1, names[-2] if len(names) > 1 else "base"), select(5)]
        made = saved(recipe_of(members, *layers, names=names), tmp_path / name)
        heal(made, tmp_path / name / "out", stages=("end-to-end",), data=str(text_file), tokens=4096)
    assert asked[0] == asked[1] == 22 * Checkpoint.open(members["base"], model="base").parameters
