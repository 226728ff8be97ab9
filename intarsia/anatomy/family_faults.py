"""What is wrong with a family file that a user has written: every key that is missing, unknown or of another kind.

docs/ADD_A_FAMILY.md says what the keys mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from intarsia.anatomy.spec import PARTS

Fault = tuple[str, str, str]
"""Where, what is expected, what is found."""

_Kind = tuple[str, Callable[[Any], bool]]
"""What is expected, in words and as a test."""

_Rules = Mapping[str, _Kind]
"""The kind of each key's value. A key that ends with a question mark may be left out."""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(*choices: str) -> _Kind:
    return " or ".join(map(repr, choices)), lambda value: value in choices


def _some_of(*choices: str) -> _Kind:
    return f"a list of {', '.join(choices)}", lambda value: _is_texts(value) and set(value) <= {*choices}


_TEXT: _Kind = "a text", lambda value: isinstance(value, str)
_TEXTS: _Kind = "a list of texts", _is_texts
_YES: _Kind = "true or false", lambda value: isinstance(value, bool)
_FLAG: _Kind = "true, false, or the config field that says so", lambda value: isinstance(value, (bool, str))
_COUNT: _Kind = "a positive whole number", _is_count
_SIZE: _Kind = (
    "a positive whole number, or the config field that has it",
    lambda value: _is_count(value) or isinstance(value, str),
)
_NUMBER: _Kind = "a number", _is_number
_ANY: _Kind = "a value", lambda value: True
_TABLE: _Kind = "a table", lambda value: isinstance(value, Mapping)
_TABLES: _Kind = "a list of tables", _is_tables
_NAMES: _Kind = (
    "a table of texts",
    lambda value: isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values()),
)

_FILE: _Rules = {
    "title": _TEXT,
    "model_types": _TEXTS,
    "approximations": _TEXTS,
    "modules": _TABLE,
    "fields": _TABLE,
    "linear": _TABLES,
    "norm": _TABLES,
    **{f"{name}?": _TABLES for name in ("per_layer", "stacked", "refuse", "approximation")},
    **{f"{name}?": _TABLE for name in ("defaults", "constants", "when", "tiny")},
    "aliases?": _NAMES,
    "renamed?": _NAMES,
    "per_layer_fields?": _TEXTS,
    "buffers?": _TEXTS,
    "parallel?": _FLAG,
    "caches_query_heads?": _YES,
}
_WITHIN: Mapping[str, _Rules] = {
    "modules": {"layers": _TEXT, "embedding": _TEXT, "head": _TEXT, "head_in_memory?": _TEXT, "experts?": _TEXT},
    "fields": {
        **dict.fromkeys(("layers", "width", "query_heads", "channels", "vocabulary", "tied"), _TEXT),
        **{f"{name}?": _TEXT for name in ("kv_heads", "head_dim", "experts", "residual_scale", "embedding_width")},
    },
    "constants": {"kv_heads?": _COUNT, "channels_per_width?": _COUNT},
    "linear": {
        "module": _TEXT,
        "part": _one_of(*PARTS),
        "side": _one_of("reads", "writes"),
        "segments": _some_of("q", "kv", "qkv", "channel", "expert"),
        "bias?": _FLAG,
        "per_expert?": _YES,
        "whole?": _SIZE,
    },
    "norm": {
        "module": _TEXT,
        "part": _one_of(*PARTS),
        "place": _one_of("before", "inside", "behind"),
        "serves?": _some_of(*PARTS),
        "rows?": _one_of("q", "kv", "head", "kv_head"),
        "offset?": _NUMBER,
        "weight?": _FLAG,
        "bias?": _FLAG,
    },
    "per_layer": {
        "field": _TEXT,
        "every?": _SIZE,
        "nth?": _ANY,
        "others?": _ANY,
        "kinds?": _NAMES,
        "instead_of?": _TEXTS,
    },
    "stacked": {"parameter": _TEXT, "tensors": _TEXTS},
    "refuse": {"feature": _TEXT, "remedy": _TEXT, "when?": _TABLE, "when_not?": _TABLE, "unless?": _TEXT},
    "approximation": {"when": _TABLE, "text": _TEXT},
}


def faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Everything that is wrong with a family's data."""
    yield from _against(data, _FILE)
    for name, rules in _WITHIN.items():
        value: Any = data.get(name)
        if isinstance(value, Mapping):
            yield from _against(value, rules, f"{name}.")
        elif _is_tables(value):
            for index, entry in enumerate(value):
                yield from _against(entry, rules, f"{name}[{index}].")
    if _is_tables(data.get("linear")):
        for part in PARTS:
            writers = [entry.get("module") for entry in data["linear"] if _is_writer(entry, part)]
            if len(writers) != 1:
                yield "linear", f"one that writes for the part {part!r}", ", ".join(map(str, writers)) or "none"


def _against(table: Mapping[str, Any], rules: _Rules, prefix: str = "") -> Iterator[Fault]:
    for rule, (expected, holds) in rules.items():
        name = rule.removesuffix("?")
        if name in table:
            if not holds(table[name]):
                yield f"{prefix}{name}", expected, repr(table[name])
        elif name == rule:
            yield f"{prefix}{name}", expected, "nothing"
    known = [rule.removesuffix("?") for rule in rules]
    for name in sorted({*table} - {*known}):
        yield f"{prefix}{name}", f"one of {', '.join(known)}", "a key that means nothing here"


def _is_writer(entry: Mapping[str, Any], part: str) -> bool:
    return entry.get("part") == part and entry.get("side") == "writes" and "whole" not in entry
