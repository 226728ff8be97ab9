"""The closed form over all layers from several starting points, and what decides between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn.functional import cross_entropy

from intarsia.commands.job import Job
from intarsia.commands.planning import Planning, heal_recipe
from intarsia.evaluation.chain import Chain
from intarsia.healing.closed_form import fit
from intarsia.healing.fit_plan import fit_forwards
from intarsia.healing.pipeline import StageResult
from intarsia.healing.restarts import Start, best_of, starts
from intarsia.options import Runtime, Target, TextSpec
from intarsia.pruning.finalists import block_starts
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.recipe import schema
from intarsia.recipe.recipe import Fitted, Recipe, identity
from intarsia.registry import heal_stages, planners
from tests import families, verbs
from tests.closed_form_fits import fit_on
from tests.conftest import Opened
from tests.healing.conftest import heal
from tests.recipes_by_hand import recipe_of, select

LAYERS = tuple(select(layer) for layer in (0, 1, 4, 5))


@dataclass(frozen=True)
class Planned:
    """A model's ladder that was repaired as it went."""

    model: str
    run: Path
    text: TextSpec

    @property
    def folder(self) -> Ladder:
        return Ladder(self.run)

    def source(self) -> Job:
        """The model and its calibration text, read anew."""
        return Job(self.model, self.text, Runtime())


Plan = Callable[..., Planned]


@pytest.fixture
def plan(model_folder: Any, text_file: Path, tmp_path: Path) -> Plan:
    def planned(**options: Any) -> Planned:
        model, run = str(model_folder("llama")), tmp_path / "run"
        verbs.plan(model, run, calibration=str(text_file), tokens=512, seq_len=32, **options)
        return Planned(model=model, run=run, text=TextSpec(sources=(str(text_file),), tokens=512, seq_len=32))

    return planned


def with_fitted(*names: str) -> Recipe:
    fitted: Fitted = {1: {name: np.zeros((2, 2), np.float32) for name in names}} if names else {}
    return replace(recipe_of("llama", LAYERS), fitted=fitted)


@pytest.mark.parametrize(
    ("family", "fitted", "number"),
    [
        ("llama", (), 1),
        ("llama", ("mlp.down_proj.weight",), 2),
        ("llama", ("mlp.down_proj.weight", "self_attn.o_proj.weight"), 2),
        ("llama", ("mlp.down_proj.weight", "self_attn.q_proj.weight"), 1),  # trained
        ("llama", ("post_feedforward_layernorm.weight",), 1),
        ("gemma2", ("mlp.down_proj.weight", "post_feedforward_layernorm.weight"), 2),  # a norm behind the read-out
    ],
)
def test_what_was_fitted_may_be_forgotten_and_what_was_trained_not(
    family: str, fitted: tuple[str, ...], number: int, checkpoint_of: Opened
) -> None:
    recipe = with_fitted(*fitted)
    found = starts(recipe, checkpoint_of(family).architecture)
    assert len(found) == number
    assert found[0].recipe is recipe
    assert [start.recipe.fitted for start in found[1:]] == [{}] * (number - 1)
    assert all(start.recipe.layers == recipe.layers for start in found)


def test_the_best_end_comes_first_and_of_equal_ones_the_earlier_start() -> None:
    recipes = [recipe_of("llama", LAYERS[:number]) for number in (1, 2, 3, 4)]
    losses = {1: 5.0, 2: 3.0, 3: 3.0, 4: 4.0}
    found = best_of(
        [Start(name=str(len(recipe.layers)), recipe=recipe) for recipe in recipes],
        lambda recipe: (recipe, [{"layer": len(recipe.layers)}]),
        lambda recipe: losses[len(recipe.layers)],
    )
    assert found.start.name == "2"
    assert found.recipe is recipes[1]
    assert found.fits == [{"layer": 2}]
    assert list(found.perplexities.items()) == [("2", 3.0), ("3", 3.0), ("4", 4.0), ("1", 5.0)]
    assert found.perplexity == 3.0
    assert found.summary() == "held-out perplexity from the recipe 2 3.00, 3 3.00, 4 4.00, 1 5.00"


def healed_in(planned: Planned, recipe: Recipe, source: Job | None = None) -> StageResult:
    """The closed form of `compress` on a recipe of the ladder."""
    with planned.folder.run.opened():
        done = heal_recipe(source or planned.source(), planned.folder, recipe, heal_stages.choose_all("closed-form"))
    assert done is not None
    return done.stages[-1]


