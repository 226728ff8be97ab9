"""Statistics by hand, from loops over tokens; padding never counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from intarsia.activations import loss
from intarsia.activations.loss import Likeliest, next_token_losses
from intarsia.activations.statistics import ChannelSums, LayerMeasure, cosines, output_projections, require_finite
from intarsia.activations.stream import LayerStream
from intarsia.errors import UserError
from tests import families
from tests.conftest import InMemory
from tests.experts_by_hand import sizes_of_experts

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, 4, generator=GENERATOR)
Y = torch.randn(3, 5, 4, generator=GENERATOR)
KEEP = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def tokens_of(x: torch.Tensor, keep: torch.Tensor | None) -> list[np.ndarray]:
    return [
        x[row, column].double().numpy()
        for row in range(x.shape[0])
        for column in range(x.shape[1])
        if keep is None or keep[row, column]
    ]


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "padded"])
def test_channel_sums(keep: torch.Tensor | None) -> None:
    sums = ChannelSums()
    for row in range(3):  # in batches of one sequence, as flat rows once
        part = None if keep is None else keep[row : row + 1]
        sums.add(X[row] if row == 2 else X[row : row + 1], part)
    tokens = tokens_of(X, keep)
    assert sums.tokens == len(tokens)
    np.testing.assert_allclose(sums.mean_absolute_C, np.mean(np.abs(tokens), axis=0), rtol=1e-6)
    np.testing.assert_allclose(sums.root_mean_square_C, np.sqrt(np.mean(np.square(tokens), axis=0)), rtol=1e-6)


def test_sums_of_half_precision_do_not_stall() -> None:
    """Summed in bfloat16, a thousand ones would end at 256."""
    sums = ChannelSums()
    sums.add(torch.ones(1, 1000, 2, dtype=torch.bfloat16), None)
    assert sums.mean_absolute_C.tolist() == [1.0, 1.0]
    assert sums.root_mean_square_C.tolist() == pytest.approx([1.0, 1.0])


def test_squares_of_half_precision_do_not_overflow() -> None:
    sums = ChannelSums()
    sums.add(torch.full((1, 10, 2), 1000.0, dtype=torch.float16), None)
    assert sums.root_mean_square_C.tolist() == pytest.approx([1000.0, 1000.0])


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "padded"])
def test_block_influence(keep: torch.Tensor | None) -> None:
    measure = LayerMeasure()
    measure.add_stream(X[:2], Y[:2], None if keep is None else keep[:2])
    measure.add_stream(X[2:], Y[2:], None if keep is None else keep[2:])
    pairs = list(zip(tokens_of(X, keep), tokens_of(Y, keep), strict=True))
    cosine = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in pairs]
    assert measure.tokens == len(pairs)
    assert measure.influence == pytest.approx(1.0 - sum(cosine) / len(cosine), rel=1e-6)


def test_a_layer_that_changes_nothing_has_no_influence() -> None:
    measure = LayerMeasure()
    measure.add_stream(X, X, None)
    assert measure.influence == pytest.approx(0.0, abs=1e-6)
    assert measure.influence >= 0.0


def test_cosines_stay_in_range() -> None:
    x = torch.full((1, 100, 3), 0.1)
    assert float(cosines(x, 3 * x, None).max()) <= 1.0
    assert float(cosines(x, -x, None).min()) >= -1.0


def test_padding_is_not_looked_at() -> None:
    broken = torch.where(KEEP[..., None], X, torch.nan)
    sums, clean = ChannelSums(), ChannelSums()
    sums.add(broken, KEEP)
    clean.add(X, KEEP)
    assert torch.equal(sums.absolute_C, clean.absolute_C)
    assert torch.equal(cosines(broken, Y, KEEP), cosines(X, Y, KEEP))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    require_finite(X, "output of layer 3")
    broken = X.clone()
    broken[1, 2, 3] = bad
    with pytest.raises(UserError, match="output of layer 3"):
        require_finite(broken, "output of layer 3")


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name not in families.MIXTURES])
def test_hooks_see_the_inputs_of_output_projections(family: str, resident_of: InMemory) -> None:
    resident = resident_of(family)
    architecture = resident.architecture
    stream = LayerStream(resident.model, architecture)
    ids = torch.randint(2, families.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    layer = resident.layers[1]
    handles = [
        layer.get_submodule(architecture.writer(part).module).register_forward_hook(
            # A copy: some layers add to it in place.
            lambda module, args, output, part=part: outputs.update({part: output.clone()})
        )
        for part in ("attention", "mlp")
    ]
    with torch.no_grad():
        entry = stream.enter(ids, None)
        with output_projections(layer, architecture, lambda part, x: seen.update({part: x})):
            after = stream.run(layer, entry.h_BTD, entry.calls[1])
        for handle in handles:
            handle.remove()
        assert {part: x.shape[-1] for part, x in seen.items()} == {
            "attention": architecture.n_query_heads * architecture.head_dim,
            "mlp": architecture.n_channels,
        }
        added = torch.zeros_like(after)
        for part, x in seen.items():
            module = layer.get_submodule(architecture.writer(part).module)
            torch.testing.assert_close(module(x).reshape(outputs[part].shape), outputs[part])
            norm = architecture.norm_after(part)
            written = module(x).reshape(after.shape)
            written = written if norm is None else layer.get_submodule(norm.module)(written)
            added += architecture.residual_scale * written
        torch.testing.assert_close(entry.h_BTD + added, after, rtol=1e-4, atol=1e-5)
        seen.clear()
        stream.run(layer, entry.h_BTD, entry.calls[1])
    assert seen == {}


@pytest.mark.parametrize("family", families.MIXTURES)
def test_hooks_see_what_every_expert_adds(family: str, resident_of: InMemory) -> None:
    """Expert by expert from the definition: its output, times what the router gives it, where it is chosen."""
    resident = resident_of(family)
    stream, layer = LayerStream(resident.model, resident.architecture), resident.layers[1]
    ids = torch.randint(2, families.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        entry = stream.enter(ids, None)
        after = stream.run(layer, entry.h_BTD, entry.calls[1])
        with output_projections(layer, resident.architecture, lambda part, x: seen.update({part: x})):
            assert torch.equal(stream.run(layer, entry.h_BTD, entry.calls[1]), after)
    handle.remove()
    expected = sizes_of_experts(layer, inputs[0].reshape(-1, families.WIDTH), resident.model.config)
    torch.testing.assert_close(seen["mlp"], expected, rtol=1e-4, atol=1e-5)
    assert (seen["mlp"] > 0).sum() == 18 * 2  # two experts a token


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


@pytest.mark.parametrize("copied", [512, 2])
def test_padding_does_not_count(copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_COPIED", copied)
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
