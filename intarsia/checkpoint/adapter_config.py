"""What an `adapter_config.json` of PEFT says, as far as it can be applied by adding a product of two matrices.

Format: peft's LoraConfig. Whatever else an adapter may do is refused with the way round it: merging it with peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.disk import read_json
from intarsia.errors import Problem, UserError

CONFIG_FILE = "adapter_config.json"
_MERGE = "Merge it with peft first: merge_and_unload(), then save_pretrained(), and pass the folder that this makes."
_LONGEST_PATTERN = 500
# What must have one of these values, because it changes more than the weights of linear layers by B A.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# These start from other base weights than those in the base's files.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of a LoRA configuration that decides weights. `base_model` is the base that it names."""

    base_model: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: alpha / rank, or with rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first pattern that matches the end of the module's name, as in peft."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and judge a folder's adapter_config.json.

    Raises:
        UserError: with everything in it that cannot be read or applied.
    """
    file = folder / CONFIG_FILE
    data = read_json(file, expected="a JSON object", remedy="Get the adapter again.")
    problems = [
        Problem(where=f"{file}: {key}", expected=expected, found=found, remedy=remedy)
        for key, expected, found, remedy in _faults(data)
    ]
    if problems:
        raise UserError(problems)
    named = data.get("base_model_name_or_path")
    return AdapterConfig(
        base_model=named if isinstance(named, str) and named else None,
        rank=data["r"],
        alpha=data["lora_alpha"],
        rank_pattern=data.get("rank_pattern") or {},
        alpha_pattern=data.get("alpha_pattern") or {},
        rslora=bool(data.get("use_rslora")),
    )


def _faults(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    kind = data.get("peft_type")
    if kind != "LORA":
        yield "peft_type", "LORA", repr(kind), _MERGE
        return
    for key, values in _PLAIN.items():
        if key in data and data[key] not in values:
            yield key, f"{values[0]!r}, for it cannot be applied on reading", _shown(data[key]), _MERGE
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        yield "init_lora_weights", "one that leaves the base's weights as they are", repr(start), _MERGE
    again = "Get the adapter again."
    if not _number(data.get("r"), whole=True):
        yield "r", "a rank of at least 1", _shown(data.get("r")), again
    if not _number(data.get("lora_alpha"), whole=False):
        yield "lora_alpha", "a positive number", _shown(data.get("lora_alpha")), again
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = data.get(key) or {}
        if not isinstance(patterns, dict):
            yield key, "patterns with numbers", _shown(patterns), again
            continue
        for pattern, value in patterns.items():
            if not _compiles(pattern) or not _number(value, whole=whole):
                yield f"{key}.{pattern[:40]}", "a pattern for module names, and a positive number", _shown(value), again


def _number(value: Any, *, whole: bool) -> bool:
    wanted = isinstance(value, int) if whole else isinstance(value, (int, float))
    return wanted and not isinstance(value, bool) and 0 < value < 2**31


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return len(pattern) <= _LONGEST_PATTERN


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
