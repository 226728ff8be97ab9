"""A checkpoint as a `transformers` model: read by transformers from its folder, or through this package's own reader.

The folder's own loader gives what the reader gives for an ordinary checkpoint. A text model inside a multimodal one,
or weights of 8 bits that are read as ordinary ones, are handed over tensor by tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from intarsia.checkpoint.reader import Checkpoint


def as_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint's model in this dtype, on the CPU."""
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
    if checkpoint.as_stored:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    else:
        config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
    assert isinstance(config, PreTrainedConfig)
    return config
