"""ReplaceMe and Prune&Comp against what their papers say, computed by hand from the plain transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from intarsia.building.materialize import assembled
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.pipeline import HealContext
from intarsia.recipe.recipe import Recipe
from intarsia.registry import heal_stages
from intarsia.run_dir import RunDir
from tests.conftest import InMemory, Opened
from tests.healing.conftest import Tokens, heal
from tests.recipes_by_hand import recipe_of, select

RUNS = [select(0), select(1), select(3), select(5)]  # 2 and 4 are dropped
Context = Callable[..., HealContext]


@pytest.fixture
def context(checkpoint_of: Opened, resident_of: InMemory, tokens: Tokens, tmp_path: Path) -> Iterator[Context]:
    run = RunDir(tmp_path / "run")

    def made(family: str, *, padded: bool = False) -> HealContext:
        calibration, selection = tokens(padded=padded)
        return HealContext(
            run=run,
            variants={"base": checkpoint_of(family)},
            load=lambda: resident_of(family),
            device=torch.device("cpu"),
            calibration=calibration,
            selection=selection,
            batch_tokens=112,  # seven sequences, so that the last batch is a smaller one
        )

    with run.opened({}):
        yield made


def healed(context: HealContext, layers: list[Any], stage: str) -> Recipe:
    recipe = recipe_of(str(context.variants["base"].folder), layers)
    found = heal_stages.choose(stage)[0].create(context, recipe)
    assert isinstance(found, Recipe)
    return found


def states_by_hand(checkpoint: Checkpoint, corpus: Corpus) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """H^0 .. H^L and what each MLP adds, of real tokens by sequence, from the model's own forward; and the mask."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    layers = model.get_submodule(checkpoint.architecture.family.modules.layers)
    writer = checkpoint.architecture.writer("mlp").module
    states: list[Tensor] = []
    added: list[Tensor] = []
    layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for layer in layers:
        layer.get_submodule(writer).register_forward_hook(lambda _, args, out: added.append(out))
        layer.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    mask = torch.ones_like(corpus.input_ids) if corpus.mask is None else corpus.mask.long()
    with torch.no_grad():
        model(input_ids=corpus.input_ids, attention_mask=mask, use_cache=False)
    shape = states[0].shape
    return [h.double() for h in states], [m.double().reshape(shape) for m in added], mask.bool()


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("llama", True), ("opt", False), ("granite", False)])
def test_replaceme_fits_one_map_for_each_run(
    family: str, padded: bool, context: Context, checkpoint_of: Opened
) -> None:
    checkpoint, given = checkpoint_of(family), context(family, padded=padded)
    found = healed(given, RUNS, "replaceme[map-ridge=0.01]")
    states, added, mask = states_by_hand(checkpoint, given.calibration)
    scale = checkpoint.architecture.residual_scale
    writer = checkpoint.architecture.writer("mlp")
    names = [f"{writer.module}.weight", *([f"{writer.module}.bias"] if writer.bias else [])]
    assert {index: sorted(tensors) for index, tensors in found.fitted.items()} == dict.fromkeys((1, 2), sorted(names))
    for index, before, after in ((1, 1, 3), (2, 3, 5)):
        m, wanted, h = (each[mask].numpy() for each in (added[before], states[after], states[before + 1]))
        y = h - scale * m
        ridge = 0.01 * np.mean(np.diag(m.T @ m)) * np.eye(m.shape[1])
        transform = np.linalg.solve(m.T @ m + ridge, m.T @ ((wanted - y) / scale))
        for name in names:
            own = checkpoint.layer_tensor(before, name).double().numpy()
            np.testing.assert_allclose(found.fitted[index][name], transform.T @ own, rtol=1e-3, atol=2e-4)
        errors = given.details[index - 1]
        assert errors["layer"] == index
        assert errors["error_before"] == pytest.approx(((wanted - h) ** 2).sum(1).mean(), rel=1e-4)
        assert errors["error_after"] == pytest.approx(
            ((wanted - y - scale * m @ transform) ** 2).sum(1).mean(), rel=1e-3
        )
        assert errors["error_after"] < errors["error_before"]
    assert given.facts["forwards"] == 5 + 2  # the original up to the last run, and the layers before the two


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_prune_comp_is_the_published_model(
    padded: bool, context: Context, checkpoint_of: Opened, resident_of: InMemory
) -> None:
    """Published, the embedding and what comes before a run are scaled up; here what comes after it is scaled down."""
    checkpoint, given = checkpoint_of("llama"), context("llama", padded=padded)
    found = healed(given, RUNS, "prune-comp")
    states, _, mask = states_by_hand(checkpoint, given.calibration)

    def alpha(before: int, after: int) -> float:
        ratios = [
            states[after][row][mask[row]].abs().mean(0) / states[before][row][mask[row]].abs().mean(0)
            for row in range(len(mask))
        ]
        return float(torch.stack(ratios).mean())

    alphas = [alpha(2, 3), alpha(4, 5)]
    assert [entry["layer"] for entry in given.details] == [1, 2]
    assert [entry["alpha"] for entry in given.details] == pytest.approx(alphas, rel=1e-5)
    assert sorted(found.fitted) == [2, 3]

    by_hand = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    kept = [by_hand.model.layers[layer] for layer in (0, 1, 3, 5)]
    with torch.no_grad():
        for count, factor in ((2, alphas[0]), (3, alphas[1])):
            by_hand.model.embed_tokens.weight.mul_(factor)
            for layer in kept[:count]:
                layer.self_attn.o_proj.weight.mul_(factor)
                layer.mlp.down_proj.weight.mul_(factor)
        by_hand.model.layers = torch.nn.ModuleList(kept)
        for index, layer in enumerate(kept):
            layer.self_attn.layer_idx = index
        ids = given.held_out.input_ids
        wanted = by_hand(input_ids=ids, use_cache=False).logits
        logits = assembled(found, resident_of("llama"))(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)


