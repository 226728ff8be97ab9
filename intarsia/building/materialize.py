"""A recipe's model on disk, built one layer at a time; or in memory, equal to the one loaded from a built folder.

On disk, peak memory is a few layers and the largest single tensor, whatever the depth: sources are memory-mapped tensor
by tensor, and every tensor is written and released before the next layer.

In memory, unchanged parts (embedding, head, selected layers) share their parameters with the resident model, so that
only new layers take memory. The values equal those of the built folder bit for bit: tensors come from the same function
and are rounded in the same order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from intarsia.building.layer import layer_tensors
from intarsia.building.loaded_model import LoadedModel, check_config, twin
from intarsia.building.offload import set_parameter
from intarsia.checkpoint.files import TensorPlan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.writer import checkpoint_writer, copy_side_files, shallower_config, write_config
from intarsia.disk import let_go
from intarsia.errors import UserError
from intarsia.inspection.structure import problem_of
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.recipe import LayerRef, Recipe
from intarsia.recipe.validate import check

RECIPE_FILE = Path("recipe") / "recipe.yaml"
"""The path of the recipe in a built model: in a separate folder, because some runtimes load every safetensors file
beside the weights."""


def materialize(
    recipe: Recipe,
    variants: Mapping[str, Checkpoint],
    out: Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Build a recipe into a model folder, which appears whole or not at all.

    Args:
        variants: the opened checkpoint of every variant, by name.
        finish: called with the staging folder before it is published, to add files such as the model card.

    Raises:
        UserError: the recipe does not fit the variants, a built tensor is not finite, or the folder cannot be
            written.
    """
    check(recipe, {name: checkpoint.architecture for name, checkpoint in variants.items()})
    base = variants[recipe.base]
    check_config(base)
    kept = [op.sources[0].layer for op in recipe.layers]
    if (reason := problem_of(base.architecture, kept)) is not None:
        raise UserError(f"The layers of this recipe do not make a valid model: {reason}.", "Remove other layers.")
    kinds = base.architecture.layer_types or ()
    for kind in dict.fromkeys(kind for kind in kinds if kind not in {kinds[layer] for layer in kept}):
        current().say(f"no layer of kind {kind} is left")
    outside = base.outside_names()
    plans = [
        TensorPlan(
            name=base.stored_name(name),
            dtype=base.headers[name].dtype,
            shape=tuple(outside_tensor(base, name, kept, meta=True).shape),
        )
        for name in outside
    ]
    plans += base.kept.values()
    further = base.further_names(len(recipe.layers))
    plans += [replace(base.headers[name], name=base.stored_name(new)) for name, new in further.items()]
    for index, op in enumerate(recipe.layers):
        first = op.sources[0]
        source = variants[first.variant]
        for local, shape in source.architecture.layer_shapes(first.layer).items():
            dtype = source.headers[source.architecture.tensor_name(first.layer, local)].dtype
            name = base.stored_name(base.architecture.tensor_name(index, local))
            plans.append(TensorPlan(name=name, dtype=dtype, shape=shape))

    def read(ref: LayerRef, local: str) -> Tensor:
        return variants[ref.variant].layer_tensor(ref.layer, local)

    inputs = [checkpoint.folder for checkpoint in variants.values()]
    inputs += [checkpoint.adapter.folder for checkpoint in variants.values() if checkpoint.adapter is not None]
    with (
        checkpoint_writer(out, plans, overwrite=overwrite, max_shard_bytes=max_shard_bytes, inputs=inputs) as writer,
        current().task("building", len(recipe.layers)) as task,
    ):
        for name in outside:
            writer.write(base.stored_name(name), outside_tensor(base, name, kept))
        for name in base.kept:
            writer.write(name, base.kept[name].tensor())
        for name, new in further.items():
            writer.write(base.stored_name(new), base.tensor(name))
        for index, op in enumerate(recipe.layers):
            tensors = layer_tensors(op, base.architecture, read)
            for local, fitted in recipe.fitted.get(index, {}).items():
                tensors[local] = torch.from_numpy(fitted).to(tensors[local].dtype)
                if tensors[local].dtype != torch.float32:
                    let_go(fitted)
            for local in base.architecture.layer_shapes(op.sources[0].layer):
                tensor = tensors.pop(local).contiguous()
                name = base.stored_name(base.architecture.tensor_name(index, local))
                if not bool(torch.isfinite(tensor).all()):
                    raise UserError(
                        f"Output tensor {name} has NaN or infinity.",
                        "Folding a norm overflows in this dtype; use a bfloat16 or float32 source.",
                    )
                writer.write(name, tensor)
            task.advance()
        write_config(base, kept, writer.folder)
        copy_side_files(base.folder, writer.folder)
        (writer.folder / RECIPE_FILE).parent.mkdir()
        schema.save(recipe, writer.folder / RECIPE_FILE)
        if finish is not None:
            finish(writer.folder)


def outside_tensor(checkpoint: Checkpoint, name: str, kept: Sequence[int], *, meta: bool = False) -> Tensor:
    """A tensor outside the layers for a model of these layers; a tensor with a part for each layer is sliced.

    Args:
        meta: without its values.
    """
    architecture, header = checkpoint.architecture, checkpoint.headers[name]
    tensor = torch.empty(header.shape, dtype=header.dtype, device="meta") if meta else checkpoint.tensor(name)
    axis = None if architecture.inspected is None else architecture.inspected.tables.get(name)
    if axis is None or list(kept) == list(range(architecture.n_layers)):
        return tensor
    return torch.cat([tensor.chunk(architecture.n_layers, dim=axis)[layer] for layer in kept], dim=axis)


def assembled(recipe: Recipe, resident: LoadedModel) -> PreTrainedModel:
    """The recipe's model, on the resident model's device and in its dtype.

    Args:
        recipe: over the resident model alone.
        resident: shares parameters; neither model's may be changed in place afterwards.
    """
    model = twin(resident.model)
    assert isinstance(model, PreTrainedModel)
    layers = nn.ModuleList()
    for index, op in enumerate(recipe.layers):
        layer = twin(resident.module(op, recipe.fitted.get(index)))
        parts: Iterator[Any] = layer.modules()
        for part in parts:
            # The cache is indexed by the layer's position in the model, not by its source.
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, index)
        layers.append(layer)
    model.set_submodule(resident.architecture.layers_in_memory, layers)
    kept = [op.sources[0].layer for op in recipe.layers]
    for name in resident.architecture.inspected.tables if resident.architecture.inspected else ():
        memory = resident.architecture.in_memory(name)
        set_parameter(model, memory, outside_tensor(resident.checkpoint, name, kept).to(model.get_parameter(memory)))
    config = _config(kept, resident)
    every: Iterator[Any] = model.modules()
    for part in every:  # all read the one config, as after loading
        if isinstance(getattr(part, "config", None), PreTrainedConfig):
            part.config = config
    return model.eval()


def _config(kept: Sequence[int], resident: LoadedModel) -> PreTrainedConfig:
    """The config of the built folder, with the resident model's settings from loading."""
    with tempfile.TemporaryDirectory(prefix="intarsia-config-") as folder:
        values = shallower_config(resident.checkpoint, kept)
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(config, PreTrainedConfig)
    config.dtype = resident.model.dtype
    config._attn_implementation = resident.model.config._attn_implementation
    # The kernel for experts is also chosen at loading, in versions of transformers with several.
    if hasattr(resident.model.config, "_experts_implementation"):
        config._experts_implementation = resident.model.config._experts_implementation
    return config
