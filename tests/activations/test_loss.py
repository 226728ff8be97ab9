from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from intarsia.activations.loss import Likeliest, next_token_losses
from intarsia.errors import UserError


def _case(dtype: torch.dtype = torch.float32, vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 7, vocabulary, generator=generator) * 4).to(dtype)
    return logits, torch.randint(vocabulary, (3, 7), generator=generator)


def test_by_hand() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = torch.tensor(3.0).log()  # token 2 gets 3 parts of 6
    sums, counts = next_token_losses(logits, torch.tensor([[0, 2, 1]]))
    assert sums.dtype == torch.float64
    assert counts.dtype == torch.int64
    assert counts.tolist() == [2]
    assert sums[0].item() == pytest.approx(torch.tensor([6 / 3, 4.0]).log().sum().item(), rel=1e-6)


def test_divergence_by_hand() -> None:
    """Of the teacher's two likeliest tokens of four, and the rest as one; 0 of a model from itself."""
    student = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1, 3, 4)
    teacher = torch.tensor([0.1, 0.2, 0.6, 0.1]).log().expand(1, 3, 4)
    ids, mask = torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]])
    likeliest = [Likeliest(*logits.topk(2, dim=-1)) for logits in (teacher, student)]
    sums, counts = next_token_losses(student, ids, expected=likeliest[0])
    by_hand = 0.6 * math.log(0.6 / 0.2) + 0.2 * math.log(0.2 / 0.3) + 0.2 * math.log(0.2 / 0.5)
    assert counts.tolist() == [2] and sums.item() == pytest.approx(2 * by_hand, rel=1e-5)
    assert next_token_losses(student, ids, mask, expected=likeliest[0])[0].item() == pytest.approx(by_hand, rel=1e-5)
    assert next_token_losses(student, ids, expected=likeliest[1])[0].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 500_000])  # many rows a block; less than one row's worth
def test_equals_cross_entropy(dtype: torch.dtype, vocabulary: int) -> None:
    logits, ids = _case(dtype, vocabulary)
    expected = F.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    sums, counts = next_token_losses(logits, ids)
    # float32 sums over half a million exponentials are good to about 2e-6
    torch.testing.assert_close(sums, expected, rtol=1e-6 if vocabulary == 50 else 1e-5, atol=0)
    assert counts.tolist() == [6, 6, 6]


def test_padding_does_not_count() -> None:
    logits, ids = _case()
    lengths = [7, 4, 1]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    logits[~mask] = torch.nan  # nobody looks at them
    sums, counts = next_token_losses(logits, ids.masked_fill(~mask, -100), mask)
    assert counts.tolist() == [6, 3, 0]
    for b, length in enumerate(lengths):
        alone, _ = next_token_losses(logits[b : b + 1, :length], ids[b : b + 1, :length])
        assert sums[b].item() == pytest.approx(alone.item(), rel=1e-7)


def test_a_full_mask_is_no_mask() -> None:
    logits, ids = _case()
    with_mask = next_token_losses(logits, ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(with_mask[0], next_token_losses(logits, ids)[0])


def test_one_token_predicts_nothing() -> None:
    sums, counts = next_token_losses(torch.zeros(2, 1, 5), torch.zeros(2, 1, dtype=torch.int64))
    assert sums.tolist() == [0, 0]
    assert counts.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_names_the_sequence_that_is_not_finite(bad: float) -> None:
    logits, ids = _case()
    logits[1, 2, ids[1, 3]] = bad
    with pytest.raises(UserError, match="candidate 7, sequence 1 of the batch: expected finite"):
        next_token_losses(logits, ids, where="candidate 7")


def test_keeps_no_graph() -> None:
    logits, ids = _case()
    assert not next_token_losses(logits.requires_grad_(), ids)[0].requires_grad
