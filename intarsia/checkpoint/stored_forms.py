"""Checkpoints that store a text model in another form (8-bit, multimodal), read as that text model.

FP8 (E4M3): a weight is its stored value times its scale. One formula covers all formats: a scale for the whole tensor,
for each row (`fbgemm_fp8`, compressed-tensors `float-quantized`), or for each block of rows and columns (`fp8` with
`weight_block_size`). The product is formed in float32 and rounded once to the dtype of the config, so bfloat16 holds it
to within one part in 512. Other quantised weights are refused with a hint.

A multimodal checkpoint (Gemma 3, LLaVA, Mistral 3 ...) nests the text model's config under `text_config` and keeps its
tensors under a prefix. Read through a `Wrapper` it has the text model's config and names, so that everything else
sees an ordinary text model; writing restores names and nesting, and copies every other tensor byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoint.files import TensorHeader
from intarsia.errors import Problems, UserError, mismatch
from intarsia.inspection import own_code

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEYS = ("quantization_config", "compression_config")
_AFTERWARDS = "and quantise the result afterwards"
_SAVE = "save_pretrained(NEW), copy the tokenizer files to NEW, and use that folder"
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
_SCALES = ("weight_scale_inv", "weight_scale")  # despite the name of the first, both are multiplied
_OTHERS = ("input_scale", "activation_scale", "input_scale_ub")  # of activations at run time, not of weights
_MOST_NAMED = 5
NESTED = "text_config"
_BASE, _HEAD = "model.", "lm_head."
# Where wrappers keep the text model's `model.*` and its `lm_head.*`. The last entry is for wrappers that keep the
# text model beside the others; it matches every text model.
_LAYOUTS = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
    ("text_model.model.", "text_model.lm_head."),
    ("model.", "lm_head."),
)
# Text models without a language-model class, and the class with the same outputs for text, where a token has the same
# position in every direction.
_PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


@dataclass(frozen=True, kw_only=True)
class Scaled(TensorHeader):
    """A weight stored in 8 bits, read as the product with its scales."""

    weight: TensorHeader
    scale: TensorHeader
    # rows and columns that share a scale
    block: tuple[int, int]

    def tensor(self) -> Tensor:
        """The weight, computed on each call."""
        wide_OI, (rows, columns) = self.weight.tensor().float(), self.shape
        scale = self.scale.tensor().float().reshape(-(-rows // self.block[0]), -(-columns // self.block[1]))
        for axis, size in enumerate(self.block):
            if scale.shape[axis] > 1:  # an axis with one scale broadcasts
                scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, self.shape[axis])
        return (wide_OI * scale).to(self.dtype)


def readable(quantization: Mapping[str, Any]) -> bool:
    """Whether the weights that a `quantization_config` describes can be read as ordinary ones."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return quantization.get("format") == "float-quantized"
    return method in _METHODS


def unscaled(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader], folder: Path
) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """Config and tensors of a quantised model, converted to those of an ordinary one without scales.

    Raises:
        UserError: the format is unknown, or a weight of 8 bits has no scale, or one of an unknown shape.
    """
    key, quantization = quantization_of(config) or ("", {})
    if not readable(quantization):
        raise refuse(key, quantization, folder / "config.json")
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(plain.get(NESTED), dict):
        plain[NESTED] = {key: value for key, value in plain[NESTED].items() if key not in _KEYS}
    holders = (plain, plain.get(NESTED) or {})
    named = [values.get(key) for values in holders for key in ("dtype", "torch_dtype")]
    name = next((name for name in named if isinstance(name, str)), "bfloat16")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    dtype = dtype if dtype in WEIGHT_DTYPES else torch.bfloat16
    shown = {name: header for name, header in headers.items() if name.rpartition(".")[2] not in (*_SCALES, *_OTHERS)}
    problems = Problems()
    for name, header in shown.items():
        if header.dtype != torch.float8_e4m3fn:
            continue
        module = name.rpartition(".")[0]
        scale = next((headers[f"{module}.{kind}"] for kind in _SCALES if f"{module}.{kind}" in headers), None)
        block = None if scale is None else _block(quantization, header, scale)
        if scale is None or block is None:
            fault = "no scale" if scale is None else f"a scale of unknown shape: {scale.name} {list(scale.shape)}"
            problems.add(
                f"{folder}: the 8-bit weight {name} has {fault}.",
                "Use the checkpoint that this one was quantised from.",
            )
            continue
        read = {**vars(header), "dtype": dtype}
        shown[name] = Scaled(**read, weight=header, scale=scale, block=block)
    problems.raise_any(most=_MOST_NAMED)
    return plain, shown


