"""Plain data, as it comes out of a recipe file, becomes a `Recipe`; every mistake of form is reported at once.

What needs the model's shape (does layer 31 exist?) is not judged here but in `check`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from intarsia.recipe.ops import Op, Select
from intarsia.recipe.parse_mix import MAX_LAYERS
from intarsia.recipe.parse_op import OpReader, Tensors
from intarsia.recipe.recipe import SCHEMA_VERSION, VARIANT_NAME, Recipe, Span, Variant, derive_spans
from intarsia.recipe.values import Values, shown

_KEYS = ("version", "model", "variants", "base", "depth", "layers", "spans", "tensors", "fitted", "provenance")
_ONE_MODEL = "base"


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
        self.ops = OpReader(tensors, self.values, _ONE_MODEL)

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
        for name in sorted(set(self.tensors or ()) - self.ops.used):
            self.values.wrong(
                "tensors", "only tensors that the recipe names", shown(name), "Use the side file it came with."
            )
        if self.values.problems:
            return None
        return Recipe(
            variants=variants,
            base=self.ops.base,
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
            self.ops.base = self.values.text(found["base"], "base")
        elif len(variants) == 1:
            self.ops.base = variants[0].name
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
                refs = self.ops.references(found["select"], f"{path}.select", MAX_LAYERS - len(layers))
                layers += [Select(source=source) for source in refs]
            elif "concat" in found:
                layers.append(self.ops.concat(found["concat"], f"{path}.concat"))
            elif "merge" in found:
                layers.append(self.ops.merge(found["merge"], f"{path}.merge"))
        return layers

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
                tensor = self.ops.tensor(f"fitted.{layer}.{local}", f"{path}[{index}]")
                if tensor is not None and tensor.dtype == np.float32:
                    result.setdefault(layer, {})[local] = tensor
                elif tensor is not None:
                    self.values.wrong(f"{path}[{index}]", "a float32 tensor", str(tensor.dtype))
        return result
