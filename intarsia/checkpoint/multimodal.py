"""A multimodal checkpoint seen as the text model inside it.

Such a checkpoint (Gemma 3, LLaVA, Mistral 3 ...) nests the text model's config under `text_config` and keeps its
tensors under a prefix. Read through a `Wrapper` it has the text model's own config and names, so that everything
else in this package sees an ordinary text model; what is written gets the names and the nesting back, and every
other tensor is copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from intarsia.checkpoint.tensor_file import TensorHeader
from intarsia.errors import UserError

NESTED = "text_config"
_BASE, _HEAD = "model.", "lm_head."
# Where wrappers keep the text model's `model.*` and its `lm_head.*`. The last is that of wrappers whose text model
# is beside the others; it fits every text model, so it comes last.
_LAYOUTS = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
    ("text_model.model.", "text_model.lm_head."),
    ("model.", "lm_head."),
)
# Text models without a language model of their own: what they make of text alone is what this one makes, for a token of
# text has the same position in every direction.
_PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """What surrounds a text model: the whole config, where the text model's tensors lie, and all other tensors."""

    config: Mapping[str, Any]
    base: str
    head: str
    kept: Mapping[str, TensorHeader]

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor of the text model."""
        if name.startswith(_HEAD):
            return self.head + name.removeprefix(_HEAD)
        assert name.startswith(_BASE), f"{name} is no tensor of a text model"
        return self.base + name.removeprefix(_BASE)

    def wrapped(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config for a text model whose config was `before` and is `after`; nothing else is touched.

        What the outer config says once more (a depth, a list) changes with it.
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
    """Whether a config is that of a model around a text model."""
    return isinstance(config.get(NESTED), dict)


def text_config(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The config of the text model: the nested one, completed, or the config itself where nothing wraps it.

    Raises:
        UserError: the nested config names no model that transformers knows.
    """
    return _completed(config[NESTED], where) if is_wrapped(config) else dict(config)


def unwrap(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader], *, where: str
) -> tuple[dict[str, Any], dict[str, TensorHeader], Wrapper]:
    """The config and the tensors of the text model, and what surrounds them.

    Raises:
        UserError: the nested config names no model that transformers knows, or no text model is where wrappers
            keep theirs.
    """
    text = _completed(config[NESTED], where)
    base, head = _layout(headers, where)
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
    # wrapper's class goes by the outer one. A head that is not there is tied in any case.
    tied = config.get("tie_word_embeddings", config[NESTED].get("tie_word_embeddings", text["tie_word_embeddings"]))
    text["tie_word_embeddings"] = bool(tied) or f"{_HEAD}weight" not in shown
    text["dtype"] = _dtype(config, text)
    return text, shown, Wrapper(config=config, base=base, head=head, kept=kept)


def _layout(headers: Mapping[str, TensorHeader], where: str) -> tuple[str, str]:
    for base, head in _LAYOUTS:
        if f"{base}embed_tokens.weight" in headers:
            return base, head
    tried = ", ".join(f"{base}embed_tokens.weight" for base, _ in _LAYOUTS)
    raise UserError(
        f"{where}: the text model inside the multimodal one is not found: there is none of {tried}.",
        "Save the text model alone with transformers, and compress that.",
    )


def _completed(nested: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The nested config with everything that it leaves to transformers' defaults, which differ from class to class."""
    # Only wrapped models need it, and it takes seconds.
    from transformers import CONFIG_MAPPING

    kind = nested.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{where}: {NESTED}.model_type is {kind!r}, which transformers does not know.",
            "Use a wrapper whose nested config names its text model.",
        )
    defaults = CONFIG_MAPPING[str(kind)].from_dict(dict(nested)).to_dict()
    # `tie_word_embeddings` is left out of saved configs where it is the class's own default.
    found = {"tie_word_embeddings": True, **defaults, **nested}
    if kind in _PLAIN:
        found["model_type"] = _PLAIN[kind]
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(found.get(key), Mapping):
                rotary = {name: value for name, value in found[key].items() if not name.startswith("mrope")}
                found[key] = {name: "default" if value == "mrope" else value for name, value in rotary.items()}
    return found


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    for values in (text, config):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) is not None:
                return values[key]
    return None
