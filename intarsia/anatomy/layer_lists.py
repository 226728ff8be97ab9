"""What a config says layer by layer: attention types, which layers have a rotary embedding, and the like.

A list that a config lacks may have a meaning all the same: transformers makes it by a rule, and a shallower model
needs the list itself, for the rule would tell its layers apart by their new places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.anatomy.family import PerLayer
from intarsia.errors import Problem


def lists(
    entries: Sequence[PerLayer], values: Mapping[str, Any], n_layers: int, where: str, problems: list[Problem]
) -> dict[str, tuple[Any, ...]]:
    """Every per-layer list of a config, by its field, as far as there is one; `problems` gets what is wrong.

    Args:
        values: the config's fields, with the family's defaults, without nulls.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for entry in entries:
        value = values.get(entry.field)
        if value is None:
            if entry.every is None:
                continue
            made = _made(entry, values, n_layers, where, problems)
            if made is not None:
                found[entry.field] = made
        elif _fits(entry, value, n_layers):
            found[entry.field] = tuple(value)
        else:
            what = "names" if entry.field == "layer_types" else "entries"
            problems.append(
                Problem(
                    where=f"{where}: {entry.field}",
                    expected=f"a list of {n_layers} {what}, one a layer",
                    found=f"a list of {len(value)}" if isinstance(value, list) else repr(value),
                    remedy=f"Make {entry.field} as long as the model is deep.",
                )
            )
    return found


def kinds(entries: Sequence[PerLayer], found: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...] | None:
    """How each layer attends, in words that differ where layers must not be joined; None without a list."""
    told = []
    for entry in entries:
        if entry.field not in found:
            continue
        if entry.kinds is not None:
            told.append([entry.kinds.get(str(int(value)), "") for value in found[entry.field]])
        elif entry.field == "layer_types":
            told.append(list(found[entry.field]))
    return tuple(", ".join(word for word in words if word) for words in zip(*told, strict=True)) if told else None


def regenerates(entry: PerLayer, config: Mapping[str, Any], name: str, wanted: Sequence[Any]) -> bool:
    """Whether the rule that a config's field `name` states makes the very list `wanted`."""
    every = _interval(config.get(name))
    return entry.every is not None and every is not None and _by_rule(entry, every, len(wanted)) == tuple(wanted)


def _made(
    entry: PerLayer, values: Mapping[str, Any], n_layers: int, where: str, problems: list[Problem]
) -> tuple[Any, ...] | None:
    stated = values.get(entry.every) if isinstance(entry.every, str) else entry.every
    every = _interval(stated)
    if every is not None:
        return _by_rule(entry, every, n_layers)
    problems.append(
        Problem(
            where=f"{where}: {entry.every}",
            expected=f"a positive whole number, for there is no {entry.field}",
            found=repr(stated),
            remedy=f"Give the config its {entry.field}: load it with transformers 5 and save it again.",
        )
    )
    return None


def _interval(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _by_rule(entry: PerLayer, every: int, n_layers: int) -> tuple[Any, ...]:
    return tuple(entry.others if (layer + 1) % every else entry.nth for layer in range(n_layers))


def _fits(entry: PerLayer, value: Any, n_layers: int) -> bool:
    if not isinstance(value, list) or len(value) != n_layers:
        return False
    kind = str if entry.field == "layer_types" else (str, int)
    return all(isinstance(item, kind) for item in value)
