"""Closed-form repair: least squares instead of training.

An output layer with span (a, b], fed by the repaired layers before it, should give the original's H^b. Its read-outs
(down_proj, o_proj) are fitted by ridge regression on their own inputs toward what is still missing of H^b, and shrink
towards the weights as they are: down_proj, then o_proj, then down_proj again behind the changed attention. Layers
behind the first cut that stand for themselves alone have down_proj fitted: they make good what those before left. With
a plain removal and down_proj alone this is the special case of arXiv 2505.02819 without its extra matrix.

Statistics are Gram matrices, accumulated in a stream: memory is one layer's, whatever the number of tokens. The ridge
strength is chosen on held-out sequences, and a fit that does not lower the held-out error is not taken.

Massive activations: a few tokens (attention sinks) have norms a hundred times the others', and plain least squares
would serve them alone. A token counts with weight 1 / |H^b|^2, as it does to the norm before the next layer.

Fitting o_proj toward the span's summed attention outputs instead was measured and is worse than leaving it alone: what
the removed layers' attention read is not what this layer's MLP can use (dev/LOG.md, closed form).

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intarsia.anatomy.spec import Anatomy, Part
from intarsia.building.resident import Resident, twin
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stream import LayerStream
from intarsia.healing.correspond import Layers, correspondences, taught
from intarsia.healing.layer_fit import FitBatch, FitRule, LayerFit, fit_layer
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Recipe

RIDGES = tuple(10.0**exponent for exponent in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 32768


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """How the closed form fits.

    Attributes:
        layers: `spans`: output layers that stand for more than themselves or were merged; `behind`: these and every
            layer behind the first of them.
        changed: read-outs to fit on the former, in this order.
        unchanged: read-outs to fit on the latter.
        weighting: `relative`: a token counts with 1 / |H^b|^2; `uniform`: all the same.
        held_out: every how-manieth sequence is held out to choose the ridge strength by.
        ridges: relative strengths to choose from.
    """

    layers: Layers = "behind"
    changed: tuple[Part, ...] = ("mlp", "attention", "mlp")
    unchanged: tuple[Part, ...] = ("mlp",)
    weighting: Literal["relative", "uniform"] = "relative"
    held_out: int = 8
    ridges: tuple[float, ...] = RIDGES

    @property
    def rule(self) -> FitRule:
        """What every read-out is fitted by."""
        return FitRule(weighting=self.weighting, held_out=self.held_out, ridges=self.ridges)

    def parts(self, recipe: Recipe, index: int) -> tuple[Part, ...]:
        """What to fit on an output layer, in order."""
        return self.changed if correspondences(recipe)[index].trainable else self.unchanged


def fit(
    recipe: Recipe,
    resident: Resident,
    corpus: Corpus,
    *,
    settings: ClosedFormSettings | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """A recipe with fitted read-outs, and a report for every one of them.

    Args:
        recipe: any recipe over the resident model; what is fitted on it already is the starting point.
        resident: the original model, which is also the teacher.
        corpus: calibration text.

    Raises:
        UserError: activations are not finite.
    """
    settings = settings or ClosedFormSettings()
    work = _Work(recipe, resident, corpus, settings, batch_tokens, progress or Silent())
    try:
        with torch.inference_mode():
            fitted, fits = work.run()
    finally:
        work.close()
    merged = {index: {**recipe.fitted.get(index, {}), **tensors} for index, tensors in fitted.items()}
    return replace(recipe, fitted={**recipe.fitted, **merged}), [asdict(entry) for entry in fits]


class _Work:
    """One fit under way: the teacher's targets, and the student's stream."""

    def __init__(
        self,
        recipe: Recipe,
        resident: Resident,
        corpus: Corpus,
        settings: ClosedFormSettings,
        batch_tokens: int | None,
        progress: Progress,
    ) -> None:
        self.recipe, self.resident, self.corpus, self.settings = recipe, resident, corpus, settings
        self.anatomy: Anatomy = resident.anatomy
        self.progress = progress
        self.stream = LayerStream(resident.model, resident.anatomy)
        self.indices = taught(recipe, settings.layers)
        n, t = corpus.input_ids.shape
        default = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
        self.batch = max(1, (batch_tokens or default) // t)
        shape = (n, t, self.anatomy.width)
        dtype = resident.model.dtype
        # One after the other: each store would take a share of the memory that is free, both of them most of it.
        self.student = HiddenStore(shape, dtype)
        left = max(0, self.student.memory_bytes - self.student.depth_bytes)
        self.targets = HiddenStore(shape, dtype, memory_bytes=left)

    def close(self) -> None:
        for store in (self.targets, self.student):
            store.close()

    def run(self) -> tuple[dict[int, dict[str, npt.NDArray[np.float32]]], list[LayerFit]]:
        fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        fits: list[LayerFit] = []
        if not self.indices:
            return fitted, fits
        self._teach()
        last = self.indices[-1]
        with self.progress.task("closed form", last + 1) as task:
            for rows, ids, mask in self._batches():
                self.student.put(0, rows.start, self.stream.enter(ids, mask).h_BTD)
            for index in range(last + 1):
                task.note(f"layer {index + 1} of {len(self.recipe.layers)}")
                module = self.resident.module(self.recipe.layers[index], self.recipe.fitted.get(index))
                if index in self.indices:
                    module = twin(module)  # fitting must leave the original model alone
                    tensors, reports = fit_layer(
                        module,
                        self.settings.parts(self.recipe, index),
                        partial(self._feed, index),
                        index=index,
                        stream=self.stream,
                        anatomy=self.anatomy,
                        rule=self.settings.rule,
                    )
                    fits += reports
                    if tensors:
                        fitted[index] = tensors
                for rows, ids, mask in self._batches():
                    h_BTD = self.stream.run(module, self._student(rows), self._call(index, ids, mask))
                    self.student.put(0, rows.start, h_BTD)
                task.advance()
        return fitted, fits

    def _teach(self) -> None:
        """One pass of the original for H^b of every fitted span."""
        # The spans of layers with a target do not overlap, so each ends where no other does.
        ends = {self.recipe.spans[index][1]: index for index in self.indices}
        with self.progress.task("teacher", len(self.corpus)) as task:
            for rows, ids, mask in self._batches():
                entry = self.stream.enter(ids, mask)
                h_BTD = entry.h_BTD
                for layer in range(max(ends)):
                    h_BTD = self.stream.run(self.resident.layers[layer], h_BTD, entry.calls[layer])
                    if layer + 1 in ends:
                        self.targets.put(ends[layer + 1], rows.start, h_BTD)
                task.advance(rows.stop - rows.start)

    def _feed(self, index: int) -> Iterator[FitBatch]:
        """What output layer `index` is fed, and what it should give."""
        for rows, ids, mask in self._batches():
            yield FitBatch(
                rows=rows,
                h_BTD=self._student(rows),
                wanted_BTD=self.targets.get(index, rows.start, rows.stop, self.resident.device),
                call=self._call(index, ids, mask),
                mask=mask,
            )

    def _student(self, rows: slice) -> Tensor:
        return self.student.get(0, rows.start, rows.stop, self.resident.device)

    def _call(self, index: int, ids: Tensor, mask: Tensor | None) -> Any:
        return self.stream.calls(ids, mask)[self.recipe.layers[index].sources[0].layer]

    def _batches(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        device = self.resident.device
        for start in range(0, len(self.corpus), self.batch):
            rows = slice(start, min(start + self.batch, len(self.corpus)))
            mask = self.corpus.mask
            yield rows, self.corpus.input_ids[rows].to(device), None if mask is None else mask[rows].to(device)


def closed_form_cost(recipe: Recipe, settings: ClosedFormSettings) -> int:
    """Layer-forwards over its tokens that a fit takes: the teacher's, the student's, and one more a read-out."""
    indices: Sequence[int] = taught(recipe, settings.layers)
    if not indices:
        return 0
    fits = sum(len(settings.parts(recipe, index)) for index in indices)
    return max(recipe.spans[index][1] for index in indices) + indices[-1] + 1 + fits


def closed_form_cost_at_most(depth: int, target: int, settings: ClosedFormSettings) -> int:
    """The same for any way to cut `depth` layers down to `target`: each changed layer stands for a removed one."""
    changed = min(target, depth - target)
    unchanged = target - changed if settings.layers == "behind" else 0
    return depth + target + changed * len(settings.changed) + unchanged * len(settings.unchanged)
