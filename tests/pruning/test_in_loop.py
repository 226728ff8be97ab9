"""Healing inside the progressive loop, against the same sequence by hand: merge, fit, measure, decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import intarsia
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import assembled, materialize
from intarsia.cli.parse import parse
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.closed_form import AS_IT_IS
from intarsia.healing.settings import ClosedFormSettings
from intarsia.options import EvalSpec, Output, Target, TextSpec
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.come_p import ComeP, ComePSettings
from intarsia.pruning.methods.laco import LacoSettings
from intarsia.pruning.methods.sleb import SlebSettings
from intarsia.pruning.prune import StepHealer
from intarsia.recipe.recipe import Op, Recipe, Variant, derive_spans, identity
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import (
    climb,
    ladder_in,
    losses_with,
    planner_of,
    progressive_methods,
    real_tokens,
    residual_stream,
    take,
    with_layers,
)
from tests.recipes_by_hand import select, shared

WHOLE = [select(layer) for layer in range(families.DEPTH)]
SETTINGS = ClosedFormSettings(ridges=(0.1,))
ONE_RIDGE = 0.1
Run = tuple[Ladder, Intermediate]


def go(
    folder: Path,
    resident: LoadedModel,
    method: str,
    target: int,
    *,
    settings: Any = None,
    corpus: Corpus | None = None,
    in_loop: ClosedFormSettings | None = SETTINGS,
) -> Run:
    """What `plan` does, in a run folder that may have been started."""
    run = ladder_in(folder, {})
    start = run.recipe(run.depths()[-1]) if run.depths() else whole()
    corpus = written_by(resident) if corpus is None else corpus
    model = Intermediate(resident, corpus, start.layers, fitted=start.fitted, batch_tokens=2 * corpus.seq_len)
    climb(planner_of(method, settings), model, start, target, run, in_loop=in_loop)
    return run, model


@cache
def written_by(resident: LoadedModel, sequences: int = 96, *, padded: bool = False) -> Corpus:
    """Text that the model wrote: what brings a layer nearer to the original lowers the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, families.VOCABULARY, (sequences, 1), generator=generator)
    with torch.no_grad():
        for _ in range(13):
            chances = (2 * resident.model(ids, use_cache=False).logits[:, -1]).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    lengths = torch.linspace(14, 5, sequences).long()[:, None]
    mask = torch.arange(14)[None, :] < lengths if padded else None
    return Corpus.of(ids, mask=mask, description="its own", documents=1)


def held_out_loss(model: Any, corpus: Corpus) -> float:
    """Mean loss a token of every eighth sequence."""
    rows = slice(0, None, 8)
    ids, mask = corpus.input_ids[rows], real_tokens(corpus)[rows]
    with torch.no_grad():
        log_p = model(ids, attention_mask=mask.long()).logits.double().log_softmax(-1)
    own = log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return -float(own[mask[:, 1:]].mean())


def whole() -> Recipe:
    return identity(Variant(name="base", model="m"), families.DEPTH)


def own_states(resident: LoadedModel, op: Op) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in resident.module(op).state_dict().items()}


