"""Families with attention and MLP side by side, fused projections, and mixtures of experts, from their configs."""

from __future__ import annotations

from typing import Any

import pytest

from intarsia.architecture.detect import detect, verify
from intarsia.architecture.spec import PARTS
from intarsia.errors import UserError
from tests import families

FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
    "vocab_size": 65024,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "bias": False,
    "alibi": False,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "vocab_size": 151936,
}


def test_falcon_is_recognised_by_what_its_layers_are() -> None:
    old, new = detect(FALCON_7B), detect(FALCON_40B)
    one = detect({**FALCON_40B, "num_ln_in_parallel_attn": 1})
    assert [architecture.family.name for architecture in (old, new, one)] == [
        "falcon",
        "falcon-two-norms",
        "falcon-one-norm",
    ]
    # Multi-query attention has one piece, whatever num_kv_heads says; the MLP is four times as wide as the stream.
    assert (old.n_kv_heads, old.heads_per_group, old.head_dim, old.n_channels) == (1, 71, 64, 4 * 4544)
    assert old.layer_shapes()["self_attention.query_key_value.weight"] == ((71 + 2) * 64, 4544)
    assert (new.n_kv_heads, new.heads_per_group, new.unit("qkv")) == (8, 16, 18 * 64)
    assert new.layer_shapes()["self_attention.query_key_value.weight"] == (8 * 18 * 64, 8192)
    assert {norm.module for norm in new.norms} == {"ln_attn", "ln_mlp"}
    for architecture in (old, one):
        assert [norm.module for norm in architecture.norms] == ["input_layernorm"]
        assert {architecture.norm_before(part) for part in PARTS} == set(architecture.norms)
    assert all(architecture.parallel and not architecture.shift_folds("mlp") for architecture in (old, new, one))
    assert all(architecture.approximations == () for architecture in (old, new, one))


def test_parameters_of_mixtures() -> None:
    """Of layers as large as the real ones: Mixtral 8x7B has 46.7 billion parameters, Qwen3-30B-A3B 30.5."""
    mixtral, qwen = detect(MIXTRAL), detect(QWEN3_30B)
    assert (mixtral.n_experts, mixtral.n_pieces("mlp"), mixtral.n_channels) == (8, 8, 14336)
    attention, experts = 2 * 4096 * 4096 + 2 * 1024 * 4096, 3 * 8 * 14336 * 4096
    assert mixtral.layer_parameters == attention + experts + 8 * 4096 + 2 * 4096
    assert 46.6e9 < 32 * mixtral.layer_parameters + 2 * 32000 * 4096 < 46.8e9
    assert 30.4e9 < 48 * qwen.layer_parameters + 2 * 151936 * 2048 < 30.6e9
    assert len(qwen.layer_shapes()) == 4 + 2 + 2 + 1 + 3 * 128
    newer = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    assert detect({**newer, "num_local_experts": 128}).layer_shapes() == qwen.layer_shapes()
    assert any("router" in text for text in mixtral.approximations)


@pytest.mark.parametrize("family", [*families.PARALLEL, *families.MIXTURES, *families.VARIATIONS])
def test_what_stands_side_by_side(family: str) -> None:
    architecture = detect(families.make_model(family).config.to_dict())
    assert architecture.parallel == (family in families.PARALLEL or family.startswith("falcon"))
    assert (architecture.n_experts > 0) == (family in families.MIXTURES)
    assert architecture.is_mixture("mlp") == (architecture.n_experts > 0) and not architecture.is_mixture("attention")


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({**FALCON_7B, "alibi": True}, "ALiBi"),
        ({**FALCON_7B, "parallel_attn": False}, "parallel_attn = false"),
        ({**FALCON_7B, "multi_query": False}, "multi_query = false"),
        ({**QWEN3_30B, "decoder_sparse_step": 2}, "some are mixtures"),
        ({**QWEN3_30B, "mlp_only_layers": [0]}, "some are mixtures"),
        ({**QWEN3_30B, "num_experts": 0}, "0"),
        ({**QWEN3_30B, "model_type": "qwen2_moe"}, "nothing"),  # the size of the shared expert
        ({**QWEN3_30B, "model_type": "qwen2_moe", "shared_expert_intermediate_size": "wide"}, "'wide'"),
        ({**MIXTRAL, "model_type": "granite", "residual_multiplier": "half"}, "'half'"),
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "gpt_oss"}, "attention sink"),
        ({"model_type": "falcon_mamba"}, "state-space"),
    ],
    ids=str,
)
def test_what_is_not_covered_is_refused_by_its_name(config: dict[str, Any], feature: str) -> None:
    with pytest.raises(UserError) as caught:
        detect(config)
    assert any(feature in problem.message for problem in caught.value.problems)
    assert all(problem.hint for problem in caught.value.problems)


def test_buffers_of_old_checkpoints_are_no_part_of_a_layer() -> None:
    model = families.make_model("gpt-neox")
    architecture = detect(model.config.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in range(architecture.n_layers):
        shapes[architecture.tensor_name(layer, "attention.bias")] = (1, 1, 64, 64)
        shapes[architecture.tensor_name(layer, "attention.masked_bias")] = ()
        shapes[architecture.tensor_name(layer, "attention.rotary_emb.inv_freq")] = (2,)
    verify(architecture, shapes, where="old")
    shapes[architecture.tensor_name(1, "attention.gate.bias")] = (4,)
    with pytest.raises(UserError, match=r"layers\.1\.attention\.gate\.bias"):
        verify(architecture, shapes, where="old")
