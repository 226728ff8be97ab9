"""Methods that decide once: ShortGPT, SLEB, angular, reverse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from intarsia.building.materialize import assembled
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.shortgpt import ShortGpt
from intarsia.pruning.methods.sleb import Sleb, SlebSettings
from intarsia.pruning.step import PlanSettings
from intarsia.recipe.recipe import Variant, identity
from intarsia.registry import planners
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import (
    METHODS,
    climb,
    kept_layers,
    ladder_in,
    ladder_of,
    planner_of,
    real_tokens,
    residual_stream,
)
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import select

WHOLE = [select(layer) for layer in range(families.DEPTH)]


def layers_of(run: Ladder, depth: int) -> list[int]:
    return [op.sources[0].layer for op in run.recipe(depth).layers]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_shortgpt_drops_by_influence_measured_once(family: str, resident_of: InMemory, tmp_path) -> None:
    resident, corpus = resident_of(family), corpus_of()
    model = Intermediate(resident, corpus, WHOLE)
    model.measure()
    influence = [measure.influence for measure in model.measures]
    order = sorted(range(families.DEPTH), key=lambda layer: influence[layer])
    model = Intermediate(resident, corpus, WHOLE)
    run = ladder_in(tmp_path / "run", {})
    assert (
        climb(ShortGpt(PlanSettings()), model, identity(Variant(name="base", model="m"), families.DEPTH), 1, run)
        is None
    )
    assert run.depths() == [5, 4, 3, 2, 1]
    for depth in run.depths():
        assert layers_of(run, depth) == sorted(order[families.DEPTH - depth :])
    assert model.layer_forwards == pytest.approx(families.DEPTH)
    assert [entry["loss"] for entry in run.log()] == [None] * 5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sleb_drops_what_costs_least(family: str, resident_of: InMemory, tmp_path) -> None:
    resident, corpus = resident_of(family), corpus_of()

    def loss(layers: list[int]) -> float:
        model = Intermediate(resident, corpus, [select(layer) for layer in layers])
        model.measure()
        return model.loss

    run = ladder_in(tmp_path / "run", {})
    model = Intermediate(resident, corpus, WHOLE)
    assert climb(Sleb(SlebSettings()), model, identity(Variant(name="base", model="m"), families.DEPTH), 3, run) is None
    left = list(range(families.DEPTH))
    for entry in run.log():
        losses = {layer: loss([other for other in left if other != layer]) for layer in left}
        dropped = min(losses, key=lambda layer: losses[layer])
        left.remove(dropped)
        assert entry["evidence"]["dropped"] == f"base:{dropped}"
        assert entry["evidence"]["losses"] == pytest.approx(list(losses.values()), rel=1e-6)
        assert layers_of(run, entry["layers"]) == left
        assert entry["loss"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_sleb_by_divergence_drops_what_changes_the_distribution_least(resident_of: InMemory, tmp_path) -> None:
    """KL over the whole vocabulary, of the models by themselves; the loss that is reported stays the loss."""
    resident, corpus = resident_of("llama"), corpus_of()

    def log_p(layers: list[int]) -> torch.Tensor:
        recipe = identity(Variant(name="base", model="m"), families.DEPTH).with_layers([select(at) for at in layers])
        with torch.no_grad():
            return assembled(recipe, resident)(corpus.input_ids).logits[:, :-1].double().log_softmax(-1)

    whole = log_p(list(range(families.DEPTH)))
    run = ladder_in(tmp_path / "run", {})
    model = Intermediate(resident, corpus, WHOLE)
    model.criterion = "kl"
    start = identity(Variant(name="base", model="m"), families.DEPTH)
    assert climb(Sleb(SlebSettings(criterion="kl", racing=False)), model, start, 4, run) is None
    left = list(range(families.DEPTH))
    for entry in run.log():
        without = {layer: log_p([other for other in left if other != layer]) for layer in left}
        kl = {layer: float((whole.exp() * (whole - found)).sum(-1).mean()) for layer, found in without.items()}
        shown = dict(zip(left, entry["evidence"]["losses"], strict=True))
        for layer in left:  # the least likely tokens are one bucket: a lower bound
            assert 0.5 * kl[layer] < shown[layer] <= kl[layer] * (1 + 1e-5)
        dropped = min(left, key=lambda layer: shown[layer])
        assert entry["evidence"]["dropped"] == f"base:{dropped}"
        left.remove(dropped)
        assert entry["loss"] > 1.0


def test_sleb_races_for_less(resident_of: InMemory) -> None:
    """What leaves early is worse than what is chosen; the chosen one has seen all of the set."""
    resident, corpus = resident_of("llama"), corpus_of(sequences=48)
    steps, spent = {}, {}
    for racing in (False, True):
        model = Intermediate(resident, corpus, WHOLE)
        model.measure()
        before = model.layer_forwards
        steps[racing] = Sleb(SlebSettings(racing=racing)).decide(model, 5, [])
        spent[racing] = model.layer_forwards - before
    exhausted, raced = steps[False], steps[True]
    assert exhausted is not None and raced is not None
    assert exhausted.evidence["sequences"] == [48] * families.DEPTH
    assert spent[False] == sum(families.DEPTH - 1 - start for start in range(families.DEPTH))
    seen, losses = raced.evidence["sequences"], exhausted.evidence["losses"]
    assert seen[raced.start] == 48 and min(seen) < 48
    assert spent[True] == pytest.approx(
        sum((families.DEPTH - 1 - start) * seen[start] / 48 for start in range(families.DEPTH))
    )
    assert losses[seen.index(min(seen))] > losses[raced.start]
    finalists = [start for start in range(families.DEPTH) if seen[start] == 48]
    assert raced.start == min(finalists, key=lambda start: losses[start])


def test_every_method_has_a_planner_and_words_for_the_help() -> None:
    for method in METHODS:
        assert planner_of(method).reason() and planners.get(method).object.__doc__


def test_from_the_end(resident_of: InMemory, tmp_path: Path) -> None:
    run, stopped, model = ladder_of("reverse", resident_of("llama"), corpus_of(), tmp_path / "run", 2)
    assert stopped is None and model.layer_forwards == 0
    assert [kept_layers(run, depth) for depth in (5, 4, 3, 2)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3],
        [0, 1, 2],
        [0, 1],
    ]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "mistral"])
def test_the_best_block_at_every_depth(family: str, padded: bool, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    states = residual_stream(resident, corpus)
    last = [int(row.sum()) - 1 for row in real_tokens(corpus)]
    run, stopped, _ = ladder_of("angular", resident, corpus, tmp_path / "run", 1)
    assert stopped is None and run.depths() == [5, 4, 3, 2, 1]
    for n in range(1, families.DEPTH):
        distances = []
        for start in range(families.DEPTH - n + 1):
            angles = [
                math.acos(float(torch.cosine_similarity(states[start][row, end], states[start + n][row, end], dim=0)))
                for row, end in enumerate(last)
            ]
            distances.append(sum(angles) / len(angles) / math.pi)
        assert run.log()[0]["evidence"]["distances"][n - 1] == pytest.approx(distances, abs=1e-6)
        best = distances.index(min(distances))
        kept = [layer for layer in range(families.DEPTH) if not best <= layer < best + n]
        assert kept_layers(run, families.DEPTH - n) == kept


def test_blocks_need_not_be_nested(resident_of: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer: the fifth. Two: the first and second."""
    table = [[9.0, 9, 9, 9, 1, 9], [1.0, 9, 9, 9, 9], [9.0, 9, 9, 1], [9.0, 1, 9], [9.0, 1]]
    monkeypatch.setattr("intarsia.pruning.methods.angular.distances", lambda model: table)
    resident, corpus, folder = resident_of("llama"), corpus_of(), tmp_path / "run"
    run, _, _ = ladder_of("angular", resident, corpus, folder, 5)
    monkeypatch.undo()
    run, _, model = ladder_of("angular", resident, corpus, folder, 1)  # resumes from the recorded steps
    assert model.layer_forwards == 0
    kept = [[0, 1, 2, 3, 5], [2, 3, 4, 5], [0, 1, 2], [0, 5], [0]]
    assert [kept_layers(run, depth) for depth in (5, 4, 3, 2, 1)] == kept
    assert run.recipe(4).spans == ((0, 3), (3, 4), (4, 5), (5, 6))
