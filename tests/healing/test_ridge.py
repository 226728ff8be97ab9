"""Ridge regression from Gram matrices, against solutions by other means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import UserError
from intarsia.healing.layer_fit import FitTokens, PostNorm, fit_norm, fit_weight
from intarsia.healing.ridge import Gram, choose
from intarsia.healing.settings import RIDGES

CPU = torch.device("cpu")
FEATURES, WIDTH = 7, 5


def data(tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, residuals that mostly follow from them, and weights of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(tokens, FEATURES, generator=generator) * torch.logspace(-1, 1, FEATURES)
    change_DC = torch.randn(WIDTH, FEATURES, generator=torch.Generator().manual_seed(99))
    r_ND = x_NC @ change_DC.T + 0.1 * torch.randn(tokens, WIDTH, generator=generator)
    return x_NC, r_ND, torch.rand(tokens, generator=generator) * 10 + 0.01


def gram_of(x_NC: Tensor, r_ND: Tensor, weight_N: Tensor, *, batch: int | None = None) -> Gram:
    gram = Gram(x_NC.shape[1], r_ND.shape[1], CPU)
    for part in torch.arange(len(x_NC)).split(batch or len(x_NC)):
        gram.add(x_NC[part], r_ND[part], weight_N[part])
    return gram


def solve(gram: Gram, ridge: float) -> Tensor:
    change_DC = gram.change(ridge)
    assert change_DC is not None
    return change_DC


def test_without_a_ridge_it_is_least_squares() -> None:
    x_NC, r_ND, weight_N = data(200)
    root = weight_N.sqrt().double()[:, None]
    wanted, *_ = np.linalg.lstsq((x_NC.double() * root).numpy(), (r_ND.double() * root).numpy(), rcond=None)
    found = solve(gram_of(x_NC, r_ND, weight_N, batch=33), 1e-12)
    np.testing.assert_allclose(found.T.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0, 30.0])
def test_a_ridge_solves_the_normal_equations(ridge: float) -> None:
    x_NC, r_ND, weight_N = data(50)
    x, r, w = x_NC.double().numpy(), r_ND.double().numpy(), np.diag(weight_N.double().numpy())
    moments = x.T @ w @ x
    system = moments + ridge * np.trace(moments) / FEATURES * np.eye(FEATURES)
    wanted = np.linalg.solve(system, x.T @ w @ r)
    np.testing.assert_allclose(solve(gram_of(x_NC, r_ND, weight_N), ridge).T.numpy(), wanted, rtol=1e-4)


def test_fewer_tokens_than_features() -> None:
    x_NC, r_ND, weight_N = data(3)
    change_DC = solve(gram_of(x_NC, r_ND, weight_N), 1e-6)
    torch.testing.assert_close(x_NC.double() @ change_DC.double().T, r_ND.double(), rtol=1e-2, atol=1e-2)
    assert gram_of(torch.zeros_like(x_NC), r_ND, weight_N).change(1e-6) is None


def test_a_strength_too_small_to_be_solved_for_gives_way_to_the_next() -> None:
    """One channel that is always zero, and no ridge to make up for it."""
    x_NC, r_ND, weight_N = data(50)
    x_NC[:, 2] = 0.0
    gram, held_out = gram_of(x_NC, r_ND, weight_N), gram_of(*data(500, seed=1))
    assert gram.change(0.0) is None
    found = choose(gram, held_out, (0.0, 0.0, 1e-3), where="")
    assert found.ridge == 1e-3 and found.change_DC is not None
    alone = choose(gram, held_out, (0.0,), where="")
    assert alone.change_DC is None and alone.error_after == alone.error_before


def test_an_infinite_ridge_leaves_the_weights() -> None:
    gram = gram_of(*data(100))
    sizes = [float(solve(gram, 10.0**power).norm()) for power in (0, 3, 6, 12)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-9
    found = choose(gram, gram_of(*data(100, seed=1)), [1e30], where="")
    assert found.change_DC is None or float(found.change_DC.abs().max()) < 1e-20


def test_the_error_is_the_one_computed_directly() -> None:
    x_NC, r_ND, weight_N = data(80)
    weight_N[:20] = 0.0  # not real tokens
    gram = gram_of(x_NC, r_ND, weight_N, batch=7)
    change_DC = torch.randn(WIDTH, FEATURES, generator=torch.Generator().manual_seed(5)).double()
    for change, left in ((None, r_ND.double()), (change_DC, r_ND.double() - x_NC.double() @ change_DC.T)):
        wanted = float((weight_N.double() * left.square().sum(dim=1)).sum()) / 60
        assert gram.error(change) == pytest.approx(wanted, rel=1e-5)
    assert gram.tokens == 60


def test_tokens_without_weight_do_not_count() -> None:
    x_NC, r_ND, weight_N = data(40)
    alone = gram_of(x_NC[:30], r_ND[:30], weight_N[:30])
    weight_N[30:], x_NC[30:] = 0.0, 1e6
    together = gram_of(x_NC, r_ND, weight_N)
    for found, wanted in zip(together.moments(), alone.moments(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert (alone.rr, alone.tokens) == (pytest.approx(together.rr), together.tokens)


def test_the_strength_is_the_best_on_held_out_tokens() -> None:
    fit, held_out = gram_of(*data(12)), gram_of(*data(500, seed=1))
    found = choose(fit, held_out, RIDGES, where="")
    errors = {ridge: held_out.error(solve(fit, ridge)) for ridge in RIDGES}
    assert found.error_after == pytest.approx(min(errors.values()))
    assert found.error_after < found.error_before == held_out.error()


@pytest.mark.parametrize("best", range(len(RIDGES)))
def test_the_search_comes_to_the_best_strength_wherever_it_is(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One feature, whose error on held-out tokens is least at a strength that is chosen here."""
    one = torch.ones(1, 1)
    fit, held_out = gram_of(one, one, one[0]), gram_of(one, one / (1.0 + RIDGES[best]), one[0])
    solved, tried = Gram.change, []

    def counting(gram: Gram, strength: float) -> Tensor | None:
        tried.append(strength)
        return solved(gram, strength)

    monkeypatch.setattr(Gram, "change", counting)
    found = choose(fit, held_out, RIDGES, where="")
    assert found.error_after == pytest.approx(0.0, abs=1e-6)
    assert len(tried) == len(set(tried)) <= max(3, abs(best - 7) + 3)


