"""Tiny models of the dense families whose layers are built otherwise than Llama's: see `tests.families`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

UNLIKE = ("gemma2", "gemma3", "olmo3", "smollm3")
"""Those whose layers 2 and 3 attend otherwise than the rest."""
DENSE = ("gemma2", "gemma3", "phi3", "olmo2", "olmo3", "smollm3", "granite", "stablelm")

_OWN_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
_GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
# The other way round than in `tests.families`: most layers look back a few tokens only.
_SLIDING = ["full_attention" if layer in (2, 3) else "sliding_attention" for layer in range(6)]
_PARTLY_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Sandwich norms, both kinds of soft caps, sliding and full layers, tied.
    "gemma2": (
        "gemma2",
        {
            **_OWN_HEADS,
            "layer_types": _SLIDING,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    # Sandwich norms and QK-norm; sliding and full layers with rotary embeddings of their own.
    "gemma3": ("gemma3_text", {**_OWN_HEADS, "layer_types": _SLIDING, "sliding_window": 5}),
    # q, k and v in one matrix, gate and up in one; half of every head is rotated.
    "phi3": ("phi3", {**_GROUPED, "head_dim": 4, "rope_parameters": _PARTLY_ROTARY, "sliding_window": 9}),
    # Norms after the parts alone, QK-norm over all heads.
    "olmo2": ("olmo2", {**_GROUPED}),
    "olmo3": ("olmo3", {**_GROUPED, "layer_types": _SLIDING, "sliding_window": 5}),
    # Layers 2 and 3 have no rotary embedding.
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layers": [1, 1, 0, 0, 1, 1], "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    # Norms with biases: q, k and v can take them, gate and up cannot.
    "stablelm": ("stablelm", {**_GROUPED, "use_qkv_bias": True, "rope_parameters": _PARTLY_ROTARY}),
}


def make_dense(family: str, common: dict[str, Any]) -> PreTrainedModel:
    """An untouched model of one of `DENSE`; `common` are fields that all families have, and wins over the family's."""
    model_type, fields = _MODELS[family]
    config = AutoConfig.for_model(model_type, **{**fields, **common})
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model
