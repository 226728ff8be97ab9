"""What was measured once comes back without running anything."""

from __future__ import annotations

from pathlib import Path

import torch

from intarsia.activations.hidden_store import HiddenStore, MemoryBudget
from intarsia.data.corpus import Corpus
from intarsia.pruning.intermediate import Intermediate
from tests import families
from tests.conftest import InMemory
from tests.recipes_by_hand import select

WHOLE = [select(layer) for layer in range(families.DEPTH)]


def corpus() -> Corpus:
    ids = torch.randint(2, families.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    return Corpus.of(ids, mask=None, description="made up", documents=1)


def everything(model: Intermediate) -> list[torch.Tensor]:
    """All that is measured on a model."""
    hidden = [model.hidden_at(depth, slice(0, 4)) for depth in range(model.depth + 1)]
    influences = torch.tensor([measure.influence for measure in model.measures])
    distances = torch.tensor([model.span_distance(start, 2, "all-tokens") for start in range(model.depth - 1)])
    return [*hidden, influences, distances, model.losses_N.clone()]


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(*pair) for pair in zip(ones, others, strict=True))


def test_rewind_is_the_whole_model_again(resident_of: InMemory) -> None:
    for memory_bytes in (None, 0, 4 * 16 * families.WIDTH * 4 * 9):  # in memory, on disk, and some of each
        model = Intermediate(resident_of("llama"), corpus(), WHOLE, memory_budget=MemoryBudget(memory_bytes))
        model.refresh()
        before = everything(model)
        model.keep()
        assert same(everything(model), before)
        assert model.layer_forwards == 6

        for start in (3, 1):
            model.replace(start, 1, None)
        changed = everything(model)
        fresh = Intermediate(resident_of("llama"), corpus(), [select(layer) for layer in (0, 2, 4, 5)])
        fresh.measure()
        assert same(changed, everything(fresh))

        spent = model.layer_forwards
        model.rewind()
        model.refresh()
        assert model.layer_forwards == spent
        assert model.ops == WHOLE
        assert same(everything(model), before)

        model.replace(4, 1, None)  # and once more: what is kept stays kept
        model.rewind()
        assert same(everything(model), before)
        for each in (model, fresh):
            each.close()


def test_the_original_is_what_was_measured_and_stays(resident_of: InMemory) -> None:
    for kept, memory_bytes in ((False, None), (True, None), (False, 0)):
        model = Intermediate(resident_of("llama"), corpus(), WHOLE, memory_budget=MemoryBudget(memory_bytes))
        model.refresh()
        before = [model.hidden_at(depth, slice(0, 4)).clone() for depth in range(model.depth + 1)]
        if kept:
            model.keep()
        else:
            model.original()
        model.replace(1, 2, None)
        original, spent = model.original(), model.layer_forwards
        model.replace(0, 1, None)
        assert model.original() is original
        assert (original.cost, model.layer_forwards) == (0, spent + model.depth)
        for depth, states in enumerate(before):
            assert torch.equal(original.at(depth, slice(0, 4)), states)
        assert not torch.equal(model.hidden_at(2, slice(0, 4)), before[2])
        model.close()


def test_an_original_that_was_not_measured_is_run(resident_of: InMemory) -> None:
    whole = Intermediate(resident_of("llama"), corpus(), WHOLE)
    whole.refresh()
    model = Intermediate(resident_of("llama"), corpus(), WHOLE[1:])
    model.refresh()
    spent, original = model.layer_forwards, model.original()
    assert (original.cost, model.layer_forwards - spent) == (6, 6.0)
    torch.testing.assert_close(original.at(3, slice(0, 2)), whole.hidden_at(3, slice(0, 2)))
    for each in (model, whole):
        each.close()


def test_a_store_that_holds(tmp_path: Path) -> None:
    store = HiddenStore((2, 1, 3), torch.float32, memory_budget=MemoryBudget(0, tmp_path))
    for depth in (0, 1):
        store.put(depth, 0, torch.full((2, 1, 3), float(depth)))
    held = list(tmp_path.rglob("*.bin"))
    store.hold()
    store.put(1, 0, torch.full((2, 1, 3), 7.0))
    store.put(2, 0, torch.full((2, 1, 3), 8.0))
    cpu = torch.device("cpu")
    assert [float(store.get(depth, 0, 2, cpu).mean()) for depth in store.depths()] == [0.0, 7.0, 8.0]
    assert [float(store.rows(depth, [1], cpu).mean()) for depth in store.depths()] == [0.0, 7.0, 8.0]
    assert len(list(tmp_path.rglob("*.bin"))) == 4
    store.restore()
    assert store.depths() == [0, 1]
    assert float(store.get(1, 0, 2, cpu).mean()) == 1.0
    assert set(tmp_path.rglob("*.bin")) == set(held)
    store.close()
    assert list(tmp_path.iterdir()) == []
