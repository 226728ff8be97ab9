"""Tiny random multimodal models: a text model of a known family inside a wrapper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
)

from tests.families import VOCABULARY, make_tokenizer, randomise

WRAPPERS = ("gemma3", "llava", "mistral3")
DEPTH = 6
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make_wrapper(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of one of `WRAPPERS`, in evaluation mode.

    gemma3: sliding and full layers in turn, sandwich norms, tied. llava: Llama, untied, its head inside the prefix.
    mistral3: tied by the outer config while the inner one says the opposite.
    """
    config: Any
    if kind == "gemma3":
        turns = ["sliding_attention", "full_attention"] * (DEPTH // 2)
        text = {**_TEXT, "layer_types": turns, "sliding_window": 6}
        config = Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=319)
        model: PreTrainedModel = Gemma3ForConditionalGeneration(config)
    elif kind == "llava":
        vision = CLIPVisionConfig(**_VISION)
        config = LlavaConfig(text_config=LlamaConfig(**_TEXT), vision_config=vision, image_token_index=319)
        model = LlavaForConditionalGeneration(config)
    elif kind == "mistral3":
        vision = PixtralVisionConfig(**_VISION)
        config = Mistral3Config(text_config=MistralConfig(**_TEXT), vision_config=vision, image_token_index=319)
        model = Mistral3ForConditionalGeneration(config)
    else:
        raise ValueError(f"no wrapper {kind!r}")
    randomise(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model.float().eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Model and tokenizer as a checkpoint folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def in_later_layout(folder: Path) -> None:
    """The same tensors under the names of `model.language_model.*` and `lm_head.*`."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("language_model.model."):
            name = "model.language_model." + name.removeprefix("language_model.model.")
        elif name.startswith("language_model."):
            name = name.removeprefix("language_model.")
        else:
            name = f"model.{name}"
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **nested: Any) -> None:
    """Set values of the nested config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = {**config["text_config"], **nested}
    config["text_config"] = {key: value for key, value in text.items() if value is not None}
    file.write_text(json.dumps(config))


IDS = torch.randint(2, VOCABULARY - 8, (2, 17), generator=torch.Generator().manual_seed(3))
"""Tokens of text, none of them an image's."""
