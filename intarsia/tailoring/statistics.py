"""Blends by statistics: the tensors of a layer that is merged by RegMean or Fisher averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from torch import Tensor

from intarsia.anatomy.spec import PARTS, Anatomy, Part
from intarsia.building.merging_statistics import fisher, regmean
from intarsia.building.mixing import merge_tensors, parts_of_tensors, scale_output
from intarsia.recipe.ops import LayerRef, Merge
from intarsia.tailoring.blend_methods import STATISTICS, Statistic
from intarsia.tailoring.byte_cache import ByteCache
from intarsia.tailoring.candidate import Blend
from intarsia.tailoring.measure_statistics import statistics_file

Arrays = Mapping[str, npt.NDArray[np.float32]]
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What is known of a family's members, and what their layers blend to by it.

    Attributes:
        folder: what `write_statistics` has written.
        read: gives a tensor of a layer of a member.
    """

    folder: Path
    anatomy: Anatomy
    read: Callable[[LayerRef, str], Tensor]

    def fitted(self, op: Merge, blends: Mapping[Part, Blend], layer: int) -> Arrays:
        """The tensors that such blends give a layer; none of parts that are blended otherwise.

        Args:
            op: the layer as a recipe can say it: averages, by the same shares.
            blends: of both parts.
        """
        key = f"{layer} {op} {blends}"
        known = self._made.get(key)
        if known is not None:
            return known
        tensors = merge_tensors(replace(op, scale=1.0), self.anatomy, self.read)
        parts = parts_of_tensors(self.anatomy)
        changed: dict[str, Tensor] = {}
        for part, blend in blends.items():
            method = next((kind for kind in STATISTICS if kind == blend.method), None)
            if method is not None:
                names = [name for name in tensors if parts[name] == part]
                changed |= self._blended(method, blend, op.sources, names, layer)
        tensors |= changed
        if op.scale != 1.0:
            for part in PARTS:
                scale_output(tensors, part, op.scale, self.anatomy)
        made = {name: tensors[name].float().numpy() for name in sorted(changed)}
        self._made.put(key, made, sum(array.nbytes for array in made.values()))
        return made

    def _blended(
        self, method: Statistic, blend: Blend, sources: Sequence[LayerRef], names: Sequence[str], layer: int
    ) -> dict[str, Tensor]:
        refs = [ref for ref in sources if ref.variant in blend.members]
        shares = shares_of(blend)
        found: dict[str, Tensor] = {}
        for name in names:
            key = name if method == "fisher" else self._input_of(name)
            if key is None:
                continue  # biases and norms stay averages
            known = [self._load(statistics_file(self.folder, ref.variant, method, layer), key) for ref in refs]
            tensors = [self.read(ref, name) for ref in refs]
            found[name] = (regmean if method == "regmean" else fisher)(tensors, known, shares=shares)
        return found

    def _input_of(self, name: str) -> str | None:
        """Which second moments are those of a weight's inputs."""
        linear = next((each for each in self.anatomy.linears if name == f"{each.module}.weight"), None)
        return None if linear is None else f"{linear.part}.{linear.side}"

    def _load(self, path: Path, key: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found

    @cached_property
    def _made(self) -> ByteCache[str, Arrays]:
        return ByteCache(_CACHE_BYTES)


def shares_of(blend: Blend) -> list[float]:
    """How much each member of a blend counts: the first as it leads, the others alike."""
    rest = 1.0 - blend.value("lead")
    return [blend.value("lead"), *([rest / (len(blend.members) - 1)] * (len(blend.members) - 1))]
