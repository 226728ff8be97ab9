"""Layers trained one by one, on the original's hidden states or on those of the trained layers before them."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing import layerwise, training
from intarsia.healing.losses import hidden_mse
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import Text
from intarsia.recipe.recipe import Recipe
from tests import families
from tests.conftest import InMemory
from tests.healing.conftest import Cut, Tokens
from tests.recipes_by_hand import recipe_of, select

QUICK = LayerwiseSettings(batch_tokens=64, evaluations=3, lr=1e-2, inputs="teacher")


def same(first: Recipe, second: Recipe) -> bool:
    assert first.fitted.keys() == second.fitted.keys()
    pairs = [(first.fitted[index], second.fitted[index]) for index in first.fitted]
    assert all(one.keys() == other.keys() for one, other in pairs)
    return all(np.array_equal(one[name], other[name]) for one, other in pairs for name in one)


def timeless(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in report]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_every_family_learns(family: str, padded: bool, cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut(family)
    resident = resident_of(family)
    before = {name: tensor.clone() for name, tensor in resident.model.state_dict().items()}
    healed, report = layerwise.train(recipe, resident, Text.of(*tokens(padded=padded)), settings=QUICK)
    assert [row["layer"] for row in report] == [2, 3]
    assert sorted(healed.fitted) == [2, 3]
    for row in report:
        assert row["loss_after"] < 0.92 * row["loss_before"]
        assert set(healed.fitted[row["layer"]]) == set(resident.architecture.layer_shapes())
    assert all(torch.equal(before[name], tensor) for name, tensor in resident.model.state_dict().items())


def test_the_loss_is_of_the_original_states(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    resident = resident_of("llama")
    train, held_out = tokens()
    _, report = layerwise.train(recipe, resident, Text.of(train, held_out), settings=QUICK)
    with torch.no_grad():
        out = resident.model(held_out.input_ids, output_hidden_states=True).hidden_states
        handle: list[torch.Tensor] = []
        # Layer 5's own output: transformers shows it after the final norm only.
        hook = resident.layers[5].register_forward_hook(lambda _, args, output: handle.append(output))
        resident.model(held_out.input_ids)
        hook.remove()
        gap = resident.layers[4]
        given, wanted = out[4], handle[0] if torch.is_tensor(handle[0]) else handle[0][0]
        position = torch.arange(given.shape[1])[None]
        rotary = resident.model.model.rotary_emb(given, position)
        found = gap(given, position_embeddings=rotary, attention_mask=None)
        found = found if torch.is_tensor(found) else found[0]
    relative = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert report[1]["loss_before"] == pytest.approx(float(relative.mean()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "killed_after", [5, *(pytest.param(step, marks=pytest.mark.exhaustive) for step in (1, 3, 7, 11))]
)
def test_killed_and_continued_is_as_undisturbed(
    killed_after: int,
    dtype: torch.dtype,
    cut: Cut,
    tokens: Tokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, recipe = cut("llama")
    resident = LoadedModel(checkpoint, device=torch.device("cpu"), dtype=dtype)
    settings = replace(QUICK, epochs=2, evaluations=4, weight_decay=0.1)
    wanted, report = layerwise.train(recipe, resident, Text.of(*tokens()), settings=settings)
    steps = []
    step = layerwise.LayerTraining._step

    def dies(self: Any, number: int) -> float:
        steps.append(number)
        if len(steps) == killed_after:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(layerwise.LayerTraining, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        layerwise.train(recipe, resident, Text.of(*tokens()), settings=settings, folder=tmp_path / "run")
    monkeypatch.setattr(layerwise.LayerTraining, "_step", step)
    found, resumed = layerwise.train(recipe, resident, Text.of(*tokens()), settings=settings, folder=tmp_path / "run")
    assert same(found, wanted)
    assert timeless(resumed) == timeless(report)
    again, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=settings, folder=tmp_path / "run")
    assert same(again, wanted)


def test_a_layer_fitted_to_its_own_output_does_not_change(resident_of: InMemory, tokens: Tokens) -> None:
    resident = resident_of("mistral")
    # Layer 5 is removed, and layer 4 must stand for itself alone: there is nothing to learn.
    recipe = replace(
        recipe_of("model", [select(layer) for layer in range(6)]), spans=tuple((i, i + 1) for i in range(6))
    )
    healed, report = layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK)
    assert (healed.fitted, report) == ({}, [])
    # The same as a training: a "merge" of one layer alone.
    joined = replace(recipe, layers=(*recipe.layers[:3], as_concat(resident, 3), *recipe.layers[4:]))
    healed, report = layerwise.train(joined, resident, Text.of(*tokens()), settings=QUICK)
    assert report[0]["loss_before"] < 1e-10
    assert report[0]["loss_after"] == report[0]["loss_before"]
    assert healed.fitted == {}


def as_concat(resident: LoadedModel, layer: int) -> Any:
    from intarsia.recipe.recipe import Concat, Cut
    from tests.recipes_by_hand import ref

    whole = Cut(
        source=ref(layer),
        kv_groups=tuple(range(resident.architecture.n_kv_heads)),
        channels=tuple(range(resident.architecture.n_channels)),
        weights={"attention": 1.0, "mlp": 1.0},
    )
    return Concat(cuts=(whole,), norm="fold")


def test_a_worse_heal_returns_the_input(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    given = {3: {"mlp.down_proj.weight": np.zeros((families.WIDTH, families.CHANNELS), dtype=np.float32)}}
    recipe = replace(recipe, fitted=given)
    healed, report = layerwise.train(
        recipe, resident_of("llama"), Text.of(*tokens()), settings=replace(QUICK, lr=30.0, clip=1e9, warmup=0.0)
    )
    assert all(row["stopped"] is not None and row["loss_after"] == row["loss_before"] for row in report)
    assert all("step" in row["stopped"] for row in report)
    assert same(healed, recipe)


def test_only_what_is_named_is_trained(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    settings = replace(QUICK, only=("down_proj", "input_layernorm.weight"))
    healed, _ = layerwise.train(recipe, resident_of("llama"), Text.of(*tokens()), settings=settings)
    assert set(healed.fitted[2]) == {"mlp.down_proj.weight", "input_layernorm.weight"}
    with pytest.raises(UserError, match=r"'sideways'.*down_proj"):
        layerwise.train(recipe, resident_of("llama"), Text.of(*tokens()), settings=replace(QUICK, only=("sideways",)))


def test_held_out_tokens_are_not_trained_on(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    """Other held-out sequences, the same training: the tensors of the last step are the same."""
    _, recipe = cut("llama")
    train, held_out = tokens()
    settings = replace(QUICK, evaluations=1)
    first, _ = layerwise.train(recipe, resident_of("llama"), Text.of(train, held_out), settings=settings)
    second, _ = layerwise.train(recipe, resident_of("llama"), Text.of(train, tokens(seed=9)[1]), settings=settings)
    assert same(first, second)


def test_damaged_weights_are_named(cut: Cut, tokens: Tokens) -> None:
    checkpoint, recipe = cut("llama")
    broken = replace(recipe, fitted={3: {"mlp.up_proj.weight": np.full((40, 32), np.nan, dtype=np.float32)}})
    resident = LoadedModel(checkpoint, device=torch.device("cpu"))
    with pytest.raises(UserError, match="output layer 3 is nan before the first step"):
        layerwise.train(broken, resident, Text.of(*tokens()), settings=QUICK)
    with torch.no_grad():
        next(resident.layers[2].parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"output of layer \d of the original"):
        layerwise.train(recipe, resident, Text.of(*tokens()), settings=QUICK)


def test_full_disk(
    cut: Cut, resident_of: InMemory, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _, recipe = cut("llama")
    with monkeypatch.context() as patched:
        patched.setattr(training, "save_file", full)
        with pytest.raises(UserError, match="a full disk"):
            layerwise.train(recipe, resident_of("llama"), Text.of(*tokens()), settings=QUICK, folder=tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    healed, _ = layerwise.train(
        recipe, resident_of("llama"), Text.of(*tokens()), settings=QUICK, folder=tmp_path / "run"
    )
    assert sorted(healed.fitted) == [2, 3]


def test_state_that_is_no_state(cut: Cut, resident_of: InMemory, tokens: Tokens, tmp_path: Path) -> None:
    _, recipe = cut("llama")
    (tmp_path / "layer-002.state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="Delete it"):
        layerwise.train(recipe, resident_of("llama"), Text.of(*tokens()), settings=QUICK, folder=tmp_path)


def test_fitted_tensors_are_the_whole_story(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    """The recipe's layer, rebuilt from its tensors, has the loss that was reported."""
    _, recipe = cut("llama")
    healed, report = layerwise.train(recipe, resident_of("llama"), Text.of(*tokens()), settings=QUICK)
    _, again = layerwise.train(healed, resident_of("llama"), Text.of(*tokens()), settings=replace(QUICK, lr=1e-12))
    assert [row["loss_before"] for row in again] == pytest.approx([row["loss_after"] for row in report], rel=1e-5)
    fitted: Mapping[int, Mapping[str, Any]] = healed.fitted
    assert all(tensor.dtype == np.float32 for tensors in fitted.values() for tensor in tensors.values())


