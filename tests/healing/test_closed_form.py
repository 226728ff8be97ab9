"""The closed form on tiny models, against the plain transformers model and its hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import assembled, materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.closed_form import fit_forwards, fitted_parts
from intarsia.healing.layer_fit import fittable
from intarsia.healing.pipeline import quality
from intarsia.healing.settings import ClosedFormSettings, taught
from intarsia.healing.stages.closed_form import FinalFitSettings
from intarsia.recipe import schema
from intarsia.recipe.recipe import Merge, Op, Recipe, identity
from tests import families
from tests.closed_form_fits import fit_on
from tests.conftest import InMemory, Opened
from tests.healing.conftest import SEQ_LEN, Cut, Tokens
from tests.recipes_by_hand import recipe_of, ref, select, shared

PLAIN = ClosedFormSettings(layers="spans")
DOWN = replace(PLAIN, changed=("mlp",))
FINAL = FinalFitSettings()
CPU = torch.device("cpu")


def removal(checkpoint: Checkpoint) -> Recipe:
    """Layers 2 and 3 are gone; layer 1 stands for them."""
    return recipe_of(str(checkpoint.folder), [select(0), select(1), select(4), select(5)])


def whole(layer: int) -> Merge:
    """That layer again, but as an op that is fitted."""
    return Merge(sources=(ref(layer),), weights=(1.0,))


def plain_model(checkpoint: Checkpoint) -> Any:
    """The model as transformers has it. Not the one that tests share: asking for hidden states leaves hooks on it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()


def held_out_rows(corpus: Corpus, settings: ClosedFormSettings = PLAIN) -> Corpus:
    """The sequences that a fit chooses the strength by."""
    rows = slice(0, None, settings.held_out)
    mask = None if corpus.mask is None else corpus.mask[rows]
    return Corpus.of(corpus.input_ids[rows], mask=mask, description="held out", documents=1)


def equal(first: Recipe, second: Recipe) -> bool:
    names = [{index: sorted(tensors) for index, tensors in recipe.fitted.items()} for recipe in (first, second)]
    return names[0] == names[1] and all(
        np.array_equal(tensor, second.fitted[index][name])
        for index, tensors in first.fitted.items()
        for name, tensor in tensors.items()
    )


def steps(architecture: Architecture, parts: Sequence[Part]) -> list[str]:
    """The modules fitted for these parts, in order: first the norm after a projection; of a mixture o_proj alone."""
    found = []
    for part in ("attention",) if architecture.n_experts else parts:
        after = architecture.norm_after(part)
        found += [] if after is None else [after.module]
        found.append(architecture.writer(part).module)
    return found


# What is fitted


