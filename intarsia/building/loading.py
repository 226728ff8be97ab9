"""A checkpoint as a `transformers` model: read by transformers from its folder, or through this package's own reader.

The folder's own loader gives what the reader gives for an ordinary checkpoint. A text model inside a multimodal one,
or weights of 8 bits that are read as ordinary ones, are handed over tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from intarsia.checkpoint.files import let_go
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import Problem, Problems, UserError


@contextmanager
def refusals_named(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers raises for a config or weights that it does not take into a user's error.

    Raises:
        UserError: with its reason.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # which one differs from class to class
        if type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", None) is not None:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise UserError(
            f"transformers {version('transformers')} does not load {checkpoint.folder}: {reason}.",
            "Correct its config.json, or use the version of transformers that it was made for.",
        ) from error


def check_config(checkpoint: Checkpoint) -> None:
    """Check that transformers takes the configs and finds all that is outside the layers; no weight is loaded.

    Raises:
        UserError: it does not; see `refusals_named`.
    """
    with refusals_named(checkpoint), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock_config(checkpoint), trust_remote_code=False)
        if (checkpoint.folder / "generation_config.json").is_file():
            generation: Any = GenerationConfig.from_pretrained(checkpoint.folder)
            generation.validate()
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                ids = getattr(generation, name, None)
                if any(type(each) is not int for each in (ids if isinstance(ids, list) else [ids]) if each is not None):
                    raise ValueError(f"{name} of generation_config.json is {ids!r}")
    held = {checkpoint.architecture.in_memory(name) for name in checkpoint.outside_names()}
    _check(checkpoint, (name for name, _ in model.named_parameters() if name not in held))


def as_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint's model in this dtype, on the CPU."""
    with refusals_named(checkpoint):
        return _as_transformers(checkpoint, dtype)


def _as_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    if checkpoint.as_stored:
        return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, trust_remote_code=False)
    config = stock_config(checkpoint)
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model: PreTrainedModel = classes[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={name: checkpoint.tensor(name) for name in checkpoint.headers},
        dtype=dtype,
    )
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


def stock_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config object of the checkpoint's model."""
    with refusals_named(checkpoint):
        if checkpoint.as_stored:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
    assert isinstance(config, PreTrainedConfig)
    return config


_MOST_NAMED = 5


def skeleton(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode, all but its layers on `device`; parameters of layers are on the meta device."""
    from accelerate import init_empty_weights

    with refusals_named(checkpoint), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(stock_config(checkpoint), dtype=dtype, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    architecture = checkpoint.architecture
    for stored in checkpoint.outside_names():
        name = architecture.in_memory(stored)
        if name in parameters:
            value = checkpoint.tensor(stored).to(device=device, dtype=dtype)
            set_parameter(model, name, value)
        elif name in buffers:
            buffers[name].copy_(checkpoint.tensor(stored))
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer.to(device)
    model.tie_weights()
    _check(checkpoint, (name for name, parameter in model.named_parameters() if parameter.is_meta))
    for name in (architecture.embedding_in_memory, architecture.family.head_in_memory):
        model.get_submodule(name).register_forward_hook(_let_go)
    model.requires_grad_(False)
    return model.eval()


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, without gradient; a parameter stays the same object."""
    owner, _, attribute = name.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), attribute, parameter)


def _let_go(module: nn.Module, args: Any, output: Any) -> None:
    for parameter in module.parameters(recurse=False):
        let_go(parameter)


def _check(checkpoint: Checkpoint, absent: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks one of the parameters outside the layers."""
    layers = f"{checkpoint.architecture.layers_in_memory}."
    Problems(
        Problem(f"{checkpoint.folder} has no tensor {name}, and the model has this parameter.", "Get it again.")
        for name in absent
        if not name.startswith(layers)
    ).raise_any(most=_MOST_NAMED)
