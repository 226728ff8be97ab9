"""What memory is measured to be, against what it must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from intarsia.anatomy.detect import detect
from intarsia.evaluation import memory
from intarsia.evaluation.memory import growth, kv_cache_bytes
from intarsia.evaluation.speed import footprint
from tests import families

MB = 1024**2
CPU = torch.device("cpu")


def take(megabytes: int) -> None:
    """Memory that is really touched, and let go of again."""
    np.ones(megabytes * MB, dtype=np.uint8).sum()


def test_growth_is_what_a_block_takes_at_most() -> None:
    with growth(CPU) as grown:
        take(200)
        take(50)
    assert 195 * MB < grown.bytes < 260 * MB


def test_growth_by_looking_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    with growth(CPU) as grown:
        kept = np.ones(200 * MB, dtype=np.uint8)
        kept.sum()
    assert 195 * MB < grown.bytes < 260 * MB


def test_what_was_needed_before_does_not_count() -> None:
    take(300)
    with growth(CPU) as grown:
        take(100)
    assert 95 * MB < grown.bytes < 160 * MB


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_cache_takes_what_the_config_says(family: str) -> None:
    """Mistral slides in every layer, Qwen3 in two of six, and the prompt is longer than their windows."""
    model = families.make_model(family)
    anatomy = detect(model.config.to_dict())
    found = footprint(model, batch=2, prompt_len=11, new_tokens=4)
    assert found.cache_bytes == kv_cache_bytes(anatomy, batch=2, tokens=14, itemsize=4)


def test_cache_by_hand() -> None:
    """Llama: keys and values, 2 sequences, 4 groups of width 4, 14 tokens, 6 layers, 4 bytes."""
    anatomy = detect(families.make_model("llama").config.to_dict())
    assert kv_cache_bytes(anatomy, batch=2, tokens=14, itemsize=4) == 2 * 2 * 4 * 4 * 14 * 6 * 4
    sliding = detect(families.make_model("mistral").config.to_dict())
    assert kv_cache_bytes(sliding, batch=1, tokens=14, itemsize=2) == 2 * 3 * 8 * 6 * 6 * 2
