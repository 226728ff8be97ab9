"""The text model of a multimodal one is made shallower, and everything else stays byte for byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint, architecture_of
from intarsia.checkpoint.stored_forms import text_config
from intarsia.inspection.small import small_config
from tests import families
from tests.command import LITTLE, invoke

_PATCHES = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE = {"image_size": 28, "patch_size": 14}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"vision_config": {**_PATCHES, "num_position_embeddings": 16}},
    "gemma4": {
        "vision_config": {**_LAYERS, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
        "audio_config": None,
    },
    "llama4": {
        "vision_config": {
            **_LAYERS,
            **_IMAGE,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        }
    },
    "qwen3_vl": {"vision_config": {**_PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        "vision_config": {**_PATCHES, "fullatt_block_indexes": [1]},
    },
    "gemma3": {"vision_config": {**_LAYERS, **_IMAGE}, "mm_tokens_per_image": 4},
    "llava": {"vision_config": {"model_type": "clip_vision_model", **_LAYERS, **_IMAGE}},
    "mistral3": {"vision_config": {"model_type": "pixtral", **_LAYERS, **_IMAGE, "head_dim": 16}},
    "emu3": {
        "vq_config": {"codebook_size": 16, "embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1]},
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7},
    },
}
"""The sizes of what is around the text model, and what its own config has besides."""
QUICK = ("qwen3_5", "qwen3_vl")


def make_model(kind: str) -> PreTrainedModel:
    """A small random model around a small one of the text model that its class has by default."""
    whole = CONFIG_MAPPING[kind]().to_dict()
    small = small_config(architecture_of(text_config(whole, where=kind), where=kind))
    own = whole["text_config"]
    text = {**own, **{key: value for key, value in small.items() if key in own and key != "model_type"}}
    text |= {key: families.VOCABULARY for key in own if key in ("vocab_size", "vocab_size_per_layer_input")}
    text |= {key: 0 for key in own if key in ("eos_token_id", "pad_token_id")}
    parts = {
        key: {**(whole[key] or {}), **value} if isinstance(value, dict) else value for key, value in KINDS[kind].items()
    }
    ids = {key: 5 for key in whole if key.endswith(("_token_id", "_token_index"))}
    config = CONFIG_MAPPING[kind].from_dict(
        {**whole, **parts, **ids, "text_config": {**text, **KINDS[kind].get("text_config", {})}}
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    families.randomise(model, 0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in KINDS if each not in QUICK)]
)
def test_the_text_model(kind: str, text_file: Path, tmp_path: Path) -> None:
    model = make_model(kind)
    folder, out = families.save(model, tmp_path / "model"), tmp_path / "out"
    checkpoint = Checkpoint.open(folder, model=str(folder))
    depth, ids = checkpoint.architecture.n_layers, torch.arange(10, 30)[None]
    resident = LoadedModel(checkpoint, device=torch.device("cpu"))
    torch.testing.assert_close(resident.model(ids).logits, model(input_ids=ids).logits)

    small = ["--calibration", text_file, "--tokens", 512, "--seq-len", 64, *LITTLE, "--heal", "none"]
    done = invoke("compress", folder, "-o", out, "--layers", depth - 1, "--method", "shortgpt", *small)
    assert done.exit_code == 0, done.output
    verified = invoke("verify", out)  # also that it generates the same with and without a cache
    assert verified.exit_code == 0, verified.output
    inspected = invoke("inspect", out).stdout
    assert re.search(rf"around it +{kind}: [\d,]+ parameters stay byte for byte", inspected)
    assert json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"] == depth - 1
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    prefix = checkpoint.stored_name(f"{checkpoint.architecture.family.modules.layers}.0.").removesuffix("0.")
    tables = [] if checkpoint.architecture.inspected is None else checkpoint.architecture.inspected.tables
    changed = {checkpoint.stored_name(name) for name in tables}
    others = {name for name in before if not name.startswith(prefix)} - changed
    assert len(checkpoint.kept) > 5 and others | changed == {name for name in after if not name.startswith(prefix)}
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in others)
