"""Checkpoints of quantised weights: which way out there is for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.checkpoint import fp8
from intarsia.errors import UserError

KEYS = ("quantization_config", "compression_config")
_AFTERWARDS = "and quantise the result afterwards"
_SAVE = "save_pretrained(NEW), copy the tokenizer files to NEW, and use that folder"


def quantization_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The entry of a config that says how its weights are quantised, with its key; None for ordinary weights."""
    for prefix, values in (("", config), ("text_config.", config.get("text_config"))):
        for key in KEYS:
            if isinstance(values, Mapping) and values.get(key):
                entry = values[key]
                return prefix + key, entry if isinstance(entry, Mapping) else {}
    return None


def refuse(key: str, quantization: Mapping[str, Any], file: Path) -> UserError:
    """Why a quantised checkpoint is not read, and what to do instead."""
    method = str(quantization.get("quant_method") or "unknown")
    if method == "bitsandbytes" or quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        method = "bitsandbytes"
    folder = str(file.parent)
    load = f"transformers.AutoModelForCausalLM.from_pretrained({folder!r}"
    if fp8.readable(quantization):
        remedy = (
            f"Pass --dequantize (or write the model as dequantize:{folder}): every weight is then read as its 8 bits "
            f"times its scale. Or use the model that it was made from, {_AFTERWARDS}."
        )
    elif method == "mxfp4":
        remedy = f"Use {load}, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype='auto'), {_SAVE}."
    elif method in ("bitsandbytes", "hqq", "quanto", "torchao", "higgs"):
        remedy = (
            f"Use the model that it was made from, {_AFTERWARDS}; where that is gone, {load}).dequantize() gives "
            f"ordinary weights with this one's losses: {_SAVE}."
        )
    else:
        remedy = f"Use the model that it was made from, {_AFTERWARDS}."
    return UserError.of(
        where=f"{file}: {key}", expected="weights that are not quantised", found=f"{method} weights", remedy=remedy
    )
