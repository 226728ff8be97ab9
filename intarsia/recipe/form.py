"""The form of a recipe file, as pydantic models: every mistake of form is reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import AfterValidator, Discriminator, Field, PlainValidator, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from intarsia.data_file import MAX_INDEX, Misplaced, Strict, Text, raise_misplaced, shown, unexpected
from intarsia.recipe.methods import METHODS, with_defaults
from intarsia.recipe.recipe import Fitted, MergeMethod, Mix, NormMode, parse_ranges

MAX_LAYERS = 10_000
_MAX_PIECES = 2**23  # In one recipe, so that a few ranges cannot fill the memory.
_REF = re.compile(r"(?:(?P<variant>[^:]*):)?(?P<first>[0-9]{1,10})(?:-(?P<last>[0-9]{1,10}))?", re.ASCII)
_Index: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INDEX)]
_Number: TypeAlias = Annotated[float, Field(ge=-MAX_INDEX, le=MAX_INDEX, allow_inf_nan=False)]


@dataclass
class Context:
    """Shared by the validators of one file."""

    # The side file's tensors; None if it cannot be read, which is reported separately.
    tensors: Mapping[str, Any] | None
    # Names of the tensors that the recipe uses.
    used: set[str] = field(default_factory=set)
    # Number of indices still allowed.
    pieces_left: int = _MAX_PIECES

    def tensor(self, name: str) -> Any:
        """A tensor of the side file; None if that cannot be read."""
        if self.tensors is None:
            return None
        self.used.add(name)
        if name not in self.tensors:
            raise unexpected(f"tensor {name!r} in the side file", "none", "Use the recipe's own side file.")
        return self.tensors[name]


def _context(info: ValidationInfo) -> Context:
    assert isinstance(info.context, Context), "recipe files are validated with a context"
    return info.context


def _layers(value: Any) -> tuple[str | None, range]:
    """`4`, `math:4`, `0-9` and `math:0-9`: the variant (None: the base) and the layers."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INDEX:
        return None, range(value, value + 1)
    match = _REF.fullmatch(value) if isinstance(value, str) else None
    if match is not None and match["variant"] != "":
        first = int(match["first"])
        last = first if match["last"] is None else int(match["last"])
        if first <= last <= MAX_INDEX and last - first < MAX_LAYERS:
            return match["variant"], range(first, last + 1)
    raise unexpected("a layer such as 4 or name:4, or a range such as 0-9", remedy="Count layers from 0.")


def _layer(value: Any) -> tuple[str | None, int]:
    try:
        variant, layers = _layers(value)
    except ValueError:
        layers = range(0)
    if len(layers) != 1:
        raise unexpected("a layer such as 4 or name:4", remedy="Count layers from 0.")
    return variant, layers[0]


def _from_ranges(text: str, info: ValidationInfo) -> tuple[int, ...]:
    try:
        return parse_ranges(text, most=_context(info).pieces_left)
    except ValueError as error:
        raise unexpected("indices such as '0-767, 900'", str(error)) from None


def _from_tensor(entry: _TensorEntry, info: ValidationInfo) -> tuple[int, ...]:
    tensor = _context(info).tensor(entry.tensor)
    if tensor is None:
        return ()
    if tensor.dtype != np.int32 or tensor.ndim != 1 or tensor.size > _context(info).pieces_left or (tensor < 0).any():
        shape = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise unexpected(f"a list of int32 indices from 0 in tensor {entry.tensor!r}", shape)
    return tuple(tensor.tolist())


