"""Remote code: code in a model's folder for a class that transformers does not have. It runs only if it is trusted.

    with trust_remote_code():
        compress("MODEL", "OUT", Target(layers=25))

Its classes are registered with transformers under the model's type, so that transformers finds them. For a model type
with a class in transformers, no other code is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intarsia.errors import UserError, in_words

CODE = "auto_map"
"""The config key with classes in the model's own files."""
OWN_CODE = "own_code"
"""The settings key with the hash of a model's own code."""
OPTION = "--trust-remote-code"
HINT = f"If you trust it, pass {OPTION} (in Python: with intarsia.trust_remote_code()), which runs it."
_HEAD = "AutoModelForCausalLM"

_TRUSTING: list[dict[str, str]] = []
"""A context in which models' own code may run: the model types with such code so far, and the hash of the code."""
_REGISTERED: dict[str, str] = {}
"""Model types whose registered classes are a model's own, and the hash of their code."""


@contextmanager
def trust_remote_code(trusted: bool = True) -> Iterator[None]:
    """Run the code of models whose class transformers does not have, within this context (all threads of this process).

    Args:
        trusted: False changes nothing.
    """
    if not trusted:
        yield
        return
    _TRUSTING.append({})
    try:
        yield
    finally:
        _TRUSTING.pop()


def trusts() -> bool:
    """Whether models' own code may run."""
    return bool(_TRUSTING)


def is_own(model_type: object) -> bool:
    """Whether a model type's class comes from a model's own code."""
    return model_type in _REGISTERED


def is_known(model_type: object) -> bool:
    """Whether there is a config class for a model type, in transformers or in trusted code."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING and (trusts() or not is_own(model_type))


def admit(folder: Path, config: Mapping[str, Any]) -> None:
    """Register the classes in a model's folder, if its config names some, transformers has none, and they are
    trusted.

    Raises:
        UserError: the code cannot be run, or another model of this type in this block has other code.
    """
    named, kind = config.get(CODE), config.get("model_type")
    if not trusts() or not isinstance(named, Mapping) or not isinstance(kind, str) or is_stock(kind):
        return
    if _HEAD not in named:
        raise UserError(
            f"{folder / 'config.json'}: {CODE} names no {_HEAD}; it has {', '.join(map(str, named)) or 'nothing'}.",
            "Use a model whose code has a language model.",
        )
    code = code_hash(folder)
    if _TRUSTING[-1].setdefault(kind, code) != code:
        raise UserError(
            f"{folder} and another model of type {kind} come with different code.",
            "Use them in separate commands.",
        )
    if _REGISTERED.get(kind) != code:
        _register(folder, kind, named)
        _REGISTERED[kind] = code


def is_stock(kind: str) -> bool:
    """Whether transformers has a language model of a type."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if is_own(kind) or kind not in CONFIG_MAPPING:
        return False
    return any(
        CONFIG_MAPPING[kind] in each for each in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    )


def _register(folder: Path, kind: str, named: Mapping[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    try:
        model: Any = get_class_from_dynamic_module(str(named[_HEAD]), str(folder))
        config: Any = model.config_class
        if "AutoConfig" in named:
            config = get_class_from_dynamic_module(str(named["AutoConfig"]), str(folder))
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, add_generation_mixin_to_remote_model(model), exist_ok=True)
    except Exception as error:  # third-party code may raise anything
        raise UserError(
            f"The code of {folder} cannot be used: {in_words(error)}.",
            "Load the model with transformers to see the traceback.",
        ) from error


def code_files(folder: Path) -> list[str]:
    """The code files in a model's folder."""
    return sorted(file.name for file in folder.glob("*.py") if file.is_file())


def code_hash(folder: Path) -> str:
    """The hash of a model's own code."""
    digest = hashlib.sha256()
    for name in code_files(folder):
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()


def code_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """The recorded facts about a model's own code; none if the class is in transformers."""
    kind = config.get("model_type")
    return {OWN_CODE: _REGISTERED[kind]} if isinstance(kind, str) and kind in _REGISTERED else {}
