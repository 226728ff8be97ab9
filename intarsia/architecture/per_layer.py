"""Per-layer settings of a config, and their values for a model of another depth.

Lists with one entry per layer (attention types, which layers have a rotary embedding, ...), the rules by which
transformers derives a missing list, and counts and numbers of layers. The family files and `per_layer.toml` name the
known ones; anything else that looks like one is refused, because it would silently be wrong in a shallower model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from intarsia.architecture.families import Family, PerLayer, rules
from intarsia.architecture.spec import Architecture
from intarsia.errors import Problem, UserError, mismatch

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
"""Names for the number of layers; a config may have several."""
_COUNTS = re.compile(
    r"(^|_)(layers?|blocks|idxs?|indices)(_|$)|every|interval|period|pattern|(^|_)(freq|frequency|step|stride)$|first_k|last_k"
)
"""Keys of numbers that count layers or are layer indices."""
_RULES = re.compile(r"every|interval|period|pattern|freq|step|stride")
"""Those without effect at 1."""
OF_NO_LAYER = re.compile(
    r"layer_?norm|layer_scale|rope|rotary|token|quantization|compression|^architectures$|^id2label$|^label2id$|^auto_map$"
    r"|^keys_to_ignore|^task_specific|image|vision|video|audio|_block_size$|_limit$|_section$"
)
"""Keys that do not refer to layers, whatever their length."""


def unknown_settings(
    family: Family, config: Mapping[str, Any], n_layers: int, where: str, *, named: Collection[str] = ()
) -> list[Problem]:
    """Report every config value that counts, numbers or lists layers and is not in the family file.

    These are lists as long as the model is deep, maps with numeric keys, and numbers, patterns and lists of numbers
    whose name refers to layers; also in nested configs.

    Args:
        named: further fields that are known.
    """
    known = {
        *family.fields.values(),
        *family.aliases,
        *rules().follow,
        *named,
        *(key for entry in family.refusals for key in (*entry.when, *(entry.when_not or {}))),
        *(key for entry in family.per_layer for key in (entry.field, str(entry.every), *entry.instead_of)),
    }
    problems = [
        mismatch(
            f"{where}: {path}",
            "only known per-layer settings",
            _shown(value),
            "It would be wrong for another depth. Add it to a family file (docs/ADD_A_FAMILY.md), or remove it from "
            "the config if the model does not depend on it.",
        )
        for path, key, value in _entries(config)
        if not (path == key and (key in known or key in _DEPTHS)) and _of_layers(key, value, n_layers)
    ]
    problems += [
        mismatch(
            f"{where}: {key}",
            f"{n_layers} layers, like {family.fields['layers']}",
            repr(config[key]),
            f"Remove {key}; {family.fields['layers']} is used.",
        )
        for key in _DEPTHS
        if config.get(key) is not None and config[key] != n_layers
    ]
    return problems + [
        mismatch(f"{where}: {key}", "a number of layers", _shown(config[key]), "Complete the config.")
        for key in rules().leading
        if config.get(key) is not None and not _whole(config[key])
    ]


def _entries(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of every config entry that may refer to layers."""
    for key, value in values.items():
        if OF_NO_LAYER.search(str(key)):
            continue
        yield f"{prefix}{key}", key, value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")


def _of_layers(key: str, value: Any, n_layers: int) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(str(name).isdigit() for name in value)
    if isinstance(value, list) and len(value) == n_layers:
        return True
    if not _COUNTS.search(key) or isinstance(value, bool):
        return False
    if isinstance(value, list):
        return any(_whole(item) for item in value)
    if isinstance(value, str):
        return bool(value) and "pattern" in key
    return _whole(value) and value != 0 and not (value == 1 and _RULES.search(key))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:60]


def for_layers(
    architecture: Architecture, config: Mapping[str, Any], sources: Sequence[int], where: str
) -> dict[str, Any]:
    """The config of a model with one layer per entry of `sources`.

    Output layer i takes its per-layer settings from layer `sources[i]`. All other values are unchanged.

    Raises:
        UserError: a per-layer list is not as long as the model is deep, or no value of a setting describes these
            layers.
    """
    assert sources and all(0 <= layer < architecture.n_layers for layer in sources)
    found, family = dict(config), architecture.family
    for key in (family.fields["layers"], *_DEPTHS):
        if found.get(key) is not None or key == family.fields["layers"]:
            found[key] = len(sources)
    for entry in family.per_layer:
        values = found.get(entry.field)
        if values is None:
            values = architecture.per_layer.get(entry.field)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != architecture.n_layers:
            raise UserError([_wrong_length(entry, values, architecture.n_layers, where)])
        found[entry.field] = [values[layer] for layer in sources]
        changed = found[entry.field] != list(values)
        for name in entry.instead_of:
            every = found.get(name)
            made = _by_rule(entry, every, len(sources)) if entry.every is not None and _interval(every) else None
            if changed and name in found and made != tuple(found[entry.field]):
                del found[name]
    _follow(found, sources, architecture.n_layers, where)
    return found