def ridge_by_hand(
    resident: LoadedModel, states: list[dict[str, torch.Tensor]], index: int, target: torch.Tensor, corpus: Corpus
) -> list[str]:
    """Fit down_proj, o_proj and down_proj of a layer in `states`; the names of what was taken."""
    taken = []
    mask = real_tokens(corpus)
    held = (torch.arange(len(corpus)) % 8 == 0)[:, None].expand_as(mask)[mask].numpy()
    wanted = target[mask].numpy()
    root = 1 / np.linalg.norm(wanted, axis=1, keepdims=True)
    for part in ("mlp", "attention", "mlp"):
        name = f"{resident.architecture.writer(part).module}.weight"
        model = with_layers(resident, states)
        layer = model.get_submodule(resident.architecture.family.modules.layers)[index]
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        layer.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, seen=inputs: seen.append(args[0])
        )
        layer.register_forward_hook(
            lambda _, args, out, seen=outputs: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(corpus.input_ids, attention_mask=mask.long(), use_cache=False)
        x = inputs[0].reshape(*mask.shape, -1)[mask].double().numpy() * root
        missing = (wanted - outputs[0][mask].double().numpy()) * root
        moments = x[~held].T @ x[~held]
        system = moments + ONE_RIDGE * np.mean(np.diag(moments)) * np.eye(len(moments))
        change = np.linalg.solve(system, x[~held].T @ missing[~held])
        before = np.sum(missing[held] ** 2)
        if np.sum((missing[held] - x[held] @ change) ** 2) < before:
            states[index] = {**states[index], name: states[index][name] + torch.tensor(change.T, dtype=torch.float32)}
            taken.append(name)
    return sorted(set(taken))


@pytest.mark.parametrize(
    ("family", "method", "padded"),
    [
        ("llama", "come", True),
        ("opt", "come", False),
        pytest.param("opt", "come", True, marks=pytest.mark.exhaustive),
        ("mistral", "sleb", False),
        ("mistral", "sleb", True),
    ],
)
def test_the_loop_by_hand(family: str, method: str, padded: bool, resident_of: InMemory, tmp_path: Path) -> None:
    """Merge (or remove), fit, measure, again and again: weights, losses, and where nothing is fitted any more."""
    resident, corpus = resident_of(family), written_by(resident_of(family), padded=padded)
    originals = {name: tensor.clone() for name, tensor in resident.model.state_dict().items()}
    run, _ = go(tmp_path / "run", resident, method, 2, corpus=corpus)
    target = residual_stream(resident, corpus)
    ops: list[Op] = list(WHOLE)
    states = [own_states(resident, op) for op in ops]
    fitted: list[list[str]] = [[] for _ in ops]
    healed = taken = 0
    for entry in run.log():
        recipe = run.recipe(entry["layers"])
        spans = dict(zip(map(str, ops), derive_spans(ops, families.DEPTH), strict=True))
        start, stop = entry["merged"]
        merged = entry["op"] is not None
        new = [recipe.layers[start]] if merged else []
        ops[start:stop] = new
        states[start:stop] = [own_states(resident, op) for op in new]
        fitted[start:stop] = [[] for _ in new]
        now = derive_spans(ops, families.DEPTH)
        assert tuple(ops) == recipe.layers and tuple(now) == recipe.spans
        changed = [
            index for index, op in enumerate(ops) if spans.get(str(op)) != now[index] or (merged and index == start)
        ]
        bare, known = list(states), [list(names) for names in fitted]
        before = held_out_loss(with_layers(resident, bare), corpus)
        reports = []
        for index in changed:
            if now[index][1] - now[index][0] > 1:
                found = ridge_by_hand(resident, states, index, target[now[index][1]], corpus)
                fitted[index] = sorted({*fitted[index], *found})
                reports += [index] * 3
        after = held_out_loss(with_layers(resident, states), corpus)
        healer = entry["evidence"]["heal"]
        assert [fit["layer"] for fit in healer["output_projections"]] == reports
        assert healer["held_out_loss"] == pytest.approx([before, after], rel=1e-4)
        assert healer["taken"] == (after < before)
        behind = len(ops) - min(changed)
        assert healer["layer_forwards"] == pytest.approx(len(reports) + 2 * behind / 8)
        healed, taken = healed + len(reports) // 3, taken + healer["taken"]
        if after >= before:
            states, fitted = bare, known
        assert {index: sorted(tensors) for index, tensors in recipe.fitted.items()} == {
            index: names for index, names in enumerate(fitted) if names
        }
        for index, tensors in recipe.fitted.items():
            for name, tensor in tensors.items():
                np.testing.assert_allclose(tensor, states[index][name].numpy(), rtol=1e-3, atol=2e-3)
        loss = Intermediate(resident, corpus, recipe.layers, fitted=recipe.fitted)
        loss.measure()
        assert entry["loss"] == pytest.approx(loss.loss, rel=1e-5)
    assert healed >= 4 and taken >= 2
    assert all(torch.equal(originals[name], tensor) for name, tensor in resident.model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_built_is_what_was_measured(
    family: str, resident_of: InMemory, checkpoint_of: Opened, tmp_path: Path
) -> None:
    resident, corpus = resident_of(family), written_by(resident_of(family))
    run, model = go(tmp_path / "run", resident, "come", 3)
    recipe = run.recipe(3)
    assert recipe.fitted
    recipe = replace(recipe, variants=(replace(recipe.variants[0], model=str(checkpoint_of(family).folder)),))
    materialize(recipe, {"base": checkpoint_of(family)}, tmp_path / "out")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    part = slice(0, 2)
    ids = corpus.input_ids[part]
    with torch.no_grad():
        wanted = model.loop.stream.logits(model.hidden_at(3, part).clone(), ids, None)
        torch.testing.assert_close(built(ids).logits, wanted, rtol=0, atol=1e-4)
        bare = assembled(replace(recipe, fitted={}), resident)(ids).logits
    assert not torch.allclose(bare, wanted, rtol=0, atol=0.1)


def test_come_decides_on_the_healed_model(resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of("llama"), written_by(resident_of("llama"))
    settings = ComePSettings(granularity=3, spans=2)
    run, _ = go(tmp_path / "run", resident, "come-p", 3, settings=settings)
    first, second, third = run.log()
    for before, after in ((first, second), (second, third)):
        recipe = run.recipe(before["layers"])
        seen = Intermediate(resident, corpus, recipe.layers, fitted=recipe.fitted)
        seen.measure()
        assert after["evidence"]["influence"] == pytest.approx([measure.influence for measure in seen.measures])
        step = ComeP(settings).decide(seen, 3, [])
        assert step is not None and [step.start, step.start + step.count] == after["merged"]
        grids = step.evidence["grid"], after["evidence"]["grid"]
        assert [entry["start"] for entry in grids[0]] == [entry["start"] for entry in grids[1]]
        assert [entry["loss"] for entry in grids[0]] == pytest.approx([entry["loss"] for entry in grids[1]])
        bare = Intermediate(resident, corpus, recipe.layers)
        bare.measure()
        assert [measure.influence for measure in bare.measures] != pytest.approx(after["evidence"]["influence"])


def test_sleb_decides_on_the_healed_model(resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of("opt"), written_by(resident_of("opt"))
    run, _ = go(
        tmp_path / "run", resident, "sleb", 4, corpus=corpus, settings=SlebSettings(racing=False, criterion="loss")
    )
    recipe, losses = run.recipe(5), run.log()[1]["evidence"]["losses"]
    assert recipe.fitted
    for dropped in range(5):
        left = [index for index in range(5) if index != dropped]
        model = Intermediate(
            resident,
            corpus,
            [recipe.layers[index] for index in left],
            fitted={at: recipe.fitted[index] for at, index in enumerate(left) if index in recipe.fitted},
        )
        model.measure()
        own = losses_with(model, 4, 0, []).sum() / model.counts_N.sum()
        assert losses[dropped] == pytest.approx(float(own), rel=1e-6)


def test_healing_helps(resident_of: InMemory, tmp_path: Path) -> None:
    """Nearer to the original at the end of every healed span, on text that was not fitted on."""
    resident = resident_of("llama")
    fresh = written_by(resident, 128)
    corpus = Corpus.of(fresh.input_ids[:96], description="random", documents=1)
    fresh = Corpus.of(fresh.input_ids[96:], description="random", documents=1)
    run, _ = go(tmp_path / "run", resident, "come", 4, corpus=corpus, in_loop=ClosedFormSettings())
    recipe = run.recipe(4)
    target = residual_stream(resident, fresh)

    @torch.no_grad()
    def states(recipe: Recipe) -> list[torch.Tensor]:
        model, seen = assembled(recipe, resident), list[torch.Tensor]()
        for layer in model.get_submodule("model.layers").children():
            layer.register_forward_hook(lambda _, __, out: seen.append(out))
        model(fresh.input_ids)
        return seen

    found, bare = states(recipe), states(replace(recipe, fitted={}))
    assert recipe.fitted
    for index in recipe.fitted:
        wanted = target[recipe.spans[index][1]]
        errors = [float(((h[index].double() - wanted).square().sum(-1)).mean()) for h in (found, bare)]
        assert errors[0] < 0.9 * errors[1]


# Which layers


def healed_after(
    resident: LoadedModel, ops: list[Op], start: int, count: int, op: Op | None
) -> tuple[Intermediate, dict[int, Mapping[str, Any]], dict[str, Any]]:
    corpus = written_by(resident)
    model = Intermediate(resident, corpus, ops)
    model.measure()
    evidence = take(StepHealer(model, SETTINGS), start, count, op)
    fitted = {index: tensors for index, tensors in enumerate(model.fitted) if tensors}
    fresh = Intermediate(resident, corpus, model.ops, fitted=fitted)
    fresh.measure()
    assert torch.equal(model.losses_N, fresh.losses_N)
    assert [a.influence for a in model.measures] == [b.influence for b in fresh.measures]
    return model, fitted, evidence


def test_the_layer_before_a_hole_is_healed(resident_of: InMemory) -> None:
    resident = resident_of("llama")
    for start, count, layer in ((3, 1, 2), (2, 2, 1), (5, 1, 4), (4, 2, 3)):
        _, fitted, evidence = healed_after(resident, list(WHOLE), start, count, None)
        assert {fit["layer"] for fit in evidence["output_projections"]} == {layer}
        assert set(fitted) == {layer}


def test_without_the_first_layer_the_next_stands_for_it(resident_of: InMemory) -> None:
    model, fitted, evidence = healed_after(resident_of("llama"), list(WHOLE), 0, 1, None)
    assert derive_spans(model.ops, families.DEPTH)[0] == (0, 2)
    assert set(fitted) == {0} == {fit["layer"] for fit in evidence["output_projections"]}


def test_where_the_second_of_two_stays_the_layer_before_them_is_healed(resident_of: InMemory) -> None:
    _, fitted, _ = healed_after(resident_of("llama"), list(WHOLE), 2, 2, select(3))
    assert set(fitted) == {1}


def test_two_layers_in_one_step(resident_of: InMemory) -> None:
    """A joined layer that is what stays of a merge is fitted anew, after the layer that now covers the hole."""
    resident = resident_of("llama")
    joined = shared(resident.architecture, (3, 4))
    ops = [select(0), select(1), select(2), joined, select(5)]
    model, fitted, evidence = healed_after(resident, ops, 2, 2, joined)
    assert [fit["layer"] for fit in evidence["output_projections"]] == [1, 1, 1, 2, 2, 2]
    assert set(fitted) == {1, 2} and model.depth == 4
    # The original was not what was measured, so it was run: 6; 5 as it was; 3 layers without and with the fits on an
    # eighth of the sequences; 3 fits each, and 1 layer between them; and 3 with the fits.
    assert model.layer_forwards == pytest.approx(6 + 5 + 2 * 3 / 8 + 6 + 1 + 3)


def test_what_was_fitted_on_other_layers_stays(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), written_by(resident_of("llama"))
    model = Intermediate(resident, corpus, WHOLE)
    model.measure()
    healer = StepHealer(model, SETTINGS)
    take(healer, 4, 1, None)
    before = model.fitted[3]
    assert before
    take(healer, 1, 1, None)
    assert model.fitted[2] is before and model.fitted[0]
    assert [fitted is not None for fitted in model.fitted] == [True, False, True, False]
    # The original's states were measured.
    assert model.layer_forwards == pytest.approx(6 + (2 * 2 / 8 + 3 + 2) + (2 * 4 / 8 + 3 + 4))


def test_where_a_span_grows_what_was_fitted_is_the_starting_point(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), written_by(resident_of("llama"))
    model = Intermediate(resident, corpus, WHOLE)
    model.measure()
    healer = StepHealer(model, SETTINGS)
    assert take(healer, 3, 1, None)["taken"]
    once, held = model.fitted[2], slice(0, None, 8)
    wanted = residual_stream(resident, corpus)[5][held]
    now = model.hidden.rows(3, list(range(0, 96, 8)), torch.device("cpu")).double()
    error = float(((wanted - now).square().sum(-1) / wanted.square().sum(-1)).mean())
    evidence = take(healer, 3, 1, None)
    assert derive_spans(model.ops, families.DEPTH)[2] == (2, 5)
    assert evidence["output_projections"][0]["error_before"] == pytest.approx(error, rel=1e-4)
    if evidence["taken"]:
        assert model.fitted[2] is not None and set(model.fitted[2]) >= set(once or ())
    else:
        assert model.fitted[2] is once


def test_a_fit_that_raises_the_loss_is_not_taken(resident_of: InMemory) -> None:
    """On text that means nothing to the model, being nearer to the original may cost."""
    resident, seen = resident_of("llama"), set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, families.VOCABULARY, (16, 13), generator=generator)
        corpus = Corpus.of(ids, description="random", documents=1)
        model = Intermediate(resident, corpus, WHOLE)
        model.measure()
        spent = model.layer_forwards
        evidence = take(StepHealer(model, ClosedFormSettings()), 3, 1, None)
        bare = Intermediate(resident, corpus, [*WHOLE[:3], *WHOLE[4:]])
        bare.measure()
        before = float(losses_with(bare, bare.depth, 0, [])[::8].sum() / bare.counts_N[::8].sum())
        assert evidence["held_out_loss"][0] == pytest.approx(before, rel=1e-6)
        assert evidence["taken"] == (evidence["held_out_loss"][1] < before)
        seen.add(evidence["taken"])
        if evidence["taken"]:
            assert model.fitted[2]
        else:
            assert model.fitted == [None] * 5
            assert torch.equal(model.losses_N, bare.losses_N)
        assert model.layer_forwards - spent == pytest.approx(2 * 3 / 8 + 3 + 3)
    assert seen == {True, False}


# Stopped and started again


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("method", ["come", "come-p", "sleb", "laco", "come-p removals"])
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_stopped_and_started_again(
    method: str, steps: int, resident_of: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = resident_of("llama")
    settings: Any = LacoSettings(merge=2) if method == "laco" else ComePSettings(granularity=3)
    if method == "come-p removals":
        method, settings = "come-p", ComePSettings(granularity=2, removals=True, heal_in_loop=True)
    corpus = written_by(resident, 32)
    go(tmp_path / "undisturbed", resident, method, 2, settings=settings, corpus=corpus)
    append, done = Ladder.append, []

    def stops(self: Ladder, entry: Mapping[str, Any], recipe: Recipe) -> None:
        append(self, entry, recipe)
        done.append(entry)
        if len(done) > steps:  # the recipes of this step are there, and half of its line
            path = self.path / "log.jsonl"
            path.write_bytes(path.read_bytes()[:-40])
            raise Stopped

    monkeypatch.setattr(Ladder, "append", stops)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", resident, method, 2, settings=settings, corpus=corpus)
    monkeypatch.undo()
    assert len(Ladder(tmp_path / "stopped").depths()) == steps
    go(tmp_path / "stopped", resident, method, 2, settings=settings, corpus=corpus)
    folders = tmp_path / "stopped", tmp_path / "undisturbed"
    files = [{path.name: path.read_bytes() for path in sorted((each / "ladder").iterdir())} for each in folders]
    assert files[0] == files[1] and any(name.endswith(".safetensors") for name in files[0])
    logs = [
        [{key: value for key, value in entry.items() if key not in ("seconds", "layer_forwards")} for entry in log]
        for log in (Ladder(each).log() for each in folders)
    ]
    assert logs[0] == logs[1]


# From the outside


def test_methods_that_can() -> None:
    assert progressive_methods() == ["come", "come-p", "laco", "sleb"]


@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_methods_that_decide_once_cannot(verb: str) -> None:
    out = {"plan": "--run", "compress": "-o"}[verb]
    words = ["no-such-model", out, "run", "--layers", "4", "--method", "shortgpt", "--heal-in-loop"]
    with pytest.raises(UserError, match="--heal-in-loop is an option of come, come-p, laco and sleb"):
        parse(getattr(intarsia, verb), verb, words)


def test_planned_with_healing(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    """The verb: the estimate holds, the recipe says how it came to be, other settings are refused."""
    model, target = str(model_folder("llama")), Target(layers=3)
    text = TextSpec(sources=(str(text_file),), tokens=512, seq_len=32)
    fitted = 0
    for number, settings in enumerate(
        (
            ComeSettings(),
            ComePSettings(granularity=2),
            ComePSettings(granularity=2, racing=False, removals=True),
            SlebSettings(),
            LacoSettings(merge=3),
        )
    ):
        folder, healed = tmp_path / str(number), replace(settings, heal_in_loop=True)
        planned = intarsia.plan(model, folder, target, method=healed, text=text)
        assert planned.depths[-1] == 3
        assert planned.layer_forwards <= planned.estimate.passes_at_most * 6 + 1e-9
        plain = intarsia.plan(model, folder, target, method=settings, text=text, dry_run=True).estimate
        assert planned.estimate.passes_at_most > plain.passes_at_most
        assert planned.estimate.hidden_bytes == 2 * plain.hidden_bytes == 2 * 7 * 512 * families.WIDTH * 4
        recipe = Ladder(folder).recipe(3)
        fitted += len(recipe.fitted)
        assert recipe.provenance["settings"]["heal_in_loop"] is True
        with pytest.raises(UserError, match="heal_in_loop"):
            intarsia.plan(model, folder, target, method=settings, text=text)
    assert fitted


def test_the_final_heal_starts_from_the_loop_s_or_from_bare_layers(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    model = str(model_folder("llama"))
    given: dict[str, Any] = {
        "text": TextSpec(sources=(str(text_file),), tokens=512, seq_len=32),
        "method": ComeSettings(heal_in_loop=True),
        "evaluation": EvalSpec(speed=False, answers=2),
    }
    result = intarsia.compress(model, tmp_path / "out", Target(layers=4), heal="none", **given)
    fitted = Ladder(tmp_path / "out.run").recipe(4).fitted
    assert result.healed is not None and result.healed["method"] == "closed-form in the loop"
    assert result.healed["fitted_output_projections"] == sum(len(tensors) for tensors in fitted.values()) > 0
    assert result.after is not None and result.after.perplexity_without_heal is not None
    out = Output(path=tmp_path / "more", run=tmp_path / "out.run")
    again = intarsia.compress(model, out, Target(layers=4), **given)
    assert again.healed is not None and again.after is not None
    assert again.healed["start"] in (AS_IT_IS, "the recipe with nothing fitted")
    continued = again.healed["start"] == AS_IT_IS or not again.healed["taken"]
    assert again.healed.get("fitted_in_loop") == (result.healed["fitted_output_projections"] if continued else None)
    assert again.after.perplexity_without_heal == result.after.perplexity_without_heal
