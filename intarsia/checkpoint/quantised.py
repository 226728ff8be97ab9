"""Checkpoints of quantised weights: FP8 is read as ordinary weights, for every other kind the error says what to do.

FP8 (E4M3): a weight is its stored value times its scale. Four ways of storing them are one formula: a scale for the
whole tensor, for each row (`fbgemm_fp8`, compressed-tensors `float-quantized`), or for each block of rows and columns
(`fp8` with `weight_block_size`). The product is formed in float32 and rounded once to the dtype of the config, so
bfloat16 holds it to within one part in 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoint.tensor_file import TensorHeader, map_tensor
from intarsia.errors import Problems, UserError

KEYS = ("quantization_config", "compression_config")
_AFTERWARDS = "and quantise the result afterwards"
_SAVE = "save_pretrained(NEW), copy the tokenizer files to NEW, and use that folder"
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
_SCALES = ("weight_scale_inv", "weight_scale")  # the first is named after what it undoes; both are multiplied
_INPUT_SCALES = ("input_scale", "activation_scale", "input_scale_ub")  # of activations at run time: not part of weights
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A weight of 8 bits and its scales, as they are stored, and what it is read as."""

    weight: TensorHeader
    scale: TensorHeader
    block: tuple[int, int]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The weight, made anew each time."""
        wide_OI = map_tensor(self.weight).float()
        rows, columns = self.weight.shape
        scale = map_tensor(self.scale).float().reshape(-(-rows // self.block[0]), -(-columns // self.block[1]))
        for axis, size in enumerate(self.block):
            if scale.shape[axis] > 1:  # an axis with one scale broadcasts
                scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, self.weight.shape[axis])
        return (wide_OI * scale).to(self.dtype)


def readable(quantization: Mapping[str, Any]) -> bool:
    """Whether the weights that a `quantization_config` describes can be read as ordinary ones."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return quantization.get("format") == "float-quantized"
    return method in _METHODS


def unscaled(
    quantization: Mapping[str, Any], headers: Mapping[str, TensorHeader], dtype: torch.dtype, *, where: str
) -> tuple[dict[str, TensorHeader], dict[str, Scaled]]:
    """The tensors as they are read, without scales; and of those that are scaled, how.

    Raises:
        UserError: a weight of 8 bits has no scale, or one of an unknown shape.
    """
    shown = {name: header for name, header in headers.items() if not _is_scale(name)}
    scaled: dict[str, Scaled] = {}
    problems = Problems()
    for name, header in shown.items():
        if header.dtype != torch.float8_e4m3fn:
            continue
        scale = _scale_of(name, headers)
        block = None if scale is None else _block(quantization, header, scale)
        if scale is None or block is None:
            fault = "no scale" if scale is None else f"a scale of unknown shape: {scale.name} {list(scale.shape)}"
            problems.add(
                f"{where}: the 8-bit weight {name} has {fault}.", "Use the checkpoint that this one was quantised from."
            )
            continue
        scaled[name] = Scaled(weight=header, scale=scale, block=block, dtype=dtype)
        shown[name] = replace(header, dtype=dtype)
    problems.raise_any(most=_MOST_NAMED)
    return shown, scaled


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in (*_SCALES, *_INPUT_SCALES)


def _scale_of(name: str, headers: Mapping[str, TensorHeader]) -> TensorHeader | None:
    module = name.rpartition(".")[0]
    return next((headers[f"{module}.{kind}"] for kind in _SCALES if f"{module}.{kind}" in headers), None)


def _block(quantization: Mapping[str, Any], weight: TensorHeader, scale: TensorHeader) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the shapes do not say."""
    if len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    if scale.numel == 1:
        return rows, columns
    if scale.numel == rows and scale.shape[0] == rows:
        return 1, columns
    size = quantization.get("weight_block_size")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        return None
    fits = tuple(scale.shape) == (-(-rows // size[0]), -(-columns // size[1]))
    return (size[0], size[1]) if fits else None


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
    if readable(quantization):
        remedy = (
            f"Pass --dequantize (or write the model as dequantize:{folder}): every weight is then read as its 8 bits "
            f"times its scale. Or use the model that it was made from, {_AFTERWARDS}."
        )
    elif method == "mxfp4":
        remedy = f"Use {load}, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype='auto'), {_SAVE}."
    elif method in ("bitsandbytes", "hqq", "quanto", "torchao", "higgs"):
        remedy = (
            f"Use the model that it was made from, {_AFTERWARDS}; where there is none, {load}).dequantize() gives "
            f"ordinary weights with this one's losses: {_SAVE}."
        )
    else:
        remedy = f"Use the model that it was made from, {_AFTERWARDS}."
    return UserError(f"{file}: {key} describes {method} weights.", remedy)