def _block(quantization: Mapping[str, Any], weight: TensorHeader, scale: TensorHeader) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the shapes do not tell."""
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
    """The quantisation entry of a config, with its key; None for ordinary weights."""
    for prefix, values in (("", config), ("text_config.", config.get("text_config"))):
        for key in _KEYS:
            if isinstance(values, Mapping) and values.get(key):
                entry = values[key]
                return prefix + key, entry if isinstance(entry, Mapping) else {}
    return None


def refuse(key: str, quantization: Mapping[str, Any], file: Path) -> UserError:
    """The error for a quantised checkpoint, with what to do instead."""
    method = str(quantization.get("quant_method") or "unknown")
    if method == "bitsandbytes" or quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        method = "bitsandbytes"
    folder = str(file.parent)
    load = f"transformers.AutoModelForCausalLM.from_pretrained({folder!r}"
    if readable(quantization):
        remedy = (
            f"Pass --dequantize (or write the model as dequantize:{folder}) to read every weight as its 8 bits times "
            f"its scale. Or use the original model, {_AFTERWARDS}."
        )
    elif method == "mxfp4":
        remedy = f"Use {load}, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype='auto'), {_SAVE}."
    elif method in ("bitsandbytes", "hqq", "quanto", "torchao", "higgs"):
        remedy = (
            f"Use the original model, {_AFTERWARDS}; if there is none, {load}).dequantize() gives ordinary weights "
            f"with the quantisation error: {_SAVE}."
        )
    else:
        remedy = f"Use the original model, {_AFTERWARDS}."
    return UserError(f"{file}: {key} describes {method} weights.", remedy)


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """The model around a text model: the whole config, the place of the text model's tensors, and all other tensors."""

    config: Mapping[str, Any]
    base: str
    head: str
    kept: Mapping[str, TensorHeader]

    def stored_name(self, name: str) -> str:
        """The name in files of a text model's tensor."""
        if name.startswith(_HEAD):
            return self.head + name.removeprefix(_HEAD)
        assert name.startswith(_BASE), f"{name} is no tensor of a text model"
        return self.base + name.removeprefix(_BASE)

    def wrapped(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config for a text model whose config changes from `before` to `after`.

        Values repeated in the outer config (a depth, a list) change with it.
        """
        nested = {key: value for key, value in self.config[NESTED].items() if key in after or key not in before}
        nested |= {key: value for key, value in after.items() if key not in before or before[key] != value}
        again = {
            key: after[key]
            for key, value in self.config.items()
            if key in before and key in after and value == before[key] != after[key]
        }
        return {**self.config, **again, NESTED: nested}


def is_wrapped(config: Mapping[str, Any]) -> bool:
    """Whether a config is for a model around a text model."""
    return isinstance(config.get(NESTED), dict)


def text_config(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The config of the text model: the completed nested one, or the config itself without a wrapper.

    Raises:
        UserError: transformers does not know the nested config's model.
    """
    return _completed(config[NESTED], where) if is_wrapped(config) else dict(config)


def unwrap(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader], *, where: str
) -> tuple[dict[str, Any], dict[str, TensorHeader], Wrapper]:
    """The config and the tensors of the text model, and its wrapper.

    Raises:
        UserError: transformers does not know the nested config's model, there is no text model in the usual
            places, or the model has code of its own.
    """
    kind = str(config.get("model_type"))
    if own_code.CODE in config and not own_code.is_stock(kind):  # its tensor names are unknown
        expected, found = "a multimodal model of transformers", f"{kind}, with code of its own"
        raise UserError(mismatch(where, expected, found, "Save the text model alone, and use that."))
    text = _completed(config[NESTED], where)
    prefixes = ((base, head) for base, head in _LAYOUTS if f"{base}embed_tokens.weight" in headers)
    base, head = next(prefixes, ("", ""))
    if not base:
        tried = ", ".join(f"{base}embed_tokens.weight" for base, _ in _LAYOUTS)
        raise UserError(
            f"{where}: no text model found in the multimodal one: there is none of {tried}.",
            "Save the text model alone with transformers, and use that.",
        )
    shown: dict[str, TensorHeader] = {}
    kept: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        if name.startswith(head):
            own = _HEAD + name.removeprefix(head)
        elif name.startswith(base):
            own = _BASE + name.removeprefix(base)
        else:
            kept[name] = header
            continue
        shown[own] = replace(header, name=own)
    # The outer config, the inner one, or both say whether the head is tied, and they may disagree: the
    # wrapper's class uses the outer one. A missing head is tied in any case.
    tied = config.get("tie_word_embeddings", config[NESTED].get("tie_word_embeddings", text["tie_word_embeddings"]))
    text["tie_word_embeddings"] = bool(tied) or f"{_HEAD}weight" not in shown
    stated = (values.get(key) for values in (text, config) for key in ("dtype", "torch_dtype"))
    text["dtype"] = next((name for name in stated if name is not None), None)
    return text, shown, Wrapper(config=config, base=base, head=head, kept=kept)


def _completed(nested: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The nested config with transformers' defaults, which differ between classes."""
    # Only wrapped models need it, and it takes seconds.
    from transformers import CONFIG_MAPPING

    kind = nested.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{where}: {NESTED}.model_type is {kind!r}, which transformers does not know.",
            "Use a wrapper whose nested config names its text model.",
        )
    defaults = CONFIG_MAPPING[str(kind)].from_dict(dict(nested)).to_dict()
    # Saved configs omit `tie_word_embeddings` if it is the class's default.
    found = {"tie_word_embeddings": True, **defaults, **nested}
    if kind in _PLAIN:
        found["model_type"] = _PLAIN[kind]
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(found.get(key), Mapping):
                rotary = {name: value for name, value in found[key].items() if not name.startswith("mrope")}
                found[key] = {name: "default" if value == "mrope" else value for name, value in rotary.items()}
    return found
