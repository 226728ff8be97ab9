"""The student of end-to-end distillation: a recipe's model, what of it is trained, and the way back to a recipe.

Only layers are trained. Embedding, final norm and head stay the base's, so that a recipe with fitted tensors still is
the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.anatomy.spec import Anatomy
from intarsia.building.materialize import materialize
from intarsia.building.parameters import to_tensors
from intarsia.building.resident import load_model
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import missing_package
from intarsia.healing.settings import EndToEndSettings
from intarsia.recipe.recipe import Recipe

_ADAPTER = "default"
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def build_student(recipe: Recipe, variants: Mapping[str, Checkpoint], folder: Path) -> None:
    """The recipe's model as a folder; one that is there is left as it is."""
    if not folder.exists():
        materialize(recipe, variants, folder)


def load_student(folder: Path, settings: EndToEndSettings, device: torch.device) -> tuple[PreTrainedModel, Anatomy]:
    """The student, with gradients for what is trained: all of the layers in float32, or low-rank changes to them."""
    checkpoint = Checkpoint.open(folder, model=str(folder))
    full = settings.lora is None
    model = load_model(checkpoint, device=device, dtype=torch.float32 if full else None)
    if full:
        layers = model.get_submodule(checkpoint.anatomy.family.layers_module)
        layers.requires_grad_(True)
    else:
        _add_lora(model, checkpoint.anatomy, settings.lora or 1)
    if settings.checkpointing:
        # transformers recomputes activations in training mode only; a student that copies a teacher wants no dropout.
        _without_dropout(model)
        settled = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # the newer name, within transformers 5
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=settled)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settled)
        model.train()
    return model, checkpoint.anatomy


def with_trained(recipe: Recipe, anatomy: Anatomy, base: Checkpoint, trained: Mapping[str, Tensor]) -> Recipe:
    """The recipe with what was trained.

    Args:
        base: the student as it was before, on disk.
        trained: parameters of the student that were trained, by their full names; low-rank ones are merged.
    """
    fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {
        index: dict(tensors) for index, tensors in recipe.fitted.items()
    }
    for index in range(len(recipe.layers)):
        prefix = anatomy.tensor_name(index, "")
        own = {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
        own = to_tensors({name: tensor for name, tensor in own.items() if ".lora_" not in name}, anatomy)
        for local in anatomy.layer_shapes():
            name = anatomy.tensor_name(index, local)
            module = name.removesuffix(".weight")
            if local in own:
                tensor = own[local]
            elif f"{module}.lora_A.{_ADAPTER}.weight" in trained:
                a, b = (trained[f"{module}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
                tensor = base.tensor(name).float() + _SCALE * (b @ a)
            else:
                continue
            fitted.setdefault(index, {})[local] = np.ascontiguousarray(tensor.float().cpu().numpy())
    return replace(recipe, fitted=fitted)


_SCALE = 2.0  # lora_alpha / r, whatever the rank


def _add_lora(model: PreTrainedModel, anatomy: Anatomy, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        instead = "train all parameters (without --lora)"
        raise missing_package("peft", where="--lora", extra="train", instead=instead, error=error) from error
    targets = [
        f"{anatomy.family.layers_module}.{index}.{linear.module}"
        for index in range(anatomy.n_layers)
        for linear in anatomy.linears
        if linear.segments != ("expert",)  # experts and their router are no linear modules in memory
    ]
    config = LoraConfig(r=rank, lora_alpha=int(_SCALE * rank), lora_dropout=0.0, bias="none", target_modules=targets)
    torch.manual_seed(0)  # A begins random, B as zeros
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            value: Any = getattr(module, name, None)
            if isinstance(value, float):
                setattr(module, name, 0.0)
