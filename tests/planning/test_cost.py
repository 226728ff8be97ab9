"""Predicted memory, by hand: which part of the work needs most, and of what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from intarsia.healing.settings import ClosedFormSettings
from intarsia.planning.cost import predict, with_closed_form, with_judging
from intarsia.planning.settings import ComeSettings
from intarsia.planning.shapes import shape_of
from intarsia.planning.sizes import BASE_BYTES, Held, Sizes
from tests import families
from tests.conftest import Opened

LAYER, OUTSIDE, WIDTH, CHANNELS, VOCABULARY = 121_643_008, 525_340_672, 2048, 8192, 128_256  # Llama 3.2 1B
ROOM, BATCH_TOKENS = 64 * 10**6, 512
BATCH = 6 * BATCH_TOKENS * CHANNELS * 4
STREAMED = Held(apart=False, stream=True, devices=1, memory_bytes=ROOM, batch_tokens=BATCH_TOKENS)
WHOLE = replace(STREAMED, stream=False, memory_bytes=10**12)


def sizes() -> Sizes:
    found = replace(Sizes.on_paper(shape_of("llama-3.2-1b")), tokenizer_bytes=10**6)
    assert (found.layer_bytes, found.outside_bytes, found.base_bytes) == (LAYER, OUTSIDE, BASE_BYTES + 10**6)
    return found


@pytest.mark.parametrize("seq_len", [128, 512])
def test_streamed_the_head_and_its_logits_are_most(seq_len: int) -> None:
    """Layers are in their files then, and the head is where only layers are run."""
    cost = predict(sizes(), "come", ComeSettings(), target=13, tokens=65536, seq_len=seq_len, held=STREAMED)
    logits = BATCH_TOKENS * VOCABULARY * 2
    assert OUTSIDE + logits > 2 * LAYER + BATCH
    assert cost.peak_memory_bytes == BASE_BYTES + 10**6 + ROOM + OUTSIDE + logits
    assert (cost.hidden_bytes, cost.spilled_bytes) == (17 * 65536 * WIDTH * 2, 17 * 65536 * WIDTH * 2 - ROOM)
    # Held in another dtype than that of the files, the head stays; and there are two layers and a batch beside it.
    kept = predict(
        replace(sizes(), mapped=False), "come", ComeSettings(), target=13, tokens=65536, seq_len=seq_len, held=STREAMED
    )
    assert kept.peak_memory_bytes == BASE_BYTES + 10**6 + ROOM + OUTSIDE + max(2 * LAYER + BATCH, logits)


def test_a_model_that_writes_the_text_has_keys_and_values() -> None:
    """Of 64 sequences at most, and no more than 2 GiB; where nothing is measured that is all there is."""
    given = {"target": 13, "tokens": 65536, "held": WHOLE}
    silent = predict(sizes(), "reverse", None, seq_len=512, **given)
    weights = 16 * LAYER + OUTSIDE
    for seq_len, rows in ((512, 64), (2048, 32), (4096, 16)):  # 32 KiB a token
        kept = (16 * 8 + 32) * 2 * 64 * seq_len * 2 + 3 * VOCABULARY * 2
        found = predict(sizes(), "reverse", None, seq_len=seq_len, writes=True, **given)
        assert found.peak_memory_bytes == BASE_BYTES + 10**6 + weights + rows * kept
        assert found.peak_memory_bytes > silent.peak_memory_bytes
    streamed = {**given, "held": STREAMED}
    there, read = (
        predict(sizes(), "reverse", None, seq_len=512, writes=writes, **streamed) for writes in (True, False)
    )
    assert there == read  # it was written without
    few = predict(sizes(), "reverse", None, seq_len=512, writes=True, **{**given, "tokens": 2048})
    assert few == silent  # four sequences are less than the losses


def test_streamed_the_closed_form_has_a_layer_and_moments() -> None:
    plan = predict(sizes(), "come", ComeSettings(), target=13, tokens=65536, seq_len=128, held=STREAMED)
    healed = with_closed_form(plan, sizes(), ClosedFormSettings(), target=13, tokens=65536, held=STREAMED)
    # The factor, columns that are solved for, and two changes in float32: the one that is tried, and the best.
    solving = 8 * (CHANNELS**2 * 17 // 32) + 8 * CHANNELS * 1024 + 2 * 4 * CHANNELS * WIDTH
    fitting = LAYER * 3 // 2 + BATCH + solving
    assert healed.peak_memory_bytes == BASE_BYTES + 10**6 + ROOM + max(fitting, OUTSIDE + 128 * 1024**2)
    few = with_closed_form(plan, sizes(), ClosedFormSettings(), target=13, tokens=1024, held=STREAMED)
    assert few.peak_memory_bytes == plan.peak_memory_bytes


def test_several_fits_share_the_original_where_there_is_room_and_are_judged_by_text_of_their_own() -> None:
    plan = predict(sizes(), "come", ComeSettings(), target=13, tokens=65536, seq_len=128, held=WHOLE)
    settings = ClosedFormSettings(held_out=32)
    one = with_closed_form(plan, sizes(), settings, target=13, tokens=65536, held=WHOLE)
    four = with_closed_form(plan, sizes(), settings, target=13, tokens=65536, held=WHOLE, starts=4, judged=8192)
    assert one.heal_forwards_at_most is not None and four.heal_forwards_at_most is not None
    fits = one.heal_forwards_at_most - 1  # 2 * 13 / 32, rounded up
    assert four.heal_forwards_at_most == 4 * fits + 9  # 5 * 13 / 8
    state = 65536 * WIDTH * 2
    assert one.hidden_bytes == plan.hidden_bytes == 17 * state
    assert four.hidden_bytes == 18 * state
    streamed = with_closed_form(plan, sizes(), settings, target=13, tokens=65536, held=STREAMED, starts=4, judged=8192)
    assert streamed.hidden_bytes == 17 * state


def test_in_memory_both_models_are_judged() -> None:
    plan = predict(sizes(), "come", ComeSettings(), target=13, tokens=1024, seq_len=128, held=WHOLE)
    hidden, logits = 17 * 1024 * WIDTH * 2, 512 * VOCABULARY * 2
    weights = OUTSIDE + (16 + 4) * LAYER  # merged layers: three, and a candidate
    assert plan.peak_memory_bytes == BASE_BYTES + 10**6 + hidden + weights + logits + BATCH
    judged = with_judging(plan, sizes(), target=13, tokens=4096, held=WHOLE)
    logits, batch = 4096 * VOCABULARY * 2, 6 * 4096 * CHANNELS * 4
    models = 2 * OUTSIDE + (16 + 13) * LAYER
    assert judged.peak_memory_bytes == BASE_BYTES + 10**6 + models + logits + batch
    with_fits = with_judging(plan, sizes(), target=13, tokens=4096, held=WHOLE, healed=ClosedFormSettings())
    # In float32: down_proj of thirteen layers, o_proj of the three that stand for more than themselves.
    kept = 4 * (13 * CHANNELS * WIDTH + 3 * WIDTH * WIDTH)
    assert with_fits.peak_memory_bytes == judged.peak_memory_bytes + kept


def test_a_tokenizer_takes_many_times_its_file(checkpoint_of: Opened, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("llama")
    (tmp_path / "tokenizer.json").write_text("x" * 1000)
    assert Sizes.of(replace(checkpoint, folder=tmp_path), None).tokenizer_bytes == 14_000
    assert Sizes.of(replace(checkpoint, folder=tmp_path / "none"), None).tokenizer_bytes == 1000 * families.VOCABULARY
