"""Large arrays of a recipe lie in files, and are the same arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from intarsia.recipe import mapped_arrays
from intarsia.recipe.mapped_arrays import let_go, mapped, spooled, write_safetensors


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_arrays, "_LEAST", 64)


def arrays() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    return {
        "b.large": rng.standard_normal((7, 5)).astype(np.float32),
        "a.turned": rng.standard_normal((6, 4)).astype(np.float32).T,
        "c.small": np.arange(3, dtype=np.int32),
        "d.empty": np.zeros((0, 4), dtype=np.float32),
    }


def test_a_spooled_array_is_the_array_in_a_file_without_a_name(tmp_path: Path) -> None:
    for name in ("a.turned", "b.large", "d.empty"):
        array = arrays()[name]
        found = spooled((array[:2], array[2:5], array[5:]), array.shape, tmp_path)
        assert np.array_equal(found, array) and found.dtype == array.dtype
        assert isinstance(found, np.memmap) == (array.nbytes >= 64)
        let_go(found)
        assert np.array_equal(found, array), "let go of, it is read again"
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_array_by_array_reads_as_usual(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_safetensors(arrays(), path, metadata={"made": "here"})
    found = load_file(path)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"made": "here"}


def test_only_large_arrays_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_safetensors(arrays(), path, metadata={})
    found = mapped(path, {"F32": "<f4"})
    assert found.keys() == {"a.turned", "b.large"}
    for name, array in found.items():
        assert np.array_equal(array, arrays()[name])
        let_go(np.ascontiguousarray(array))  # also through a view of it
        assert np.array_equal(array, arrays()[name])
