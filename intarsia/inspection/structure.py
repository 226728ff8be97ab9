"""Architectures read from a class of `transformers`, for models without a family file.

The class is built on the meta device, without weights. It must have one list of layers, as long as the model is deep.
Per-layer settings of the config follow the layers as for every model (`intarsia.architecture.per_layer`). To check
them, the class is built from the changed config: its layers must be the remaining ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from intarsia.architecture.families import Family, Modules, PerLayer, rules
from intarsia.architecture.per_layer import OF_NO_LAYER, for_layers, unknown_settings
from intarsia.architecture.spec import Architecture, Inspected
from intarsia.data_file import read_toml
from intarsia.errors import UserError, in_words, mismatch
from intarsia.inspection import own_code
from intarsia.progress import quiet_transformers

Shapes = Mapping[str, tuple[int, ...]]

_NUMBERED = re.compile(r"idx|index|layer_id|layer_number|^training$|^_")
"""Attributes of modules that always differ between layers."""


def inspected(config: Mapping[str, Any], shapes: Shapes | None, *, where: str, reason: str) -> Architecture:
    """The architecture of a model whose layers can be removed.

    Args:
        shapes: of the tensors in the files; None without files, for those that the class would write.
        reason: why its layers cannot be joined.

    Raises:
        UserError: transformers has no such decoder, its layers are not one list of the right length, the config has
            unknown per-layer settings, or the tensors are not the model's.
    """
    made = config_of(config, where)
    model = on_meta(made, where)
    depth, width = (getattr(made, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not isinstance(depth, int) or not isinstance(width, int):
        what = "a width" if isinstance(depth, int) else "a number of layers"
        raise _refused(where, f"{what} in the config, under its usual name or in `attribute_map`", "none")
    layers_module, layers = _layer_list(model, depth, where)
    names = {id(module): name for name, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if id(embedding) not in names or id(head) not in names:
        raise _refused(where, "one embedding and one head", "none that transformers names")
    held = _Files(model, layers_module, layers, where)
    tied = bool(getattr(made, "tie_word_embeddings", False))
    at = {memory: file for file, memory in held.outside.items()}
    in_files = {
        key: at.get(f"{names[id(each)]}.weight", f"{names[id(each)]}.weight").removesuffix(".weight")
        for key, each in (("embedding", embedding), ("head", head))
    }
    fields = {what: str(made.attribute_map.get(name, name)) for what, name in _FIELDS.items()}
    per_layer = {
        key: tuple(value)
        for key, value in made.to_dict().items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and key not in rules().names
        and not OF_NO_LAYER.search(str(key))
    }
    family = Family.model_construct(
        title=str(config["model_type"]),
        model_types=(str(config["model_type"]),),
        modules=Modules(layers=held.layers_module, **in_files, head_in_memory=names[id(head)]),
        fields=fields,
        linears=[],
        norms=[],
        lists=[PerLayer(field=key) for key in per_layer],
        always=(),
    )
    problems = unknown_settings(family, {**made.to_dict(), **config}, depth, where, named=rules().names)
    if problems:
        raise UserError(problems)
    found = Architecture(
        family=family,
        linears=(),
        norms=(),
        n_layers=depth,
        width=width,
        n_query_heads=1,
        n_kv_heads=1,
        head_dim=1,
        n_channels=1,
        vocabulary=int(embedding.weight.shape[0]),
        tied=tied,
        layer_types=_kinds(made, list(layers)),
        config=dict(config),
        per_layer=per_layer,
        inspected=Inspected(
            reason=reason,
            shapes=held.layer_shapes(shapes, tied=f"{in_files['head']}.weight" if tied else None),
            structures=tuple(map(structure_of, layers)),
            rows=held.rows,
            stacks=held.stacks,
            outside=held.outside,
            tables={},
            layers_module=layers_module,
            embedding_module=names[id(embedding)],
        ),
    )
    return _with_tables(found, model)


_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "query_heads": "num_attention_heads",
    "channels": "intermediate_size",
    "vocabulary": "vocab_size",
    "tied": "tie_word_embeddings",
}


def config_of(config: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The config object of a decoder.

    Raises:
        UserError: transformers does not know the model type or refuses the config, it is not a decoder's, or its layers
            are known to depend on one another.
    """
    kind = config.get("model_type")
    if not own_code.is_known(kind):
        problem = f"{where}: transformers {version('transformers')} has no model type {kind!r}"
        if own_code.CODE in config:
            raise UserError(f"{problem}, which comes with code of its own that is not run.", own_code.HINT)
        stated = config.get("transformers_version")
        since = f" (the config was written by {stated})" if isinstance(stated, str) else ""
        raise UserError(f"{problem}.", f"Use a version of transformers that has it{since}, or correct model_type.")
    try:
        with quiet_transformers():
            made = CONFIG_MAPPING[str(kind)].from_dict({key: _number(value) for key, value in config.items()})
    except Exception as error:  # config classes fail in different ways
        raise UserError(
            f"{where}: transformers refuses this config of type {kind}: {in_words(error)}.", "Correct it."
        ) from error
    assert isinstance(made, PreTrainedConfig)
    if getattr(made, "is_encoder_decoder", False):
        raise _refused(where, "a decoder", f"an encoder-decoder ({kind})")
    if str(kind) in _reasons():
        raise _refused(where, "layers that can be removed one by one", _reasons()[str(kind)])
    if type(made) not in MODEL_FOR_CAUSAL_LM_MAPPING and not _registered(made):
        raise _refused(where, "a language model", f"{kind}, which AutoModelForCausalLM of transformers does not load")
    if 0 < (getattr(made, "num_hidden_layers", 0) or 0) <= (getattr(made, "num_kv_shared_layers", 0) or 0):
        raise _refused(
            where, "layers with keys and values of their own", "only layers that read those of another model"
        )
    return made