def test_what_does_not_carry_over_is_not_taken() -> None:
    x_NC, r_ND, weight_N = data(100)
    found = choose(gram_of(x_NC, r_ND, weight_N), gram_of(x_NC, -r_ND, weight_N), RIDGES, where="")
    assert found.change_DC is None and found.ridge is None
    assert found.error_after == found.error_before


def test_nothing_to_fit_or_to_choose_by() -> None:
    nothing = Gram(FEATURES, WIDTH, CPU)
    assert choose(nothing, gram_of(*data(30)), RIDGES, where="").change_DC is None
    assert choose(gram_of(*data(30)), nothing, RIDGES, where="").change_DC is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["features", "residuals"])
@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_not_finite_is_an_error(value: float, which: str, held_out: bool) -> None:
    x_NC, r_ND, weight_N = data(30)
    (x_NC if which == "features" else r_ND)[3, 2] = value
    bad, good = gram_of(x_NC, r_ND, weight_N), gram_of(*data(30))
    with pytest.raises(UserError, match="layer 7"):
        choose(*((good, bad) if held_out else (bad, good)), RIDGES, where="layer 7")


def test_a_few_massive_tokens_do_not_decide() -> None:
    """Three tokens of a hundred times the norm that follow a rule of their own, among 300 ordinary ones."""
    x_NC, r_ND, _ = data(300)
    x_NC, r_ND = x_NC / x_NC.norm(dim=1, keepdim=True), r_ND / x_NC.norm(dim=1, keepdim=True)
    massive_NC, contrary_ND = 100 * x_NC[:3], -100 * r_ND[:3]
    x_NC, r_ND = torch.cat([massive_NC, x_NC[3:]]), torch.cat([contrary_ND, r_ND[3:]])
    relative_N = r_ND.square().sum(dim=1).reciprocal()

    def error(weight_N: Tensor) -> float:
        change_DC = solve(gram_of(x_NC, r_ND, weight_N), 1e-4).float()
        left = (r_ND - x_NC @ change_DC.T)[3:]
        return float(left.square().sum() / r_ND[3:].square().sum())

    assert error(relative_N) < 0.2
    assert error(torch.ones(300)) > 0.8


