from __future__ import annotations

import pytest
import torch

from intarsia.building.operators import linear


def test_weighted_sum() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert torch.equal(linear([a, b], [2.0, -0.5]), torch.tensor([-3.0, -6.0]))


def test_accumulates_in_float32_and_keeps_the_dtype() -> None:
    # In bfloat16 256 + 1 is 256 again; summed wider it is 258.
    tensors = [torch.tensor([256.0]), torch.tensor([1.0]), torch.tensor([1.0])]
    found = linear([tensor.to(torch.bfloat16) for tensor in tensors], [1.0, 1.0, 1.0])
    assert found.dtype == torch.bfloat16
    assert found.item() == 258.0


def test_one_tensor_with_weight_one_is_itself() -> None:
    tensor = torch.randn(4, dtype=torch.float64)
    assert torch.equal(linear([tensor], [1.0]), tensor)


def test_sources_are_left_alone() -> None:
    tensor = torch.ones(3)
    linear([tensor, tensor], [3.0, 4.0])
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize(("tensors", "weights"), [([], []), ([torch.ones(1)], []), ([], [1.0])])
def test_mistakes_of_the_caller(tensors: list[torch.Tensor], weights: list[float]) -> None:
    with pytest.raises(ValueError):
        linear(tensors, weights)