def _follow(found: dict[str, Any], sources: Sequence[int], depth: int, where: str) -> None:
    """Adapt the settings named in `rules` to these layers of a model of `depth`."""
    known = rules()
    for step, listed in known.steps:
        if _whole(found.get(step)) and found[step] > 1:
            others = (layer for layer in range(depth) if (layer + 1) % found[step])
            found[listed], found[step] = sorted({*(found.get(listed) or ()), *others}), 1
    for name, value in list(found.items()):
        if name in known.indices and isinstance(value, list | tuple):
            found[name] = [index for index, layer in enumerate(sources) if layer in value]
        elif name in known.patterns and isinstance(value, str) and len(value) == depth:
            found[name] = "".join(value[layer] for layer in sources)
        elif name in known.leading and _whole(value) and value <= depth:  # a greater one covers all layers at any depth
            leading = [layer < value for layer in sources]
            if leading == sorted(leading, reverse=True):
                found[name] = sum(leading)
            else:  # there is no such number; it has no effect beside the more specific `layer_types`
                del found[name]
        elif name in known.trailing and _whole(value):
            found[name] = sum(layer >= depth - value for layer in sources)
        elif name in known.maps and isinstance(value, Mapping):
            own = {int(key): entry for key, entry in value.items()}
            found[name] = {str(index): own[layer] for index, layer in enumerate(sources) if layer in own}
        elif name in known.roots and isinstance(value, int | float):
            found[name] = value * math.sqrt(len(sources) / depth)
    for groups, listed in known.repeats:
        if groups in found:
            found[groups] = [[found[listed], 1]]
    for period, offset in known.periods:
        if _whole(found.get(period)) and list(sources) != list(range(depth)):
            every, start = found[period], found.get(offset, 0)
            wanted = [(layer - start) % every == 0 for layer in sources]
            tried = ((p, o) for p in (every, *range(1, len(sources) + 2)) for o in range(p))
            fits = ((p, o) for p, o in tried if [(index - o) % p == 0 for index in range(len(sources))] == wanted)
            try:
                found[period], found[offset] = next(fits)
            except StopIteration:
                raise UserError(
                    f"{where}: no {period} and {offset} describe the remaining layers.",
                    f"Keep layers at equal distances, because every {every}th is of another kind.",
                ) from None


def lists(
    entries: Sequence[PerLayer], values: Mapping[str, Any], n_layers: int, where: str, problems: list[Problem]
) -> dict[str, tuple[Any, ...]]:
    """The per-layer lists of a config, by field; problems are added to `problems`.

    Args:
        values: the config's fields with the family's defaults, without nulls.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for entry in entries:
        value = values.get(entry.field)
        if value is None:
            if entry.every is None:
                continue
            stated = values.get(entry.every) if isinstance(entry.every, str) else entry.every
            if _interval(stated):
                found[entry.field] = _by_rule(entry, stated, n_layers)
            else:
                expected = f"a positive whole number, because there is no {entry.field}"
                remedy = f"Add {entry.field} to the config: load it with transformers 5 and save it again."
                problems.append(mismatch(f"{where}: {entry.every}", expected, repr(stated), remedy))
        else:
            kind = str if entry.field == "layer_types" else (str, int)
            fits = isinstance(value, list) and len(value) == n_layers and all(isinstance(each, kind) for each in value)
            if fits:
                found[entry.field] = tuple(value)
            else:
                problems.append(_wrong_length(entry, value, n_layers, where))
    return found


def _wrong_length(entry: PerLayer, value: Any, n_layers: int, where: str) -> Problem:
    return mismatch(
        f"{where}: {entry.field}",
        f"a list of {n_layers} {'names' if entry.field == 'layer_types' else 'entries'}, one per layer",
        f"a list of {len(value)}" if isinstance(value, list) else repr(value),
        f"Make {entry.field} as long as the model is deep.",
    )


def kinds(entries: Sequence[PerLayer], found: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...] | None:
    """The attention type of each layer, different for layers that must not be joined; None without a list."""
    words = []
    for entry in entries:
        if entry.field not in found:
            continue
        if entry.kinds is not None:
            words.append([entry.kinds.get(str(int(value)), "") for value in found[entry.field]])
        elif entry.field == "layer_types":
            words.append(list(found[entry.field]))
    return tuple(", ".join(word for word in row if word) for row in zip(*words, strict=True)) if words else None


def _interval(value: Any) -> bool:
    return _whole(value) and bool(value > 0)


def _by_rule(entry: PerLayer, every: Any, n_layers: int) -> tuple[Any, ...]:
    return tuple(entry.others if (layer + 1) % every else entry.nth for layer in range(n_layers))
