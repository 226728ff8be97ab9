"""An output projection with a norm after it, fitted on made-up activations whose answer is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import UserError
from intarsia.healing.layer_fit import FitTokens, PostNorm, fit_norm, fit_weight

TOKENS, FEATURES, WIDTH = 600, 10, 8
RIDGES = (1e-9, 1e-4, 1e-2, 1.0)


class OffsetNorm(nn.Module):
    """RMS norm that multiplies by 1 + weight, as Gemma's."""

    def __init__(self, weight_D: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_D, requires_grad=False)

    def forward(self, y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1.0 + self.weight)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def post_norm(seed: int = 1) -> PostNorm:
    return PostNorm(OffsetNorm(0.3 * normal(WIDTH, seed=seed)), offset=1.0, scale=0.7)


def passes_over(weight_DC: Tensor, missing: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Iterator[FitTokens]]:
    """Two batches of tokens, a quarter of them held out; `missing(x, y)` is what is missing after the layer."""
    projection = nn.Linear(FEATURES, WIDTH, bias=False).requires_grad_(False)
    projection.weight.copy_(weight_DC)
    x_NC = normal(TOKENS, FEATURES, seed=3)
    missing_ND = missing(x_NC, projection(x_NC))

    def passes() -> Iterator[FitTokens]:
        for part in (slice(0, 200), slice(200, TOKENS)):
            yield FitTokens(
                projection=projection,
                x_NC=x_NC[part],
                missing_ND=missing_ND[part],
                weight_N=1.0 / (1.0 + torch.arange(TOKENS)[part] % 3),
                held_N=torch.arange(TOKENS)[part] % 4 == 0,
            )

    return passes


def true_error(norm: PostNorm, weight_DC: Tensor, other_DC: Tensor, passes: Callable[[], Iterator[FitTokens]]) -> float:
    total, tokens = 0.0, 0
    for batch in passes():
        held = batch.held_N
        change = norm.added(batch.x_NC @ other_DC.T) - norm.added(batch.x_NC @ weight_DC.T)
        squared = (batch.missing_ND - change)[held].square().sum(-1)
        total, tokens = total + float((batch.weight_N[held] * squared).sum()), tokens + int(held.sum())
    return total / tokens


def test_a_norm_is_taken_apart() -> None:
    norm, y = post_norm(), normal(5, WIDTH, seed=2)
    own = norm.weight
    unit = norm.unit(y)
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.added(y), 0.7 * (1.0 + own) * unit)
    assert norm.weight is own


def test_the_norms_weight_is_least_squares() -> None:
    """With next to no ridge, row by row what numpy finds."""
    weight, norm = normal(WIDTH, FEATURES, seed=4), post_norm()
    passes = passes_over(weight, lambda x, y: normal(TOKENS, WIDTH, seed=5) + 0.5 * norm.unit(y))
    found, fit = fit_norm(norm, passes, (1e-12,), where="here")
    assert found is not None
    whole = list(passes())
    unit, missing, root, held = (
        torch.cat(parts)
        for parts in zip(
            *[(0.7 * norm.unit(p.y_ND), p.missing_ND, p.weight_N.sqrt(), p.held_N) for p in whole], strict=True
        )
    )
    for row in range(WIDTH):
        x, r = ((t[:, row] * root)[~held].numpy() for t in (unit, missing))
        change = np.linalg.lstsq(x[:, None], r, rcond=None)[0][0]
        assert float(found[row] - norm.weight[row]) == pytest.approx(float(change), rel=1e-3, abs=1e-5)
    left = ((missing - unit * (found - norm.weight)) * root[:, None])[held].square().sum() / held.sum()
    assert fit.error_after == pytest.approx(float(left), rel=1e-4)
    assert fit.error_after < fit.error_before


def test_a_changed_projection_is_found_again() -> None:
    """The target is what a somewhat different weight gives after the norm: most of the difference is made good."""
    weight, norm = normal(WIDTH, FEATURES, seed=4), post_norm()
    other = weight + 0.15 * normal(WIDTH, FEATURES, seed=6)
    passes = passes_over(weight, lambda x, y: norm.added(x @ other.T) - norm.added(y))
    found, fit = fit_weight(norm, weight, passes, RIDGES, where="here")
    assert found is not None and fit.ridge in RIDGES
    assert fit.error_before == pytest.approx(true_error(norm, weight, weight, passes), rel=1e-4)
    assert fit.error_after == pytest.approx(true_error(norm, weight, found, passes), rel=1e-4)
    assert fit.error_after < 0.1 * fit.error_before


def test_what_the_norm_takes_back_is_not_taken() -> None:
    """Missing is more of the same: a longer W would give it without the norm. With it, only the norm's weight can."""
    weight, norm = normal(WIDTH, FEATURES, seed=4), post_norm()
    passes = passes_over(weight, lambda x, y: 0.5 * norm.added(y))
    found, fit = fit_weight(norm, weight, passes, RIDGES, where="here")
    assert fit.error_after > 0.9 * fit.error_before
    assert found is None or fit.error_after < fit.error_before
    scale, fit = fit_norm(norm, passes, RIDGES, where="here")
    assert scale is not None
    torch.testing.assert_close(1.0 + scale, 1.5 * (1.0 + norm.weight), rtol=1e-3, atol=1e-4)
    assert fit.error_after < 1e-6 * fit.error_before


def test_a_fit_that_does_not_carry_over_is_not_taken() -> None:
    """Held-out tokens miss the opposite of what the others miss."""
    weight, norm = normal(WIDTH, FEATURES, seed=4), post_norm()
    sign = torch.where(torch.arange(TOKENS) % 4 == 0, -1.0, 1.0)[:, None]
    passes = passes_over(weight, lambda x, y: sign * 0.3 * x[:, :WIDTH])
    found, fit = fit_weight(norm, weight, passes, (1e-9,), where="here")
    assert (found, fit.ridge) == (None, None) and fit.error_after == fit.error_before > 0
    passes = passes_over(weight, lambda x, y: sign * 0.3 * norm.unit(y))
    scale, fit = fit_norm(norm, passes, (1e-9,), where="here")
    assert (scale, fit.ridge) == (None, None) and fit.error_after == fit.error_before > 0


def test_rows_that_the_norm_switches_off_stay() -> None:
    weight = normal(WIDTH, FEATURES, seed=4)
    scale = torch.zeros(WIDTH)
    scale[2] = -1.0  # 1 + weight = 0
    norm = PostNorm(OffsetNorm(scale), offset=1.0, scale=1.0)
    other = weight + 0.1 * normal(WIDTH, FEATURES, seed=6)
    passes = passes_over(weight, lambda x, y: norm.added(x @ other.T) - norm.added(y))
    found, _ = fit_weight(norm, weight, passes, RIDGES, where="here")
    assert found is not None
    assert torch.equal(found[2], weight[2]) and not torch.equal(found[1], weight[1])


@pytest.mark.parametrize("held", [False, True])
def test_activations_that_are_not_finite(held: bool) -> None:
    weight, norm = normal(WIDTH, FEATURES, seed=4), post_norm()
    bad = (torch.arange(TOKENS) % 4 == 0)[:, None] == held
    passes = passes_over(weight, lambda x, y: torch.where(bad, torch.nan, y))
    with pytest.raises(UserError, match="here: activations are NaN"):
        fit_weight(norm, weight, passes, RIDGES, where="here")
    with pytest.raises(UserError, match="here: activations are NaN"):
        fit_norm(norm, passes, RIDGES, where="here")