@pytest.mark.parametrize("features", [255, 256, 257, 700])
def test_moments_of_many_features_are_whole_whenever_they_are_read(features: int) -> None:
    """Half of the blocks are summed up and the others copied: also between two batches."""
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(900, size, generator=generator) for size in (features, 3))
    gram = Gram(features, 3, CPU)
    for start, stop in ((0, 500), (500, 900)):
        gram.add(x[start:stop], r[start:stop], torch.ones(stop - start))
        wanted = x[:stop].double().T @ x[:stop].double()
        xx_CC, xr_CD = gram.moments()
        assert torch.equal(xx_CC, xx_CC.T)
        torch.testing.assert_close(xx_CC, wanted, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(xr_CD, x[:stop].double().T @ r[:stop].double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_changed_in_its_own_dtype(dtype: torch.dtype) -> None:
    gram = gram_of(*data(200))
    own_DC = torch.randn(WIDTH, FEATURES, generator=torch.Generator().manual_seed(7)).to(dtype)
    before = own_DC.clone()
    found = choose(gram, gram, RIDGES, where="")
    applied_DC = found.applied(own_DC)
    assert applied_DC is not None and found.change_DC is not None
    assert applied_DC.dtype == dtype and torch.equal(own_DC, before)
    torch.testing.assert_close(applied_DC, (own_DC.float() + found.change_DC).to(dtype))


TOKENS, INPUTS, OUTPUTS = 600, 10, 8
STRENGTHS = (1e-9, 1e-4, 1e-2, 1.0)


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
    return PostNorm(OffsetNorm(0.3 * normal(OUTPUTS, seed=seed)), offset=1.0, scale=0.7)


def passes_over(weight_DC: Tensor, missing: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Iterator[FitTokens]]:
    """Two batches of tokens, a quarter of them held out; `missing(x, y)` is what is missing after the layer."""
    projection = nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)
    projection.weight.copy_(weight_DC)
    x_NC = normal(TOKENS, INPUTS, seed=3)
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
    norm, y = post_norm(), normal(5, OUTPUTS, seed=2)
    own = norm.weight
    unit = norm.unit(y)
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.added(y), 0.7 * (1.0 + own) * unit)
    assert norm.weight is own


def test_the_norms_weight_is_least_squares() -> None:
    """With next to no ridge, row by row what numpy finds."""
    weight, norm = normal(OUTPUTS, INPUTS, seed=4), post_norm()
    passes = passes_over(weight, lambda x, y: normal(TOKENS, OUTPUTS, seed=5) + 0.5 * norm.unit(y))
    found, fit = fit_norm(norm, passes, (1e-12,), where="here")
    assert found is not None
    whole = list(passes())
    unit, missing, root, held = (
        torch.cat(parts)
        for parts in zip(
            *[(0.7 * norm.unit(p.y_ND), p.missing_ND, p.weight_N.sqrt(), p.held_N) for p in whole], strict=True
        )
    )
    for row in range(OUTPUTS):
        x, r = ((t[:, row] * root)[~held].numpy() for t in (unit, missing))
        change = np.linalg.lstsq(x[:, None], r, rcond=None)[0][0]
        assert float(found[row] - norm.weight[row]) == pytest.approx(float(change), rel=1e-3, abs=1e-5)
    left = ((missing - unit * (found - norm.weight)) * root[:, None])[held].square().sum() / held.sum()
    assert fit.error_after == pytest.approx(float(left), rel=1e-4)
    assert fit.error_after < fit.error_before


