"""The evolutionary search against every model there is, and what it repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.evolve import EvolveSettings, pairs, words_of
from intarsia.recipe.algebra import half_layers
from intarsia.recipe.recipe import Op
from intarsia.recipe.schema import content_hash
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import kept_layers, ladder_in, ladder_of, planner_of
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import select

TARGET = 4


def models(depth: int, target: int, *, half: bool) -> Iterator[tuple[int, ...]]:
    """All sub-blocks that `target` whole layers can be made of."""
    for kept in itertools.combinations(range(2 * depth), 2 * target):
        layers = zip(kept[::2], kept[1::2], strict=True)
        alternate = all(sub_block % 2 == place % 2 for place, sub_block in enumerate(kept))
        if alternate and (half or all(first + 1 == second for first, second in layers)):
            yield kept


@pytest.mark.parametrize("half", [True, False])
def test_what_comes_back_leaves_whole_layers(half: bool) -> None:
    wanted = set(models(5, 3, half=half))
    reached = set()
    for kept in models(5, 2, half=half):
        found = {tuple(sorted((*kept, *pair))) for pair in pairs(kept, 5, half=half)}
        assert found == {other for other in wanted if set(kept) < set(other)}
        reached |= found
    assert reached == wanted


def test_words() -> None:
    kept = [place for place in range(24) if place not in (4, 5, 6, 7, 13, 14, 20, 21)]
    assert words_of(kept, 12) == "layers 2 to 3; mlp 6 to attention 7; layer 10"


@pytest.mark.parametrize("half", [True, False])
def test_it_finds_the_best_of_all_models(half: bool, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of("llama"), corpus_of(padded=True)

    def layers(kept: tuple[int, ...]) -> list[Op]:
        found = zip(kept[::2], kept[1::2], strict=True)
        return [
            select(first // 2)
            if first + 1 == second
            else half_layers(select(first // 2), select(second // 2), "fold", resident.architecture)
            for first, second in found
        ]

    def loss(ops: list[Op]) -> float:
        model = Intermediate(resident, corpus, ops)
        model.measure()
        return model.loss

    losses = {kept: loss(layers(kept)) for kept in models(families.DEPTH, TARGET, half=half)}
    best = min(losses, key=losses.__getitem__)
    settings = EvolveSettings(generations=30, offspring=8, criterion="loss", half_layers=half)
    run, stopped, model = ladder_of("evolve", resident, corpus, tmp_path / "run", TARGET, settings)
    assert stopped is None and run.depths() == [TARGET]
    assert list(run.recipe(TARGET).layers) == layers(best)
    (entry,) = run.log()
    found = entry["evidence"]["losses"]
    assert len(found) == 31 and found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(losses[best], rel=1e-6)
    assert entry["evidence"]["evaluated"] <= len(losses)
    planner = planner_of("evolve", settings)
    assert model.layer_forwards <= planner.forwards_at_most(resident.architecture, TARGET, len(corpus))


@pytest.mark.parametrize("family", [pytest.param("gemma3", marks=pytest.mark.exhaustive), "llama"])
def test_a_stopped_search_resumes(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of(family), corpus_of()
    settings = EvolveSettings(generations=6, offspring=6)
    whole, _, model = ladder_of("evolve", resident, corpus, tmp_path / "whole", TARGET, settings)
    again, _, _ = ladder_of("evolve", resident, corpus, tmp_path / "again", TARGET, settings)
    other = EvolveSettings(generations=6, offspring=6, search_seed=1)
    ladder_of("evolve", resident, corpus, tmp_path / "other", TARGET, other)
    assert again.run.log("search").entries() == whole.run.log("search").entries()
    assert Ladder(tmp_path / "other").run.log("search").entries() != whole.run.log("search").entries()
    # Killed in the middle of a line.
    lines = (tmp_path / "whole" / "search.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(lines) // 2
    ladder_in(tmp_path / "half")
    (tmp_path / "half" / "search.jsonl").write_text("".join(lines[:half]) + lines[half][:9], encoding="utf-8")
    resumed, _, second = ladder_of("evolve", resident, corpus, tmp_path / "half", TARGET, settings)
    assert content_hash(resumed.recipe(TARGET)) == content_hash(whole.recipe(TARGET))
    assert resumed.log()[0]["evidence"] == whole.log()[0]["evidence"]
    assert families.DEPTH < second.layer_forwards < model.layer_forwards


def test_it_starts_from_greedy_removal(resident_of: InMemory, tmp_path: Path) -> None:
    # One sequence, so that every stage and both methods decide by the same losses.
    resident, corpus = resident_of("llama"), corpus_of(sequences=1)
    settings = EvolveSettings(generations=0, half_layers=False)
    found, _, _ = ladder_of("evolve", resident, corpus, tmp_path / "evolve", 3, settings)
    greedy, _, _ = ladder_of("sleb", resident, corpus, tmp_path / "sleb", 3)
    assert kept_layers(found, 3) == kept_layers(greedy, 3)
    gone = sorted(set(range(families.DEPTH)) - set(kept_layers(found, 3)))
    assert gone[-1] - gone[0] > 2  # no block of adjacent layers
