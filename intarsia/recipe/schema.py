"""Recipes as files: YAML for people, and a safetensors side file for long lists and tensors.

Short index lists are ranges in the YAML; long ones (int32) and fitted tensors (float32) go into `<stem>.safetensors`.
The YAML holds its hash, so that a recipe is never read with the tensors of another. Reading runs no code, follows no
path but the plain name of that file, and is bounded in size. Arrays stay memory-mapped: the fitted tensors of a large
model, in float32, take more memory than several of its layers.

`intarsia.recipe.validate.check` checks a recipe against its models (does layer 31 exist?).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from intarsia.architecture.spec import PARTS
from intarsia.data_file import (
    MAX_CHARACTERS,
    InlineList,
    InlineMap,
    dump_yaml,
    problems_of,
    read_yaml,
    refusal,
    shown,
)
from intarsia.disk import full_disk_named, let_go, replaced, write_whole
from intarsia.errors import Problem, Problems, UserError, mismatch
from intarsia.recipe.algebra import with_unit_weights
from intarsia.recipe.form import (
    ConcatEntry,
    Context,
    LayerEntry,
    MergeEntry,
    OpEntry,
    RecipeFile,
    SideFile,
    VariantEntry,
)
from intarsia.recipe.methods import METHODS
from intarsia.recipe.recipe import (
    SCHEMA_VERSION,
    Concat,
    Cut,
    LayerRef,
    Merge,
    Op,
    Recipe,
    Select,
    Variant,
    derive_spans,
    format_ranges,
)
from intarsia.recipe.validate import mistakes

# A single entry, because safetensors writes several in varying order.
_MARK = {"intarsia": "recipe"}
_DTYPES = {"I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
_SMALL = 2**24  # bytes; a smaller array is kept in memory

Arrays = dict[str, npt.NDArray[Any]]
_LONGEST_INLINE = 100  # Longest text of ranges in the YAML, in characters.
_REMEDY = "Correct the recipe."
_ONE_MODEL = "base"  # The variant's name in the short form `model: FOLDER_OR_ID`.


def tensors_hash(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of names, dtypes, shapes and little-endian values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
        digest.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        digest.update(tensor.data)
        let_go(tensors[name])
    return digest.hexdigest()


def read_tensors(path: Path) -> Arrays:
    """The memory-mapped tensors of a side file.

    Raises:
        OSError, SafetensorError: there is no such file, or it is damaged.
        ValueError: a tensor is neither int32 nor float32; the message is its name.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file")
    with safe_open(path, framework="numpy") as file:
        kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name in file.offset_keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise ValueError(name)
            kinds[name] = _DTYPES[entry.get_dtype()], tuple(entry.get_shape())
    found: Arrays = {}
    whole = np.memmap(path, dtype=np.uint8, mode="c")
    # Tensors fill the file to its last byte, in the order of offsets.
    start = len(whole) - sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())
    for name, (dtype, shape) in kinds.items():
        stop = start + dtype.itemsize * math.prod(shape)
        found[name] = whole[start:stop].view(dtype).reshape(shape)
        start = stop
    return found