@cache
def _reasons() -> Mapping[str, str]:
    return read_toml(files("intarsia.inspection") / "refused.toml")


def _registered(config: PreTrainedConfig) -> bool:
    """Whether the language model of a multimodal model has the type of this nested config.

    If so, register it, so that `AutoModelForCausalLM` finds it.
    """
    outer = type(config).__module__.split(".")[-2]
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[outer], None) if outer in CONFIG_MAPPING else None
    if found is None or found.config_class is not type(config):
        return False
    AutoModelForCausalLM.register(type(config), found, exist_ok=True)
    return True


def _number(value: Any) -> Any:
    """A value of a config.json, in which transformers writes an infinity as an object."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    return float(value["__float__"]) if isinstance(value, Mapping) and set(value) == {"__float__"} else value


def on_meta(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """The model of a config, without weights.

    Raises:
        UserError: its class refuses the config.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
            model = classes[type(config)](config)
    except Exception as error:  # as above
        raise UserError(
            f"{where}: transformers cannot build a model from this config: {in_words(error)}.", "Correct it."
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def _refused(where: str, expected: str, found: str) -> UserError:
    return UserError(mismatch(where, expected, found, "It cannot be made shallower; use another model."))


def _layer_list(model: PreTrainedModel, depth: int, where: str) -> tuple[str, nn.ModuleList]:
    """The one list of layers, and its name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            found[name] = module
    if len(found) == 1:
        return next(iter(found.items()))
    lists = ", ".join(found) if found else "none"
    raise _refused(where, f"one list of {depth} layers in {type(model).__name__}", lists)


def structure_of(layer: nn.Module, *, numbers: bool = True) -> str:
    """The structure of a layer: its modules, the shapes of their parameters, and their settings.

    Args:
        numbers: False ignores settings that are not whole numbers.
    """
    parts: list[object] = []
    of = (bool, int, float, str) if numbers else (bool, int, str)
    for name, module in layer.named_modules():
        settings = {
            key: f"{value:.9g}" if isinstance(value, float) else value
            for key, value in vars(module).items()
            if isinstance(value, of) and not _NUMBERED.search(key)
        }
        own = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        parts.append((name, type(module).__name__, sorted(settings.items()), sorted(own.items())))
    return repr(parts)


def _kinds(config: PreTrainedConfig, layers: Sequence[nn.Module]) -> tuple[str, ...] | None:
    """The name of each layer's kind: by the config, and by its parts if different layers have equal names.

    Layers that differ only in a factor are of one kind.
    """
    stated: Any = getattr(config, "layer_types", None)
    named = stated if isinstance(stated, list | tuple) and len(stated) == len(layers) else ["layer"] * len(layers)
    variants: dict[str, dict[str, nn.Module]] = {}
    structures = [structure_of(layer, numbers=False) for layer in layers]
    for name, structure, layer in zip(map(str, named), structures, layers, strict=True):
        variants.setdefault(name, {}).setdefault(structure, layer)
    words: dict[tuple[str, str], str] = {}
    for name, found in variants.items():
        own = _own([[type(part).__name__ for part in layer.children()] for layer in found.values()])
        if len(set(own)) < len(own):
            own = _own([_flags(layer) for layer in found.values()])
        for number, (each, word) in enumerate(zip(found, own, strict=True)):
            unique = f"{word} {own[:number].count(word) + 1}".lstrip() if own.count(word) > 1 else word
            words[name, each] = f"{name} ({unique})" if unique and len(own) > 1 else name
    kinds = tuple(words[str(name), structure] for name, structure in zip(named, structures, strict=True))
    return kinds if len(set(kinds)) > 1 else None


def _flags(layer: nn.Module) -> list[str]:
    """Settings of a layer's parts: those that are true, and those that are a word."""
    settings = (setting for part in layer.modules() for setting in vars(part).items())
    named = [(name, value) for name, value in settings if not _NUMBERED.search(name)]
    words = (name if value is True else value for name, value in named if value is True or isinstance(value, str))
    return list(dict.fromkeys(words))


def _own(words: Sequence[Sequence[str]]) -> list[str]:
    """Words that are not in all of the lists."""
    common = set.intersection(*map(set, words))
    return [", ".join(word for word in each if word not in common) for each in words]


class _Files:
    """The tensor names of a model in files, and the parameter and rows that each of them holds.

    transformers converts parameters for files; here it converts their row numbers.
    """

    def __init__(self, model: PreTrainedModel, layers_module: str, layers: nn.ModuleList, where: str) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self.where, self.depth = where, len(layers)
        self.unused = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        self.structures = list(map(structure_of, layers))
        self.firsts = {structure: index for index, structure in reversed(list(enumerate(self.structures)))}
        prefix = f"{layers_module}."
        wanted = {f"{prefix}{index}." for index in self.firsts.values()}
        once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        state = {  # tied parameters count once, as in files
            name: tensor
            for name, tensor in model.state_dict().items()
            if name in once and (not name.startswith(prefix) or any(name.startswith(each) for each in wanted))
        }
        shared = sorted(name for name in model.state_dict() if name not in once and name.startswith(prefix))
        if shared:
            raise _refused(where, "layers with weights of their own", f"layers that share theirs ({shared[0]})")
        starts: dict[str, int] = {}
        numbered: dict[str, Tensor] = {}
        number = 0
        for name, tensor in state.items():
            shape = (*tensor.shape[:-1], 1) if tensor.dim() > 1 else tuple(tensor.shape)
            count = int(torch.Size(shape).numel())
            starts[name], numbered[name] = number, torch.arange(number, number + count).reshape(shape)
            number += count
        try:
            written = revert_weight_conversion(model, numbered)
        except Exception as error:  # a conversion that needs whole tensors
            raise _refused(where, "files that hold the parameters", f"a conversion that {error}") from error
        self.rows: dict[str, tuple[str, int]] = {}
        self.stacks: dict[str, int] = {}
        self.outside: dict[str, str] = {}
        self.layers_module = layers_module
        self.expected: dict[str, tuple[int, ...]] = {}
        owners = sorted(starts, key=lambda name: starts[name])
        for name, tensor in written.items():
            flat = tensor.reshape(-1)
            first = int(flat[0]) if flat.numel() else 0
            owner = next(each for each in reversed(owners) if starts[each] <= first)
            whole = state[owner]
            shape = (*tensor.shape[:-1], whole.shape[-1]) if whole.dim() > 1 else tuple(tensor.shape)
            self.expected[name] = shape
            if not owner.startswith(prefix):
                self.outside[name] = owner
                continue
            index, _, memory = owner.removeprefix(prefix).partition(".")
            before, mark, local = name.partition(f".{index}.")
            if not mark:
                raise _refused(where, "tensors of a layer under its number", name)
            self.layers_module = before
            contiguous = bool((flat == torch.arange(first, first + flat.numel())).all())
            if contiguous:
                self.rows[local] = (memory, first - starts[owner])
                if whole.dim() == 3 and tensor.dim() == 2:
                    self.stacks[memory] = whole.shape[0]

    def layer_shapes(self, shapes: Shapes | None, *, tied: str | None) -> tuple[Shapes, ...]:
        """Every tensor of each layer, with its shape in files.

        Raises:
            UserError: the files lack one, have an additional one, or another shape.
        """
        prefix = f"{self.layers_module}."
        expected: dict[str, tuple[int, ...]] = {
            name: shape for name, shape in self.expected.items() if not name.startswith(prefix) and name != tied
        }
        layers: list[Shapes] = []
        for index, structure in enumerate(self.structures):
            first = f"{prefix}{self.firsts[structure]}."
            own = {name.removeprefix(first): shape for name, shape in self.expected.items() if name.startswith(first)}
            layers.append(own)
            expected |= {f"{prefix}{index}.{local}": shape for local, shape in own.items()}
        if shapes is None:
            return tuple(layers)
        for name in self._unused(expected, shapes):
            index_of, _, local = name.removeprefix(prefix).partition(".")
            layers[int(index_of)] = {**layers[int(index_of)], local: shapes[name]}
        return tuple(layers)

    def _unused(self, expected: Shapes, shapes: Shapes) -> list[str]:
        """The layers' tensors that the class does not use; they stay with their layers.

        Raises:
            UserError: the tensors are not those that the class expects.
        """
        prefix = f"{self.layers_module}."
        wrong = [name for name, shape in expected.items() if tuple(shapes.get(name, ())) != tuple(shape)]
        more = [
            name
            for name in shapes
            if name.startswith(prefix)
            and name not in expected
            and not name.endswith("inv_freq")
            and int(name.removeprefix(prefix).partition(".")[0]) < self.depth
        ]
        unused = [name for name in more if any(pattern.search(name) for pattern in self.unused)]
        more = [name for name in more if name not in unused]
        if wrong or more:
            name = [*wrong, *more][0]
            wanted = f"shape {list(expected[name])}" if name in expected else "only tensors of the model's class"
            found = f"shape {list(shapes[name])}" if name in shapes else "no such tensor"
            others = f", and {len(wrong) + len(more) - 1} more like this" if len(wrong) + len(more) > 1 else ""
            raise UserError(
                f"{self.where}: {name}: expected {wanted}, found {found}{others}.",
                "Load it with transformers and save it again, or use matching config and weights.",
            )
        return unused


def _with_tables(found: Architecture, model: PreTrainedModel) -> Architecture:
    """Add the tensors outside the layers that have a part for each layer, and shrink with the model."""
    assert found.inspected is not None
    depth, in_files = found.n_layers, {memory: file for file, memory in found.inspected.outside.items()}
    ordinary = (found.embedding_in_memory, found.family.head_in_memory)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name in in_files and name.rpartition(".")[0] not in ordinary
    }
    if not any(size % depth == 0 for shape in shapes.values() for size in shape if size > 1):
        return found
    one_less = ([*range(dropped), *range(dropped + 1, depth)] for dropped in reversed(range(depth)))
    kept = next((kept for kept in one_less if problem_of(found, kept) is None), None)
    if kept is None:
        return found
    smaller = on_meta(config_of(for_layers(found, found.config, kept, "the config"), "the config"), "the config")
    tables: dict[str, int] = {}
    for name, shape in shapes.items():
        other = smaller.get_parameter(name).shape
        changed = [axis for axis, (old, new) in enumerate(zip(shape, other, strict=True)) if old != new]
        if changed:
            tables[in_files[name]] = changed[0]
    return replace(found, inspected=replace(found.inspected, tables=tables))


