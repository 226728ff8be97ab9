"""The closed form over all layers from several starting points, and what decides between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from intarsia.activations.hidden_store import MemoryBudget
from intarsia.building.materialize import assembled
from intarsia.commands.job import Job
from intarsia.commands.planning import Planning, heal_recipe
from intarsia.healing import closed_form
from intarsia.healing.closed_form import AS_IT_IS, Start, fit, fit_each, fit_forwards, starts
from intarsia.healing.pipeline import Healed
from intarsia.healing.ridge import USUAL
from intarsia.healing.stages.closed_form import FinalFitSettings
from intarsia.options import Target, TextSpec
from intarsia.pruning.blocks import starts_of
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.pruning.methods.evolve import EvolveSettings, words_of
from intarsia.recipe import schema
from intarsia.recipe.recipe import Fitted, Recipe, identity
from intarsia.registry import heal_stages, planners
from tests import verbs
from tests.closed_form_fits import fit_on
from tests.conftest import Opened
from tests.healing.conftest import heal
from tests.recipes_by_hand import recipe_of, select

FINAL = FinalFitSettings()
TRIAL = replace(FINAL, unchanged=("mlp",), ridges=(USUAL,))
LAYERS = tuple(select(layer) for layer in (0, 1, 4, 5))


@dataclass
class Planned:
    """A model's ladder that was healed step by step."""

    model: str
    run: Path
    given: dict[str, Any]

    @property
    def folder(self) -> Ladder:
        return Ladder(self.run)

    @cached_property
    def job(self) -> Job:
        """The model and its calibration text, read anew."""
        names = {name: self.given[name] for name in ("tokens", "seq_len")}
        return Job(self.model, TextSpec(sources=(self.given["calibration"],), **names))

    def healed(self, recipe: Recipe, stage: str = "closed-form[fit-trial-tokens=512]") -> Healed:
        """A recipe of the ladder, healed in closed form."""
        with self.folder.run.opened():
            planning = Planning(self.job, Target(layers=len(recipe.layers)), planners.choose(self.given["settings"]))
            found = heal_recipe(planning, self.folder, recipe, heal_stages.choose_all(stage))
            planning.close()
        assert found is not None
        return found


Plan = Callable[..., Planned]


@pytest.fixture
def plan(model_folder: Any, text_file: Path, tmp_path: Path) -> Plan:
    def planned(**options: Any) -> Planned:
        model, run = str(model_folder("llama")), tmp_path / "run"
        given: dict[str, Any] = {"calibration": str(text_file), "tokens": 512, "seq_len": 32}
        verbs.plan(model, run, **options, **given)
        return Planned(model=model, run=run, given={**given, "settings": options["settings"]})

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
        (
            "gemma2",
            ("mlp.down_proj.weight", "post_feedforward_layernorm.weight"),
            2,
        ),  # with a norm
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


def test_the_best_fit_comes_first_and_of_equal_ones_the_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [recipe_of("llama", LAYERS[:number]) for number in (1, 2, 3, 4)]
    losses = {1: 5.0, 2: 3.0, 3: 3.0, 4: 4.0}
    points = [Start(name=str(len(recipe.layers)), recipe=recipe) for recipe in recipes]
    monkeypatch.setattr(closed_form, "fit", lambda recipe, *_, **__: (recipe, [{"layer": len(recipe.layers)}]))
    measure = SimpleNamespace(divergence=lambda recipe: losses[len(recipe.layers)])
    monkeypatch.setattr(closed_form, "NextTokens", lambda *_: measure)
    teacher, budget = SimpleNamespace(resident=None), MemoryBudget(0)
    for _ in range(2):  # the second time they are read
        found = fit_each(points, teacher, None, settings=FINAL, folder=tmp_path, memory_budget=budget)  # type: ignore[arg-type]
        assert [(each.start.name, each.divergence) for each in found] == [
            ("2", 3.0),
            ("3", 3.0),
            ("4", 4.0),
            ("1", 5.0),
        ]
        assert found[0].recipe.layers == recipes[1].layers and found[0].fits == [{"layer": 2}]
        monkeypatch.setattr(closed_form, "fit", None)


