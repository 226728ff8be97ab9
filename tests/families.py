"""Tiny random models of every family, saved as ordinary checkpoint folders.

Nothing about them is neutral: norm weights are not ones, biases are not zeros, heads are grouped, and every layer is
different, so that a piece in the wrong place changes the output.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.families_dense import DENSE, make_dense
from tests.families_parallel import EXPERTS, MIXTURES, PARALLEL, VARIATIONS, make_parallel

__all__ = ["DENSE", "EXPERTS", "MIXTURES", "PARALLEL", "VARIATIONS"]

FAMILIES = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "opt", *DENSE, *PARALLEL, *MIXTURES)
DEPTH = 6
WIDTH = 32
CHANNELS = 40
VOCABULARY = 320
POSITIONS = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": CHANNELS}
# Layers 2 and 3 look back a few tokens only.
_LAYER_TYPES = ["sliding_attention" if layer in (2, 3) else "full_attention" for layer in range(DEPTH)]


def make_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of one of `FAMILIES`, in evaluation mode.

    llama: 4 KV groups of 2 query heads, untied. llama-bias: the same with biases on every linear layer. mistral: 3
    groups, width of its heads of its own, a sliding window. qwen2: 2 groups, QKV biases, tied. qwen3: 3 groups,
    QK-norm, wide heads, full and sliding layers. opt: 4 heads, biases everywhere, ungated, tied.
    """
    grouped = {"num_attention_heads": 8, "num_key_value_heads": 4}
    own_heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    config: Any
    if family == "llama":
        config = LlamaConfig(**{**_GATED, **grouped, "tie_word_embeddings": False, **changes})
        model: PreTrainedModel = LlamaForCausalLM(config)
    elif family == "llama-bias":
        config = LlamaConfig(**{**_GATED, **grouped, "attention_bias": True, "mlp_bias": True, **changes})
        model = LlamaForCausalLM(config)
    elif family == "mistral":
        config = MistralConfig(**{**_GATED, **own_heads, "head_dim": 8, "sliding_window": 7, **changes})
        model = MistralForCausalLM(config)
    elif family == "qwen2":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen2Config(**{**_GATED, **heads, "tie_word_embeddings": True, **changes})
        model = Qwen2ForCausalLM(config)
    elif family == "qwen3":
        sliding = {"use_sliding_window": True, "sliding_window": 5, "layer_types": _LAYER_TYPES}
        config = Qwen3Config(**{**_GATED, **own_heads, **sliding, "head_dim": 16, **changes})
        model = Qwen3ForCausalLM(config)
    elif family == "opt":
        sizes = {"num_attention_heads": 4, "ffn_dim": CHANNELS, "word_embed_proj_dim": WIDTH, "dropout": 0.0}
        config = OPTConfig(**{**_COMMON, **sizes, "pad_token_id": 1, **changes})
        model = OPTForCausalLM(config)
    elif family in DENSE:
        model = make_dense(family, {**_GATED, **changes})
    elif family in (*PARALLEL, *MIXTURES, *VARIATIONS):
        model = make_parallel(family, {**_GATED, **changes})
    else:
        raise ValueError(f"no family {family!r}")
    randomise(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model.float().eval()


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Random norms, biases and weights, large enough that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.2 * noise)


def sample_text(words: int, *, seed: int = 0) -> str:
    """Lines of made-up words, in which some words follow others more often than chance has it."""
    rng = random.Random(seed)
    stock = ["".join(rng.choice("aeioulnrstk") for _ in range(rng.randint(2, 6))) for _ in range(60)]
    found, last = [], 0
    for _ in range(words):
        last = (last * 7 + rng.choice([1, 2, 3])) % len(stock)
        found.append(stock[last])
    return "\n".join(" ".join(found[start : start + 12]) + "." for start in range(0, words, 12)) + "\n"


def make_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows every byte and a few words of `sample_text`; EOS is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(600).splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save(model: PreTrainedModel, folder: Path, *, chat: bool = False, max_shard_size: str = "5GB") -> Path:
    """Model and tokenizer as a checkpoint folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(chat=chat).save_pretrained(folder)
    return folder
