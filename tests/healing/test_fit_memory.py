"""What a fit takes in memory: the bytes that torch allocates while it runs, against the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.healing import behind_norm, few_tokens, fit_memory, ridge, symmetric
from intarsia.healing.behind_norm import NormBehind, Passed, fit_weight
from intarsia.healing.closed_form_settings import RIDGES
from intarsia.healing.fit_memory import fit_bytes, gram_bytes
from intarsia.healing.ridge import Fit, Gram, choose
from intarsia.healing.scratch import Scratch

CPU = torch.device("cpu")
FEATURES, WIDTH, BATCH = 1024, 256, 64
FEW, MANY = 512, 2048  # tokens: kept as they are, and summed up


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worked with at a time is as small beside these matrices as it is beside those of real layers."""
    monkeypatch.setattr(symmetric, "_BLOCK", 32)
    monkeypatch.setattr(ridge, "SOLVED_AT_ONCE", 64)
    monkeypatch.setattr(fit_memory, "SOLVED_AT_ONCE", 64)
    monkeypatch.setattr(few_tokens, "_COLUMNS", 64)
    monkeypatch.setattr(few_tokens, "_BLOCK", 32)
    monkeypatch.setattr(behind_norm, "_ROWS", 32)


def most_bytes(work: Callable[[], Any]) -> int:
    """How far the tensors of torch rise above where they were, at most: every allocation of its own is counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def text(tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Features in bfloat16, residuals that half follow from them, weights; every eighth batch is held out."""
    for index in range(tokens // BATCH):
        chance = torch.Generator().manual_seed(index)
        x_NC = torch.randn(BATCH, FEATURES, generator=chance).bfloat16()
        r_ND = x_NC[:, :WIDTH].float() + torch.randn(BATCH, WIDTH, generator=chance)
        yield x_NC, r_ND, torch.rand(BATCH, generator=chance) + 0.1, index % 8 == 0


def fitted(tokens: int, scratch: Scratch) -> Fit:
    fit = Gram(FEATURES, WIDTH, CPU, scratch=scratch)
    held_out = Gram(FEATURES, WIDTH, CPU, held_out=True, scratch=scratch)
    for x_NC, r_ND, weight_N, held in text(tokens):
        (held_out if held else fit).add(x_NC, r_ND, weight_N)
    return choose(fit, held_out, RIDGES, where="here")


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize(("tokens", "held_rows"), [(FEW, True), (MANY, True), (MANY, False)])
def test_a_fit_takes_what_the_formula_says(
    tokens: int, held_rows: bool, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out tokens are kept as they are; or summed up too, as so many of a longer text would be."""
    if not held_rows:
        for module in (ridge, fit_memory):
            monkeypatch.setattr(
                module, "rows_at_most", lambda features, *, held_out=False: 128 if held_out else features // 2
            )
    scratch = Scratch(in_files=in_files, folder=tmp_path)
    found: list[Fit] = []
    taken = most_bytes(lambda: found.append(fitted(tokens, scratch)))
    foretold = fit_bytes(FEATURES, WIDTH, tokens=tokens, held_out=8, itemsize=2, in_files=in_files)
    # What is not counted: a batch in float32, and the block of moments that it adds.
    assert 0.95 * foretold < taken < foretold + 4 * BATCH * (2 * FEATURES + WIDTH) + 12 * 64 * FEATURES
    assert found[0].error_after < found[0].error_before
    if not in_files:
        return
    alone = fitted(tokens, Scratch())
    assert (found[0].ridge, found[0].error_after) == (alone.ridge, alone.error_after)
    assert list(tmp_path.iterdir()) == []


def test_in_files_it_is_the_moments_and_little_else(tmp_path: Path) -> None:
    """Of a library's own factorisation there would be four squares: of those to fit on and to judge by, a copy, and the
    factor."""
    taken = most_bytes(lambda: fitted(MANY, Scratch(in_files=True, folder=tmp_path)))
    assert gram_bytes(FEATURES, WIDTH) == 8 * (FEATURES**2 * 17 // 32 + FEATURES * WIDTH)
    assert taken < 1.25 * gram_bytes(FEATURES, WIDTH) < 0.25 * 8 * (4 * FEATURES**2 + 2 * FEATURES * WIDTH)


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, y: Tensor) -> Tensor:
        return y / (y.float().square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("in_files", [False, True])
def test_behind_a_norm(tokens: int, in_files: bool, tmp_path: Path) -> None:
    own_DC = torch.randn(WIDTH, FEATURES, generator=torch.Generator().manual_seed(9)).bfloat16()
    scratch = Scratch(in_files=in_files, folder=tmp_path)

    def passes() -> Iterator[Passed]:
        for x_NC, missing_ND, weight_N, held in text(tokens):
            held_N = torch.full((BATCH,), held)
            yield Passed(x_NC=x_NC, y_ND=x_NC @ own_DC.T, missing_ND=missing_ND, weight_N=weight_N, held_N=held_N)

    norm = NormBehind(Norm(), offset=0.0, scale=1.0)
    taken = most_bytes(lambda: fit_weight(norm, own_DC, passes, RIDGES, where="here", scratch=scratch))
    foretold = fit_bytes(
        FEATURES, WIDTH, tokens=tokens, held_out=8, itemsize=2, in_files=in_files, strengths=len(RIDGES)
    )
    assert 0.85 * foretold < taken < foretold + 4 * BATCH * (3 * FEATURES + 4 * WIDTH) + 12 * 64 * FEATURES