def test_layers_taught(checkpoint_of: Opened) -> None:
    architecture = checkpoint_of("llama").architecture

    def spans_and_after(layers: Sequence[Op]) -> tuple[list[int], list[int]]:
        recipe = recipe_of("model", layers)
        return taught(recipe, "spans"), taught(recipe, "after")

    assert spans_and_after([select(n) for n in range(6)]) == ([], [])
    assert spans_and_after([select(0), select(1), select(4), select(5)]) == ([1], [1, 2, 3])
    assert spans_and_after([select(2), select(3), shared(architecture, (4, 5))]) == ([0, 2], [0, 1, 2])
    assert spans_and_after([select(0), select(1), select(2), select(3), select(4)]) == ([4], [4])
    # A layer that is put in stands for nothing: there is no target for it.
    more = [select(0), select(3), whole(1), select(2), select(4), select(5)]
    assert spans_and_after(more) == ([0], [0, 3, 4, 5])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_layer_fitted_to_its_own_output_stays(
    family: str, checkpoint_of: Opened, resident_of: InMemory, tokens: Tokens
) -> None:
    checkpoint = checkpoint_of(family)
    layers = [whole(0), select(1), select(2), whole(3), select(4), select(5)]
    recipe = recipe_of(str(checkpoint.folder), layers)
    resident = resident_of(family)
    found, fits = fit_on(recipe, resident, tokens()[0], settings=replace(PLAIN, layers="after"))
    whole_fit, rest = steps(resident.architecture, PLAIN.changed), steps(resident.architecture, PLAIN.unchanged)
    assert len(fits) == 2 * len(whole_fit) + 4 * len(rest)
    assert all(row["error_before"] < 1e-10 and row["error_after"] <= row["error_before"] for row in fits)
    for index, tensors in found.fitted.items():
        for name, tensor in tensors.items():
            own = resident.layers[index].get_parameter(name).numpy()
            np.testing.assert_allclose(tensor, own, atol=1e-5)
    again, fits = fit_on(identity(recipe.variants[0], 6), resident, tokens()[0], settings=PLAIN)
    assert (again.fitted, fits) == ({}, [])


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_removals_and_joined_layers_are_healed(
    family: str, padded: bool, cut: Cut, resident_of: InMemory, tokens: Tokens
) -> None:
    """No fit raises its error, and the reported error is that of the resulting model."""
    _, recipe = cut(family)
    resident = resident_of(family)
    before = {name: tensor.clone() for name, tensor in resident.model.state_dict().items()}
    train, fresh = tokens(sequences=96, padded=padded)
    healed, fits = fit_on(recipe, resident, train, settings=PLAIN)
    modules = steps(resident.architecture, PLAIN.changed)
    assert [(row["layer"], row["module"]) for row in fits] == [(layer, name) for layer in (2, 3) for name in modules]
    assert all(row["error_after"] <= row["error_before"] for row in fits)
    assert all(name.removesuffix(".weight") in modules for names in healed.fitted.values() for name in names)
    measured = quality(healed, resident, [held_out_rows(train)])
    for row in (fits[len(modules) - 1], fits[-1]):
        assert row["error_after"] == pytest.approx(measured["errors"][row["layer"]], rel=1e-3)
    errors = [quality(each, resident, [fresh])["errors"] for each in (recipe, healed)]
    assert errors[1][2] < 0.9 * errors[0][2] and errors[1][3] < 0.9 * errors[0][3]
    assert all(torch.equal(before[name], tensor) for name, tensor in resident.model.state_dict().items())