FOLLOWING = LayerwiseSettings(
    batch_tokens=64, evaluations=3, lr=1e-2, kl=0.0, mse=1.0, inputs="student", layers="after"
)


def run_to(recipe: Recipe, resident: LoadedModel, corpus: Corpus, depth: int) -> Tensor:
    """Hidden states after a number of output layers."""
    stream = LayerStream(resident.model, resident.architecture)
    entry = stream.enter(corpus.input_ids, None)
    h_BTD = entry.h_BTD
    for index in range(depth):
        op = recipe.layers[index]
        module = resident.module(op, recipe.fitted.get(index))
        h_BTD = stream.run(module, h_BTD, entry.calls[op.sources[0].layer])
    return h_BTD


def original(resident: LoadedModel, corpus: Corpus, depth: int) -> Tensor:
    stream = LayerStream(resident.model, resident.architecture)
    entry = stream.enter(corpus.input_ids, None)
    h_BTD = entry.h_BTD
    for layer in range(depth):
        h_BTD = stream.run(resident.layers[layer], h_BTD, entry.calls[layer])
    return h_BTD


def without(recipe: Recipe, index: int) -> Recipe:
    return replace(recipe, fitted={i: tensors for i, tensors in recipe.fitted.items() if i != index})


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_losses_are_those_after_the_trained_layers(
    family: str, cut: Cut, resident_of: InMemory, tokens: Tokens
) -> None:
    _, recipe = cut(family)
    resident = resident_of(family)
    train, held_out = tokens()
    healed, report = layerwise.train(recipe, resident, Text.of(train, held_out), settings=FOLLOWING)
    assert [row["layer"] for row in report] == [2, 3]
    with torch.inference_mode():
        for row, stop in zip(report, (4, 6), strict=True):
            wanted = original(resident, held_out, stop)
            for key, when in (("loss_before", without(healed, row["layer"])), ("loss_after", healed)):
                found = run_to(when, resident, held_out, row["layer"] + 1)
                per_row = [float(hidden_mse(wanted[n : n + 1], found[n : n + 1])) for n in range(len(held_out))]
                assert row[key] == pytest.approx(np.mean(per_row), rel=2e-4)


