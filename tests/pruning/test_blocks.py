"""The original without a block of layers, against the same by hand, and as starts of the final heal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

import intarsia
from intarsia import progress
from intarsia.building.loaded_model import LoadedModel
from intarsia.commands.job import Job
from intarsia.commands.planning import Planning, heal_recipe
from intarsia.options import EvalSpec, Runtime, Target, TextSpec
from intarsia.progress import Display
from intarsia.pruning.blocks import best_blocks, starts_of
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.sleb import SlebSettings
from intarsia.recipe.algebra import half_layers
from intarsia.recipe.schema import content_hash
from intarsia.registry import heal_stages, planners
from intarsia.run_dir import RunDir
from tests import families
from tests.conftest import Folder, InMemory
from tests.pruning.by_hand import losses_with
from tests.pruning.test_in_loop import written_by
from tests.recipes_by_hand import recipe_of, select

WHOLE = [select(layer) for layer in range(families.DEPTH)]


def measured(resident: LoadedModel, sequences: int = 32) -> Intermediate:
    model = Intermediate(resident, written_by(resident, sequences), WHOLE)
    model.measure()
    return model


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_best_blocks_are_those_of_least_loss(family: str, resident_of: InMemory) -> None:
    model = measured(resident_of(family), 8)  # too few to race on
    tokens, whole = float(model.counts_N.sum()), model.ops
    by_hand = {(start, False): losses_with(model, start, 2, []) for start in range(families.DEPTH - 1)}
    for start in range(families.DEPTH - 2):
        half = half_layers(whole[start], whole[start + 2], "fold", model.architecture)
        by_hand[start, True] = losses_with(model, start, 3, [half])
    losses = {block: float(sums_N.sum()) / tokens for block, sums_N in by_hand.items()}
    found = best_blocks(model, 2, number=9)
    assert [(block["start"], block["half"]) for block in found] == sorted(losses, key=lambda block: losses[block])
    for block in found:
        assert block["end"] == block["start"] + 2 + block["half"]
        assert block["loss"] == pytest.approx(losses[block["start"], block["half"]], rel=1e-9)


def test_a_block_that_is_the_recipe_itself_is_no_other_start(resident_of: InMemory) -> None:
    recipe = recipe_of("llama", [select(layer) for layer in (0, 1, 4, 5)])
    blocks = [
        {"start": 2, "end": 4, "half": False, "loss": 1.0},
        {"start": 1, "end": 3, "half": False, "loss": 2.0},
        {"start": 1, "end": 4, "half": True, "loss": 3.0},
    ]
    architecture = resident_of("llama").architecture
    found = starts_of(recipe, blocks, architecture)
    half = half_layers(select(1), select(3), "fold", architecture)
    assert [list(start.recipe.layers) for start in found] == [
        [select(layer) for layer in (0, 3, 4, 5)],
        [select(0), half, select(4), select(5)],
    ]
    assert [start.name for start in found] == [
        "the original without layers 1 to 2",
        "the original without mlp 1 to attention 3",
    ]


def test_the_final_heal_starts_from_blocks_too(tmp_path: Path, model_folder: Folder, text_file: Path) -> None:
    """Resumed, the recorded blocks are used; the original's states are the planner's, where the fit needs no more; the
    recipe is the same."""
    job = Job(str(model_folder("llama")), TextSpec(sources=(str(text_file),), tokens=1024, seq_len=32), Runtime())
    method, stages = planners.choose("sleb[blocks=2,plan-tokens=512]"), heal_stages.choose_all("closed-form")
    hashes = []
    for name, read in (("run", 1024), ("run", 1024), ("other", 1024), ("less", 512)):
        planning = Planning(job, Target(layers=4), method, heals=read)
        with planning.opened(RunDir(tmp_path / name)) as ladder:
            planning.work(ladder)
            if (states := planning.states()) is not None:  # not where the plan is resumed
                assert states.batches.corpus.sha256 == job.text.calibration.first(read).sha256
            healed = heal_recipe(planning, ladder, ladder.recipe(4), stages)
        assert healed is not None
        hashes.append(content_hash(healed.recipe))
        (tmp_path / name / "healed-004" / "1-closed-form.json").unlink()  # as if it had been killed
        starts = healed.stages[-1].facts["starts"]
        assert 2 <= len(starts) <= 3 and sum("the original without" in start for start in starts) >= 1
    assert len(set(hashes)) == 1


def test_what_decides_the_steps_is_part_of_the_text(resident_of: InMemory) -> None:
    """The first sequences decide; the original's hidden states are there for all, and stay."""
    resident = resident_of("llama")
    corpus = written_by(resident, 32)
    model, first = Intermediate(resident, corpus, WHOLE), Intermediate(resident, corpus.take(8), WHOLE)
    model.look_at(8 * corpus.seq_len)
    for each in (model, first):
        each.refresh()
        each.keep()
        each.replace(2, 1, None)
        assert each.losses_N.shape == (8,)
    assert model.losses_N.equal(first.losses_N)
    assert [each.influence for each in model.measures] == [each.influence for each in first.measures]
    original = measured(resident)
    states = model.original()
    for depth in range(families.DEPTH + 1):
        assert states.at(depth, slice(0, 32)).equal(original.hidden_at(depth, slice(0, 32)))
    model.rewind()
    assert model.hidden_at(families.DEPTH, slice(8, 32)).equal(original.hidden_at(families.DEPTH, slice(8, 32)))


