"""Pieces taken out and put together again, against loops over rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.architecture.detect import detect
from intarsia.architecture.spec import Architecture, Linear
from intarsia.building import slicing
from intarsia.building.slicing import blocks, fold_centred_norm, fold_norm, join, positions, take

ARCHITECTURE = detect(
    {
        "model_type": "llama",
        "hidden_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "intermediate_size": 7,
        "vocab_size": 5,
    }
)
FUSED = replace(
    ARCHITECTURE,
    linears=(
        replace(ARCHITECTURE.linears[0], module="self_attn.qkv_proj", segments=("q", "kv", "kv")),
        *ARCHITECTURE.linears[3:],
    ),
)


def linear(architecture: Architecture, name: str) -> Linear:
    return next(found for found in architecture.linears if found.module.endswith(name))


def numbered(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


def test_query_heads_follow_their_key_value_head() -> None:
    """Query head j reads key/value head j // 2, so group g owns query heads 2g and 2g + 1."""
    weight = numbered(6 * 4, 10)
    by_hand = np.concatenate(
        [weight.numpy()[head * 4 : head * 4 + 4] for group in (2, 0) for head in range(6) if head // 2 == group]
    )
    q_proj = linear(ARCHITECTURE, "q_proj")
    (found,) = take(weight, positions(ARCHITECTURE, q_proj, (2, 0)), q_proj.cut_axis)
    np.testing.assert_array_equal(found.numpy(), by_hand)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_key_and_value_rows(name: str) -> None:
    weight = numbered(3 * 4, 10)
    module = linear(ARCHITECTURE, name)
    (found,) = take(weight, positions(ARCHITECTURE, module, (2, 0)), module.cut_axis)
    np.testing.assert_array_equal(found.numpy(), np.concatenate([weight.numpy()[8:12], weight.numpy()[0:4]]))


def test_columns_of_the_output_projection() -> None:
    weight = numbered(10, 6 * 4)
    module = linear(ARCHITECTURE, "o_proj")
    (found,) = take(weight, positions(ARCHITECTURE, module, (1,)), module.cut_axis)
    np.testing.assert_array_equal(found.numpy(), weight.numpy()[:, 8:16])


def test_channels() -> None:
    up, down = linear(ARCHITECTURE, "up_proj"), linear(ARCHITECTURE, "down_proj")
    weight = numbered(7, 10)
    (rows,) = take(weight, positions(ARCHITECTURE, up, (6, 1)), up.cut_axis)
    np.testing.assert_array_equal(rows.numpy(), weight.numpy()[[6, 1]])
    (columns,) = take(weight.T, positions(ARCHITECTURE, down, (6, 1)), down.cut_axis)
    np.testing.assert_array_equal(columns.numpy(), weight.numpy().T[:, [6, 1]])


def test_a_fused_projection_has_every_piece_in_each_segment() -> None:
    weight = numbered(24 + 12 + 12, 10)
    qkv = linear(FUSED, "qkv_proj")
    first = take(weight, positions(FUSED, qkv, (1,)), 0)
    second = take(weight, positions(FUSED, qkv, (2, 0)), 0)
    rows = [*range(8, 16), *range(16, 24), *range(8)]  # q of group 1, then of 2 and 0
    rows += [*range(28, 32), *range(32, 36), *range(24, 28)]  # k
    rows += [*range(40, 44), *range(44, 48), *range(36, 40)]  # v
    np.testing.assert_array_equal(join([first, second], 0).numpy(), weight.numpy()[rows])


@pytest.mark.parametrize("architecture", [ARCHITECTURE, FUSED], ids=["apart", "fused"])
def test_joining_all_pieces_is_the_identity(architecture: Architecture) -> None:
    for module in architecture.linears:
        weight = torch.randn(architecture.linear_shape(module))
        whole = positions(architecture, module, range(architecture.n_pieces(module.part)))
        assert torch.equal(join([take(weight, whole, module.cut_axis)], module.cut_axis), weight)


@given(st.permutations(range(7)), st.integers(0, 7))
def test_a_layer_cut_in_two_and_joined_is_that_permutation(order: list[int], middle: int) -> None:
    weight = numbered(10, 7)
    down = linear(ARCHITECTURE, "down_proj")
    parts = [take(weight, positions(ARCHITECTURE, down, cut), 1) for cut in (order[:middle], order[middle:])]
    assert torch.equal(join(parts, 1), weight[:, order])


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_what_is_taken(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "_ROWS", 3)
    weight, where = numbered(7, 8), torch.tensor([6, 1, 3, 0])
    found = list(blocks(weight, where, axis))
    assert all(len(taken) <= 3 and len(taken) == rows.stop - rows.start for rows, taken in found)
    assert torch.equal(torch.cat([taken for _, taken in found]), take(weight, [where], axis)[0])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_folding_a_norm_is_exact(shifted: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, scale, shift, n = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 8), (5,), (8,), (8,), (11, 8))
    )
    if shifted and not biased:
        with pytest.raises(ValueError, match="cannot be folded"):
            fold_norm(weight, None, scale, shift)
        return
    folded, offset = fold_norm(weight, bias if biased else None, scale, shift if shifted else None)
    assert folded.dtype == torch.float64
    expected = (n * scale + (shift if shifted else 0.0)) @ weight.T + (bias if biased else 0.0)
    found = n @ folded.T + (offset if offset is not None else 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (offset is not None) == biased


def test_folding_half_precision_gives_float32() -> None:
    weight = torch.randn(3, 4).to(torch.bfloat16)
    scale = torch.randn(4)
    folded, _ = fold_norm(weight, None, scale, None)
    assert folded.dtype == torch.float32
    assert torch.equal(folded, weight.float() * scale)


def test_folding_nothing_changes_nothing() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    folded, offset = fold_norm(weight, bias, None, None)
    assert torch.equal(folded, weight)
    assert offset is not None and torch.equal(offset, bias)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_norms_bias_goes_into_rows_that_read_ones(scaled: bool) -> None:
    """Without a linear bias: the norm's output has mean zero, so that a constant part of a row is free to give it."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, 10, generator=generator, dtype=torch.float64) for size in (7, 30))
    scale, shift = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(2))
    unit = torch.nn.functional.layer_norm(x, (10,), eps=0.0)
    own = (unit * scale if scaled else unit) + shift
    folded = fold_centred_norm(weight, scale if scaled else None, shift)
    torch.testing.assert_close((unit + 1.0) @ folded.T, own @ weight.T, rtol=1e-10, atol=1e-10)
    assert fold_centred_norm(weight.bfloat16(), scale, shift).dtype == torch.float32
