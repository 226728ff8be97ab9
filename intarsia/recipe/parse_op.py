"""An op, as it stands in a recipe file: which layers, which of their pieces, and how they are combined."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from intarsia.anatomy.spec import PARTS, Part
from intarsia.recipe.methods import METHODS
from intarsia.recipe.ops import Concat, Cut, LayerRef, Merge, NormMode
from intarsia.recipe.parse_mix import MAX_LAYERS, parse_mix
from intarsia.recipe.ranges import MAX_INDEX, parse_ranges
from intarsia.recipe.values import Values, shown

_MAX_PIECES = 2**23  # In one recipe, so that a few ranges cannot fill the memory.
_REF = re.compile(r"(?:(?P<variant>[^:]*):)?(?P<first>[0-9]{1,10})(?:-(?P<last>[0-9]{1,10}))?", re.ASCII)

Tensors = Mapping[str, npt.NDArray[Any]]


class OpReader:
    """Reads ops, collects problems in `values`, and returns stand-ins where it has reported one.

    Attributes:
        base: the variant that a layer without a name belongs to.
        used: tensors of the side file that were named so far.
    """

    def __init__(self, tensors: Tensors | None, values: Values, base: str) -> None:
        self.tensors = tensors
        self.values = values
        self.base = base
        self.used: set[str] = set()
        self.pieces_left = _MAX_PIECES

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
        """One of them."""
        return next(iter(self.references(value, path)), LayerRef(variant=self.base, layer=0))

    def concat(self, value: Any, path: str) -> Concat:
        """Pieces of several layers joined; by share of pieces where no weights are given."""
        found = self.values.mapping(value, path, ("norm", "fuse", "cuts"), ("cuts",))
        norm = found.get("norm", "fold")
        if norm not in get_args(NormMode):
            self.values.wrong(f"{path}.norm", " or ".join(get_args(NormMode)), shown(norm))
        fuse = found.get("fuse", False)
        if not isinstance(fuse, bool):
            self.values.wrong(f"{path}.fuse", "true or false", shown(fuse))
        entries = self.values.array(found["cuts"], f"{path}.cuts", MAX_LAYERS) if "cuts" in found else []
        cuts = [self._cut(entry, f"{path}.cuts[{index}]") for index, entry in enumerate(entries)]
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

    def _cut(self, value: Any, path: str) -> Cut:
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
            kv_groups=self._indices(found.get("kv_groups", []), f"{path}.kv_groups"),
            channels=self._indices(found.get("channels", []), f"{path}.channels"),
            weights=weights,
        )

    def _indices(self, value: Any, path: str) -> tuple[int, ...]:
        """A list, ranges as text, one number, or the name of a tensor in the side file."""
        found: tuple[int, ...] = ()
        if isinstance(value, dict):
            found = self._indices_tensor(value, path)
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

    def _indices_tensor(self, value: dict[str, Any], path: str) -> tuple[int, ...]:
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
        """A tensor of the side file; None where there is no such one, or no side file that could be read."""
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
        """Whole layers combined."""
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
