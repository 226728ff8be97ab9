"""The model in the middle of pruning: what is measured, reused, kept and come back to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.activations.hidden_store import HiddenStore, MemoryBudget
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.pruning.intermediate import Intermediate
from intarsia.recipe.recipe import Op, Variant, identity
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import climb, ladder_in, losses_with, planner_of
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import select, shared

WHOLE = [select(layer) for layer in range(families.DEPTH)]


def opened(resident: LoadedModel, corpus: Corpus, ops: list[Any] = WHOLE, **changes: Any) -> Intermediate:
    # Two sequences a batch, so that batches and the shorter last one are covered.
    return Intermediate(resident, corpus, ops, **{"batch_tokens": 2 * corpus.seq_len, **changes})


def measured(resident: LoadedModel, corpus: Corpus, ops: list[Any] = WHOLE, **changes: Any) -> Intermediate:
    model = opened(resident, corpus, ops, **changes)
    model.measure()
    return model


def assert_same(found: Intermediate, expected: Intermediate) -> None:
    """Every number that is measured, to the bit."""
    assert found.depth == expected.depth
    assert torch.equal(found.losses_N, expected.losses_N)
    assert torch.equal(found.counts_N, expected.counts_N)
    assert found.loss == expected.loss
    assert len(found.measures) == len(expected.measures) == found.depth
    for a, b in zip(found.measures, expected.measures, strict=True):
        assert (a.influence, a.tokens) == (b.influence, b.tokens)
        for part in ("attention", "mlp"):
            assert a.channels[part].tokens == b.channels[part].tokens
            assert torch.equal(a.channels[part].mean_absolute_C, b.channels[part].mean_absolute_C)
            assert torch.equal(a.channels[part].root_mean_square_C, b.channels[part].root_mean_square_C)
    for start in range(found.depth):
        for count in range(1, found.depth - start + 1):
            for tokens in ("all-tokens", "last-token"):
                assert found.span_distance(start, count, tokens) == expected.span_distance(start, count, tokens)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_equal_to_the_model_itself(family: str, padded: bool, resident_of: InMemory) -> None:
    """Loss, influence and distance against the model's own forward and plain loops."""
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    model = measured(resident, corpus)
    ids = corpus.input_ids
    mask = torch.ones_like(ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
    with torch.no_grad():
        own = resident.model(ids, attention_mask=mask.long(), output_hidden_states=True)
    log_p = own.logits.double().log_softmax(-1)
    for row in range(len(ids)):
        real = int(mask[row].sum())
        loss = -sum(float(log_p[row, at, ids[row, at + 1]]) for at in range(real - 1))
        assert float(model.losses_N[row]) == pytest.approx(loss, rel=1e-5, abs=1e-5)
        assert int(model.counts_N[row]) == real - 1
    hidden = [h.double() for h in own.hidden_states[:-1]]
    for layer in range(families.DEPTH - 1):
        cosine = torch.nn.functional.cosine_similarity(hidden[layer], hidden[layer + 1], dim=-1)[mask]
        assert model.measures[layer].influence == pytest.approx(float(1 - cosine.mean()), abs=1e-6)
        assert model.measures[layer].tokens == corpus.tokens
    cosine = torch.nn.functional.cosine_similarity(hidden[1], hidden[4], dim=-1)
    by_hand = cosine.arccos() / torch.pi
    assert model.span_distance(1, 3, "all-tokens") == pytest.approx(float(by_hand[mask].mean()), abs=1e-5)
    ends = [float(by_hand[row, int(mask[row].sum()) - 1]) for row in range(len(ids))]
    assert model.span_distance(1, 3, "last-token") == pytest.approx(sum(ends) / len(ends), abs=1e-5)
    assert model.layer_forwards == pytest.approx(families.DEPTH)


def test_the_last_layer_on_the_residual_stream_or_behind_the_final_norm(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of()
    with torch.no_grad():
        own = resident.model(corpus.input_ids, output_hidden_states=True).hidden_states
    before, behind = own[-2].double(), own[-1].double()
    published = 1 - torch.nn.functional.cosine_similarity(before, behind, dim=-1).mean()
    ours, reference = measured(resident, corpus), measured(resident, corpus, after_final_norm=True)
    assert reference.measures[-1].influence == pytest.approx(float(published), abs=1e-6)
    assert abs(ours.measures[-1].influence - reference.measures[-1].influence) > 1e-3
    assert [m.influence for m in ours.measures[:-1]] == [m.influence for m in reference.measures[:-1]]
    assert ours.span_distance(4, 2, "all-tokens") != reference.span_distance(4, 2, "all-tokens")
    assert ours.span_distance(3, 2, "all-tokens") == reference.span_distance(3, 2, "all-tokens")
    assert ours.loss == reference.loss


CHANGES: dict[str, tuple[int, int, Any]] = {
    "merge two": (2, 2, (2, 3)),
    "merge three": (0, 2, (1, 0)),
    "merge the last": (4, 2, (5, 4)),
    "drop the first": (0, 1, None),
    "drop one": (3, 1, None),
    "drop the last": (5, 1, None),
    "drop the last two": (4, 2, None),
    "drop all but one": (1, 5, None),
}


@pytest.mark.parametrize("after_final_norm", [False, True], ids=["", "after-final-norm"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_leaves_what_a_fresh_start_would_measure(
    change: tuple[int, int, Any], padded: bool, after_final_norm: bool, resident_of: InMemory
) -> None:
    resident, corpus = resident_of("qwen3"), corpus_of(padded=padded)
    start, count, sources = change
    op = None if sources is None else shared(resident.architecture, sources)
    model = measured(resident, corpus, after_final_norm=after_final_norm)
    for first in range(families.DEPTH):  # fill what is kept between steps
        model.span_distance(first, 1, "all-tokens")
    model.replace(start, count, op)
    fresh = measured(resident, corpus, model.ops, after_final_norm=after_final_norm)
    assert_same(model, fresh)
    # After the final norm, a layer that becomes the last one is measured again.
    again = after_final_norm and op is None and start + count == families.DEPTH
    assert model.layer_forwards == pytest.approx(2 * families.DEPTH - start - count + (op is not None) + again)


def test_changes_add_up(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of()
    model = measured(resident, corpus)
    model.replace(3, 2, shared(resident.architecture, [3, 4]))
    model.replace(1, 1, None)
    model.replace(2, 2, shared(resident.architecture, [3, 5, 4], seed=1))
    assert_same(model, measured(resident, corpus, model.ops))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_spilled_hidden_states_change_nothing(family: str, padded: bool, resident_of: InMemory) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    spilled = measured(resident, corpus, memory_budget=MemoryBudget(0))
    assert_same(spilled, measured(resident, corpus))
    spilled.close()


CANDIDATES: dict[str, tuple[int, int, list[Op]]] = {
    "skip one": (2, 1, []),
    "skip two": (4, 2, []),
    "skip the first": (0, 1, []),
    "skip all": (0, 6, []),
    "other layer": (1, 1, [select(4)]),
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=CANDIDATES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_candidates_loss_is_what_replacing_gives(
    family: str, candidate: tuple[int, int, list[Op]], padded: bool, resident_of: InMemory
) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    start, count, ops = candidate
    model = measured(resident, corpus)
    found = losses_with(model, start, count, ops)
    assert model.depth == families.DEPTH
    assert_same(model, measured(resident, corpus))  # unchanged
    changed = list(WHOLE)
    changed[start : start + count] = ops
    if changed:
        assert torch.equal(found, measured(resident, corpus, changed).losses_N)
    part = slice(2, 5)
    torch.testing.assert_close(losses_with(model, start, count, ops, sequences=part), found[part], rtol=1e-6, atol=1e-6)


def test_a_merged_candidate(resident_of: InMemory) -> None:
    resident, corpus = resident_of("opt"), corpus_of()
    op = shared(resident.architecture, [2, 3])
    model = measured(resident, corpus)
    found = losses_with(model, 2, 2, [op])
    model.replace(2, 2, op)
    assert torch.equal(found, model.losses_N)


@contextmanager
def counted(model: Intermediate) -> Iterator[Counter[int]]:
    """Counts sequences that pass through every layer module, also through those made meanwhile."""
    passed: Counter[int] = Counter()
    handles = []
    resident = model.resident
    make = type(resident).module

    def hook(module: torch.nn.Module) -> None:
        handles.append(
            module.register_forward_hook(lambda module, args, output: passed.update({id(module): args[0].shape[0]}))
        )

    def made(op: Op, fitted: Any = None) -> torch.nn.Module:
        module = make(resident, op, fitted)
        if all(module is not layer for layer in resident.layers):
            kept.append(module)
            module._forward_hooks.clear()  # those of the layer that it was copied from
            hook(module)
        return module

    kept: list[torch.nn.Module] = []  # as long as a module lives, its id is its own
    for layer in resident.layers:
        hook(layer)
    resident.module = made  # type: ignore[method-assign]
    try:
        yield passed
    finally:
        del resident.module  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def test_layer_forwards_are_those_that_were_run(resident_of: InMemory) -> None:
    resident, corpus = resident_of("mistral"), corpus_of()
    model = opened(resident, corpus)
    with counted(model) as passed:

        def spent(expected: int) -> None:
            assert sum(passed.values()) == pytest.approx(expected * len(corpus))
            assert model.layer_forwards - before == pytest.approx(expected)

        before = 0.0
        model.measure()
        spent(6)
        assert all(passed[id(layer)] == len(corpus) for layer in resident.layers)

        passed.clear()
        before = model.layer_forwards
        losses_with(model, 3, 2, [shared(resident.architecture, [3, 4])])
        spent(2)
        assert not any(passed[id(layer)] for layer in resident.layers[:3])

        passed.clear()
        before = model.layer_forwards
        model.span_distance(2, 3, "all-tokens")
        spent(0)

        passed.clear()
        before = model.layer_forwards
        model.replace(3, 2, shared(resident.architecture, [3, 4]))
        spent(2)
        assert not any(passed[id(layer)] for layer in resident.layers[:3])

        passed.clear()
        before = model.layer_forwards
        losses_with(model, 0, 1, [], sequences=slice(0, 3))
        assert sum(passed.values()) == 4 * 3
        assert model.layer_forwards - before == pytest.approx(4 * 3 / len(corpus))


def test_a_layer_that_is_not_finite_is_named(checkpoint_of: Any) -> None:
    resident = LoadedModel(checkpoint_of("llama"), device=torch.device("cpu"))
    with torch.no_grad():
        resident.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="layer 2"):
        measured(resident, corpus_of())


def test_only_what_has_changed_is_measured_again(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of()
    model = Intermediate(resident, corpus, WHOLE)
    model.refresh()
    losses = model.losses_N.clone()
    assert model.layer_forwards == pytest.approx(families.DEPTH)
    model.refresh()
    model.become(WHOLE[:2])
    model.become(WHOLE)
    model.refresh()
    assert model.layer_forwards == pytest.approx(families.DEPTH)
    model.replace(4, 1, None)
    assert model.layer_forwards == pytest.approx(families.DEPTH + 1)
    model.become(WHOLE)
    model.refresh()  # layers 0 .. 3 are unchanged
    assert model.layer_forwards == pytest.approx(families.DEPTH + 1 + 2)
    assert torch.equal(model.losses_N, losses)
    fresh = Intermediate(resident, corpus, WHOLE)
    fresh.measure()
    assert [measure.influence for measure in model.measures] == [measure.influence for measure in fresh.measures]


@pytest.mark.parametrize("after_final_norm", [False, True])
def test_methods_share_a_pass_over_the_whole_model(
    after_final_norm: bool, resident_of: InMemory, tmp_path: Path
) -> None:
    """One after the other in one object, each decides as it would alone."""
    resident, corpus = resident_of("llama"), corpus_of()
    whole = identity(Variant(name="base", model="m"), families.DEPTH)
    together = Intermediate(resident, corpus, whole.layers, after_final_norm=after_final_norm)
    methods = ["shortgpt", "angular", "mka", "taylor", "come", "sleb", "laco", "shortgpt", "reverse"]
    for number, method in enumerate(methods):
        alone = Intermediate(resident, corpus, whole.layers, after_final_norm=after_final_norm)
        runs = []
        for name, model in (("together", together), ("alone", alone)):
            model.become(whole.layers)
            run = ladder_in(tmp_path / f"{number}-{name}", {})
            climb(planner_of(method), model, whole, 3, run)
            runs.append(run)
        assert [entry["hash"] for entry in runs[0].log()] == [entry["hash"] for entry in runs[1].log()]
        assert [entry["evidence"] for entry in runs[0].log()] == [entry["evidence"] for entry in runs[1].log()]
        if method in ("angular", "mka"):
            assert sum(entry["layer_forwards"] for entry in runs[0].log()) == 0.0


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