def _counted(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    indices = (value,) if isinstance(value, int) else tuple(value)
    _context(info).pieces_left -= len(indices)
    if _context(info).pieces_left < 0:
        raise unexpected(f"at most {_MAX_PIECES} indices in a recipe", "more", "Use a shorter recipe.")
    return indices


def _indices_tag(value: Any) -> str:
    tags: dict[type, str] = {list: ":list", str: ":ranges", dict: ":tensor"}
    return tags.get(type(value), ":one")


def _sha256(value: str) -> str:
    if re.fullmatch("[0-9a-f]{64}", value):
        return value
    raise unexpected("64 hexadecimal digits in lower case", remedy="Leave it out.")


def _plain_name(value: str) -> str:
    if value.endswith(".safetensors") and not set(value) & set("/\\:\0") and value[0] != ".":
        return value
    raise unexpected("the plain name of a .safetensors file beside the recipe")


def _fitted(value: Mapping[int, list[str]], info: ValidationInfo) -> Fitted:
    found: dict[int, dict[str, Any]] = {layer: {} for layer in value}
    wrong: list[Misplaced] = []
    for layer, names in value.items():
        for index, name in enumerate(names):
            try:
                found[layer][name] = _context(info).tensor(f"fitted.{layer}.{name}")
            except PydanticCustomError as error:
                wrong.append(((str(layer), index), error, name))
    raise_misplaced(wrong)
    return found


def _named(value: Any) -> Any:
    """Provenance may hold anything, under keys that other tools can read."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise unexpected("names as keys", shown(key), "Put it in quotes.")
            _named(entry)
    elif isinstance(value, list):
        for entry in value:
            _named(entry)
    return value


LayerEntry: TypeAlias = Annotated[tuple[str | None, int], PlainValidator(_layer)]
_Layers: TypeAlias = Annotated[tuple[str | None, range], PlainValidator(_layers)]


class _TensorEntry(Strict):
    tensor: Text


if TYPE_CHECKING:
    _Indices: TypeAlias = tuple[int, ...]
    _Fitted: TypeAlias = Fitted
else:
    _Indices = Annotated[
        Annotated[list[_Index], Tag(":list")]
        | Annotated[str, AfterValidator(_from_ranges), Tag(":ranges")]
        | Annotated[_TensorEntry, AfterValidator(_from_tensor), Tag(":tensor")]
        | Annotated[_Index, Tag(":one")],
        Discriminator(_indices_tag),
        AfterValidator(_counted),
    ]
    _Names = Annotated[list[Text], Field(min_length=1, max_length=MAX_LAYERS)]
    _Fitted = Annotated[dict[Annotated[int, Field(ge=0, le=MAX_LAYERS)], _Names], AfterValidator(_fitted)]


class Weights(Strict):
    """The weights of a cut for parameters that belong to no piece."""

    attention: _Number
    mlp: _Number


class CutEntry(Strict):
    """Pieces of one layer."""

    source: LayerEntry = Field(alias="from")
    kv_groups: _Indices = ()
    channels: _Indices = ()
    weights: Weights | None = None


class ConcatEntry(Strict):
    """Pieces of several layers joined."""

    norm: NormMode = "fold"
    fuse: bool = False
    cuts: list[CutEntry] = Field(min_length=1, max_length=MAX_LAYERS)


class MixEntry(Strict):
    """How the tensors of several layers are combined; `validate` checks the method's conditions."""

    method: MergeMethod = "linear"
    weights: list[_Number] | None = Field(default=None, min_length=1, max_length=MAX_LAYERS)
    params: dict[str, Any] = Field(default_factory=dict)

    def mix(self, sources: int) -> Mix:
        """The mix of that many layers, with equal weights and the method's defaults unless given."""
        known = METHODS.get(self.method)
        # Invalid values stay, so that `mistakes` reports them.
        decimal = {name: each for name, each in known.parameters.items() if not each.whole} if known else {}
        params = {
            name: float(value) if name in decimal and decimal[name].holds(value) else value
            for name, value in self.params.items()
        }
        weights = tuple(self.weights or [1.0 / sources] * sources)
        return Mix(weights=weights, method=self.method, params=with_defaults(self.method, params))


class MergeEntry(MixEntry):
    """Whole layers combined."""

    sources: list[LayerEntry] = Field(alias="from", min_length=1, max_length=MAX_LAYERS)
    base: LayerEntry | None = None
    scale: _Number = 1.0
    mlp: MixEntry | None = None


class OpEntry(Strict):
    """An output layer; or several, if a range of layers is selected."""

    select: _Layers | None = None
    concat: ConcatEntry | None = None
    merge: MergeEntry | None = None

    @model_validator(mode="after")
    def _one_op(self) -> OpEntry:
        given = [op for op in ("select", "concat", "merge") if getattr(self, op) is not None]
        if len(given) != 1:
            raise unexpected("exactly one of select, concat and merge", ", ".join(given) or "none")
        return self


class VariantEntry(Strict):
    """The location and hash of a variant."""

    model: Text
    revision: Text | None = None
    sha256: Annotated[str, AfterValidator(_sha256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class SideFile(Strict):
    """The file of tensors beside the recipe."""

    file: Annotated[Text, AfterValidator(_plain_name)]
    sha256: str | None = None


class RecipeFile(Strict):
    """A whole recipe."""

    version: Literal[1]
    model: Text | None = None
    variants: dict[Text, VariantEntry] | None = Field(default=None, min_length=1)
    base: Text | None = None
    depth: int = Field(ge=1, le=MAX_LAYERS)
    layers: list[OpEntry] = Field(min_length=1, max_length=MAX_LAYERS)
    spans: list[Annotated[list[_Index], Field(min_length=2, max_length=2)]] | None = Field(
        default=None, min_length=1, max_length=MAX_LAYERS
    )
    tensors: SideFile | None = None
    fitted: _Fitted | None = None
    provenance: Annotated[dict[Any, Any], AfterValidator(_named)] | None = None

    @model_validator(mode="after")
    def _one_base(self) -> RecipeFile:
        if (self.model is None) == (self.variants is None):
            found = "both" if self.model else "neither"
            raise unexpected("either 'model' or 'variants'", found, "Name a model: `model: FOLDER_OR_ID`.")
        if self.model is not None and self.base is not None:
            error = unexpected("no base beside the short form 'model'", remedy="Leave it out.")
            raise_misplaced([(("base",), error, self.base)])
        if self.variants is not None and self.base is None and len(self.variants) > 1:
            error = unexpected("the variant of everything outside the layers", "none", "Add it.")
            raise_misplaced([(("base",), error, None)])
        count = sum(len(entry.select[1]) if entry.select else 1 for entry in self.layers)
        if count > MAX_LAYERS:
            raise unexpected(f"at most {MAX_LAYERS} layers", str(count))
        return self
