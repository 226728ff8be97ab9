"""Plain data, as it comes out of a recipe file, becomes a `Recipe`; every mistake of form is reported at once.

What needs the model's shape (does layer 31 exist?) is not judged here but in `check`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from intarsia.anatomy.spec import PARTS, Part
from intarsia.recipe.methods import METHODS
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, NormMode, Op, Select
from intarsia.recipe.parse_mix import MAX_LAYERS, parse_mix
from intarsia.recipe.ranges import MAX_INDEX, parse_ranges
from intarsia.recipe.recipe import SCHEMA_VERSION, VARIANT_NAME, Recipe, Span, Variant, derive_spans
from intarsia.recipe.values import Values, shown

_MAX_PIECES = 2**23  # In one recipe, so that a few ranges cannot fill the memory.
_KEYS = ("version", "model", "variants", "base", "depth", "layers", "spans", "tensors", "fitted", "provenance")
_REF = re.compile(r"(?:(?P<variant>[^:]*):)?(?P<first>[0-9]{1,10})(?:-(?P<last>[0-9]{1,10}))?", re.ASCII)
_ONE_MODEL = "base"

Tensors = Mapping[str, npt.NDArray[Any]]


def parse_recipe(data: Any, tensors: Tensors | None, *, where: str) -> Recipe:
    """The recipe that the data describes.

    Args:
        data: the value of the YAML file.
        tensors: the side file's tensors; None where it could not be read, which has been reported already.
        where: the file's name, for messages.

    Raises:
        UserError: with every problem that was found (at most fifty are listed).
    """
    reader = _Reader(tensors, where)
    recipe = reader.recipe(data)
    reader.values.raise_problems()
    assert recipe is not None, "no recipe without a problem"
    return recipe


class _Reader:
    """Walks through the data, collects problems, and returns stand-ins where it has reported one."""

    def __init__(self, tensors: Tensors | None, where: str) -> None:
        self.tensors = tensors
        self.values = Values(where)
        self.base = _ONE_MODEL
        self.used: set[str] = set()
        self.pieces_left = _MAX_PIECES

    # The recipe

    def recipe(self, data: Any) -> Recipe | None:
        found = self.values.mapping(data, "", _KEYS, ("version", "depth", "layers"))
        if not found:
            return None
        version = found.get("version")
        if "version" in found and (version != SCHEMA_VERSION or not isinstance(version, int) or version is True):
            # Another version may mean anything by its keys; more messages would only mislead.
            self.values.problems.clear()
            self.values.wrong(
                "version", str(SCHEMA_VERSION), shown(version), "Use the version of Intarsia that wrote it."
            )
            return None
        variants = self.variants(found)
        depth = self.values.integer(found.get("depth"), "depth", 1, MAX_LAYERS) if "depth" in found else 0
        layers = self.layers(found["layers"]) if "layers" in found else []
        spans = self.spans(found.get("spans"))
        fitted = self.fitted(found.get("fitted"))
        provenance = self.values.plain_mapping(found.get("provenance"), "provenance")
        for name in sorted(set(self.tensors or ()) - self.used):
            self.values.wrong(
                "tensors", "only tensors that the recipe names", shown(name), "Use the side file it came with."
            )
        if self.values.problems:
            return None
        return Recipe(
            variants=variants,
            base=self.base,
            depth=depth,
            layers=tuple(layers),
            spans=derive_spans(layers, depth) if spans is None else spans,
            fitted=fitted,
            provenance=provenance,
        )

    def variants(self, found: dict[str, Any]) -> tuple[Variant, ...]:
        if "model" in found and "variants" not in found:
            if "base" in found:
                self.values.wrong(
                    "base", "no base beside the short form 'model'", shown(found["base"]), "Leave it out."
                )
            return (self.variant(_ONE_MODEL, found["model"], "model"),)
        if "model" in found:
            self.values.wrong("model", "either 'model' or 'variants'", "both", "Remove one of them.")
        value = found.get("variants")
        if not isinstance(value, dict) or not value:
            self.values.wrong(
                "variants", "a mapping from names to models", shown(value), "Name a model: `model: FOLDER_OR_ID`."
            )
            return ()
        variants = tuple(self.variant(name, entry, f"variants.{shown(name)}") for name, entry in value.items())
        if "base" in found:
            self.base = self.values.text(found["base"], "base")
        elif len(variants) == 1:
            self.base = variants[0].name
        else:
            self.values.wrong(
                "base", "the name of the variant that gives everything outside the layers", "none", "Add it."
            )
        return variants

    def variant(self, name: Any, value: Any, path: str) -> Variant:
        if not isinstance(name, str) or not VARIANT_NAME.fullmatch(name):
            self.values.wrong(path, "a name of at most 64 letters, digits, '_', '-' and '.'", shown(name), "Rename it.")
            name = "?"
        if isinstance(value, str):
            return Variant(name=name, model=self.values.text(value, path))
        entry = self.values.mapping(value, path, ("model", "revision", "sha256"), ("model",))
        revision, sha256 = entry.get("revision"), entry.get("sha256")
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            self.values.wrong(f"{path}.sha256", "64 hexadecimal digits in lower case", shown(sha256), "Leave it out.")
        return Variant(
            name=name,
            model=self.values.text(entry["model"], f"{path}.model") if "model" in entry else "?",
            revision=None if revision is None else self.values.text(revision, f"{path}.revision"),
            sha256=sha256,
        )

    # Layers

    def layers(self, value: Any) -> list[Op]:
        layers: list[Op] = []
        for index, entry in enumerate(self.values.array(value, "layers", MAX_LAYERS)):
            path = f"layers[{index}]"
            found = self.values.mapping(entry, path, ("select", "concat", "merge"))
            if len(found) != 1:
                self.values.wrong(path, "exactly one of select, concat and merge", f"{len(found)} keys")
            elif "select" in found:
                refs = self.references(found["select"], f"{path}.select", MAX_LAYERS - len(layers))
                layers += [Select(source=source) for source in refs]
            elif "concat" in found:
                layers.append(self.concat(found["concat"], f"{path}.concat"))
            elif "merge" in found:
                layers.append(self.merge(found["merge"], f"{path}.merge"))
        return layers

    def references(self, value: Any, path: str, most: int = 1) -> list[LayerRef]:
        """`4`, `math:4`, and, where several layers may stand, `0-9` and `math:0-9`."""
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INDEX:
            return [LayerRef(variant=self.base, layer=value)]
        match = _REF.fullmatch(value) if isinstance(value, str) else None
        if match is not None and match["variant"] != "" and (most > 1 or match["last"] is None):
            first = int(match["first"])
            last = first if match["last"] is None else int(match["last"])
            if first <= last <= MAX_INDEX and last - first < most:
                variant = self.base if match["variant"] is None else match["variant"]
                return [LayerRef(variant=variant, layer=layer) for layer in range(first, last + 1)]
        several = ", a range such as 0-9" if most > 1 else ""
        self.values.wrong(path, f"a layer such as 4 or name:4{several}", shown(value), "Count layers from 0.")
        return []

    def reference(self, value: Any, path: str) -> LayerRef:
        return next(iter(self.references(value, path)), LayerRef(variant=self.base, layer=0))

    def concat(self, value: Any, path: str) -> Concat:
        found = self.values.mapping(value, path, ("norm", "fuse", "cuts"), ("cuts",))
        norm = found.get("norm", "fold")
        if norm not in get_args(NormMode):
            self.values.wrong(f"{path}.norm", " or ".join(get_args(NormMode)), shown(norm))
        fuse = found.get("fuse", False)
        if not isinstance(fuse, bool):
            self.values.wrong(f"{path}.fuse", "true or false", shown(fuse))
        entries = self.values.array(found["cuts"], f"{path}.cuts", MAX_LAYERS) if "cuts" in found else []
        cuts = [self.cut(entry, f"{path}.cuts[{index}]") for index, entry in enumerate(entries)]
        given = [isinstance(entry, dict) and "weights" in entry for entry in entries]
        if any(given) and not all(given):
            self.values.wrong(f"{path}.cuts", "weights for every cut or for none", "some", "Complete or remove them.")
        if not any(given):
            totals = {part: sum(len(cut.pieces(part)) for cut in cuts) for part in PARTS}
            cuts = [
                Cut(
                    source=cut.source,
                    kv_groups=cut.kv_groups,
                    channels=cut.channels,
                    weights={
                        part: len(cut.pieces(part)) / totals[part] if totals[part] else 1.0 / len(cuts)
                        for part in PARTS
                    },
                )
                for cut in cuts
            ]
        return Concat(cuts=tuple(cuts), norm=norm, fuse=fuse is True)

    def cut(self, value: Any, path: str) -> Cut:
        keys = ("from", "kv_groups", "channels", "weights")
        found = self.values.mapping(value, path, keys, ("from",))
        weights: dict[Part, float] = {}
        if "weights" in found:
            entry = self.values.mapping(found["weights"], f"{path}.weights", PARTS, PARTS)
            weights = {
                part: self.values.number(entry[part], f"{path}.weights.{part}") for part in PARTS if part in entry
            }
        return Cut(
            source=self.reference(found.get("from", 0), f"{path}.from"),
            kv_groups=self.indices(found.get("kv_groups", []), f"{path}.kv_groups"),
            channels=self.indices(found.get("channels", []), f"{path}.channels"),
            weights=weights,
        )

    def indices(self, value: Any, path: str) -> tuple[int, ...]:
        """A list, ranges as text, one number, or the name of a tensor in the side file."""
        found: tuple[int, ...] = ()
        if isinstance(value, dict):
            found = self.indices_tensor(value, path)
        elif isinstance(value, list):
            found = tuple(self.values.integer(entry, f"{path}[{index}]") for index, entry in enumerate(value))
        elif isinstance(value, str):
            try:
                found = parse_ranges(value, most=self.pieces_left)
            except ValueError as error:
                self.values.wrong(path, "indices such as '0-767, 900'", str(error))
        else:
            found = (self.values.integer(value, path),)
        self.pieces_left -= len(found)
        if self.pieces_left < 0:
            self.values.wrong(path, f"at most {_MAX_PIECES} indices in a recipe", "more", "Use a shorter recipe.")
            return ()
        return found

    def indices_tensor(self, value: dict[str, Any], path: str) -> tuple[int, ...]:
        found = self.values.mapping(value, path, ("tensor",), ("tensor",))
        name = self.values.text(found.get("tensor"), f"{path}.tensor")
        tensor = self.tensor(name, path)
        if tensor is None:
            return ()
        if tensor.dtype != np.int32 or tensor.ndim != 1 or tensor.size > self.pieces_left or (tensor < 0).any():
            shape = f"{tensor.dtype} of shape {list(tensor.shape)}"
            self.values.wrong(path, f"a list of int32 indices from 0 in tensor {name!r}", shape)
            return ()
        return tuple(tensor.tolist())

    def tensor(self, name: str, path: str) -> npt.NDArray[Any] | None:
        if self.tensors is None:
            return None
        self.used.add(name)
        if name not in self.tensors:
            self.values.wrong(
                path, f"tensor {name!r} in the side file", "none", "Use the side file that belongs to it."
            )
            return None
        return self.tensors[name]

    def merge(self, value: Any, path: str) -> Merge:
        keys = ("from", "weights", "method", "params", "base", "scale", "mlp")
        found = self.values.mapping(value, path, keys, ("from",))
        entries = self.values.array(found["from"], f"{path}.from", MAX_LAYERS) if "from" in found else []
        sources = tuple(self.reference(entry, f"{path}.from[{index}]") for index, entry in enumerate(entries))
        mix = parse_mix(self.values, found, path, len(sources))
        mlp = None
        if "mlp" in found:
            entry = self.values.mapping(found["mlp"], f"{path}.mlp", ("weights", "method", "params"))
            mlp = parse_mix(self.values, entry, f"{path}.mlp", len(sources))
        base = None
        layers = {source.layer for source in sources}
        if "base" in found:
            base = self.reference(found["base"], f"{path}.base")
        elif METHODS[mix.method].base or (mlp is not None and METHODS[mlp.method].base):
            if len(layers) > 1:
                expected = "the layer that differences are taken to, for the sources are not at one index"
                self.values.wrong(f"{path}.base", expected, "none", "Add it.")
            base = LayerRef(variant=self.base, layer=min(layers, default=0))
        return Merge(
            sources=sources,
            weights=mix.weights,
            method=mix.method,
            params=mix.params,
            base=base,
            scale=self.values.number(found["scale"], f"{path}.scale") if "scale" in found else 1.0,
            mlp=mlp,
        )

    # The rest

    def spans(self, value: Any) -> tuple[Span, ...] | None:
        if value is None:
            return None
        spans: list[Span] = []
        for index, entry in enumerate(self.values.array(value, "spans", MAX_LAYERS)):
            path = f"spans[{index}]"
            if isinstance(entry, list) and len(entry) == 2:
                spans.append((self.values.integer(entry[0], f"{path}[0]"), self.values.integer(entry[1], f"{path}[1]")))
            else:
                self.values.wrong(path, "two numbers: the first layer and the one after the last", shown(entry))
        return tuple(spans)

    def fitted(self, value: Any) -> dict[int, dict[str, npt.NDArray[np.float32]]]:
        if value is not None and not isinstance(value, dict):
            self.values.wrong("fitted", "a mapping from output layers to lists of tensor names", shown(value))
            return {}
        result: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        for key, entry in (value or {}).items():
            path = f"fitted.{shown(key)}"
            layer = self.values.integer(key, path, 0, MAX_LAYERS)
            for index, name in enumerate(self.values.array(entry, path, MAX_LAYERS)):
                local = self.values.text(name, f"{path}[{index}]", "a tensor name")
                tensor = self.tensor(f"fitted.{layer}.{local}", f"{path}[{index}]")
                if tensor is not None and tensor.dtype == np.float32:
                    result.setdefault(layer, {})[local] = tensor
                elif tensor is not None:
                    self.values.wrong(f"{path}[{index}]", "a float32 tensor", str(tensor.dtype))
        return result
