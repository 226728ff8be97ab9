"""A tiny config of every family."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, OPTConfig, PretrainedConfig, Qwen2Config, Qwen3Config


@pytest.fixture(scope="session")
def common() -> dict[str, Any]:
    """Fields that every family has under the same name."""
    return {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 50}


@pytest.fixture(scope="session")
def configs(common: dict[str, Any]) -> dict[str, PretrainedConfig]:
    grouped = {**common, "num_key_value_heads": 2, "intermediate_size": 20}
    return {
        "llama": LlamaConfig(**grouped),
        "mistral": MistralConfig(**grouped, head_dim=4),
        "qwen2": Qwen2Config(**grouped),
        "qwen3": Qwen3Config(**grouped, head_dim=16),
        "opt": OPTConfig(**common, ffn_dim=20, word_embed_proj_dim=48),
    }
