from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intarsia.activations.loss import Likeliest
from intarsia.healing.losses import (
    CLIP,
    cross_entropy,
    hidden_cosine,
    hidden_kl,
    hidden_loss,
    hidden_mse,
    logit_kl,
    over_rows,
)

MASK = torch.tensor([True, False])
LOG3 = math.log(3.0)


def test_hidden_kl_by_hand() -> None:
    # softmax([log 3, 0]) = (3/4, 1/4), softmax([0, 0]) = (1/2, 1/2).
    teacher, student = torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)
    wanted = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(hidden_kl(teacher, student)) == pytest.approx(wanted, rel=1e-6)
    # The other way round it is another number: the teacher comes first.
    turned = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(hidden_kl(student, teacher)) == pytest.approx(turned, rel=1e-6)


def test_hidden_mse_by_hand() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    student = torch.tensor([[3.0, 3.0], [0.5, 1.0]])
    # Squared errors 1 and 1/4; squared sizes 25 and 1.
    assert float(hidden_mse(teacher, student, weighting="uniform")) == pytest.approx(1.25 / 26)
    assert float(hidden_mse(teacher, student, weighting="relative")) == pytest.approx((1 / 25 + 0.25) / 2)
    assert float(hidden_mse(teacher, torch.zeros(2, 2))) == pytest.approx(1.0)


def test_massive_tokens_are_clipped() -> None:
    teacher = torch.zeros(5, 2)
    teacher[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, 100.0])
    student = teacher.clone()
    student[4, 0] = 50.0
    # The fifth token counts as if it were CLIP long: weight (CLIP / 100)^2.
    weight = (CLIP / 100.0) ** 2
    wanted = weight * 50.0**2 / (4.0 + weight * 100.0**2)
    assert float(hidden_mse(teacher, student, weighting="clip")) == pytest.approx(wanted, rel=1e-5)


def test_hidden_cosine_by_hand() -> None:
    teacher, student = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert float(hidden_cosine(teacher, student)) == pytest.approx((1.0 - 1.0 / math.sqrt(2.0)) / 2, rel=1e-6)


@pytest.mark.parametrize("weighting", ["relative", "clip", "uniform"])
def test_padding_counts_nowhere(weighting: str) -> None:
    given = {"kl": 1.0, "mse": 2.0, "cosine": 3.0, "weighting": weighting}
    teacher, student = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    mask = torch.tensor([[True, True], [True, False]])
    alone = hidden_loss(teacher[mask], student[mask], **given)  # type: ignore[arg-type]
    teacher[1, 1], student[1, 1] = 1e4, -7.0
    assert float(hidden_loss(teacher, student, mask, **given)) == pytest.approx(float(alone), rel=1e-5)  # type: ignore[arg-type]


def test_the_sum_is_weighted() -> None:
    teacher, student = torch.randn(3, 5), torch.randn(3, 5)
    parts = 2 * hidden_kl(teacher, student) + 3 * hidden_mse(teacher, student) + 4 * hidden_cosine(teacher, student)
    total = hidden_loss(teacher, student, kl=2, mse=3, cosine=4)
    assert float(total) == pytest.approx(float(parts), rel=1e-6)


def test_logit_kl_by_hand() -> None:
    teacher, student = torch.tensor([[2 * LOG3, 0.0]]), torch.zeros(1, 2)
    # At temperature 2 the teacher says (3/4, 1/4); the loss is multiplied by 4.
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(logit_kl(teacher, student, 2.0)[0]) == pytest.approx(4 * kl, rel=1e-6)


def test_top_k_kl_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    student = torch.tensor([[0.25, 0.25, 0.4, 0.1]]).log()
    likeliest = Likeliest.of(teacher, 2)
    assert likeliest.tokens.tolist() == [[0, 1]]
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert float(likeliest.divergence(student)[0]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_of_almost_all_is_the_full_kl(temperature: float) -> None:
    teacher, student = torch.randn(4, 9), torch.randn(4, 9)
    full = logit_kl(teacher, student, temperature) / temperature**2
    found = [Likeliest.of(teacher, k, temperature).divergence(student, temperature) for k in (8, 3)]
    assert torch.allclose(found[0], full, rtol=1e-4, atol=1e-5)
    assert bool((found[1] <= full + 1e-6).all())


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[LOG3, 0.0], [LOG3, 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 1])).tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_over_rows_is_the_sum_with_its_gradient(rows: int) -> None:
    hidden = torch.randn(rows, 6, requires_grad=True)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    teacher, weight = torch.randn(rows, 11), torch.rand(rows)

    def losses(logits: Tensor, part: slice) -> Tensor:
        return logit_kl(teacher[part], logits)

    blocks = over_rows(hidden, head, losses, weight)
    (found,) = torch.autograd.grad(3.0 * blocks, hidden)
    whole = (logit_kl(teacher, head(hidden)) * weight).sum()
    (wanted,) = torch.autograd.grad(3.0 * whole, hidden)
    assert float(blocks.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert float(over_rows(hidden, head, losses, weight)) == pytest.approx(float(whole.detach()), rel=1e-5)
