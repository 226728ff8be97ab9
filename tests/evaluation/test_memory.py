"""What memory is measured to be, against what it must be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from intarsia.architecture.detect import detect
from intarsia.evaluation.speed import footprint, kv_cache_bytes
from tests import families

MB = 1024**2

_GROWTH = """
import numpy as np
import torch
from intarsia.evaluation import speed as memory

MB = 1024**2

def take(megabytes):
    np.ones(megabytes * MB, dtype=np.uint8).sum()  # really touched, and released again

with memory.growth(torch.device("cpu")) as grown:
    take(200)
    take(50)
print(grown.bytes)

take(300)
with memory.growth(torch.device("cpu")) as grown:
    take(100)
print(grown.bytes)
"""


def test_growth_is_what_a_block_takes_at_most() -> None:
    """What was needed before does not count.

    In a process of its own: what other tests release meanwhile must not count.
    """
    done = subprocess.run([sys.executable, "-c", _GROWTH], check=True, capture_output=True, text=True)
    most, after_more = (int(line) for line in done.stdout.split())
    assert 195 * MB < most < 260 * MB
    assert 95 * MB < after_more < 160 * MB


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_cache_takes_what_the_config_says(family: str) -> None:
    """Mistral slides in every layer, Qwen3 in two of six, and the prompt is longer than their windows."""
    model = families.make_model(family)
    architecture = detect(model.config.to_dict())
    found = footprint(model, batch=2, prompt_len=11, new_tokens=4)
    assert found.cache_bytes == kv_cache_bytes(architecture, batch=2, tokens=14, itemsize=4)


def test_cache_by_hand() -> None:
    """Llama: keys and values, 2 sequences, 4 groups of width 4, 14 tokens, 6 layers, 4 bytes."""
    architecture = detect(families.make_model("llama").config.to_dict())
    assert kv_cache_bytes(architecture, batch=2, tokens=14, itemsize=4) == 2 * 2 * 4 * 4 * 14 * 6 * 4
    sliding = detect(families.make_model("mistral").config.to_dict())
    assert kv_cache_bytes(sliding, batch=1, tokens=14, itemsize=2) == 2 * 3 * 8 * 6 * 6 * 2
