"""Small models of the same kind as a large one: some of its layers, of every kind, in small sizes.

They are for checking an architecture, not for use. Its characteristics stay: groups of query heads, a separate head
width, windows (shorter than the test sequences), flags, multipliers, experts. `sizes.toml` has the sizes by field name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from intarsia.architecture.per_layer import for_layers
from intarsia.architecture.spec import Architecture
from intarsia.data_file import read_toml
from intarsia.errors import UserError, in_words
from intarsia.inspection.structure import config_of, problem_of

_LEAST_LAYERS, _SHORT = 6, 12
_STORED = ("dtype", "torch_dtype", "quantization_config", "auto_map", "transformers_version", "architectures")
"""Config fields about the stored weights."""


def small_config(architecture: Architecture) -> dict[str, Any]:
    """The config of a small model of an architecture."""
    config = config_of(architecture.config, "the config").to_dict() | dict(architecture.config)
    small = shrunken_sizes(for_layers(architecture, config, some_layers(architecture), "the config"))
    if architecture.removal_only:
        return small
    fields = architecture.family.fields
    heads, width = small[fields["query_heads"]], small[fields["width"]]
    own_width = architecture.head_dim * architecture.n_query_heads != architecture.width
    usual = {"kv_heads": heads, "head_dim": width // heads + 8 * own_width}
    for what, value in usual.items():
        name = fields.get(what)
        # Some classes do not accept None for the default.
        if name in small and (small[name] is None or (what == "head_dim" and own_width)):
            small[name] = value
    return {**small, **architecture.family.tiny}


def small_model(config: Mapping[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation mode without neutral values: norms are not ones, biases not zeros.

    Raises:
        UserError: transformers does not know the model type, or cannot build a model from this config.
    """
    rest = {key: value for key, value in config.items() if key != "model_type"}
    model_type = str(config["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} has no model type {model_type!r} to build a small model.",
            "Correct model_type in the config, or install a version of transformers that has it.",
        )
    try:
        made = AutoConfig.for_model(model_type, **rest)
        assert isinstance(made, PreTrainedConfig)
        model = AutoModelForCausalLM.from_config(made)
    except Exception as error:
        # Config classes fail in different ways, by family and version.
        raise UserError(
            f"transformers cannot build a small model of type {model_type}: {in_words(error)}.",
            "Set interdependent fields in the family file's table [tiny].",
        ) from error
    assert isinstance(model, PreTrainedModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.copy_(1.0 + 0.3 * noise if is_norm else (0.5 if "embed" in name else 0.2) * noise)
    return model.float().eval()


def some_layers(architecture: Architecture) -> Sequence[int]:
    """Layers that make a valid model, each kind twice if possible: the first ones, or the first two of each kind if
    those are too many.

    If layers can be joined, neighbours are of one kind.
    """
    depth = architecture.n_layers
    kinds = architecture.layer_types or ("",) * depth
    if architecture.layer_types is not None and not architecture.removal_only:
        return [kinds.index(kind) for kind in dict.fromkeys(kinds) for _ in range(2)] * 2
    twos = [layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < 2]
    tried: list[Sequence[int]] = [range(length) for length in range(min(_LEAST_LAYERS, depth), depth)]
    tried.insert(_SHORT - _LEAST_LAYERS, twos)

    def whole(layers: Sequence[int]) -> bool:
        some = [kinds[layer] for layer in layers]
        return all(some.count(kind) >= min(2, kinds.count(kind)) for kind in set(kinds))

    return next((each for each in tried if whole(each) and problem_of(architecture, each) is None), range(depth))


def shrunken_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with small sizes."""
    sizes = read_toml(files("intarsia.inspection") / "sizes.toml")
    own = sizes["models"].get(str(config.get("model_type")), {})
    return {**_small(config, sizes), **own}


def _small(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _STORED:
            continue
        if isinstance(value, Mapping):
            found[key] = _small(value, sizes)
        elif key in sizes["fields"] and isinstance(value, int) and not isinstance(value, bool):
            found[key] = min(value, sizes["fields"][key]) if value else value
        elif key in sizes["fields"] and isinstance(value, list):  # one for each layer
            found[key] = [min(each, sizes["fields"][key]) for each in value]
        elif re.search(r"token_id$|token_index$", str(key)) and value is not None:
            found[key] = [1] if isinstance(value, list) else min(value, 2)
        else:
            found[key] = value
    if "head_dim" in found and "qk_rope_head_dim" in found:  # latent attention, which computes it
        found["head_dim"] = found["qk_rope_head_dim"]
    heads, groups = (next((found[name] for name in sizes[kind] if found.get(name)), 0) for kind in ("heads", "groups"))
    if groups and heads:  # keep the type of grouping: one group, some, or one per head
        whole = next(config[name] for name in sizes["heads"] if config.get(name))
        own = next(config[name] for name in sizes["groups"] if config.get(name))
        for name in sizes["groups"]:
            if found.get(name):
                found[name] = heads if own == whole else 1 if own == 1 else max(heads // 2, 1)
    rope: dict[str, Any] = found.get("rope_parameters") or found.get("rope_scaling") or {}
    for name in ("short_factor", "long_factor"):
        if heads and rope.get(name):  # one for each frequency of a head
            head = found.get("head_dim") or found["hidden_size"] // heads
            share = rope.get("partial_rotary_factor") or found.get("partial_rotary_factor") or 1.0
            rope[name] = rope[name][: int(head * share) // 2]
    return found
