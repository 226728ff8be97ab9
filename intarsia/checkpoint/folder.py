"""What a model folder holds besides weights: a shallower model's config, and files that go along as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from intarsia.anatomy.detect import regenerates
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
_SIDE_FILES = (
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
# A name such as `tokenizer_ablation.safetensors` must not bring weights along.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


def write_config(source: Checkpoint, layer_sources: Sequence[int], out: Path) -> None:
    """Write `out`/config.json for a model with one layer per entry of `layer_sources`: see `cut_config`.

    Raises:
        UserError: a per-layer list of the config is not as long as the model is deep.
    """
    config = cut_config(source, layer_sources)
    if source.wrapper is not None:
        config = source.wrapper.wrapped(source.config, config)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def cut_config(source: Checkpoint, layer_sources: Sequence[int]) -> dict[str, Any]:
    """The config of a model with one layer per entry of `layer_sources`; that of the text model inside a wrapper.

    `layer_sources[i]` is the layer of `source` from which output layer i takes what the config says layer by layer.
    All other values stay as they are.

    Raises:
        UserError: a per-layer list of the config is not as long as the model is deep.
    """
    assert layer_sources and all(0 <= layer < source.anatomy.n_layers for layer in layer_sources)
    config = dict(source.config)
    family = source.anatomy.family
    config[family.fields["layers"]] = len(layer_sources)
    for entry in family.per_layer:
        values = config.get(entry.field)
        if values is None:
            values = source.anatomy.per_layer.get(entry.field)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != source.anatomy.n_layers:
            raise UserError.of(
                where=f"{source.folder / 'config.json'}: {entry.field}",
                expected=f"{source.anatomy.n_layers} entries, one a layer",
                found=f"{len(values)} entries" if isinstance(values, list) else repr(values),
                remedy=f"Make {entry.field} as long as the model is deep.",
            )
        config[entry.field] = [values[layer] for layer in layer_sources]
        changed = config[entry.field] != list(values)
        for name in entry.instead_of:
            if changed and name in config and not regenerates(entry, config, name, config[entry.field]):
                del config[name]
    return config


def copy_side_files(source: Checkpoint, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence; never weights, code or the model card."""
    for entry in sorted(source.folder.iterdir()):
        wanted = any(fnmatch(entry.name, pattern) for pattern in _SIDE_FILES)
        if wanted and entry.is_file() and not any(fnmatch(entry.name, pattern) for pattern in _WEIGHTS):
            # Contents only: on the hub's cache these are links, and their modes are the cache's business.
            shutil.copyfile(entry, out / entry.name)