def test_a_ladder_s_recipe_starts_as_it_is_bare_and_as_blocks(plan: Plan) -> None:
    """Each fit is the one from that start, and the nearest to the original on the selection text is taken."""
    settings = ComePSettings(granularity=2, racing=False, removals=True, blocks=2, heal_in_loop=True)
    planned = plan(layers=3, settings=settings)
    job, ladder = planned.job, planned.folder
    architecture, selection = job.checkpoint.architecture, job.text.selection
    assert selection is not None and len(selection) == 2
    several = 0
    for depth in ladder.depths():
        recipe = ladder.recipe(depth)
        found = planned.healed(recipe)
        cut, result = found.stages
        blocks = json.loads((ladder.path / f"blocks/layers-{depth:03d}.json").read_text())["blocks"]
        points = [*starts(recipe, architecture), *starts_of(recipe, blocks, architecture)]
        several += len(points) > 2
        assert len(points) <= 4
        assert all(not start.recipe.fitted for start in points[1:])
        by_hand, losses = {}, {}
        for start in points:
            fitted, _ = fit_on(start.recipe, job.resident, job.text.calibration, settings=FINAL)
            by_hand[start.name] = divergence_of(fitted, job, selection.input_ids)
            losses[start.name] = loss_of(fitted, job, selection.input_ids)
        assert result.facts["forwards"] == sum(fit_forwards(start.recipe, FINAL, architecture) for start in points)
        heal = found.recipe.provenance["heal"]
        assert list(heal["starts"]) == sorted(by_hand, key=lambda name: by_hand[name])
        for name, value in heal["starts"].items():
            assert value == pytest.approx(by_hand[name], rel=1e-4)
        first = next(iter(heal["starts"]))
        assert np.log(cut.perplexity) == pytest.approx(loss_of(recipe, job, selection.input_ids), rel=1e-6)
        assert result.taken == (losses[first] < np.log(cut.perplexity))
        chosen = next(start for start in points if start.name == first)
        assert result.facts["start"] == chosen.name
        assert result.facts["from_scratch"] == (chosen is not points[0])
        if result.taken:
            assert found.recipe.layers == chosen.recipe.layers
        again = planned.healed(recipe)
        assert not again.stages[-1].fresh
        assert schema.content_hash(again.recipe) == schema.content_hash(found.recipe)
    assert several


def test_of_several_starts_the_best_on_a_few_tokens_is_fitted_on_all(plan: Plan) -> None:
    planned = plan(layers=4, settings=ComeSettings(heal_in_loop=True))
    job, recipe = planned.job, planned.folder.recipe(4)
    points = starts(recipe, job.checkpoint.architecture)
    selection = job.text.selection
    assert len(points) == 2 and selection is not None
    found = planned.healed(recipe, "closed-form[fit-trial-tokens=128]")
    text = job.text.calibration
    by_hand = {}
    for start in points:
        fitted, _ = fit_on(start.recipe, job.resident, text.take(4), settings=TRIAL)
        by_hand[start.name] = divergence_of(fitted, job, selection.input_ids)
    best = min(points, key=lambda start: by_hand[start.name])
    expected, _ = fit_on(best.recipe, job.resident, text, settings=FINAL)
    assert found.stages[-1].facts["start"] == best.name
    assert schema.content_hash(found.recipe) == schema.content_hash(expected)


@pytest.mark.parametrize(
    ("method", "stage", "passes"),
    [
        (ComeSettings(), "closed-form", 3),
        (ComeSettings(heal_in_loop=True), "closed-form", 3 * (2 / 4 + 1)),
        (ComePSettings(blocks=2), "closed-form[fit-trial-tokens=512]", 9),
        (ComePSettings(blocks=2), "closed-form[fit-trial-tokens=128]", 3 * (3 / 4 + 1)),
        (EvolveSettings(blocks=1, finalists=2), "closed-form[fit-trial-tokens=512]", 9),
        (ComeSettings(), "closed-form,layerwise[epochs=2]", 3 + 2 + 3 * 2),
    ],
)
def test_passes_are_those_of_every_start(method: Any, stage: str, passes: float, plan: Plan) -> None:
    job = plan(layers=5, settings=ComeSettings()).job
    planning = Planning(job, Target(layers=3), planners.choose(method))
    assert planning.heal_passes_at_most(heal_stages.choose_all(stage)) == passes


def test_finalists_of_a_search_are_starts(plan: Plan) -> None:
    planned = plan(layers=4, settings=EvolveSettings(generations=2, offspring=4, finalists=3, blocks=1))
    recipe, (entry,) = planned.folder.recipe(4), planned.folder.log()
    found = planned.healed(recipe).stages[-1].facts["starts"]
    others = [f"the original without {words_of(kept, 6)}" for kept in entry["evidence"]["others"]]
    assert len(others) == 2 and {AS_IT_IS, *others} <= set(found)
    assert len(found) in (3, 4)  # the best block may be one of them


def test_heal_resumes_after_the_fits_that_were_finished(
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

    monkeypatch.setattr("intarsia.healing.closed_form.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(recipe, tmp_path / "out", data)
    heal(recipe, tmp_path / "out", data)
    assert fits == 4
    assert [path.name for path in (tmp_path / "out.heal" / "stages" / "1-closed-form").iterdir()] == ["key.json"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def divergence_of(recipe: Recipe, job: Job, ids_BT: Any) -> float:
    """Mean KL from the original's next token, by the definition: of its 64 likeliest, and the rest as one."""
    whole = assembled(identity(recipe.variant(recipe.base), recipe.depth), job.resident)
    log_p, log_s = (
        chain(ids_BT).logits[:, :-1].double().log_softmax(-1) for chain in (whole, assembled(recipe, job.resident))
    )
    top = log_p.topk(min(64, log_p.shape[-1]), dim=-1).indices

    def with_rest(log_q: torch.Tensor) -> torch.Tensor:
        kept = log_q.exp().gather(-1, top)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1).clamp_min(1e-9)

    p, s = with_rest(log_p), with_rest(log_s)
    return float((p * (p.log() - s.log())).sum(-1).mean())


def loss_of(recipe: Recipe, job: Job, ids_BT: Any) -> float:
    """Mean next-token loss, by the definition."""
    logits = assembled(recipe, job.resident)(ids_BT).logits.float()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))