@pytest.mark.parametrize(("given", "message"), [({"blocks": -1}, "--blocks is -1"), ({"plan_tokens": 0}, "--plan-tok")])
def test_bad_numbers_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(intarsia.UserError, match=message):
        SlebSettings(**given)


def test_the_card_and_the_report_say_where_healing_started(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original without a block, and not the method's merges: so nothing is said to be joined."""
    measure = SimpleNamespace(divergence=lambda _: next(values))
    monkeypatch.setattr("intarsia.healing.closed_form.NextTokens", lambda *_: measure)
    accepted = property(lambda result: 1.0 if result.recipe.fitted else 2.0)
    monkeypatch.setattr("intarsia.healing.pipeline.StageResult.perplexity", accepted)
    values = iter([2.0, 1.0])
    text = TextSpec(sources=(str(text_file),), tokens=2048, seq_len=32)
    evaluation, method = EvalSpec(speed=False, answers=2), "come[blocks=1]"
    out = tmp_path / "out"
    result = intarsia.compress(
        str(model_folder("llama")), out, Target(layers=4), method=method, text=text, evaluation=evaluation
    )
    assert result.healed is not None and result.healed["taken"]
    said = result.healed["start"]
    assert said.startswith("the original without")
    card, page = (out / "README.md").read_text(encoding="utf-8"), (out / "report.html").read_text(encoding="utf-8")
    assert f"Healing started from {said}" in card and "were joined" not in card
    assert f"It started from {said}" in page


def test_the_bar_moves_by_a_part_of_healing_while_blocks_are_compared(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    moved = Display.moved

    def watched(display: Display) -> None:
        moved(display)
        if display._tasks:
            seen.append((display._words(), display._pace.share))

    monkeypatch.setattr(Display, "moved", watched)
    text = TextSpec(sources=(str(text_file),), tokens=2048, seq_len=32)
    with progress.reporting_to(Display(io.StringIO())):
        result = intarsia.compress(
            str(model_folder("llama")), tmp_path / "out", Target(layers=4), method="come[blocks=1]", text=text
        )
    blocks, heal = result.estimate.block_passes_at_most, result.estimate.heal_passes_at_most
    first = next(place for place, (words, _) in enumerate(seen) if "dropping" in words)
    start, end = seen[first - 1][1], next(share for words, share in seen if words.startswith("building"))
    until = next(
        place for place, (words, _) in enumerate(seen) if "perplexity" in words
    )  # the pruned model is measured
    shares = [share for _, share in seen[first:until]]
    assert start < max(shares) == pytest.approx(start + blocks / (blocks + heal) * (end - start))
