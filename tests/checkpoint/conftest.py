"""Tiny random models on disk, and a cache folder of the test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("INTARSIA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`single`: one file, untied. `sharded`: the same weights in several files. `tied`: Qwen2 with layer types."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    common: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False)).float()
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="15KB")
    Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True)).float().save_pretrained(root / "tied")
    return {entry.name: entry for entry in root.iterdir()}


@pytest.fixture
def model(saved: dict[str, Path], tmp_path: Path) -> Make:
    """A copy of one of the saved models that the test may damage."""

    def copy(kind: str = "single") -> Path:
        return Path(shutil.copytree(saved[kind], tmp_path / kind))

    return copy
