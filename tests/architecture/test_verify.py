"""Architectures against the tensors that transformers' own models have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from intarsia.architecture.detect import detect, verify
from intarsia.architecture.spec import Architecture
from intarsia.errors import UserError

Configs = dict[str, PretrainedConfig]
Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: PretrainedConfig) -> Shapes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture
def more(common: dict[str, Any], configs: Configs) -> Configs:
    grouped = {**common, "num_key_value_heads": 2, "intermediate_size": 20}
    return {
        **configs,
        "llama with biases": LlamaConfig(**grouped, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "opt at another embedding width": OPTConfig(**common, ffn_dim=20, word_embed_proj_dim=24),
        "opt without biases": OPTConfig(**common, ffn_dim=20, enable_bias=False, layer_norm_elementwise_affine=False),
    }


@pytest.fixture
def llama(configs: Configs) -> Architecture:
    return detect(configs["llama"].to_dict())


def refused(architecture: Architecture, shapes: Shapes) -> UserError:
    with pytest.raises(UserError) as caught:
        verify(architecture, shapes, where="model")
    return caught.value


@pytest.fixture
def shapes(configs: Configs) -> Shapes:
    return shapes_of(configs["llama"])


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama with biases",
        "mistral",
        "qwen2",
        "qwen3",
        "opt",
        "opt at another embedding width",
        "opt without biases",
    ],
)
def test_agrees_with_transformers(name: str, more: Configs) -> None:
    config = more[name]
    architecture, shapes = detect(config.to_dict()), shapes_of(config)
    verify(architecture, shapes, where="model")
    prefix = f"{architecture.family.modules.layers}.1."
    real = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    assert architecture.layer_shapes() == real
    assert f"{architecture.family.modules.head}.weight" in shapes
    assert architecture.layer_parameters == sum(torch.Size(shape).numel() for shape in real.values())


def test_missing_wrong_and_unexpected_tensors_at_once(llama: Architecture, shapes: Shapes) -> None:
    del shapes["model.layers.0.mlp.up_proj.weight"]
    shapes["model.layers.1.self_attn.k_proj.weight"] = (17, 48)
    shapes["model.layers.2.self_attn.q_proj.lora_A"] = (4, 48)
    shapes["model.layers.3.mlp.up_proj.weight"] = (20, 48)
    shapes["model.embed_tokens.weight"] = (51, 48)
    text = str(refused(llama, shapes))
    for part in ("layers.0.mlp.up_proj.weight", "no such tensor", "[16, 48]", "[17, 48]", "lora_A", "layers.3.", "[51"):
        assert part in text
    assert len(refused(llama, shapes).problems) == 5


def test_many_problems_are_cut_short(llama: Architecture) -> None:
    error = refused(llama, {})
    assert len(error.problems) == 21
    assert "more problems" in str(error)


def test_old_rotary_buffers_are_let_pass(llama: Architecture, shapes: Shapes) -> None:
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    verify(llama, shapes, where="model")


def test_tensors_outside_the_layers_are_nobodys_business_here(llama: Architecture, shapes: Shapes) -> None:
    shapes["model.something.weight"] = (1,)
    verify(llama, shapes, where="model")
