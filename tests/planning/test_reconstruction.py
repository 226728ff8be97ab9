"""Spans chosen by what a closed-form fit leaves, against brute force with numpy."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from intarsia.anatomy.spec import PARTS
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.closed_form_settings import RIDGES, ClosedFormSettings
from intarsia.planning import repair
from intarsia.planning.allocate import counts, ratios
from intarsia.planning.come import Come
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.ladder import climb, planner_of
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.settings import ComeSettings
from intarsia.recipe.algebra import concat_of
from intarsia.recipe.ops import Op
from intarsia.recipe.recipe import Variant, derive_spans, identity
from tests import families
from tests.conftest import InMemory
from tests.planning.by_hand import real_tokens, residual_stream, with_layers
from tests.planning.conftest import corpus_of
from tests.recipes_by_hand import select

WHOLE = [select(layer) for layer in range(families.DEPTH)]
SETTINGS = ComeSettings(span_choice="reconstruction")


def measured(resident: Resident, corpus: Corpus, ops: Any = WHOLE, **changes: Any) -> Intermediate:
    model = Intermediate(resident, corpus, ops, batch_tokens=2 * corpus.seq_len, **changes)
    model.measure()
    return model


def joined(model: Intermediate, start: int) -> Op:
    """The layer of the prior form, from measures and weights."""
    anatomy = model.anatomy
    shares = ratios([model.measures[index].influence for index in (start, start + 1)], 1.0)
    numbers = {part: counts(shares, anatomy.n_pieces(part)) for part in PARTS}
    kept = []
    for position, index in enumerate((start, start + 1)):
        best = {}
        for part in PARTS:
            weight = model.modules[index].get_submodule(anatomy.writer(part).module).weight.double()
            scores = weight.abs().sum(0) * model.measures[index].channels[part].mean_absolute_C.double()
            by_piece = scores.view(anatomy.n_pieces(part), -1).mean(1)
            best[part] = sorted(by_piece.argsort(descending=True, stable=True)[: numbers[part][position]].tolist())
        kept.append(best)
    weights = [{part: numbers[part][index] / anatomy.n_pieces(part) for part in PARTS} for index in range(2)]
    return concat_of(model.ops[start : start + 2], kept, weights=weights, norm="fold", anatomy=anatomy)


def error_by_hand(resident: Resident, corpus: Corpus, ops: list[Op], start: int) -> float:
    """Relative squared error that the best strength leaves on every eighth sequence, by a plain model and numpy."""
    target = residual_stream(resident, corpus)[derive_spans(ops, families.DEPTH)[start][1]]
    model = with_layers(resident, [dict(resident.module(op).state_dict()) for op in ops])
    layer = model.get_submodule(resident.anatomy.family.layers_module)[start]
    seen: dict[str, torch.Tensor] = {}
    layer.get_submodule(resident.anatomy.writer("mlp").module).register_forward_pre_hook(
        lambda _, args: seen.update(x=args[0])
    )
    layer.register_forward_hook(lambda _, args, out: seen.update(out=out[0] if isinstance(out, tuple) else out))
    mask = real_tokens(corpus)
    with torch.no_grad():
        model(corpus.input_ids, attention_mask=mask.long(), use_cache=False)
    held = (torch.arange(len(corpus)) % 8 == 0)[:, None].expand_as(mask)[mask].numpy()
    wanted = target[mask].numpy()
    root = 1 / np.linalg.norm(wanted, axis=1, keepdims=True)
    x = seen["x"].reshape(*mask.shape, -1)[mask].double().numpy() * root
    missing = (wanted - seen["out"][mask].double().numpy()) * root
    # Ridge regression as least squares with rows of their own.
    scale = np.mean(np.sum(x[~held] ** 2, axis=0))
    left = [np.mean(np.sum(missing[held] ** 2, axis=1))]
    for strength in RIDGES:
        rows = np.concatenate([x[~held], np.sqrt(strength * scale) * np.eye(x.shape[1])])
        values = np.concatenate([missing[~held], np.zeros((x.shape[1], missing.shape[1]))])
        change, *_ = np.linalg.lstsq(rows, values, rcond=None)
        left.append(np.mean(np.sum((missing[held] - x[held] @ change) ** 2, axis=1)))
    return float(min(left))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "opt", "mistral"])
def test_the_least_error_by_brute_force(family: str, padded: bool, resident_of: InMemory) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded, sequences=32)
    model = measured(resident, corpus)
    spent = model.layer_forwards
    step = Come(SETTINGS, posterior=False).decide(model, 5, [])
    assert step is not None
    assert model.layer_forwards - spent == pytest.approx(5)  # one a span; the original is what was measured
    by_hand = {
        start: error_by_hand(resident, corpus, [*WHOLE[:start], joined(model, start), *WHOLE[start + 2 :]], start)
        for start in range(5)
    }
    found = {int(start): error for start, error in step.evidence["span_scores"].items()}
    assert found == pytest.approx(by_hand, rel=2e-3)
    assert step.start == min(by_hand, key=lambda start: by_hand[start])
    assert step.op == joined(model, step.start)
    assert step.evidence["span_choice"] == "reconstruction"


def test_the_posterior_form_races_the_spans_of_least_error(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of(sequences=16)
    settings = ComeSettings(span_choice="reconstruction", spans=2, granularity=2, racing=False)
    step = Come(settings, posterior=True).decide(measured(resident, corpus), 5, [])
    prior = Come(SETTINGS, posterior=False).decide(measured(resident, corpus), 5, [])
    assert step is not None and prior is not None
    assert step.evidence["span_scores"] == prior.evidence["span_scores"]
    errors = {int(start): error for start, error in step.evidence["span_scores"].items()}
    two = sorted(errors, key=lambda start: errors[start])[:2]
    assert two[0] == prior.start
    assert {entry["start"] for entry in step.evidence["grid"]} == set(two)


@pytest.mark.parametrize("in_loop", [None, ClosedFormSettings()], ids=["", "in-loop"])
def test_every_later_choice_is_what_a_fresh_start_would_choose(
    in_loop: Any, resident_of: InMemory, tmp_path: Path
) -> None:
    """What is kept of earlier steps is what it would be now: same errors, for fewer layer-forwards."""
    resident, corpus = resident_of("llama"), corpus_of(sequences=16)
    whole = identity(Variant(name="base", model="m"), families.DEPTH)
    run = RunFolder.start(tmp_path / "run", {})
    model = Intermediate(resident, corpus, WHOLE, batch_tokens=2 * corpus.seq_len)
    climb(planner_of("come", SETTINGS), model, whole, 2, run, in_loop=in_loop)
    log = run.log()
    assert [entry["layers"] for entry in log] == [5, 4, 3, 2]
    for before, after in pairwise(log):
        recipe = run.recipe(before["layers"])
        fresh = measured(resident, corpus, recipe.layers, fitted=recipe.fitted)
        step = Come(SETTINGS, posterior=False).decide(fresh, 2, [])
        assert step is not None
        assert after["evidence"]["span_scores"] == step.evidence["span_scores"]
        assert after["merged"] == [step.start, step.start + 2]
        if in_loop is None:
            # One a span that is not as it was, and what lies behind this merge.
            alike, spans = max(0, before["merged"][0] - 1), recipe.depth - 1
            behind = after["layers"] - after["merged"][0]
            assert after["layer_forwards"] <= spans - alike + behind + 1e-6


def test_only_so_many_tokens_are_fitted_on(resident_of: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, corpus = resident_of("llama"), corpus_of(sequences=32)
    monkeypatch.setattr(repair, "RECONSTRUCTION_TOKENS", 16 * corpus.seq_len + 5)
    model = measured(resident, corpus)
    spent = model.layer_forwards
    step = Come(SETTINGS, posterior=False).decide(model, 5, [])
    assert step is not None
    assert model.layer_forwards - spent == pytest.approx(5 * 16 / 32)
    part = Corpus.of(corpus.input_ids[:16], description="the first half", documents=1)
    by_hand = error_by_hand(resident, part, [*WHOLE[:2], joined(model, 2), *WHOLE[4:]], 2)
    assert step.evidence["span_scores"]["2"] == pytest.approx(by_hand, rel=2e-3)


def test_one_sequence_is_not_fitted_on(resident_of: InMemory) -> None:
    """All of it is held out: the error of the layers as they are decides."""
    resident, corpus = resident_of("llama"), corpus_of(sequences=1)
    step = Come(SETTINGS, posterior=False).decide(measured(resident, corpus), 5, [])
    assert step is not None
    assert min(step.evidence["span_scores"].values()) > 0.01
    scores = step.evidence["span_scores"]
    assert step.start == min(map(int, scores), key=lambda start: scores[str(start)])


def test_a_layer_that_overflows_is_named(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of(sequences=16)
    model = measured(resident, corpus)
    original = model.original(16)
    with torch.inference_mode():
        original.at(4, slice(0, 1))[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="reconstruction at layer 2"):
        Come(SETTINGS, posterior=False).decide(model, 5, [])