def test_a_ladder_s_recipe_starts_as_it_is_bare_and_as_blocks(plan: Plan) -> None:
    """Each fit is what it is from that start, the best is taken, and a second call only reads it."""
    settings_of_plan = ComePSettings(
        granularity=2, racing=False, removals=True, finalists=2, blocks=4, heal_in_loop=True
    )
    planned = plan(layers=3, settings=settings_of_plan)
    folder, source = planned.folder, planned.source()
    (chosen,) = heal_stages.choose_all("closed-form")
    several, judges = 0, source.text.selection
    assert judges is not None and len(judges) == 2
    for entry in folder.log():
        recipe = folder.recipe(entry["layers"])
        tried = [each for each in entry["evidence"]["repair"]["finalists"] if "of" in each]
        tried.sort(key=lambda each: min(each["held_out_loss"]))
        whole = identity(recipe.variants[0], families.DEPTH).layers
        blocks = [(*whole[: each["replaced"][0]], *whole[each["replaced"][1] :]) for each in tried]
        found_blocks = block_starts(folder, recipe)
        assert [start.recipe.layers for start in found_blocks] == [each for each in blocks if each != recipe.layers][:2]
        points = [*starts(recipe, source.checkpoint.architecture), *found_blocks]
        several += len(points) > 2
        assert all(not start.recipe.fitted for start in points[1:])

        found = healed_in(planned, recipe, source)
        assert found.fresh
        architecture = source.checkpoint.architecture
        forwards = sum(fit_forwards(start.recipe, chosen.settings, architecture) for start in points)
        assert found.facts["forwards"] == forwards
        if len(points) > 1:
            for start in points:
                fitted, _ = fit_on(start.recipe, source.resident, source.text.calibration, settings=chosen.settings)
                by_hand = loss_of(fitted, source, judges.input_ids)
                assert np.log(found.facts["starts"][start.name]) == pytest.approx(by_hand, rel=1e-6)
            best = next(start for start in points if start.name == found.facts["start"])
            assert found.facts["start"] == min(found.facts["starts"], key=found.facts["starts"].get)
            assert not found.taken or found.recipe.layers == best.recipe.layers
            assert found.facts["from_scratch"] == (best is not points[0])
        again = healed_in(planned, recipe, source)
        assert not again.fresh
        assert schema.content_hash(again.recipe) == schema.content_hash(found.recipe)
    assert several


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("come", 1),
        ("come[heal_in_loop=true]", 2),
        ("come-p[heal_in_loop=true,blocks=1]", 3),
        ("come-p[heal_in_loop=true,blocks=5]", 4),
    ],
)
def test_passes_of_the_fits(method: str, number: int, plan: Plan) -> None:
    source = plan(layers=5).source()
    planning = Planning(source, Target(layers=4), planners.choose(method))
    assert planning.heal_passes_at_most(heal_stages.choose_all("closed-form")) == 3 * number
    assert planning.heal_passes_at_most(()) == 0


def test_killed_in_the_last_of_several_fits_the_others_are_not_made_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(layers=4, settings=ComeSettings(heal_in_loop=True))
    run, recipe = planned.run, planned.folder.recipe(4)
    assert recipe.fitted
    whole = healed_in(planned, recipe)
    shutil.rmtree(run / "healed-004")
    fits = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal fits
        fits += 1
        if fits == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr("intarsia.healing.restarts.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        healed_in(planned, recipe)
    resumed = healed_in(planned, recipe)
    assert fits == 3
    assert schema.content_hash(resumed.recipe) == schema.content_hash(whole.recipe)
    assert resumed.facts["starts"] == whole.facts["starts"]


def test_heal_goes_on_behind_the_fits_that_were_finished(
    plan: Plan, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(text_file)
    recipe = tmp_path / "recipe.yaml"
    schema.save(plan(layers=4, settings=ComeSettings(heal_in_loop=True)).folder.recipe(4), recipe)
    heal(recipe, tmp_path / "whole", data)
    fits = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal fits
        fits += 1
        if fits == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr("intarsia.healing.restarts.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(recipe, tmp_path / "out", data)
    heal(recipe, tmp_path / "out", data)
    assert fits == 3
    assert [path.name for path in (tmp_path / "out.heal" / "stages" / "1-closed-form").iterdir()] == ["key.json"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def loss_of(recipe: Recipe, source: Job, ids_BT: Any) -> float:
    """Mean next-token loss, by the definition."""
    logits = Chain(recipe, source.resident)(ids_BT).logits.float()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))
