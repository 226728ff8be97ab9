"""Tiny models whose attention and MLP stand side by side, and mixtures of experts: see `tests.families`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PARALLEL = ("gpt-neox", "falcon", "cohere", "cohere2", "phi")
MIXTURES = ("mixtral", "qwen3-moe", "qwen2-moe")
# Like one of the others but for a feature or two: the tests that all families go through have them only now and then.
VARIATIONS = ("gpt-neox-sequential", "falcon-7b", "falcon-11b")
EXPERTS = 6

_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
_SLIDING = ["full_attention" if layer in (2, 3) else "sliding_attention" for layer in range(6)]
_PARTLY_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_FALCON = {"num_attention_heads": 8, "ffn_hidden_size": 40, "parallel_attn": True}
_ROUTED = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # q, k and v of one head after the other in one matrix; half of every head is rotated; two norms.
    "gpt-neox": ("gpt_neox", {"num_attention_heads": 4, "rope_parameters": _PARTLY_ROTARY}),
    "gpt-neox-sequential": (
        "gpt_neox",
        {"num_attention_heads": 4, "rope_parameters": _PARTLY_ROTARY, "use_parallel_residual": False},
    ),
    # Query heads, key head and value head of one group after the other; norm biases, no other biases; tied.
    "falcon": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4}),
    # One key/value head for all, and one norm for both parts.
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True}),
    "falcon-11b": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
    ),
    # A norm without bias for both parts, QK-norm with weights for every head; tied.
    "cohere": ("cohere", {**_GROUPED, "use_qk_norm": True, "logit_scale": 0.25}),
    # Sliding layers with rotary embedding, full layers without.
    "cohere2": ("cohere2", {**_GROUPED, "layer_types": _SLIDING, "sliding_window": 5, "logit_scale": 0.25}),
    # One norm for both parts, biases everywhere, the head too; QK-norm with a weight and a bias for all heads.
    "phi": ("phi", {**_GROUPED, "rope_parameters": _PARTLY_ROTARY, "qk_layernorm": True}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**_ROUTED, "num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    # Router weights that do not sum to 1, and a shared expert behind a gate.
    "qwen2-moe": ("qwen2_moe", {**_ROUTED, "num_experts": EXPERTS, "shared_expert_intermediate_size": 20}),
}


def make_parallel(family: str, common: dict[str, Any]) -> PreTrainedModel:
    """An untouched model of one of the above; `common`, fields that all families have, wins over the family's."""
    model_type, fields = _MODELS[family]
    config = AutoConfig.for_model(model_type, **{**fields, **common})
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model
