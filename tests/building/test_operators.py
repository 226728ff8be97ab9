"""Merge operators against the papers' formulas, written out in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intarsia.building.layer import generator_for
from intarsia.building.operators import linear, trim
from intarsia.recipe.methods import METHODS


def merged(name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], **given: Any) -> Tensor:
    """What an operator makes of matrices; a row of numbers is one too, for vectors are spared."""
    base = None if base is None else base[None]
    found: Tensor = METHODS[name].function([tensor[None] for tensor in tensors], weights, base, **given)
    return found[0]


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    return merged("slerp", None, [first, second], [1.0 - t, t])


def random_tensors(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for _ in range(count)]


def same(found: Tensor, expected: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(
        found.double().numpy(), np.asarray(expected, dtype=np.float64), rtol=1e-5, atol=tolerance
    )


def test_slerp_by_hand() -> None:
    """At right angles a third of the way is cos 30 and sin 30 degrees; lengths are kept, not normalised away."""
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    same(slerp(first, second, 1 / 3), [2.0 * math.cos(math.pi / 6), 4.0 * math.sin(math.pi / 6)])


def test_slerp_of_matrices() -> None:
    a, b = random_tensors(2, 3, 5)
    x, y, t = a.double().numpy(), b.double().numpy(), 0.3
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    same(
        slerp(a, b, t),
        np.sin((1 - t) * angle) / np.sin(angle) * x + np.sin(t * angle) / np.sin(angle) * y,
    )
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)


def test_slerp_where_there_is_no_arc() -> None:
    (a,) = random_tensors(1, 4)
    same(slerp(a, a, 0.3), a.numpy())
    same(slerp(a, -a, 0.25), 0.5 * a.numpy())  # (1 - t) a - t a
    same(slerp(a, torch.zeros(4), 0.25), 0.75 * a.numpy())
    same(slerp(torch.zeros(4), torch.zeros(4), 0.5), np.zeros(4))


def test_task_arithmetic() -> None:
    base, a, b = random_tensors(3, 4, 3)
    expected = base + 0.5 * (a - base) - 1.5 * (b - base)
    same(merged("task_arithmetic", base, [a, b], [0.5, -1.5]), expected.numpy())
    assert torch.equal(merged("task_arithmetic", base, [base, base], [0.7, 9.0]), base)


def test_trim_keeps_the_largest() -> None:
    delta = torch.tensor([[0.1, -3.0, 2.0], [0.5, -0.2, 1.0]])
    assert torch.equal(trim(delta, 0.5), torch.tensor([[0.0, -3.0, 2.0], [0.0, 0.0, 1.0]]))
    assert torch.equal(trim(delta, 0.01), torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(trim(delta, 1.0), delta)
    # 0.3 of 10 is 3, and not 4 because 0.3 * 10 is a little more.
    assert int((trim(torch.arange(1.0, 11.0), 0.3) != 0).sum()) == 3
    # Of equals none is preferred for its place in memory.
    assert torch.equal(trim(torch.tensor([1.0, -1.0, 1.0]), 0.4), torch.tensor([1.0, -1.0, 1.0]))


def test_ties_by_hand() -> None:
    """The example of every step: trimmed entries do not vote, opposite signs are outvoted, agreeing ones averaged."""
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    a = base + torch.tensor([4.0, -2.0, 0.1, 3.0])
    b = base + torch.tensor([2.0, 5.0, 0.2, -3.0])
    # Trimmed to the largest three: [4, -2, 0, 3] and [2, 5, 0, -3]. Signs: +, +, 0, 0.
    same(merged("ties", base, [a, b], [1.0, 1.0], density=0.75, lambda_=2.0), [16.0, 20.0, 10.0, 10.0])
    # Weights 3 and 1: signs by 3a + b are +, -, 0, +; means (3*4 + 2) / 4, -2, 0, 3.
    same(merged("ties", base, [a, b], [3.0, 1.0], density=0.75, lambda_=1.0), [13.5, 8.0, 10.0, 13.0])


def ties_by_hand(base: np.ndarray, tuned: list[np.ndarray], density: float, scale: float) -> np.ndarray:
    trimmed = []
    for tensor in tuned:
        delta = (tensor - base).reshape(-1)
        keep = math.ceil(density * delta.size)
        order = np.argsort(-np.abs(delta), kind="stable")
        kept = np.zeros_like(delta)
        kept[order[:keep]] = delta[order[:keep]]
        trimmed.append(kept)
    result = np.zeros(base.size)
    for entry in range(base.size):
        values = [delta[entry] for delta in trimmed]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == sign]
        result[entry] = np.mean(agreeing) if agreeing else 0.0
    return base + scale * result.reshape(base.shape)


@pytest.mark.parametrize(("count", "density"), [(1, 0.2), (2, 0.2), (3, 0.55), (3, 1.0)])
def test_ties_against_the_paper(count: int, density: float) -> None:
    base, *tuned = random_tensors(count + 1, 6, 7, seed=count)
    found = merged("ties", base, tuned, [1.0] * count, density=density, lambda_=0.8)
    arrays = [tensor.double().numpy() for tensor in tuned]
    same(found, ties_by_hand(base.double().numpy(), arrays, density, 0.8))


def test_ties_without_differences_is_the_base() -> None:
    (base,) = random_tensors(1, 3, 3)
    assert torch.equal(merged("ties", base, [base, base], [1.0, 1.0], density=0.2, lambda_=1.0), base)
    # One fine-tuned tensor, untrimmed, is that tensor.
    tuned = base + 1.0
    same(merged("ties", base, [tuned], [0.4], density=1.0, lambda_=1.0), tuned.numpy())


def masks(density: float, *shape: int) -> list[np.ndarray]:
    return [(torch.rand(shape, generator=generator_for(7, i)) < density).numpy() for i in range(2)]


def test_dare_drops_and_rescales() -> None:
    base, a, b = random_tensors(3, 40, 50)
    generators = [generator_for(7, i) for i in range(2)]
    found = merged("dare_linear", base, [a, b], [0.5, 2.0], density=0.3, generators=generators)
    first, second = masks(0.3, 40, 50)
    x, y, z = (tensor.double().numpy() for tensor in (base, a, b))
    same(found, x + 0.5 * first * (y - x) / 0.3 + 2.0 * second * (z - x) / 0.3, 1e-5)
    assert 0.25 < first.mean() < 0.35
    assert (first != second).any()
    whole = merged("dare_linear", base, [a, b], [0.5, 2.0], density=1.0, generators=generators)
    assert torch.equal(whole, merged("task_arithmetic", base, [a, b], [0.5, 2.0]))


def test_dare_ties() -> None:
    base, a, b = random_tensors(3, 12, 9, seed=4)
    generators = [generator_for(7, i) for i in range(2)]
    found = merged("dare_ties", base, [a, b], [1.0, 1.0], density=0.6, lambda_=0.5, generators=generators)
    x, y, z = (tensor.double().numpy() for tensor in (base, a, b))
    first, second = masks(0.6, 12, 9)
    dropped = [x + first * (y - x) / 0.6, x + second * (z - x) / 0.6]
    same(found, ties_by_hand(x, dropped, 1.0, 0.5))


def test_a_generator_depends_on_seed_and_names_alone() -> None:
    def draw(*names: object) -> list[float]:
        return torch.rand(3, generator=generator_for(*names)).tolist()  # type: ignore[arg-type]

    assert draw(1, "a", 2) == draw(1, "a", 2)
    assert len({tuple(draw(*names)) for names in [(1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3)]}) == 4


def test_breadcrumbs() -> None:
    base = torch.zeros(10)
    tuned = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0])
    found = merged("breadcrumbs", base, [tuned], [2.0], bottom=0.3, top=0.1)
    same(found, [0.0, 0.0, 0.0, -8.0, 10.0, -12.0, 14.0, -16.0, 18.0, 0.0])
    same(merged("breadcrumbs", base, [tuned], [1.0], bottom=0.0, top=0.0), tuned.numpy())
    same(merged("breadcrumbs", base, [base], [1.0], bottom=0.5, top=0.1), np.zeros(10))
    with pytest.raises(ValueError):
        merged("breadcrumbs", base, [tuned], [1.0], bottom=0.5, top=0.5)


def test_model_stock_of_two() -> None:
    """Two differences at 60 degrees: t = 2 * 0.5 / (1 + 0.5)."""
    base = torch.tensor([1.0, 1.0])
    a, b = base + torch.tensor([2.0, 0.0]), base + 2.0 * torch.tensor([0.5, math.sqrt(0.75)])
    t = 2.0 / 3.0
    same(merged("model_stock", base, [a, b], [1.0, 1.0]), t * (a + b).numpy() / 2 + (1 - t) * base.numpy())


def test_model_stock_of_three() -> None:
    base, *tuned = random_tensors(4, 5, 5, seed=2)
    tuned = [tensor + 2.0 for tensor in tuned]
    x = base.double().numpy()
    deltas = [tensor.double().numpy() - x for tensor in tuned]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosine = np.mean(
        [(deltas[i] * deltas[j]).sum() / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j]) for i, j in pairs]
    )
    t = 3 * cosine / (1 + 2 * cosine)
    assert 0.0 < t < 1.0
    same(merged("model_stock", base, tuned, [1.0] * 3), x + t * np.mean(deltas, axis=0))


def test_model_stock_at_its_edges() -> None:
    (base,) = random_tensors(1, 4)
    tuned = base + 1.0
    same(merged("model_stock", base, [tuned, tuned], [1.0, 1.0]), tuned.numpy())  # no angle: nothing but the average
    assert torch.equal(merged("model_stock", base, [base, base], [1.0, 1.0]), base)
    assert torch.equal(merged("model_stock", base, [tuned, base], [1.0, 1.0]), base)
    same(merged("model_stock", base, [tuned, base - 1.0], [1.0, 1.0]), base.numpy())
    with pytest.raises(ValueError):
        merged("model_stock", base, [tuned], [1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_rounded_once(dtype: torch.dtype) -> None:
    """In 16 bits every operator gives the float32 result of the same 16-bit tensors, rounded."""
    narrow = [tensor.to(dtype) for tensor in random_tensors(3, 8, 8, seed=9)]
    base, a, b = narrow
    x, y, z = (tensor.float() for tensor in narrow)

    def seeds() -> list[torch.Generator]:
        return [generator_for(1, i) for i in range(2)]

    ones = [1.0, 1.0]
    half = {"density": 0.5, "lambda_": 1.0}
    pairs = [
        (slerp(a, b, 0.4), slerp(y, z, 0.4)),
        (merged("task_arithmetic", base, [a, b], ones), merged("task_arithmetic", x, [y, z], ones)),
        (
            merged("model_stock", base, [a, b], [1.0, 1.0]),
            merged("model_stock", x, [y, z], [1.0, 1.0]),
        ),
        (merged("ties", base, [a, b], ones, **half), merged("ties", x, [y, z], ones, **half)),
        (
            merged("dare_linear", base, [a, b], ones, density=0.5, generators=seeds()),
            merged("dare_linear", x, [y, z], ones, density=0.5, generators=seeds()),
        ),
        (
            merged("dare_ties", base, [a, b], ones, **half, generators=seeds()),
            merged("dare_ties", x, [y, z], ones, **half, generators=seeds()),
        ),
        (
            merged("breadcrumbs", base, [a, b], ones, bottom=0.4, top=0.1),
            merged("breadcrumbs", x, [y, z], ones, bottom=0.4, top=0.1),
        ),
    ]
    for found, expected in pairs:
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))


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
