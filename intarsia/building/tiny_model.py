"""A small random model of the same kind as a large one: few layers, narrow, with the features of its config.

For trying an architecture, not for use. What makes a model of its kind stays: groups of query heads, heads of a width
of their own, every kind of layer, windows (shorter than what is run through them), flags, multipliers, experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from intarsia.architecture.spec import Architecture
from intarsia.errors import UserError
from intarsia.inspection.small import small_config

VOCABULARY = 160
_LAYERS, _KV_HEADS, _GROUP, _HEAD, _CHANNELS, _EXPERTS, _WINDOW = 6, 4, 3, 16, 48, 6, 6
# Of the stored weights, not of the layers: the small model is float32 and has no such things.
_LEFT_OUT = ("dtype", "torch_dtype", "quantization_config", "auto_map", "transformers_version", "architectures")


def shrunken(architecture: Architecture) -> dict[str, Any]:
    """The config of a small model like the one that an architecture is of."""
    if architecture.removal_only:
        return small_config(architecture)
    fields = architecture.family.fields
    small = {key: value for key, value in architecture.config.items() if key not in _LEFT_OUT}
    heads = min(architecture.n_kv_heads, _KV_HEADS)
    queries = heads * (_KV_HEADS if heads == 1 else min(architecture.heads_per_group, _GROUP))
    width = queries * _HEAD
    own_head = architecture.head_dim * architecture.n_query_heads != architecture.width
    head = _HEAD + 8 if own_head else _HEAD
    sizes = {
        "layers": len(some_layers(architecture)),
        "width": width,
        "query_heads": queries,
        "kv_heads": heads,
        "head_dim": head,
        "channels": _CHANNELS,
        "experts": min(architecture.n_experts, _EXPERTS),
        "vocabulary": VOCABULARY,
        "embedding_width": width,
    }
    for what, value in sizes.items():
        name = fields.get(what)
        if name is not None and (name in small or (what == "head_dim" and own_head)):
            small[name] = value
    for name, values in architecture.per_layer.items():
        small[name] = [values[layer] for layer in some_layers(architecture)]
    small |= {name: _other(name, value, small, head) for name, value in small.items() if name not in fields.values()}
    return {**small, **architecture.family.tiny}


def some_layers(architecture: Architecture) -> list[int]:
    """The layers of the large model that the small one's are like: two of each kind, one after the other, and again."""
    if architecture.layer_types is None:
        return list(range(min(architecture.n_layers, _LAYERS)))
    firsts = [architecture.layer_types.index(kind) for kind in dict.fromkeys(architecture.layer_types)]
    pairs = [layer for layer in firsts for _ in range(2)]
    return pairs * max(1, -(-_LAYERS // len(pairs)) if len(firsts) == 1 else 2)


def small_model(config: Mapping[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation mode, in which nothing is neutral: norms are no ones, biases no zeros.

    Raises:
        UserError: transformers does not know the model type, or cannot make a model of this config.
    """
    rest = {key: value for key, value in config.items() if key != "model_type"}
    model_type = str(config["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} has no model type {model_type!r} to build a small model.",
            "Correct model_type in the config, or install a version of transformers that has it. A model that comes "
            "with code of its own cannot be checked.",
        )
    try:
        made = AutoConfig.for_model(model_type, **rest)
        assert isinstance(made, PreTrainedConfig)
        model = AutoModelForCausalLM.from_config(made)
    except Exception as error:
        # What a config class objects to, and how, differs between families and versions.
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers makes no small model of type {model_type}: {type(error).__name__}: {words}.",
            "Set the fields that must fit together in the family file's table [tiny].",
        ) from error
    assert isinstance(model, PreTrainedModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.copy_(1.0 + 0.3 * noise if is_norm else (0.5 if "embed" in name else 0.2) * noise)
    return model.float().eval()


def _other(name: str, value: Any, small: Mapping[str, Any], head: int) -> Any:
    """A field that is no size of the architecture, as the small model has it."""
    if name.endswith("_token_id"):
        return [1] if isinstance(value, list) else value if value is None or value < VOCABULARY else 1
    if isinstance(value, Mapping):
        return {key: _other(str(key), part, {**small, **value}, head) for key, part in value.items()}
    if isinstance(value, bool) or value is None:
        return value
    if name == "head_dim":  # where a family computes it, and writes it down all the same
        return _HEAD
    if name.endswith("intermediate_size"):
        return _CHANNELS
    if name == "sliding_window":
        return _WINDOW
    if name == "num_experts_per_tok":
        return min(value, 2)
    if name in ("short_factor", "long_factor"):
        share = small.get("partial_rotary_factor") or 1.0
        return value[: int(head * share) // 2]
    return value
