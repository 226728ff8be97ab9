"""The closed form over all layers from several starting points, and what decides between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import intarsia
from intarsia.data.corpus import Corpus
from intarsia.evaluation.chain import Chain
from intarsia.healing.closed_form import fit
from intarsia.healing.fit_plan import fit_forwards
from intarsia.healing.restarts import Start, best_of, starts
from intarsia.healing.settings import LAST, ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.progress import Silent
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.recipe import schema
from intarsia.recipe.recipe import Fitted, Recipe, identity
from intarsia.stages.repair import _set_aside, beginnings, heal_passes_at_most, repaired
from intarsia.stages.source import Source
from tests import families
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
    given: dict[str, Any]

    @property
    def folder(self) -> Ladder:
        return Ladder(self.run)

    def source(self) -> Source:
        """The model and its calibration text, read anew."""
        return Source(
            self.model,
            revision=None,
            seed=0,
            device=None,
            dtype=None,
            stream=False,
            memory_bytes=None,
            progress=Silent(),
            **self.given,
        )


Plan = Callable[..., Planned]


@pytest.fixture
def plan(model_folder: Any, text_file: Path, tmp_path: Path) -> Plan:
    def planned(**options: Any) -> Planned:
        model, run = str(model_folder("llama")), tmp_path / "run"
        given: dict[str, Any] = {"calibration": str(text_file), "tokens": 512, "seq_len": 32}
        intarsia.plan(model, run, heal_in_loop=True, **options, **given)
        return Planned(model=model, run=run, given=given)

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


def test_a_ladder_s_recipe_begins_as_it_is_bare_and_as_blocks(plan: Plan) -> None:
    """Each end is what the fit from that start gives, the best is taken, and a second call only reads it."""
    settings_of_plan = ComePSettings(granularity=2, racing=False, removals=True, finalists=2, blocks=4)
    planned = plan(layers=3, method="come-p", settings=settings_of_plan)
    run, folder, source = planned.run, planned.folder, planned.source()
    settings = ClosedFormSettings()
    several = 0
    judges = source.parts.selection
    assert judges is not None
    assert len(judges) == 2
    for entry in folder.log():
        recipe = folder.recipe(entry["layers"])
        begin = beginnings(folder, recipe, source.checkpoint.architecture)
        several += len(begin) > 2
        tried = [each for each in entry["evidence"]["repair"]["finalists"] if "of" in each]
        tried.sort(key=lambda each: min(each["held_out_loss"]))
        whole = identity(recipe.variants[0], families.DEPTH).layers
        blocks = [(*whole[: each["replaced"][0]], *whole[each["replaced"][1] :]) for each in tried]
        others = [layers for layers in blocks if layers != recipe.layers]
        bare = 1 + bool(recipe.fitted)
        assert [start.recipe.layers for start in begin[bare:]] == others[:2]
        assert all(not start.recipe.fitted for start in begin[1:])
        assert len(begin) <= 4

        found = repaired(run, recipe, source, settings=settings, batch_tokens=None)
        assert found.fresh
        architecture = source.checkpoint.architecture
        assert found.forwards == sum(fit_forwards(start.recipe, settings, architecture) for start in begin)
        by_hand = {}
        corpus = source.corpus
        for start in begin:
            fitted, _ = fit_on(start.recipe, source.resident, corpus, settings=settings)
            by_hand[start.name] = loss_of(fitted, source, judges.input_ids)
        heal = found.recipe.provenance["heal"]
        assert list(heal["starts"]) == sorted(by_hand, key=lambda name: by_hand[name])
        for name, value in heal["starts"].items():
            assert np.log(value) == pytest.approx(by_hand[name], rel=1e-6)
        first = next(iter(heal["starts"]))
        assert found.taken == (heal["starts"][first] < heal["stages"][0]["held_out_perplexity"])
        chosen = next(start for start in begin if start.name == first)
        if found.taken:
            assert found.start == chosen.name
            assert found.recipe.layers == chosen.recipe.layers
            assert found.goes_on == (chosen is begin[0])
        again = repaired(run, recipe, source, settings=settings, batch_tokens=None)
        assert not again.fresh
        assert schema.content_hash(again.recipe) == schema.content_hash(found.recipe)
        assert again.start == found.start
    assert several
    for planned, in_loop, begin in (
        (ComeSettings(), False, 1),
        (None, True, 2),
        (ComePSettings(blocks=1), True, 3),
        (ComePSettings(blocks=5), True, 4),
    ):
        assert heal_passes_at_most(source.checkpoint.architecture, planned, in_loop=in_loop) == 3 * begin


@pytest.mark.parametrize("fitted", [True, False])
def test_what_chose_the_strength_does_not_judge(plan: Plan, fitted: bool) -> None:
    """With several starts and with one: where no further text is left, sequences that no fit has seen judge."""
    planned = plan(layers=4)
    run, source, recipe = planned.run, planned.source(), planned.folder.recipe(4)
    recipe = recipe if fitted else replace(recipe, fitted={})
    source.parts.__dict__["selection"] = None
    heal = repaired(run, recipe, source, settings=LAST, batch_tokens=None).recipe.provenance["heal"]
    assert heal["settings"]["closed-form"]["held_out"] == 8
    unseen = [8]  # of 16 sequences; 0 chooses the strength
    settings = replace(LAST, held_out=8)
    found = {}
    for start in beginnings(planned.folder, recipe, source.checkpoint.architecture):
        again, _ = fit_on(start.recipe, source.resident, source.corpus, settings=settings, unseen=unseen)
        found[start.name] = loss_of(again, source, source.corpus.input_ids[unseen])
    assert len(found) == 1 + fitted
    assert np.log(heal["stages"][-1]["held_out_perplexity"]) == pytest.approx(min(found.values()), rel=1e-6)
    for name, value in heal.get("starts", {}).items():
        assert np.log(value) == pytest.approx(found[name], rel=1e-6)


def test_one_start_is_judged_by_further_text_where_there_is_some(plan: Plan) -> None:
    planned = plan(layers=4)
    source = planned.source()
    recipe = replace(planned.folder.recipe(4), fitted={})
    heal = repaired(planned.run, recipe, source, settings=LAST, batch_tokens=None).recipe.provenance["heal"]
    further = source.parts.selection
    assert further is not None and "starts" not in heal
    before, after = (np.log(row["held_out_perplexity"]) for row in heal["stages"])
    healed, _ = fit_on(recipe, source.resident, source.corpus, settings=LAST)
    assert before == pytest.approx(loss_of(recipe, source, further.input_ids), rel=1e-6)
    assert after == pytest.approx(loss_of(healed, source, further.input_ids), rel=1e-6)


@pytest.mark.parametrize(("sequences", "chosen_by", "judged_by"), [(1, [0], []), (2, [0], []), (3, [0], [2])])
def test_few_sequences_are_shared_out(sequences: int, chosen_by: list[int], judged_by: list[int]) -> None:
    corpus = Corpus.of(torch.arange(4 * sequences).view(sequences, 4), description="few", documents=1)
    settings, text, unseen = _set_aside(corpus, LAST)
    assert unseen == judged_by
    assert [row for row in range(0, sequences, settings.held_out) if row not in unseen] == chosen_by
    assert torch.equal(text.input_ids, corpus.input_ids[unseen or chosen_by])


def test_killed_in_the_last_of_several_fits_the_others_are_not_made_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes of it is what comes without being killed, with room for the original's states or without."""
    planned = plan(layers=4)
    run, recipe = planned.run, planned.folder.recipe(4)
    fits: list[bool] = []  # of each, whether the teacher's states are kept for the next

    def killed(recipe: Recipe, teacher: TeacherStates, **kwargs: Any) -> Any:
        if len(fits) == 1:
            raise KeyboardInterrupt
        return counted(recipe, teacher, **kwargs)

    def counted(recipe: Recipe, teacher: TeacherStates, **kwargs: Any) -> Any:
        fits.append(teacher.keep)
        return fit(recipe, teacher, **kwargs)

    whole = repaired(run, recipe, planned.source(), settings=LAST, batch_tokens=None)
    for path in (run / "healed").iterdir():
        path.unlink()  # files alone: nothing is left of the ends
    monkeypatch.setattr("intarsia.healing.restarts.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        repaired(run, recipe, planned.source(), settings=LAST, batch_tokens=None)
    (kept,) = (run / "healed").iterdir()
    assert len(list(kept.glob("*.yaml"))) == 1
    monkeypatch.setattr("intarsia.healing.restarts.fit", counted)
    source = planned.source()
    source.placement = replace(source.placement, memory_bytes=1)
    resumed = repaired(run, recipe, source, settings=LAST, batch_tokens=None)
    assert fits == [True, False]
    assert not kept.exists()
    assert resumed.recipe.provenance == whole.recipe.provenance
    assert schema.content_hash(resumed.recipe) == schema.content_hash(whole.recipe)


def test_heal_goes_on_behind_the_fits_that_were_finished(
    plan: Plan, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(text_file)
    recipe = tmp_path / "recipe.yaml"
    schema.save(plan(layers=4).folder.recipe(4), recipe)
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


def loss_of(recipe: Recipe, source: Source, ids_BT: Any) -> float:
    """Mean next-token loss, by the definition."""
    logits = Chain(recipe, source.resident)(ids_BT).logits.float()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()))