def problem_of(architecture: Architecture, kept: Sequence[int]) -> str | None:
    """Why a model cannot consist of only these of its layers, in order; None if it can.

    With a family file, it always can.
    """
    if architecture.inspected is None:
        return None
    try:
        config = for_layers(architecture, architecture.config, kept, "the config")
        model = on_meta(config_of(config, "the config"), "the config")
    except UserError as error:
        return str(error.problems[0].message)
    layers = model.get_submodule(architecture.layers_in_memory)
    assert isinstance(layers, nn.ModuleList)
    if [structure_of(layer) for layer in layers] != [architecture.inspected.structures[index] for index in kept]:
        return "its layers depend on their index or on the depth in a way that the config cannot describe otherwise"
    return None


class Possible:
    """Whether a model may consist of some of its layers; decided once for all layers of equal structure."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._problems: dict[tuple[str, ...], str | None] = {}

    def __call__(self, layers: Sequence[int]) -> bool:
        """Whether it may consist of only these layers. If layers can only be removed, the config must be able to
        describe them, and every kind of layer must stay."""
        kinds, inspected = self.architecture.layer_types, self.architecture.inspected
        if inspected is None:
            return True
        if not layers or (kinds and {kinds[layer] for layer in layers} != set(kinds)):
            return False
        alike = tuple(inspected.structures[layer] for layer in layers)
        if alike not in self._problems:
            self._problems[alike] = problem_of(self.architecture, layers)
        return self._problems[alike] is None


def removals(architecture: Architecture) -> list[list[int]]:
    """Sets of layers that make a valid model: without one of the first, and without two of the others."""
    whole, possible = list(range(architecture.n_layers)), Possible(architecture)

    def without(layers: list[int], order: Iterable[int]) -> list[int]:
        tried = ([layer for layer in layers if layer != dropped] for dropped in order)
        return next((left for left in tried if len(left) < len(layers) and possible(left)), layers)

    middle = len(whole) // 2
    two = without(without(whole, [*whole[middle:], *whole[:middle]]), reversed(whole))
    return [kept for kept in (without(whole, whole), two) if kept != whole]