def write_tensors(tensors: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Write a side file, one tensor at a time, in the order of names."""
    header: dict[str, Any] = {"__metadata__": _MARK}
    kinds = {dtype.name: kind for kind, dtype in _DTYPES.items()}
    start = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        stop = start + tensor.nbytes
        offsets = {"data_offsets": [start, stop]}
        header[name] = {"dtype": kinds[tensor.dtype.name], "shape": list(tensor.shape), **offsets}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            tensor = np.ascontiguousarray(tensors[name])
            file.write(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).data)
            let_go(tensors[name])


def refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that is not a recipe's side file, such as a model's weights."""
    if not path.exists():
        return
    try:
        with safe_open(path, framework="numpy") as file:
            ours = (file.metadata() or {}).get("intarsia") == _MARK["intarsia"]
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise UserError(f"{path} exists and is not a recipe's side file.", "Give the recipe another name.")


def spooled(
    parts: Iterable[npt.NDArray[np.float32]], shape: tuple[int, ...], folder: Path | None
) -> npt.NDArray[np.float32]:
    """An array in an unnamed file, which is deleted with the array.

    Args:
        parts: the array's rows, some at a time, so that it is never in memory as a whole.
        folder: on the disk to use; None for that of temporary files.

    Raises:
        UserError: the disk is full.
    """
    dtype = np.dtype(np.float32)
    if math.prod(shape) * dtype.itemsize < _SMALL:
        return np.concatenate(list(parts))
    with full_disk_named(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        return np.memmap(file, dtype=dtype, mode="c", shape=shape)


# Reading


def load(path: Path) -> Recipe:
    """Read a recipe file and check all that needs no model; `validate.check` checks it against its models.

    Raises:
        UserError: with every problem.
    """
    data = read_yaml(path, what="a recipe")
    problems = Problems()
    tensors: Arrays | None = {}
    if isinstance(data, dict) and data.get("tensors") is not None:
        tensors = None
        # Report form errors together with those of the rest of the recipe.
        with problems, suppress(ValidationError):
            tensors = _side_tensors(path, SideFile.model_validate(data["tensors"]))
    with problems:
        recipe = parse_recipe(data, tensors, where=str(path))
    if problems:
        raise refusal(problems, where=str(path))
    return recipe


def parse_recipe(data: Any, tensors: Arrays | None, *, where: str) -> Recipe:
    """The recipe for the value of a YAML file.

    Args:
        tensors: of the side file; None if it could not be read.
        where: the file's name, for messages.

    Raises:
        UserError: with every problem.
    """
    version = data.get("version", SCHEMA_VERSION) if isinstance(data, dict) else SCHEMA_VERSION
    if type(version) is not int or version != SCHEMA_VERSION:
        # Keys of another version may have other meanings; more messages would only mislead.
        raise UserError(
            f"{where} has version {shown(version)}; this Intarsia reads version {SCHEMA_VERSION}.",
            "Use the version of Intarsia that wrote it.",
        )
    context = Context(tensors)
    problems: list[Problem] = []
    try:
        entry = RecipeFile.model_validate(data, context=context)
    except ValidationError as error:
        problems += problems_of(error, RecipeFile, where=where, remedy=_REMEDY)
    expected, remedy = "only tensors that the recipe uses", "Use the recipe's own side file."
    unused = sorted(set(tensors or ()) - context.used)
    problems += [mismatch(f"{where}: tensors", expected, shown(name), remedy) for name in unused]
    if problems:
        raise refusal(problems, where=where)
    recipe = _recipe(entry)
    if problems := [Problem(f"{where}: {each.message}", each.hint) for each in mistakes(recipe)]:
        raise refusal(problems, where=where)
    return recipe


def _side_tensors(path: Path, entry: SideFile) -> Arrays:
    def unusable(place: str, expected: str, found: str, remedy: str) -> UserError:
        return UserError(mismatch(f"{path}: tensors.{place}", expected, found, remedy))

    try:
        tensors = read_tensors(path.parent / entry.file)
    except ValueError as error:
        raise unusable("file", "int32 and float32 tensors only", shown(str(error)), _REMEDY) from None
    except (OSError, SafetensorError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        remedy = "Keep the unchanged file beside the recipe."
        raise unusable("file", f"the side file {entry.file}", found, remedy) from None
    if entry.sha256 is not None and entry.sha256 != tensors_hash(tensors):
        raise unusable("sha256", "the side file of this recipe", "another one", "Copy both files.")
    return tensors


def _recipe(entry: RecipeFile) -> Recipe:
    entries = entry.variants or {_ONE_MODEL: VariantEntry(model=entry.model or "")}
    base = entry.base or next(iter(entries))

    def source(ref: LayerEntry) -> LayerRef:
        return LayerRef(variant=base if ref[0] is None else ref[0], layer=ref[1])

    def ops(entry: OpEntry) -> Iterator[Op]:
        if entry.select is not None:
            variant, layers = entry.select
            yield from (Select(source=source((variant, index))) for index in layers)
        elif entry.concat is not None:
            yield _concat(entry.concat, source)
        elif entry.merge is not None:
            yield _merge(entry.merge, source)

    layers = tuple(op for layer in entry.layers for op in ops(layer))
    return Recipe(
        variants=tuple(Variant(name=name, **found.model_dump()) for name, found in entries.items()),
        base=base,
        depth=entry.depth,
        layers=layers,
        spans=tuple((first, last) for first, last in entry.spans or ()) or derive_spans(layers, entry.depth),
        fitted=entry.fitted or {},
        provenance=entry.provenance or {},
    )


def _concat(entry: ConcatEntry, source: Callable[[LayerEntry], LayerRef]) -> Concat:
    """Pieces of several layers joined, weighted by share of pieces unless weights are given."""
    cuts = tuple(
        Cut(
            source=source(cut.source),
            kv_groups=cut.kv_groups,
            channels=cut.channels,
            weights={part: getattr(cut.weights, part) for part in PARTS if cut.weights is not None},
        )
        for cut in entry.cuts
    )
    given = any(cut.weights for cut in cuts)
    return Concat(cuts=cuts if given else with_unit_weights(cuts), norm=entry.norm, fuse=entry.fuse)


def _merge(entry: MergeEntry, source: Callable[[LayerEntry], LayerRef]) -> Merge:
    mix = entry.mix(len(entry.sources))
    mlp = None if entry.mlp is None else entry.mlp.mix(len(entry.sources))
    base, indices = entry.base, {layer for _, layer in entry.sources}
    methods = [METHODS.get(each.method) for each in (mix, mlp) if each is not None]
    if base is None and len(indices) == 1 and any(method and method.base for method in methods):
        base = (None, min(indices))
    return Merge(
        sources=tuple(source(ref) for ref in entry.sources),
        weights=mix.weights,
        method=mix.method,
        params=mix.params,
        base=None if base is None else source(base),
        scale=entry.scale,
        mlp=mlp,
    )


# Writing


def save(recipe: Recipe, path: Path) -> None:
    """Write a recipe to `path` (and `<stem>.safetensors`); existing files are replaced at once or not at all.

    Raises:
        UserError: the recipe is too long for a file, another file has the side file's name, or the disk is full.
        OSError: the folder cannot be written to.
    """
    side = path.with_suffix(".safetensors")
    text, tensors = to_yaml_text(recipe, side_file=side.name)
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{path}: a recipe may have {MAX_CHARACTERS} characters; this one has {len(text)}.",
            "Shorten its provenance.",
        )
    if tensors:
        refuse_foreign(side)
        with replaced(side) as temporary:
            write_tensors(tensors, temporary)
    write_whole(path, text)


def to_yaml_text(recipe: Recipe, *, side_file: str = "recipe.safetensors") -> tuple[str, Arrays]:
    """The YAML text of a recipe, and the tensors of its side file (int32 indices, float32 fitted tensors)."""
    tensors: Arrays = {}
    layers = [_layer(op, index, recipe.base, tensors) for index, op in enumerate(recipe.layers)]
    for layer, fitted in recipe.fitted.items():
        for name, tensor in fitted.items():
            tensors[f"fitted.{layer}.{name}"] = np.ascontiguousarray(tensor, dtype=np.float32)
    data: dict[str, Any] = {"version": SCHEMA_VERSION, "variants": {}, "base": recipe.base, "depth": recipe.depth}
    for variant in recipe.variants:
        entry = {"model": variant.model, "revision": variant.revision, "sha256": variant.sha256}
        data["variants"][variant.name] = {key: value for key, value in entry.items() if value is not None}
    data["layers"] = layers
    data["spans"] = InlineList([list(span) for span in recipe.spans])
    if tensors:
        data["tensors"] = {"file": side_file, "sha256": tensors_hash(tensors)}
    if recipe.fitted:
        data["fitted"] = {layer: list(fitted) for layer, fitted in recipe.fitted.items() if fitted}
    if recipe.provenance:
        data["provenance"] = _plain(recipe.provenance)
    return dump_yaml(data), tensors


def content_hash(recipe: Recipe) -> str:
    """SHA-256 of all that decides the weights, without names of variants, spans and provenance.

    A variant counts by the hash of its weights, or without one by its location.
    """
    identity = {
        variant.name: [variant.sha256] if variant.sha256 else [variant.model, variant.revision]
        for variant in recipe.variants
    }

    def source(ref: LayerRef) -> list[Any]:
        return [identity.get(ref.variant, ref.variant), ref.layer]

    def described(op: Op) -> list[Any]:
        if isinstance(op, Select):
            return ["select", source(op.source)]
        if isinstance(op, Merge):
            merge: list[Any] = ["merge", op.method, [source(ref) for ref in op.sources], list(op.weights)]
            rest = _merge_rest(op, source)
            return [*merge, rest] if rest else merge
        cuts = [
            [source(cut.source), *([list(cut.pieces(part)), cut.weights.get(part)] for part in PARTS)]
            for cut in op.cuts
        ]
        return ["concat", op.norm, cuts, *(["fuse"] if op.fuse else [])]

    fitted = {f"{layer}.{name}": tensor for layer, found in recipe.fitted.items() for name, tensor in found.items()}
    base = identity.get(recipe.base, recipe.base)
    layers = [described(op) for op in recipe.layers]
    content = [SCHEMA_VERSION, base, recipe.depth, layers, tensors_hash(fitted)]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _layer(op: Op, index: int, base: str, tensors: Arrays) -> dict[str, Any]:
    if isinstance(op, Select):
        return {"select": _reference(op.source, base)}
    if isinstance(op, Merge):
        sources = InlineList([_reference(source, base) for source in op.sources])
        weights = InlineList([float(weight) for weight in op.weights])
        rest = _merge_rest(op, lambda source: _reference(source, base))
        rest = {key: InlineMap(value) if isinstance(value, dict) else value for key, value in rest.items()}
        return {"merge": {"method": op.method, "from": sources, "weights": weights, **rest}}
    cuts = [_cut(cut, f"layers.{index}.cuts.{number}", base, tensors) for number, cut in enumerate(op.cuts)]
    return {"concat": {"norm": op.norm, **({"fuse": True} if op.fuse else {}), "cuts": cuts}}


def _merge_rest(op: Merge, source: Callable[[LayerRef], Any]) -> dict[str, Any]:
    """The keys of a merge besides sources, method and weights; none for a plain sum of layers."""
    rest: dict[str, Any] = {}
    if op.params:
        rest["params"] = _sorted(op.params)
    if op.base is not None:
        rest["base"] = source(op.base)
    if op.scale != 1.0:
        rest["scale"] = float(op.scale)
    if op.mlp is not None:
        mix = {"method": op.mlp.method, "weights": [float(weight) for weight in op.mlp.weights]}
        rest["mlp"] = {**mix, **({"params": _sorted(op.mlp.params)} if op.mlp.params else {})}
    return rest


def _sorted(params: Mapping[str, float]) -> dict[str, float]:
    return {name: params[name] for name in sorted(params)}


def _cut(cut: Cut, name: str, base: str, tensors: Arrays) -> dict[str, Any]:
    entry: dict[str, Any] = {"from": _reference(cut.source, base)}
    for part, key in (("attention", "kv_groups"), ("mlp", "channels")):
        indices = cut.kv_groups if part == "attention" else cut.channels
        entry[key] = format_ranges(indices)
        if len(entry[key]) > _LONGEST_INLINE:
            tensors[f"{name}.{key}"] = np.asarray(indices, dtype=np.int32)
            entry[key] = InlineMap(tensor=f"{name}.{key}")
    entry["weights"] = InlineMap({part: float(cut.weights[part]) for part in PARTS})
    return entry


def _reference(ref: LayerRef, base: str) -> int | str:
    return ref.layer if ref.variant == base else str(ref)


def _plain(value: Any) -> Any:
    """Provenance as plain values that UTF-8 can hold; anything else in it is a bug."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    assert value is None or isinstance(value, (bool, int, float)), f"provenance holds a {type(value).__name__}"
    return value
