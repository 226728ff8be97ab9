"""A small model has the features of the large one that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from intarsia.architecture.detect import detect
from intarsia.architecture.spec import Architecture
from intarsia.errors import UserError
from intarsia.inspection.small import small_config, small_model, some_layers


def large(model_type: str, **changes: Any) -> Architecture:
    return detect(AutoConfig.for_model(model_type, **changes).to_dict())


def test_sizes_shrink_and_features_stay() -> None:
    architecture = large("llama", num_attention_heads=32, num_key_value_heads=8, attention_bias=True, dtype="bfloat16")
    config = small_config(architecture)
    small = detect(config)
    assert (small.n_layers, small.n_kv_heads, small.heads_per_group, small.head_dim) == (6, 2, 2, 16)
    assert (small.width, small.n_channels, small.vocabulary) == (64, 96, 160)
    assert config["attention_bias"] is True and "dtype" not in config
    assert config["rms_norm_eps"] == architecture.config["rms_norm_eps"]
    model = small_model(config)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert float((model.model.norm.weight.detach() - 1.0).abs().max()) > 0.1


@pytest.mark.parametrize(("queries", "keys", "groups"), [(32, 32, 4), (32, 1, 1), (16, 8, 2)])
def test_how_heads_are_grouped_stays(queries: int, keys: int, groups: int) -> None:
    small = detect(small_config(large("llama", num_attention_heads=queries, num_key_value_heads=keys)))
    assert (small.n_kv_heads, small.n_query_heads) == (groups, 4)


def test_heads_of_a_width_of_their_own() -> None:
    small = detect(small_config(large("gemma2")))  # 8 heads of 256 on a width of 2304
    assert small.head_dim * small.n_query_heads != small.width
    small = detect(small_config(large("llama")))
    assert small.head_dim * small.n_query_heads == small.width


def test_every_kind_of_layer_stays() -> None:
    architecture = large("gemma3_text")
    assert some_layers(architecture) == [0, 0, 5, 5, 0, 0, 5, 5]
    config = small_config(architecture)
    full, sliding = "full_attention", "sliding_attention"
    assert config["layer_types"] == [sliding, sliding, full, full] * 2
    assert config["sliding_window"] < 20 < architecture.config["sliding_window"]
    smol = small_config(large("smollm3"))
    assert smol["no_rope_layers"] == [1, 1, 0, 0] * 2 and smol["num_hidden_layers"] == 8


def test_lists_of_rotary_factors_fit_the_small_heads() -> None:
    factors = [1.0 + index / 48 for index in range(48)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors}
    architecture = large("phi3", rope_parameters={**rope, "original_max_position_embeddings": 4096})
    config = small_config(architecture)
    assert config["rope_parameters"]["short_factor"] == factors[:8]
    assert small_model(config).config.rope_parameters["rope_type"] == "longrope"


def test_experts_and_tokens() -> None:
    architecture = large("mixtral", eos_token_id=[31999, 2], num_local_experts=64, num_experts_per_tok=6)
    config = small_config(architecture)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert config["eos_token_id"] == [1]


def test_a_config_that_transformers_refuses() -> None:
    config = {**small_config(large("llama")), "hidden_act": "unheard_of"}
    with pytest.raises(UserError, match=r"small model of type llama.*unheard_of.*\[tiny\]"):
        small_model(config)
