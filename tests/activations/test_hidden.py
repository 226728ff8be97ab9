from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from intarsia.activations.hidden_store import HiddenStore, MemoryBudget

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