def test_later_layers_are_trained_too(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    resident = resident_of("llama")
    longer = with_identity_after(recipe)
    _, alone = layerwise.train(longer, resident, Text.of(*tokens()), settings=LayerwiseSettings(batch_tokens=64))
    _, after = layerwise.train(longer, resident, Text.of(*tokens()), settings=FOLLOWING)
    assert [row["layer"] for row in alone] == [2]
    assert [row["layer"] for row in after] == [2, 3, 4]


def with_identity_after(recipe: Recipe) -> Recipe:
    """Layers 0 and 1, pieces of 2 and 3, then 4 and 5 as they are."""
    layers = [select(0), select(1), recipe.layers[2], select(4), select(5)]
    return recipe_of(recipe.variants[0].model, layers)


def test_killed_and_continued_after_trained_layers(
    cut: Cut, resident_of: InMemory, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = cut("qwen2")
    resident = resident_of("qwen2")
    undisturbed, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=FOLLOWING)
    step, steps = layerwise.LayerTraining._step, []

    def dying(self: layerwise.LayerTraining, number: int) -> float:
        steps.append(number)
        if len(steps) == 9:  # in the second layer: each takes six steps
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(layerwise.LayerTraining, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        layerwise.train(recipe, resident, Text.of(*tokens()), settings=FOLLOWING, folder=tmp_path)
    continued, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=FOLLOWING, folder=tmp_path)
    assert len(steps) < 9 + 6  # the first layer was not trained again
    for index in (2, 3):
        for name, array in undisturbed.fitted[index].items():
            assert np.array_equal(array, continued.fitted[index][name])


@pytest.mark.parametrize(("family", "settings"), [("opt", QUICK), ("llama", FOLLOWING)])
def test_spilled_states_are_the_same(
    family: str, settings: LayerwiseSettings, cut: Cut, resident_of: InMemory, tokens: Tokens, tmp_path: Path
) -> None:
    (_, recipe), resident = cut(family), resident_of(family)
    kept, _ = layerwise.train(recipe, resident, Text.of(*tokens()), settings=settings)
    spilled, _ = layerwise.train(
        recipe, resident, Text.of(*tokens()), settings=settings, folder=tmp_path, memory_bytes=0
    )
    assert same(kept, spilled)
    assert not list(tmp_path.glob("intarsia-hidden-*"))


@pytest.mark.parametrize(("name", "value"), [("inputs", "both"), ("layers", "all")])
def test_settings_that_are_none(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        LayerwiseSettings(**{name: value})  # type: ignore[arg-type]
