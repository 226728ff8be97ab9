"""Half of a symmetric matrix, factorised in place, and what waits in files, against what numpy finds."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.errors import UserError
from intarsia.healing import scratch as scratch_module
from intarsia.healing import symmetric
from intarsia.healing.scratch import IN_MEMORY, Pile, Scratch
from intarsia.healing.symmetric import Symmetric, entries

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(x_NC: Tensor, scratch: Scratch = IN_MEMORY) -> Symmetric:
    matrix = Symmetric(x_NC.shape[1], dtype=torch.float64, device=CPU, scratch=scratch)
    matrix.add(x_NC)
    return matrix


@pytest.mark.parametrize("size", [1, 3, 4, 5, 16, 63, 65])
@pytest.mark.parametrize("in_files", [False, True])
def test_solutions_are_those_of_the_whole_matrix(
    size: int, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one block, of blocks that the size is no multiple of, and again after another shift and more rows."""
    monkeypatch.setattr(symmetric, "_BLOCK", 4)
    x_NC, more_NC, b_CK = normal(2 * size, size), normal(7, size, seed=1), normal(size, 3, seed=2)
    matrix, whole = of(x_NC, Scratch(in_files=in_files, folder=tmp_path)), (x_NC.T @ x_NC).numpy()
    for shift in (0.5, 3.0, 0.0):
        matrix.factorise(shift)
        wanted = np.linalg.solve(whole + shift * np.eye(size), b_CK.numpy())
        np.testing.assert_allclose(matrix.solve_(b_CK.clone()).numpy(), wanted, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(matrix.whole().numpy(), whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(matrix.times(b_CK).numpy(), whole @ b_CK.numpy(), rtol=1e-10, atol=1e-10)
    matrix.factorise(1.0)
    matrix.add(more_NC)
    whole += (more_NC.T @ more_NC).numpy()
    np.testing.assert_allclose(matrix.diagonal().numpy(), np.diagonal(whole), rtol=1e-12)
    matrix.factorise(1.0)
    wanted = np.linalg.solve(whole + np.eye(size), b_CK.numpy())
    np.testing.assert_allclose(matrix.solve_(b_CK.clone()).numpy(), wanted, rtol=1e-8, atol=1e-8)


def test_little_more_than_half_is_kept() -> None:
    assert entries(8192) == 8192**2 * 17 // 32
    assert (entries(3), entries(256), entries(257)) == (9, 256**2, 256 * 257 + 1)
    for size in (1, 255, 700, 11008):
        matrix = Symmetric(size, dtype=torch.float32, device=torch.device("meta"))
        assert sum(row.numel() for row in matrix._rows) == entries(size)


def test_one_that_is_not_positive_is_shifted_until_it_is() -> None:
    """Fewer rows than columns, and no shift: of all solutions one that is close to the least."""
    x_NC = normal(3, 6)
    matrix, b_CK = of(x_NC), x_NC.T @ normal(3, 2, seed=1)
    matrix.factorise(0.0)
    found = matrix.solve_(b_CK.clone())
    wanted, *_ = np.linalg.lstsq((x_NC.T @ x_NC).numpy(), b_CK.numpy(), rcond=1e-10)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("in_files", [False, True])
def test_a_pile_gives_what_was_put(in_files: bool, tmp_path: Path) -> None:
    pile = Pile(Scratch(in_files=in_files, folder=tmp_path))
    parts = [normal(rows, 5, seed=rows).to(torch.bfloat16) for rows in (2, 7, 1)]
    for part in parts:
        pile.put(part)
    assert len(pile) == 3 and all(torch.equal(pile.get(index), parts[index]) for index in (1, 0, 2, 1))
    assert pile.get(1).dtype == torch.bfloat16
    assert torch.equal(pile.joined(), torch.cat(parts)) and len(pile) == 0
    transposed = normal(4, 3).T
    pile.put(transposed)
    assert torch.equal(pile.get(0), transposed)
    assert list(tmp_path.iterdir()) == []  # it has no name


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, **_: Any) -> None:
            pass

        def seek(self, at: int) -> None:
            pass

        def write(self, data: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(scratch_module.tempfile, "TemporaryFile", Full)
    matrix = of(normal(4, 3), Scratch(in_files=True, folder=tmp_path))
    with pytest.raises(UserError, match="a full disk"):
        matrix.factorise(1.0)
