"""A tiny model that comes with code of its own: a decoder with learned positions, and a gain for each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from tests import families

KIND = "mine"
DEPTH = 6
CONFIGURATION = """
from transformers import PreTrainedConfig


class MineConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
                 num_attention_heads=4, max_position_embeddings=512, gains=None, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.gains = gains or [1.0] * num_hidden_layers
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
"""
MODELING = """
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_mine import MineConfig


class MineLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        width = config.hidden_size
        self.layer_idx, self.heads, self.gain = layer_idx, config.num_attention_heads, config.gains[layer_idx]
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)

    def forward(self, hidden_states, mask, past_key_values=None):
        parts = self.qkv(self.norm(hidden_states)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        read = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.out(read)
        return hidden_states + self.gain * self.down(gelu(self.up(self.mlp_norm(hidden_states))))


class MinePreTrainedModel(PreTrainedModel):
    config_class = MineConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class MineModel(MinePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MineLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        at = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)
        mask = (torch.arange(before + len(at), device=at.device)[None] <= at[:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        hidden_states = self.embed_tokens(input_ids) + self.positions(at)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MineForCausalLM(MinePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = MineModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        out = self.model(input_ids, **{key: value for key, value in kwargs.items() if key != "return_dict"})
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
"""


def save(folder: Path, **changes: Any) -> Path:
    """A random model in a folder, with its code and a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODELING)
    config = {
        "model_type": KIND,
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
        "vocab_size": families.VOCABULARY,
        "num_hidden_layers": DEPTH,
        "gains": [1.0 + layer / 4 for layer in range(DEPTH)],
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    made = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(made, trust_remote_code=True)
    families.randomise(model, 0)
    return families.save(model, folder)
