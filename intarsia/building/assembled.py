"""A recipe's whole model in memory: a `transformers` model like the one that a built folder gives, cache and all.

What the recipe leaves alone (embedding, head, selected layers) shares its parameters with the resident model, so that
it costs no more memory than the layers that are new. Its numbers are those of the built folder, bit for bit: tensors
come from the same function and are rounded in the same order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.loading import set_parameter
from intarsia.building.materialize import outside_tensor
from intarsia.checkpoint.writer import shallower_config
from intarsia.recipe.recipe import Recipe


def assembled(recipe: Recipe, resident: LoadedModel) -> PreTrainedModel:
    """The recipe's model, on the resident model's device and in its dtype.

    Args:
        recipe: over the resident model alone.
        resident: stays as it is. Neither of the two models' parameters may be changed in place afterwards.
    """
    model = twin(resident.model)
    assert isinstance(model, PreTrainedModel)
    layers = nn.ModuleList()
    for index, op in enumerate(recipe.layers):
        layer = twin(resident.module(op, recipe.fitted.get(index)))
        parts: Iterator[Any] = layer.modules()
        for part in parts:
            # What is kept for later tokens is found by the layer's index in the model, not by its source.
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, index)
        layers.append(layer)
    model.set_submodule(resident.architecture.layers_in_memory, layers)
    _slice_tables(model, recipe, resident)
    _configure(model, _config(recipe, resident))
    return model.eval()


def _slice_tables(model: PreTrainedModel, recipe: Recipe, resident: LoadedModel) -> None:
    """Leave of tensors outside the layers with a part for each layer those of the layers that there are."""
    kept = [op.sources[0].layer for op in recipe.layers]
    for name in resident.architecture.inspected.tables if resident.architecture.inspected else ():
        memory = resident.architecture.in_memory(name)
        own = model.get_parameter(memory)
        set_parameter(model, memory, outside_tensor(resident.checkpoint, name, kept).to(own))


def _config(recipe: Recipe, resident: LoadedModel) -> PreTrainedConfig:
    """The config of the built folder, and of the resident model what is decided when a model is loaded."""
    with tempfile.TemporaryDirectory(prefix="intarsia-config-") as folder:
        values = shallower_config(resident.checkpoint, [op.sources[0].layer for op in recipe.layers])
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(config, PreTrainedConfig)
    config.dtype = resident.model.dtype
    config._attn_implementation = resident.model.config._attn_implementation
    # How experts are computed is decided at loading too, by transformers that has several kernels.
    if hasattr(resident.model.config, "_experts_implementation"):
        config._experts_implementation = resident.model.config._experts_implementation
    return config


def _configure(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Let every part read the one config, as after loading."""
    parts: Iterator[Any] = model.modules()
    for part in parts:
        if isinstance(getattr(part, "config", None), PreTrainedConfig):
            part.config = config
