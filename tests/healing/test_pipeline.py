"""Heal stages one after the other: what is accepted, recorded, resumed and set aside."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.job import load_tokenizer
from intarsia.data.corpus import Corpus
from intarsia.data.text import TextParts, draw
from intarsia.errors import UserError
from intarsia.healing import closed_form
from intarsia.healing.closed_form import AS_IT_IS, Start
from intarsia.healing.pipeline import HealContext, Healed, check_memory, check_stages, run_stages, tokens_read
from intarsia.healing.stages.closed_form import FinalFitSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.options import Runtime, TextSpec
from intarsia.progress import Display, reporting_to
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, identity
from intarsia.registry import heal_stage, heal_stages
from intarsia.run_dir import RunDir
from tests import families
from tests.closed_form_fits import fit_on
from tests.healing.conftest import LAYERWISE

Run = Callable[..., Healed]
FINAL = FinalFitSettings()
TRAINED = "end-to-end[lora=2,lr=1e-3,top-k=4,evaluations=2,epochs=2,step-tokens=64,precision=no]"


@dataclass(frozen=True, kw_only=True)
class FactorSettings:
    # What an output projection is multiplied by.
    factor: float = 1.0


@pytest.fixture(autouse=True)
def scale(own_registry: None) -> None:
    """Registers the stage `scale`, which multiplies an output projection."""

    @heal_stage("scale", settings=FactorSettings)
    def scaled(context: HealContext, recipe: Recipe, settings: FactorSettings) -> Recipe:
        weight = context.resident.layers[0].get_parameter("mlp.down_proj.weight").detach().float().numpy()
        context.details.append({"factor": settings.factor})
        (context.folder / "log.jsonl").write_text("{}\n")
        (context.folder / "state.safetensors").write_text("")
        (context.folder / "more").mkdir()
        (context.folder / "more" / "optimiser.bin").write_text("")
        tensors = {"mlp.down_proj.weight": weight * np.float32(settings.factor)}
        return replace(recipe, fitted={**recipe.fitted, 0: tensors})


@pytest.fixture(scope="module")
def original(learned: tuple[Path, Recipe]) -> LoadedModel:
    return LoadedModel(Checkpoint.open(learned[0], model=str(learned[0])), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def text(original: LoadedModel, text_file: Path) -> TextParts:
    spec = TextSpec(sources=(str(text_file),), tokens=1024, seq_len=32)
    return draw(spec, load_tokenizer(original.checkpoint))


@pytest.fixture
def context(original: LoadedModel, text: TextParts, tmp_path: Path) -> Iterator[Callable[..., HealContext]]:
    run = RunDir(tmp_path / "run")

    def made(**changes: Any) -> HealContext:
        given = {
            "run": run,
            "variants": {"base": original.checkpoint},
            "load": lambda: original,
            "device": original.device,
            "calibration": text.calibration,
            "selection": text.selection,
        }
        return HealContext(**{**given, **changes})

    with run.opened({}):
        yield made


@pytest.fixture
def cut(learned: tuple[Path, Recipe]) -> Recipe:
    return learned[1]


def stopped(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_stage_is_accepted_if_the_model_is_better_on_the_selection_text(
    context: Callable[..., HealContext], cut: Recipe, text: TextParts, original: LoadedModel
) -> None:
    healed = run_stages(context(), cut, heal_stages.choose_all(["closed-form", "scale[factor=0.1]", LAYERWISE]))
    assert [result.stage for result in healed.stages] == ["pruned", "closed-form", "scale", "layerwise"]
    assert [result.taken for result in healed.stages[:3]] == [True, True, False]
    first, fitted, scaled, _ = healed.stages
    assert fitted.perplexity < first.perplexity and scaled.perplexity == fitted.perplexity
    assert schema.content_hash(scaled.recipe) == schema.content_hash(fitted.recipe)
    # Exactly the fit on the calibration text, with the settings of a last fit.
    by_hand, _ = fit_on(cut, original, text.calibration, settings=FINAL)
    assert schema.content_hash(by_hand) == schema.content_hash(fitted.recipe)
    said = healed.recipe.provenance["heal"]
    assert [row["stage"] for row in said["stages"]] == ["pruned", "closed-form", "scale", "layerwise"]
    assert said["settings"]["scale"] == {"factor": 0.1} and said["output_projections"] == fitted.details
    assert said["text"]["sha256"] == text.calibration.sha256
    assert schema.content_hash(schema.load(healed.path)) == schema.content_hash(healed.recipe)
    assert "hidden_error" not in said["stages"][0]
    json.dumps(said, allow_nan=False)


def test_progress_moves_through_every_stage(context: Callable[..., HealContext], cut: Recipe, text: TextParts) -> None:
    """As far as a stage's passes say, and through its steps: 3 of the fit; of the training 1 of the teacher and 8; and
    three passes over the selection text."""

    class Watched(Display):
        shares: ClassVar[dict[str, list[float]]] = {}

        def moved(self) -> None:
            super().moved()
            if self._tasks:
                self.shares.setdefault(self._tasks[-1].title, []).append(self._pace.share)

    with reporting_to(Watched(io.StringIO())):
        run_stages(context(), cut, heal_stages.choose_all(["closed-form", TRAINED]))
    measured, fit, teacher, student = (
        Watched.shares[title]
        for title in ("perplexity", "closed form", "the teacher's 4 likeliest tokens", "end-to-end training")
    )
    assert text.selection is not None
    measuring = text.selection.tokens / text.calibration.tokens
    whole = 12 + 3 * measuring
    assert measured[0] == 0 and measuring / whole in [pytest.approx(share) for share in measured]
    assert fit[-1] <= (measuring + 3) / whole and teacher[0] == pytest.approx((2 * measuring + 3) / whole)
    assert student[0] == pytest.approx((2 * measuring + 4) / whole)
    assert student[-1] == pytest.approx((2 * measuring + 12) / whole) and measured[-1] == pytest.approx(1.0)
    assert len(set(student)) > 10 and student == sorted(student)


def test_training_frees_hidden_states_of_the_original(
    context: Callable[..., HealContext], cut: Recipe, text: TextParts, original: LoadedModel
) -> None:
    freed: list[TeacherStates | None] = []
    with TeacherStates(Loop(original, Batches(text.calibration, original.device))) as known:
        made = context(states=known, release=lambda: freed.append(made.states))
        run_stages(made, cut, heal_stages.choose_all("closed-form"))
        assert made.states is known and freed == []
        run_stages(made, cut, heal_stages.choose_all(["closed-form", TRAINED]))
        assert freed == [None]


def test_the_text_that_stages_read_hidden_states_of() -> None:
    whole = sys.maxsize
    texts = {"none": 0, "end-to-end": 0, "closed-form[fit-tokens=512],end-to-end": 512, "closed-form,scale": whole}
    assert {stages: tokens_read(heal_stages.choose_all(stages)) for stages in texts} == texts


def test_a_finished_stage_is_only_read_and_its_tensors_go(
    context: Callable[..., HealContext], cut: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = heal_stages.choose_all("closed-form,scale")
    first = run_stages(context(), cut, stages)
    folder = first.path.with_suffix("")
    assert sorted(path.name for path in folder.iterdir()) == ["key.json", "log.jsonl"]
    monkeypatch.setattr(closed_form, "fit", stopped)
    again = run_stages(context(load=stopped), cut, stages)
    assert [result.fresh for result in first.stages] == [True] * 3
    assert [replace(result, fresh=True, recipe=cut) for result in again.stages] == [
        replace(result, recipe=cut) for result in first.stages
    ]
    assert schema.content_hash(again.recipe) == schema.content_hash(first.recipe)
    # Another setting is other work; what comes before it stands.
    other = run_stages(context(), cut, heal_stages.choose_all("closed-form,scale[factor=2]"))
    assert [result.fresh for result in other.stages] == [False, False, True]
    with pytest.raises(KeyboardInterrupt):
        run_stages(context(), cut, heal_stages.choose_all("closed-form[fit_weighting=uniform]"))


def test_without_more_text_some_sequences_are_set_aside(
    context: Callable[..., HealContext], cut: Recipe, text: TextParts, original: LoadedModel
) -> None:
    """The last sixteenth; what is known of the original on the whole text still serves."""
    made = context(selection=None)
    assert len(made.calibration) == 30 and torch.equal(made.held_out.input_ids, text.calibration.input_ids[30:])
    wanted, _ = fit_on(cut, original, made.calibration, settings=FINAL)
    assert schema.content_hash(run_stages(made, cut, heal_stages.choose_all("closed-form")).recipe) == (
        schema.content_hash(wanted)
    )
    loop = Loop(original, Batches(text.calibration, original.device))
    with TeacherStates(loop, keep=True) as states:
        states.learn(range(families.DEPTH + 1))
        known = context(selection=None, states=states, name="known")
        assert schema.content_hash(run_stages(known, cut, heal_stages.choose_all("closed-form")).recipe) == (
            schema.content_hash(wanted)
        )
        with known.original_states(known.calibration) as found:
            found.learn([3])
            assert found.cost == 0


@pytest.mark.parametrize(("sequences", "held_out"), [(1, [0]), (2, [1]), (9, [8])])
def test_few_sequences_are_shared_out(context: Callable[..., HealContext], sequences: int, held_out: list[int]) -> None:
    few = Corpus.of(torch.arange(4 * sequences).view(sequences, 4), description="few", documents=1)
    made = context(calibration=few, selection=None)
    assert len(made.calibration) == max(sequences - 1, 1)
    assert torch.equal(made.held_out.input_ids, few.input_ids[held_out])


def test_the_best_of_several_starts_and_killed_within(
    context: Callable[..., HealContext], cut: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = replace(cut, fitted=run_stages(context(), cut, heal_stages.choose_all("closed-form")).recipe.fitted)
    whole = identity(cut.variants[0], cut.depth).layers
    other = Start(name="other", recipe=cut.with_layers(whole[:4]))
    stages = heal_stages.choose_all("closed-form")
    wanted = run_stages(context(starts=(other,), name="whole"), half, stages)
    facts = wanted.stages[-1].facts
    assert set(facts["starts"]) == {AS_IT_IS, "the recipe with nothing fitted", "other"}
    assert facts["start"] == min(facts["starts"], key=facts["starts"].get)
    fits: list[bool] = []
    fit = closed_form.fit

    def kills(*args: Any, **kwargs: Any) -> Any:
        fits.append(True)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(closed_form, "fit", kills)
    with pytest.raises(KeyboardInterrupt):
        run_stages(context(starts=(other,), name="killed"), half, stages)
    found = run_stages(context(starts=(other,), name="killed", memory_bytes=1), half, stages)
    assert len(fits) == 5  # the last of the starts, and the best one on all of the text
    assert schema.content_hash(found.recipe) == schema.content_hash(wanted.recipe)
    assert found.stages[-1].facts == facts


def test_what_a_stage_needs_is_checked_before(context: Callable[..., HealContext], cut: Recipe) -> None:
    whole = heal_stages.choose_all("layerwise,end-to-end[lora=none]")
    for runtime in (Runtime(stream=True), Runtime(devices=("cuda:0", "cuda:1"))):
        with pytest.raises(UserError, match="end-to-end trains all layers at once") as refused:
            check_stages(whole, runtime)
        assert "give --heal layerwise" in refused.value.problems[0].hint
    check_memory(whole, 10**6, 10**6, torch.device("cpu"))
    with pytest.raises(UserError, match="end-to-end takes at least 1,602,000"):
        check_memory(whole, 10**14, 2 * 10**12, torch.device("cpu"))
    with pytest.raises(UserError, match="--log nothing is no tracker"):
        check_stages(heal_stages.choose_all("end-to-end[log=nothing]"), Runtime())
    check_stages(whole, Runtime(devices=("cpu",)))

    @heal_stage("wrong")
    def wrong(context: HealContext, recipe: Recipe) -> Any:
        return None

    with pytest.raises(UserError, match="wrong gave no recipe"):
        run_stages(context(), cut, heal_stages.choose_all("wrong"))