def test_prune_comp_scales_a_norm_that_follows(context: Context, checkpoint_of: Opened) -> None:
    checkpoint, given = checkpoint_of("gemma3"), context("gemma3")
    found = healed(given, RUNS, "prune-comp")
    after = checkpoint.architecture.norm_after("mlp")
    assert after is not None and after.offset == 1.0
    first, second = (entry["alpha"] for entry in given.details)
    for index, layer, factor in ((2, 3, first), (3, 5, first * second)):
        own = checkpoint.layer_tensor(layer, f"{after.module}.weight").double().numpy()
        np.testing.assert_allclose(found.fitted[index][f"{after.module}.weight"], (1 + own) / factor - 1, rtol=1e-4)
        assert len(found.fitted[index]) == 2


@pytest.mark.parametrize(
    ("family", "layers", "stage", "words"),
    [
        ("llama", [select(layer) for layer in range(6)], "replaceme", "drops no layer"),
        ("llama", [select(layer) for layer in range(6)], "prune-comp", "drops no layer"),
        ("gemma3", RUNS, "replaceme", "MLP without router or norm after it"),
        ("mixtral", RUNS, "replaceme", "MLP without router or norm after it"),
        ("olmo2", RUNS, "prune-comp", "read a norm's output"),
    ],
)
def test_what_cannot_be_healed_so_is_refused(
    family: str, layers: list[Any], stage: str, words: str, context: Context
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        healed(context(family), layers, stage)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].hint


def test_too_little_text_for_a_map(context: Context) -> None:
    given = context("llama")
    given.calibration = given.calibration.take(1)
    with pytest.raises(UserError, match="does not determine the map"):
        healed(given, RUNS, "replaceme")


def test_the_verb_heals_with_both(learned: tuple[Path, Recipe], text_file: Path, tmp_path: Path) -> None:
    """On a model whose perplexity means something, the merged layer of its recipe gets a map too."""
    folder, recipe = learned
    from intarsia.recipe import schema

    path = tmp_path / "recipe.yaml"
    schema.save(recipe, path)
    found = heal(path, tmp_path / "out", str(text_file), stages=("replaceme", "prune-comp"))
    assert set(found.details) == {"replaceme", "prune-comp"}
    assert [entry["layer"] for entry in found.details["replaceme"]] == [2, 3]
    assert folder.is_dir() and (tmp_path / "out" / "model.safetensors").is_file()