def test_a_changed_projection_is_found_again() -> None:
    """The target is what a somewhat different weight gives after the norm: most of the difference is made good."""
    weight, norm = normal(OUTPUTS, INPUTS, seed=4), post_norm()
    other = weight + 0.15 * normal(OUTPUTS, INPUTS, seed=6)
    passes = passes_over(weight, lambda x, y: norm.added(x @ other.T) - norm.added(y))
    found, fit = fit_weight(norm, weight, passes, STRENGTHS, where="here")
    assert found is not None and fit.ridge in STRENGTHS
    assert fit.error_before == pytest.approx(true_error(norm, weight, weight, passes), rel=1e-4)
    assert fit.error_after == pytest.approx(true_error(norm, weight, found, passes), rel=1e-4)
    assert fit.error_after < 0.1 * fit.error_before


def test_what_the_norm_takes_back_is_not_taken() -> None:
    """Missing is more of the same: a longer W would give it without the norm. With it, only the norm's weight can."""
    weight, norm = normal(OUTPUTS, INPUTS, seed=4), post_norm()
    passes = passes_over(weight, lambda x, y: 0.5 * norm.added(y))
    found, fit = fit_weight(norm, weight, passes, STRENGTHS, where="here")
    assert fit.error_after > 0.9 * fit.error_before
    assert found is None or fit.error_after < fit.error_before
    scale, fit = fit_norm(norm, passes, STRENGTHS, where="here")
    assert scale is not None
    torch.testing.assert_close(1.0 + scale, 1.5 * (1.0 + norm.weight), rtol=1e-3, atol=1e-4)
    assert fit.error_after < 1e-6 * fit.error_before


def test_a_fit_that_does_not_carry_over_is_not_taken() -> None:
    """Held-out tokens miss the opposite of what the others miss."""
    weight, norm = normal(OUTPUTS, INPUTS, seed=4), post_norm()
    sign = torch.where(torch.arange(TOKENS) % 4 == 0, -1.0, 1.0)[:, None]
    passes = passes_over(weight, lambda x, y: sign * 0.3 * x[:, :OUTPUTS])
    found, fit = fit_weight(norm, weight, passes, (1e-9,), where="here")
    assert (found, fit.ridge) == (None, None) and fit.error_after == fit.error_before > 0
    passes = passes_over(weight, lambda x, y: sign * 0.3 * norm.unit(y))
    scale, fit = fit_norm(norm, passes, (1e-9,), where="here")
    assert (scale, fit.ridge) == (None, None) and fit.error_after == fit.error_before > 0


def test_rows_that_the_norm_switches_off_stay() -> None:
    weight = normal(OUTPUTS, INPUTS, seed=4)
    scale = torch.zeros(OUTPUTS)
    scale[2] = -1.0  # 1 + weight = 0
    norm = PostNorm(OffsetNorm(scale), offset=1.0, scale=1.0)
    other = weight + 0.1 * normal(OUTPUTS, INPUTS, seed=6)
    passes = passes_over(weight, lambda x, y: norm.added(x @ other.T) - norm.added(y))
    found, _ = fit_weight(norm, weight, passes, STRENGTHS, where="here")
    assert found is not None
    assert torch.equal(found[2], weight[2]) and not torch.equal(found[1], weight[1])


@pytest.mark.parametrize("held", [False, True])
def test_activations_that_are_not_finite(held: bool) -> None:
    weight, norm = normal(OUTPUTS, INPUTS, seed=4), post_norm()
    bad = (torch.arange(TOKENS) % 4 == 0)[:, None] == held
    passes = passes_over(weight, lambda x, y: torch.where(bad, torch.nan, y))
    with pytest.raises(UserError, match="here has NaN"):
        fit_weight(norm, weight, passes, STRENGTHS, where="here")
    with pytest.raises(UserError, match="here has NaN"):
        fit_norm(norm, passes, STRENGTHS, where="here")