def test_a_heal_starts_from_what_is_fitted(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    train, _ = tokens(sequences=96)
    once, first = fit_on(recipe, resident_of("llama"), train, settings=PLAIN)
    twice, second = fit_on(once, resident_of("llama"), train, settings=PLAIN)
    assert second[0]["error_before"] == pytest.approx(first[2]["error_after"], rel=1e-3)
    assert second[0]["error_after"] <= second[0]["error_before"]
    assert sorted(twice.fitted) == sorted(once.fitted)


# Targets


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_target_is_that_of_the_plain_model(
    family: str, padded: bool, checkpoint_of: Opened, resident_of: InMemory, tokens: Tokens
) -> None:
    """Errors before a fit, worked out from hidden states: what is aimed at is what the model itself gives."""
    resident = resident_of(family)
    train, _ = tokens(padded=padded)
    seen = held_out_rows(train)
    mask = torch.ones_like(seen.input_ids, dtype=torch.bool) if seen.mask is None else seen.mask
    with torch.no_grad():
        out = plain_model(checkpoint_of(family))(seen.input_ids, attention_mask=mask.long(), output_hidden_states=True)
    target = out.hidden_states[4]
    squared = (target - out.hidden_states[2]).square().sum(-1)
    wanted = {"uniform": squared[mask].mean(), "relative": (squared / target.square().sum(-1))[mask].mean()}
    for part in PARTS:
        for weighting in ("uniform", "relative"):
            settings = ClosedFormSettings(layers="spans", changed=(part,), weighting=weighting)
            if not steps(resident.architecture, settings.changed):
                continue
            _, (row, *_) = fit_on(removal(checkpoint_of(family)), resident, train, settings=settings, batch_tokens=64)
            assert row["error_before"] == pytest.approx(float(wanted[weighting]), rel=1e-4)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_fit_is_least_squares(
    part: Part, family: str, checkpoint_of: Opened, resident_of: InMemory, tokens: Tokens
) -> None:
    """With next to no ridge, what `numpy.linalg.lstsq` finds on the inputs and targets of the plain model."""
    resident = resident_of(family)
    train, _ = tokens(sequences=96)
    settings = replace(PLAIN, changed=(part,), ridges=(1e-9,))
    healed, _ = fit_on(removal(checkpoint_of(family)), resident, train, settings=settings)
    linear = resident.architecture.writer(part)
    plain = plain_model(checkpoint_of(family))
    name = resident.architecture.tensor_name(1, f"{linear.module}.weight").removesuffix(".weight")
    module = plain.get_submodule(name)
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    chosen = torch.arange(len(train)) % settings.held_out != 0
    with torch.no_grad():
        states = plain(train.input_ids[chosen], output_hidden_states=True).hidden_states
    handle.remove()
    root = states[4].square().sum(-1).reciprocal().sqrt().reshape(-1, 1).double()
    x = (inputs[0].reshape(len(root), -1).double() * root).numpy()
    missing = ((states[4] - states[2]).reshape(len(root), -1).double() * root).numpy()
    change, *_ = np.linalg.lstsq(x, missing, rcond=None)
    own = module.get_parameter("weight").detach().numpy()
    np.testing.assert_allclose(healed.fitted[1][f"{linear.module}.weight"], own + change.T, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_later_layers_correct_what_is_left(
    family: str, cut: Cut, resident_of: InMemory, checkpoint_of: Opened, tokens: Tokens
) -> None:
    train, fresh = tokens(sequences=96)
    resident, recipe = resident_of(family), removal(checkpoint_of(family))
    near, _ = fit_on(recipe, resident, train, settings=PLAIN)
    far, fits = fit_on(recipe, resident, train, settings=replace(PLAIN, layers="after"))
    assert sorted(near.fitted) == [1] and sorted(far.fitted) == [1, 2, 3]
    changed, rest = (len(steps(resident.architecture, parts)) for parts in (PLAIN.changed, PLAIN.unchanged))
    assert [row["layer"] for row in fits] == [1] * changed + [2] * rest + [3] * rest
    errors = [quality(each, resident, [fresh])["errors"] for each in (near, far)]
    assert errors[1][1] == errors[0][1]
    assert errors[1][3] < errors[0][3]


# Tokens


def test_padding_never_counts(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("qwen3")
    train, _ = tokens(padded=True)
    assert train.mask is not None
    other = Corpus.of(
        torch.where(train.mask, train.input_ids, 1), mask=train.mask, description="other padding", documents=1
    )
    assert not torch.equal(train.input_ids, other.input_ids)
    (first, one), (second, two) = (
        fit_on(recipe, resident_of("qwen3"), each, settings=PLAIN) for each in (train, other)
    )
    assert equal(first, second)
    assert one == two


def test_batches_do_not_matter(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("mistral")
    train, _ = tokens()
    first, _ = fit_on(recipe, resident_of("mistral"), train, settings=PLAIN)
    second, _ = fit_on(recipe, resident_of("mistral"), train, settings=PLAIN, batch_tokens=3 * SEQ_LEN)
    for index, tensors in first.fitted.items():
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, second.fitted[index][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_batches_side_by_side_do_not_matter(family: str, cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut(family)
    train, _ = tokens(padded=True)
    first, reports = fit_on(recipe, resident_of(family), train, settings=PLAIN)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second, again = fit_on(recipe, resident_of(family), train, settings=PLAIN)
    finally:
        torch.set_num_threads(threads)
    assert first.fitted.keys() == second.fitted.keys() != set()
    for one, other in zip(reports, again, strict=True):
        assert (one["layer"], one["module"]) == (other["layer"], other["module"])
        assert one["error_after"] == pytest.approx(other["error_after"], rel=1e-3)


def test_massive_tokens(tmp_path: Path, tokens: Tokens) -> None:
    """Every sequence begins with a token of a thousand times the norm: ordinary tokens are fitted all the same."""
    model = families.make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[1] *= 1000.0
    checkpoint = Checkpoint.open(families.save(model, tmp_path / "model"), model="llama")
    resident = LoadedModel(checkpoint, device=CPU)
    train, fresh = tokens(sequences=96)
    train.input_ids[:, 0] = fresh.input_ids[:, 0] = 1
    recipe = removal(checkpoint)
    plain, relative, uniform = (
        quality(each, resident, [fresh])["errors"][1]
        for each in (
            recipe,
            fit_on(recipe, resident, train, settings=DOWN)[0],
            fit_on(recipe, resident, train, settings=replace(DOWN, weighting="uniform"))[0],
        )
    )
    assert relative < 0.9 * plain
    assert relative < uniform


# What does not carry over


def test_one_sequence_is_all_held_out(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("llama")
    found, fits = fit_on(recipe, resident_of("llama"), tokens(sequences=1)[0], settings=PLAIN)
    assert found.fitted == {}
    assert len(fits) == 6 and all(row["ridge"] is None for row in fits)


def test_a_fit_that_does_not_carry_over_is_not_taken(cut: Cut, resident_of: InMemory) -> None:
    """The held-out sequences are of other tokens than the rest, and hardly any ridge may be chosen."""
    _, recipe = cut("llama")
    ids = torch.arange(2, 2 + 9 * SEQ_LEN).view(9, SEQ_LEN)
    ids[1:8] = ids[1:2]  # one sequence seven times over: fewer tokens than channels
    corpus = Corpus.of(ids, description="few tokens", documents=1)
    found, fits = fit_on(recipe, resident_of("llama"), corpus, settings=replace(PLAIN, ridges=(1e-12,)))
    assert all(row["error_after"] == row["error_before"] for row in fits)
    assert found.fitted == {}


@pytest.mark.parametrize("where", ["of the original", "held-out"])
def test_activations_that_are_not_finite(where: str, cut: Cut, tokens: Tokens) -> None:
    checkpoint, recipe = cut("llama")
    resident = LoadedModel(checkpoint, device=CPU)
    train, _ = tokens()
    if where == "of the original":
        resident.layers[2].get_submodule("mlp.down_proj").get_parameter("weight")[0, 0] = float("nan")
        named = "output of layer 2 of the original"
    else:
        train.input_ids[0, 3], train.input_ids[1:] = 300, train.input_ids[1:].clamp_max(299)
        resident.model.get_input_embeddings().weight[300] = float("inf")
        named = "output of layer 0 of the original"
    with pytest.raises(UserError, match=named) as caught:
        fit_on(recipe, resident, train, settings=PLAIN)
    assert "NaN or infinity" in str(caught.value)


# The resulting model


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_is_as_in_memory(family: str, dtype: torch.dtype, cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    checkpoint, recipe = cut(family)
    if dtype != torch.float32:
        model = families.make_model(family).to(dtype)
        checkpoint = Checkpoint.open(families.save(model, tmp_path / "model"), model=family)
    resident = LoadedModel(checkpoint, device=CPU, dtype=dtype)
    train, fresh = tokens(sequences=96)
    healed, _ = fit_on(recipe, resident, train, settings=PLAIN)
    assert healed.fitted
    schema.save(healed, tmp_path / "healed.yaml")
    healed = schema.load(tmp_path / "healed.yaml")
    materialize(healed, {"base": checkpoint}, tmp_path / "out")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with torch.no_grad():
        wanted = assembled(healed, resident)(fresh.input_ids).logits
        unhealed = assembled(recipe, resident)(fresh.input_ids).logits
        found = built(fresh.input_ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.06)
    assert not torch.allclose(found, unhealed, rtol=0, atol=0.1)


# Cost


@pytest.mark.parametrize("layers", ["spans", "after"])
@pytest.mark.parametrize("changed", [("mlp", "attention", "mlp"), ("mlp",)])
@pytest.mark.parametrize("unchanged", [("mlp",), ("mlp", "attention")])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cost_is_the_estimated_one(
    layers: Any, changed: Any, unchanged: Any, padded: bool, cut: Cut, resident_of: InMemory, tokens: Tokens
) -> None:
    _, recipe = cut("opt")
    resident = resident_of("opt")
    train, _ = tokens(padded=padded)
    kind, sequences = type(resident.layers[0]), []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, kind) and args[0].shape[1] == SEQ_LEN:
            sequences.append(args[0].shape[0])

    settings = ClosedFormSettings(layers=layers, changed=changed, unchanged=unchanged)
    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        fit_on(recipe, resident, train, settings=settings, batch_tokens=64)
    finally:
        handle.remove()
    assert sum(sequences) == fit_forwards(recipe, settings, resident.architecture) * len(train)


@pytest.mark.parametrize("target", range(1, 30))
def test_three_passes_are_enough(target: int, checkpoint_of: Opened) -> None:
    """The most expensive way to remove: every layer that is left stands for as few as can be."""
    removed, architecture = 30 - target, checkpoint_of("llama").architecture
    kept = [layer for layer in range(30) if layer % 2 == 0 or layer > 2 * removed][-target:]
    recipe = recipe_of("model", [select(layer) for layer in kept], depth=30)
    assert len(recipe.layers) == target
    for settings in (ClosedFormSettings(), FINAL):
        assert fit_forwards(recipe, settings, architecture) <= 3 * 30
        assert fit_forwards(identity(recipe.variants[0], 30), settings, architecture) == 0


@pytest.mark.parametrize(
    ("kept", "more"),
    [
        # Of 7 original layers, 21 forwards may be made. The teacher's 7, the student's and those of each fit:
        ([0, 1, 2, 4, 5, 6], [3, 4, 5]),  # 7 + 4 + 3 + 3 = 17, and 3 more
        ([0, 1, 3, 4, 5, 6], [2, 3]),  # 7 + 5 + 3 + 4 = 19, and 2 more: the first of the four
        ([0, 2, 4, 5, 6], []),  # 7 + 5 + 6 + 3 = 21
    ],
)
def test_more_is_fitted_as_long_as_three_passes_pay_for_it(
    kept: list[int], more: list[int], checkpoint_of: Opened
) -> None:
    recipe, architecture = (
        recipe_of("model", [select(layer) for layer in kept], depth=7),
        checkpoint_of("llama").architecture,
    )
    found, base = (fitted_parts(recipe, settings, architecture) for settings in (FINAL, ClosedFormSettings()))
    assert found.keys() == base.keys()
    assert [index for index in found if found[index] != base[index]] == more
    assert all(found[index] == ("mlp", "attention") for index in more)
    assert set(base.values()) <= {("mlp", "attention", "mlp"), ("mlp",)}
    cost = fit_forwards(recipe, FINAL, architecture)
    assert fit_forwards(recipe, ClosedFormSettings(), architecture) + len(more) == cost <= 21


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_o_proj_of_unchanged_layers_is_fitted_too(family: str, cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    """And leaves held-out tokens no further from the original than without it; a mixture has nothing more to fit."""
    _, recipe = cut(family)
    resident = resident_of(family)
    train, _ = tokens()
    errors = []
    default = ClosedFormSettings()
    for settings in (default, replace(FINAL, held_out=default.held_out)):
        _, fits = fit_on(recipe, resident, train, settings=settings)
        fitted = [(row["layer"], row["module"]) for row in fits]
        wanted = fitted_parts(recipe, settings, resident.architecture)
        assert [index for index, _ in fitted if index not in wanted] == []
        attention = resident.architecture.writer("attention").module
        assert {index for index, module in fitted if module == attention} == {
            index for index, parts in wanted.items() if "attention" in fittable(parts, resident.architecture)
        }
        last = max(wanted)
        errors.append([row["error_after"] for row in fits if row["layer"] == last][-1])
        assert all(row["error_after"] <= row["error_before"] for row in fits)
    assert errors[1] <= errors[0] * (1.0 if family != "mixtral" else 1.0 + 1e-6)
