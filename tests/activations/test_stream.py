"""The layer-by-layer runner against the model's own forward."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from intarsia.activations.hidden_store import HiddenStore, MemoryBudget
from intarsia.activations.stream import LayerStream
from tests import families
from tests.conftest import InMemory

TOKENS = 14


def batch(padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(2, families.VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    mask[2, 1:] = False
    return ids, mask


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_equal_to_the_models_own_forward(family: str, padded: bool, resident_of: InMemory) -> None:
    resident = resident_of(family)
    ids, mask = batch(padded)
    stream = LayerStream(resident.model, resident.architecture)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        attention = None if mask is None else mask.long()
        own = resident.model(ids, attention_mask=attention, output_hidden_states=True, use_cache=False)
        entry = stream.enter(ids, mask)
        hidden = [entry.h_BTD]
        for layer, call in zip(resident.layers, entry.calls, strict=True):
            hidden.append(stream.run(layer, hidden[-1], call))
        assert len(own.hidden_states) == families.DEPTH + 1
        for found, expected in zip(hidden[:-1], own.hidden_states[:-1], strict=True):
            assert torch.equal(found[real], expected[real])
        # transformers reports the last one after the final norm.
        assert torch.equal(stream.final_norm(hidden[-1], ids, mask)[real], own.hidden_states[-1][real])
        assert not torch.allclose(hidden[-1][real], own.hidden_states[-1][real])
        assert torch.equal(stream.logits(hidden[-1], ids, mask)[real], own.logits[real])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_restarts_at_any_depth(family: str, resident_of: InMemory) -> None:
    resident = resident_of(family)
    stream = LayerStream(resident.model, resident.architecture)
    ids, mask = batch(True)
    with torch.no_grad():
        own = resident.model(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
        for depth in range(families.DEPTH):
            h = own.hidden_states[depth]
            # Asked for anew: the arguments do not depend on what ran before.
            calls = stream.calls(ids, mask)
            for layer in range(depth, families.DEPTH):
                h = stream.run(resident.layers[layer], h, calls[layer])
            assert torch.equal(stream.logits(h, ids, mask)[mask], own.logits[mask])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_padding_has_no_influence_on_real_tokens(family: str, resident_of: InMemory) -> None:
    resident = resident_of(family)
    stream = LayerStream(resident.model, resident.architecture)
    ids, mask = batch(True)
    other = torch.where(mask, ids, (ids + 7) % families.VOCABULARY)
    found = []
    with torch.no_grad():
        for tokens in (ids, other):
            entry = stream.enter(tokens, mask)
            h = entry.h_BTD
            for layer, call in zip(resident.layers, entry.calls, strict=True):
                h = stream.run(layer, h, call)
            found.append(h[mask])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_arguments_of_unpadded_batches_are_made_once_a_shape(resident_of: InMemory) -> None:
    resident = resident_of("llama")
    stream = LayerStream(resident.model, resident.architecture)
    embedded = []
    handle = resident.model.get_input_embeddings().register_forward_hook(lambda *_: embedded.append(1))
    try:
        ids, mask = batch(True)
        with torch.no_grad():
            first = stream.calls(ids, None)
            assert stream.calls(ids.flip(0), None) is first
            assert len(embedded) == 1
            stream.calls(ids[:2], None)
            assert len(embedded) == 2
            stream.calls(ids, mask)
            stream.calls(ids, mask)
            assert len(embedded) == 4
    finally:
        handle.remove()


def test_every_layer_has_its_own_arguments(resident_of: InMemory) -> None:
    """Sliding and full layers of one model get different masks."""
    resident = resident_of("qwen3")
    stream = LayerStream(resident.model, resident.architecture)
    ids, mask = batch(True)
    with torch.no_grad():
        calls = stream.calls(ids, mask)
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert masks[0] is masks[5] and masks[2] is masks[3]
    assert not torch.equal(masks[0], masks[2])


def test_the_model_is_left_as_it_was(resident_of: InMemory) -> None:
    resident = resident_of("opt")
    before = resident.model.get_submodule(resident.architecture.family.modules.layers)
    stream = LayerStream(resident.model, resident.architecture)
    ids, _ = batch(False)
    with torch.no_grad():
        stream.enter(ids, None)
        with pytest.raises(IndexError):
            stream.enter(torch.full_like(ids, families.VOCABULARY), None)
        own = resident.model(ids).logits
        stream.enter(ids, None)
        assert torch.equal(resident.model(ids).logits, own)
    assert resident.model.get_submodule(resident.architecture.family.modules.layers) is before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whatever_the_attention_implementation(implementation: str) -> None:
    from intarsia.architecture.detect import detect

    model = families.make_model("mistral")
    model.set_attn_implementation(implementation)
    ids, mask = batch(True)
    stream = LayerStream(model, detect(model.config.to_dict()))
    with torch.no_grad():
        own = model(ids, attention_mask=mask.long(), use_cache=False).logits
        entry = stream.enter(ids, mask)
        h = entry.h_BTD
        for layer, call in zip(model.model.layers, entry.calls, strict=True):
            h = stream.run(layer, h, call)
        assert torch.equal(stream.logits(h, ids, mask)[mask], own[mask])


CPU = torch.device("cpu")
SHAPE = (5, 3, 4)


@pytest.fixture(autouse=True)
def spills_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depths_in_memory", [0, 1, 10])
def test_spilled_or_not_it_holds_the_same(dtype: torch.dtype, depths_in_memory: int, spills_here: Path) -> None:
    states = torch.randn(4, *SHAPE).to(dtype)
    size = 5 * 3 * 4 * dtype.itemsize
    store = HiddenStore(SHAPE, dtype, memory_budget=MemoryBudget(depths_in_memory * size))
    assert store.depth_bytes == size
    for depth in (2, 0, 3):
        for start, stop in ((0, 2), (2, 4), (4, 5)):
            store.put(depth, start, states[depth, start:stop])
    for depth in (0, 2, 3):
        assert torch.equal(store.get(depth, 0, 5, CPU), states[depth])
        assert torch.equal(store.get(depth, 3, 5, CPU), states[depth, 3:])
    spilled = list(spills_here.rglob("*.bin"))
    assert len(spilled) == max(0, 3 - depths_in_memory)
    assert all(file.stat().st_size == size for file in spilled)
    store.put(2, 1, states[1, 1:3])  # written again
    assert torch.equal(store.get(2, 0, 5, CPU), torch.cat([states[2, :1], states[1, 1:3], states[2, 3:]]))
    store.close()
    assert list(spills_here.iterdir()) == []


def test_files_go_with_the_store(spills_here: Path) -> None:
    store = HiddenStore(SHAPE, torch.float32, memory_budget=MemoryBudget(0))
    store.put(0, 0, torch.zeros(SHAPE))
    assert list(spills_here.iterdir())
    del store
    gc.collect()
    assert list(spills_here.iterdir()) == []


def test_by_default_small_states_stay_in_memory(spills_here: Path) -> None:
    store = HiddenStore(SHAPE, torch.float32)
    store.put(0, 0, torch.zeros(SHAPE))
    assert list(spills_here.iterdir()) == []
